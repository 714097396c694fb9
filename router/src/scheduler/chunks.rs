//! How prompts divide what a step may compute of them.

/// By which rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Division {
    /// Half is kept for the first, so that its prompt takes at most twice as many steps as it would alone. The rest goes
    /// to those of which the least is left, which gives the least mean time to the first token: a short prompt is through
    /// in a step or two though a book is being read beside it. (Equal parts would make all of them late.)
    ShortestBesideFirst,
    /// Each gets all that those before it leave.
    InOrder,
}

/// Divides `budget` tokens among prompts of which `remaining` tokens are still to be computed, the one that goes first in
/// front. Returns the tokens of each, in the same order.
pub(crate) fn divide(division: Division, budget: usize, remaining: &[usize]) -> Vec<usize> {
    let mut chunks = vec![0; remaining.len()];
    let Some(first) = remaining.first() else { return chunks };
    let mut order = (0..remaining.len()).collect::<Vec<_>>();
    if division == Division::ShortestBesideFirst {
        chunks[0] = budget.div_ceil(2).min(*first);
        // By powers of two, and by order within them: of prompts that are about alike none is to be overtaken, since each
        // lets others pass for a while only, and then the budget would be left over.
        order.sort_by_key(|&index| (remaining[index] - chunks[index]).checked_ilog2());
    }
    let mut left = budget - chunks[0];
    for index in order {
        let more = left.min(remaining[index] - chunks[index]);
        chunks[index] += more;
        left -= more;
    }
    chunks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(budget: usize, remaining: &[usize], expected: &[usize]) {
        let chunks = divide(Division::ShortestBesideFirst, budget, remaining);
        assert_eq!(chunks, expected, "{budget} among {remaining:?}");
    }

    #[test]
    fn the_first_has_half_and_the_shortest_the_rest() {
        check(16, &[], &[]);
        check(16, &[100], &[16]);
        check(16, &[100, 40, 5], &[8, 3, 5]);
        check(16, &[100, 3], &[13, 3]);
        check(16, &[2, 40, 30], &[2, 0, 14]);
        check(16, &[2, 3, 4], &[2, 3, 4]);
        check(16, &[100, 7, 7], &[8, 7, 1]);
        check(16, &[12, 30], &[12, 4]);
        check(1, &[100, 3], &[1, 0]);
        check(0, &[100, 3], &[0, 0]);
        // About alike: in order.
        check(16, &[12, 7, 5, 4], &[12, 4, 0, 0]);
    }

    #[test]
    fn in_order_each_gets_what_those_before_it_leave() {
        assert_eq!(divide(Division::InOrder, 16, &[10, 40, 2]), [10, 6, 0]);
        assert_eq!(divide(Division::InOrder, 16, &[3, 4, 5]), [3, 4, 5]);
    }

    proptest! {
        #[test]
        fn all_is_given_where_it_is_wanted_and_the_first_gets_its_half(
            budget in 0..5000_usize,
            remaining in prop::collection::vec(1..3000_usize, 1..20),
        ) {
            for division in [Division::ShortestBesideFirst, Division::InOrder] {
                let chunks = divide(division, budget, &remaining);
                let wanted = remaining.iter().sum::<usize>();
                prop_assert_eq!(chunks.iter().sum::<usize>(), budget.min(wanted));
                prop_assert!(chunks.iter().zip(&remaining).all(|(chunk, remaining)| chunk <= remaining));
                prop_assert!(chunks[0] >= remaining[0].min(budget.div_ceil(2)));
            }
        }
    }
}
