//! Logit bias: a number per token, added to its logit.

use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor};

struct LogitBias(Vec<(u32, f32)>);

/// Ids must be below the vocabulary's size. An id given twice gets both biases.
pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let biases: Vec<(u32, f32)> =
        parameters.logit_bias.iter().map(|entry| (entry.token_id, entry.bias)).collect();
    if biases.is_empty() { None } else { Some(Box::new(LogitBias(biases))) }
}

impl LogitsProcessor for LogitBias {
    fn process(&self, _: &History, distribution: &mut Distribution) {
        let logits = distribution.logits_mut();
        for &(token_id, bias) in &self.0 {
            logits[token_id as usize] += bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::changed;
    use super::*;

    #[test]
    fn a_bias_is_added_to_its_token_only() {
        let biases = [(1, 2.5), (3, -100.0), (1, 0.5)];
        let logit_bias = biases.map(|(token_id, bias)| proto::v1::LogitBias { token_id, bias }).to_vec();
        let parameters = SamplingParameters { logit_bias, ..SamplingParameters::default() };
        let logits = changed(build, &parameters, &History::default(), &[1.0, 1.0, 1.0, 1.0]);
        assert_eq!(logits, [1.0, 4.0, 1.0, -99.0]);
    }
}
