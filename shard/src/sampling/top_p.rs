//! Top-p, nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751).

use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor, is_greedy};

struct TopP(f32);

pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let p = parameters.top_p;
    if is_greedy(parameters) || p >= 1.0 { None } else { Some(Box::new(TopP(p))) }
}

impl LogitsProcessor for TopP {
    /// Keeps the smallest set of most likely tokens that have probability `p` together, at least one.
    fn process(&self, _: &History, distribution: &mut Distribution) {
        let total = distribution.total_weight();
        distribution.keep_weight(f64::from(self.0) * total);
    }
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::{kept, logits_of};
    use super::super::neutral_parameters;
    use super::*;

    #[test]
    fn the_smallest_set_that_reaches_p_is_kept() {
        let check = |top_p, expected: &[u32]| {
            let logits = logits_of(&[0.1, 0.5, 0.15, 0.25]);
            assert_eq!(kept(build, &SamplingParameters { top_p, ..neutral_parameters() }, &logits), expected);
        };
        check(1e-6, &[1]);
        check(0.49, &[1]);
        check(0.51, &[1, 3]);
        check(0.76, &[1, 2, 3]);
        check(0.95, &[0, 1, 2, 3]);
        check(1.0, &[0, 1, 2, 3]);
    }

    #[test]
    fn of_equally_likely_tokens_the_lower_ids_are_kept() {
        let parameters = SamplingParameters { top_p: 0.4995, ..neutral_parameters() };
        assert_eq!(kept(build, &parameters, &[1.0; 1000]), (0..500).collect::<Vec<u32>>());
    }
}
