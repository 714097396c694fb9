//! Temperature: logits are divided by it, so below 1 likely tokens become likelier.

use kernels::ops::logits::greatest;
use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor, is_greedy};

struct Temperature(f32);

pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let temperature = parameters.temperature;
    if is_greedy(parameters) || temperature == 1.0 { None } else { Some(Box::new(Temperature(temperature))) }
}

impl LogitsProcessor for Temperature {
    /// Logits are taken relative to the largest, so a tiny temperature makes others unlikely and none infinite.
    fn process(&self, _: &History, distribution: &mut Distribution) {
        let logits = distribution.logits_mut();
        let max = greatest(logits).logit;
        for logit in logits {
            // The quotient is 0 / temperature for the largest: exactly 0.
            *logit = (*logit - max) / self.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::{changed, kept};
    use super::*;

    fn parameters(temperature: f32) -> SamplingParameters {
        SamplingParameters { temperature, ..SamplingParameters::default() }
    }

    #[test]
    fn differences_of_logits_are_divided() {
        let check = |temperature, expected: [f32; 3]| {
            let logits = changed(build, &parameters(temperature), &History::default(), &[1.0, 3.0, 2.0]);
            let relative: Vec<f32> = logits.iter().map(|logit| logit - logits[1]).collect();
            assert_eq!(relative, expected, "temperature {temperature}");
        };
        check(1.0, [-2.0, 0.0, -1.0]);
        check(0.5, [-4.0, 0.0, -2.0]);
        check(2.0, [-1.0, 0.0, -0.5]);
        check(0.0, [-2.0, 0.0, -1.0]);
    }

    #[test]
    fn a_tiny_temperature_leaves_the_most_likely_token_only() {
        assert_eq!(kept(build, &parameters(f32::MIN_POSITIVE), &[1.0, 3.0, 2.0]), [1]);
    }
}
