//! Top-k: keeps the k most likely tokens (Fan et al. 2018, arXiv:1805.04833).

use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor, is_greedy};

struct TopK(usize);

pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let k = parameters.top_k;
    if is_greedy(parameters) || k == 0 { None } else { Some(Box::new(TopK(k as usize))) }
}

impl LogitsProcessor for TopK {
    fn process(&self, _: &History, distribution: &mut Distribution) {
        distribution.keep_most_likely(self.0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::distribution::tests::{by_probability, kept, rows};
    use super::super::neutral_parameters;
    use super::*;

    fn top_k(k: u32, logits: &[f32]) -> Vec<u32> {
        kept(build, &SamplingParameters { top_k: k, ..neutral_parameters() }, logits)
    }

    #[test]
    fn the_k_most_likely_tokens_are_kept_and_of_ties_the_lower_ids() {
        assert_eq!(top_k(2, &[0.0, 3.0, 1.0, 2.0]), [1, 3]);
        assert_eq!(top_k(2, &[1.0, 1.0, 1.0, 0.0]), [0, 1]);
        assert_eq!(top_k(0, &[0.0, 1.0]), [0, 1]);
        assert_eq!(top_k(u32::MAX, &[0.0, 1.0]), [0, 1]);
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_definition(row in rows(), k in 1usize..800) {
            let mut expected: Vec<u32> = by_probability(&row).iter().take(k).map(|(id, _)| *id).collect();
            expected.sort_unstable();
            prop_assert_eq!(top_k(k as u32, &row), expected);
        }
    }
}
