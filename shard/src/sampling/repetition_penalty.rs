//! Repetition penalty (Keskar et al. 2019, "CTRL", arXiv:1909.05858, section 4.1).

use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor};

struct RepetitionPenalty(f32);

pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let penalty = parameters.repetition_penalty;
    if penalty == 1.0 { None } else { Some(Box::new(RepetitionPenalty(penalty))) }
}

impl LogitsProcessor for RepetitionPenalty {
    /// Divides positive and multiplies negative logits of all tokens seen in prompt or output.
    fn process(&self, history: &History, distribution: &mut Distribution) {
        let logits = distribution.logits_mut();
        for (token_id, _) in history.iter() {
            let logit = &mut logits[token_id as usize];
            let penalized = if *logit > 0.0 { *logit / self.0 } else { *logit * self.0 };
            // An extreme penalty must not make a logit infinite: the difference of two infinities is no number.
            *logit = penalized.clamp(f32::MIN, f32::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::changed;
    use super::*;

    #[test]
    fn seen_tokens_become_less_likely_once_however_often_they_were_seen() {
        let parameters = SamplingParameters { repetition_penalty: 2.0, ..SamplingParameters::default() };
        let mut history = History::new(&parameters);
        history.push_prompt(0);
        history.push_generated(1);
        history.push_generated(1);
        let logits = changed(build, &parameters, &history, &[3.0, -3.0, 3.0, -3.0]);
        assert_eq!(logits, [1.5, -6.0, 3.0, -3.0]);
    }

    #[test]
    fn an_extreme_penalty_leaves_finite_logits() {
        for repetition_penalty in [f32::MIN_POSITIVE, f32::MAX] {
            let parameters = SamplingParameters { repetition_penalty, ..SamplingParameters::default() };
            let mut history = History::new(&parameters);
            history.push_prompt(0);
            history.push_prompt(1);
            let logits = changed(build, &parameters, &history, &[300.0, -300.0]);
            assert!(logits.iter().all(|logit| logit.is_finite()), "{logits:?}");
        }
    }
}
