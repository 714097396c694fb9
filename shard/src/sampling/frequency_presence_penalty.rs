//! Frequency and presence penalty, as OpenAI's API defines them: both count generated tokens only.

use proto::v1::SamplingParameters;

use super::{Distribution, History, LogitsProcessor};

struct FrequencyPresencePenalty {
    frequency: f32,
    presence: f32,
}

pub(super) fn build(parameters: &SamplingParameters) -> Option<Box<dyn LogitsProcessor>> {
    let (frequency, presence) = (parameters.frequency_penalty, parameters.presence_penalty);
    if frequency == 0.0 && presence == 0.0 {
        return None;
    }
    Some(Box::new(FrequencyPresencePenalty { frequency, presence }))
}

impl LogitsProcessor for FrequencyPresencePenalty {
    fn process(&self, history: &History, distribution: &mut Distribution) {
        let logits = distribution.logits_mut();
        for (token_id, occurrences) in history.iter().filter(|(_, occurrences)| occurrences.generated > 0) {
            logits[token_id as usize] -= self.frequency * occurrences.generated as f32 + self.presence;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::changed;
    use super::*;

    fn check(frequency_penalty: f32, presence_penalty: f32, expected: [f32; 4]) {
        let parameters =
            SamplingParameters { frequency_penalty, presence_penalty, ..SamplingParameters::default() };
        // Without a penalty nothing would be counted.
        let mut history = History::new(&SamplingParameters { presence_penalty: 1.0, ..parameters.clone() });
        history.push_prompt(0);
        history.push_generated(1);
        history.push_generated(2);
        history.push_generated(2);
        assert_eq!(changed(build, &parameters, &history, &[1.0; 4]), expected);
    }

    #[test]
    fn only_generated_tokens_count_each_time_or_at_all() {
        check(0.0, 0.0, [1.0, 1.0, 1.0, 1.0]);
        check(0.5, 0.0, [1.0, 0.5, 0.0, 1.0]);
        check(0.0, 0.5, [1.0, 0.5, 0.5, 1.0]);
        check(-0.5, 0.25, [1.0, 1.25, 1.75, 1.0]);
    }
}
