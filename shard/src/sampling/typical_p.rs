//! Locally typical sampling (Meister et al. 2022, arXiv:2202.00666).

use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor, is_greedy};

struct TypicalP(f32);

pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let p = parameters.typical_p;
    if is_greedy(parameters) || p >= 1.0 { None } else { Some(Box::new(TypicalP(p))) }
}

impl LogitsProcessor for TypicalP {
    /// Keeps the smallest set of tokens that have probability `p` together and whose information is nearest to the
    /// distribution's entropy.
    fn process(&self, _: &History, distribution: &mut Distribution) {
        let total = distribution.total_weight();
        let information = |weight: f32| -(f64::from(weight) / total).ln();
        let entropy: f64 = distribution
            .candidates()
            .iter()
            .map(|candidate| f64::from(candidate.weight) / total * information(candidate.weight))
            .sum();
        distribution.keep_weight_by_key(f64::from(self.0) * total, |candidate| {
            (information(candidate.weight) - entropy).abs()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::{kept, logits_of};
    use super::super::neutral_parameters;
    use super::*;

    fn typical(typical_p: f32, probabilities: &[f32]) -> Vec<u32> {
        let parameters = SamplingParameters { typical_p, ..neutral_parameters() };
        kept(build, &parameters, &logits_of(probabilities))
    }

    /// Entropy 1.208 nats; distances of -ln p from it: 0.515 (0.5), 0.178 (0.25), 0.689 (0.15), 1.094 (0.1).
    #[test]
    fn tokens_nearest_to_the_entropy_are_kept_until_they_reach_p() {
        let probabilities = [0.1, 0.5, 0.15, 0.25];
        assert_eq!(typical(0.2, &probabilities), [3]);
        assert_eq!(typical(0.3, &probabilities), [1, 3]);
        assert_eq!(typical(0.8, &probabilities), [1, 2, 3]);
        assert_eq!(typical(0.99, &probabilities), [0, 1, 2, 3]);
        assert_eq!(typical(1.0, &probabilities), [0, 1, 2, 3]);
    }

    #[test]
    fn the_most_likely_token_may_be_dropped() {
        // Entropy 2.06 nats: the one token of 0.5 carries 0.69, each of the twenty of 0.025 carries 3.69.
        let mut probabilities = vec![0.3];
        probabilities.extend([0.14; 5]);
        assert_eq!(typical(0.1, &probabilities), [1]);
    }
}
