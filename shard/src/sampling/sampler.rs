//! One sequence's way from logits to a token.

use proto::v1::{SampledToken, SamplingParameters};

use super::{
    Distribution, History, LogSoftmax, LogitsProcessor, NotFinite, PROCESSORS, choose, grammar_mask,
    is_greedy,
};

/// Chooses the tokens of one sequence.
pub(crate) struct Sampler {
    /// Those before a grammar's mask, and those behind it.
    processors: [Vec<Box<dyn LogitsProcessor>>; 2],
    history: History,
    seed: u64,
    greedy: bool,
}

/// Why a row of logits has no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoToken {
    /// See [`NotFinite`].
    NotFinite,
    /// The grammar allows no token that the model gives a probability.
    NothingAllowed,
}

impl From<NotFinite> for NoToken {
    fn from(NotFinite: NotFinite) -> Self {
        Self::NotFinite
    }
}

/// Buffers of one row; kept from step to step.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    distribution: Distribution,
}

impl Sampler {
    /// For a sequence that begins with `prompt` and has `generated` tokens already (after a preemption). Parameters
    /// are in their ranges, and ids below the vocabulary's size.
    pub(crate) fn new(parameters: &SamplingParameters, prompt: &[u32], generated: &[u32]) -> Self {
        let mut history = History::new(parameters);
        for &token_id in prompt {
            history.push_prompt(token_id);
        }
        for &token_id in generated {
            history.push_generated(token_id);
        }
        Self {
            processors: PROCESSORS
                .map(|builds| builds.iter().filter_map(|build| build(parameters)).collect()),
            history,
            seed: parameters.seed,
            greedy: is_greedy(parameters),
        }
    }

    /// Chooses the token at `position` (0-based in the sequence) from its row of logits, of those that `mask` allows (a bit for
    /// each), and reports its log-probability and the `top_n` most likely tokens in the raw distribution.
    pub(crate) fn sample(
        &self,
        logits: &[f32],
        position: u64,
        mask: Option<&[u32]>,
        top_n: usize,
        scratch: &mut Scratch,
    ) -> Result<SampledToken, NoToken> {
        let softmax = LogSoftmax::of(logits)?;
        let is_plain = mask.is_none() && self.processors.iter().all(Vec::is_empty);
        let token_id = if self.greedy && is_plain {
            softmax.most_likely_token()
        } else {
            self.choose(logits, position, mask, &mut scratch.distribution)?
        };
        let logprob = softmax.logprob(logits[token_id as usize]);
        Ok(SampledToken { token_id, logprob, top: softmax.most_likely(logits, top_n) })
    }

    /// Takes note of a token that was chosen, by this rank or another.
    pub(crate) fn push(&mut self, token_id: u32) {
        self.history.push_generated(token_id);
    }

    fn choose(
        &self,
        logits: &[f32],
        position: u64,
        mask: Option<&[u32]>,
        distribution: &mut Distribution,
    ) -> Result<u32, NoToken> {
        distribution.reset(logits);
        let [before, behind] = &self.processors;
        for processor in before {
            processor.process(&self.history, distribution);
        }
        if let Some(mask) = mask {
            grammar_mask::apply(mask, distribution.logits_mut())?;
        }
        for processor in behind {
            processor.process(&self.history, distribution);
        }
        Ok(if self.greedy {
            choose::most_likely(distribution.logits())
        } else {
            choose::at_random(distribution, self.seed, position)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::neutral_parameters;
    use super::*;

    fn row(salt: u32, vocab_size: u32) -> Vec<f32> {
        (0..vocab_size).map(|id| ((id * 7919 + salt * 104_729) % 997) as f32 / 100.0).collect()
    }

    fn parameters() -> SamplingParameters {
        SamplingParameters {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.95,
            min_p: 0.01,
            typical_p: 0.98,
            seed: 99,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            presence_penalty: 0.1,
            logit_bias: vec![proto::v1::LogitBias { token_id: 3, bias: 1.0 }],
        }
    }

    fn run(sampler: &mut Sampler, scratch: &mut Scratch, positions: std::ops::Range<u64>) -> Vec<u32> {
        positions
            .map(|position| {
                let logits = row(position as u32, 400);
                let token_id = sampler.sample(&logits, position, None, 0, scratch).unwrap().token_id;
                sampler.push(token_id);
                token_id
            })
            .collect()
    }

    #[test]
    fn a_token_does_not_depend_on_company_that_used_the_buffers_before() {
        let mut alone = Sampler::new(&parameters(), &[1, 2], &[]);
        let expected = run(&mut alone, &mut Scratch::default(), 2..40);

        let mut scratch = Scratch::default();
        let company = Sampler::new(&SamplingParameters { seed: 5, ..parameters() }, &[7], &[]);
        let mut sampler = Sampler::new(&parameters(), &[1, 2], &[]);
        let mut tokens = Vec::new();
        for position in 2..40 {
            company.sample(&row(1000 + position as u32, 500), position, None, 3, &mut scratch).unwrap();
            tokens.extend(run(&mut sampler, &mut scratch, position..position + 1));
        }
        assert_eq!(tokens, expected);
    }

    #[test]
    fn a_sampler_made_in_the_middle_goes_on_as_if_it_had_made_the_beginning() {
        let mut scratch = Scratch::default();
        let expected = run(&mut Sampler::new(&parameters(), &[1, 2], &[]), &mut scratch, 2..40);
        let mut resumed = Sampler::new(&parameters(), &[1, 2], &expected[..20]);
        assert_eq!(run(&mut resumed, &mut scratch, 22..40), expected[20..]);
    }

    #[test]
    fn bias_and_penalties_hold_for_greedy_choice_and_truncation_does_not() {
        let greedy = |parameters: SamplingParameters| {
            let parameters = SamplingParameters { temperature: 0.0, ..parameters };
            let sampler = Sampler::new(&parameters, &[2], &[]);
            sampler.sample(&[1.0, 2.0, 3.0], 1, None, 0, &mut Scratch::default()).unwrap().token_id
        };
        assert_eq!(greedy(neutral_parameters()), 2);
        assert_eq!(greedy(SamplingParameters { repetition_penalty: 4.0, ..neutral_parameters() }), 1);
        let logit_bias = vec![proto::v1::LogitBias { token_id: 0, bias: 5.0 }];
        assert_eq!(greedy(SamplingParameters { logit_bias, ..neutral_parameters() }), 0);
        assert_eq!(greedy(SamplingParameters { typical_p: 0.01, min_p: 1.0, ..neutral_parameters() }), 2);
    }

    #[test]
    fn a_mask_holds_whatever_bias_and_penalties_say_and_whoever_is_beside() {
        let logits = row(1, 100);
        let mask = [1 << 7 | 1 << 20, 0, 0, 0];
        let logit_bias = vec![proto::v1::LogitBias { token_id: 50, bias: 100.0 }];
        for seed in 0..50 {
            let parameters = SamplingParameters { seed, logit_bias: logit_bias.clone(), ..parameters() };
            let sampler = Sampler::new(&parameters, &[7, 20], &[7]);
            let mut scratch = Scratch::default();
            let sampled = sampler.sample(&logits, 3, Some(&mask), 0, &mut scratch).unwrap();
            assert!([7, 20].contains(&sampled.token_id), "{}", sampled.token_id);
            sampler.sample(&row(9, 200), 3, None, 0, &mut scratch).unwrap();
            assert_eq!(sampler.sample(&logits, 3, Some(&mask), 0, &mut scratch), Ok(sampled));
        }
        let greedy = SamplingParameters { temperature: 0.0, ..neutral_parameters() };
        let sampler = Sampler::new(&greedy, &[7], &[]);
        let mut scratch = Scratch::default();
        let nothing = sampler.sample(&logits, 3, Some(&[0; 4]), 0, &mut scratch);
        assert_eq!(nothing, Err(NoToken::NothingAllowed));
        let expected = if logits[7] >= logits[20] { 7 } else { 20 };
        let sampled = sampler.sample(&logits, 3, Some(&mask), 0, &mut scratch).unwrap();
        assert_eq!(sampled.token_id, expected);
        let softmax = LogSoftmax::of(&logits).unwrap();
        assert_eq!(sampled.logprob, softmax.logprob(logits[expected as usize]));
    }

    #[test]
    fn logprobs_are_those_of_the_raw_distribution() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let sampler = Sampler::new(&parameters(), &[2], &[2, 2]);
        let sampled = sampler.sample(&logits, 3, None, 2, &mut Scratch::default()).unwrap();
        let softmax = LogSoftmax::of(&logits).unwrap();
        assert_eq!(sampled.logprob, softmax.logprob(logits[sampled.token_id as usize]));
        assert_eq!(sampled.top.iter().map(|token| token.token_id).collect::<Vec<u32>>(), [2, 1]);
        assert_eq!(sampled.top[0].logprob, softmax.logprob(2.0));
    }

    #[test]
    fn a_row_that_is_not_finite_is_refused_whatever_the_parameters() {
        let mut scratch = Scratch::default();
        for parameters in [neutral_parameters(), parameters(), SamplingParameters::default()] {
            let sampler = Sampler::new(&parameters, &[0], &[]);
            assert_eq!(
                sampler.sample(&[0.0, f32::NAN, 1.0, 0.0], 1, None, 0, &mut scratch),
                Err(NoToken::NotFinite)
            );
        }
    }
}
