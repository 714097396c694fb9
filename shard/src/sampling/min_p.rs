//! Min-p: drops tokens that are unlikely relative to the most likely one (Nguyen et al. 2024, arXiv:2407.01082).

use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor, is_greedy};

struct MinP(f32);

pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let p = parameters.min_p;
    if is_greedy(parameters) || p == 0.0 { None } else { Some(Box::new(MinP(p))) }
}

impl LogitsProcessor for MinP {
    fn process(&self, _: &History, distribution: &mut Distribution) {
        // The most likely token is never dropped by the processors before, and its weight is 1.
        distribution.retain(|candidate| candidate.weight >= self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::{kept, logits_of};
    use super::super::neutral_parameters;
    use super::*;

    #[test]
    fn tokens_below_a_share_of_the_most_likely_one_are_dropped() {
        let check = |min_p, expected: &[u32]| {
            let logits = logits_of(&[0.1, 0.5, 0.15, 0.25]);
            assert_eq!(kept(build, &SamplingParameters { min_p, ..neutral_parameters() }, &logits), expected);
        };
        check(0.0, &[0, 1, 2, 3]);
        check(0.19, &[0, 1, 2, 3]);
        check(0.21, &[1, 2, 3]);
        check(0.45, &[1, 3]);
        check(1.0, &[1]);
    }
}
