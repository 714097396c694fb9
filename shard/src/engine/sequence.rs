//! What the shard remembers of a sequence between steps.

use std::collections::HashMap;

use grammar::GrammarId;
use kernels::ops::embedding::LAST_TOKEN_OF;
use kernels::ops::lora::NO_ADAPTER;
use proto::v1::{FinishReason, NewSequence, StoppingParameters};

use super::device_sampling::DeviceSampling;
use super::grammars::Constraint;
use crate::sampling::Sampler;

/// All sequences that were admitted and not released, by `sequence_id`.
pub(super) type Sequences = HashMap<u64, Sequence>;

/// One sequence.
pub(super) struct Sequence {
    /// Prompt, then generated tokens, as far as they were read.
    pub(super) token_ids: Vec<u32>,
    /// Tokens behind `token_ids` that steps in flight choose.
    pub(super) num_pending: usize,
    /// How many of `token_ids` are the prompt.
    pub(super) prompt_len: usize,
    /// How many tokens have their keys and values in the blocks when the steps in flight are done.
    pub(super) computed_len: usize,
    /// In order of position.
    pub(super) block_ids: Vec<u32>,
    /// How many of `block_ids` a device has in its tables.
    pub(super) num_tabled: usize,
    /// What changes the model for it, or [`NO_ADAPTER`].
    pub(super) adapter: u32,
    pub(super) sampler: Sampler,
    pub(super) top_n_tokens: usize,
    pub(super) prompt_logprobs: bool,
    /// Whether it has ended; it is kept until it is released.
    pub(super) finished: bool,
    /// Whether a step was computed without it, for want of memory: that step ends it.
    pub(super) left_out: bool,
    /// How its tokens are chosen, where a device does that.
    pub(super) on_device: Option<DeviceSampling>,
    /// What its tokens are held to.
    pub(super) grammar: Option<GrammarId>,
    /// Its way through it, on rank 0.
    pub(super) constraint: Option<Constraint>,
    stopping: StoppingParameters,
}

/// Whether a text is complete by its grammar, so that nothing can follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Complete {
    Yes,
    No,
}

impl Sequence {
    /// From a message that has been validated.
    pub(super) fn new(new: NewSequence) -> Self {
        let prompt_len = new.prompt_tokens as usize;
        let (prompt, generated) = new.token_ids.split_at(prompt_len);
        let sampling = new.sampling.expect("validated: sampling is set");
        Self {
            sampler: Sampler::new(&sampling, prompt, generated),
            num_pending: 0,
            prompt_len,
            computed_len: new.computed_tokens as usize,
            block_ids: new.block_ids,
            num_tabled: 0,
            adapter: new.adapter_index.unwrap_or(NO_ADAPTER),
            top_n_tokens: new.top_n_tokens as usize,
            prompt_logprobs: new.prompt_logprobs,
            finished: false,
            left_out: false,
            on_device: None,
            grammar: (new.grammar_id != 0).then_some(GrammarId(new.grammar_id)),
            constraint: None,
            stopping: new.stopping.expect("validated: stopping is set"),
            token_ids: new.token_ids,
        }
    }

    /// Tokens of prompt and output, with those that steps in flight choose.
    pub(super) fn len(&self) -> usize {
        self.token_ids.len() + self.num_pending
    }

    /// The token at a position, or where the device finds it while a step in flight chooses it.
    pub(super) fn token_at(&self, position: usize) -> u32 {
        match (self.token_ids.get(position), &self.on_device) {
            (Some(&token_id), _) => token_id,
            (None, Some(device)) => LAST_TOKEN_OF | device.slot,
            (None, None) => {
                unreachable!("without a device no step is launched before the one before is collected")
            }
        }
    }

    /// Whether nothing more is to be computed: it has ended, a step in flight ends it, or one chooses the last token it may
    /// have.
    pub(super) fn has_ended(&self) -> bool {
        self.finished
            || self.left_out
            || self.len() - self.prompt_len >= self.stopping.max_new_tokens as usize
    }

    /// Whether the next token is the last one that it may have.
    pub(super) fn ends_with_next(&self) -> bool {
        self.token_ids.len() + 1 - self.prompt_len >= self.stopping.max_new_tokens as usize
    }

    /// Appends a token that a step has chosen, and says whether the sequence ends with it. `is_complete`: whether its grammar says
    /// so.
    pub(super) fn push(
        &mut self,
        token_id: u32,
        is_complete: Complete,
        eos_token_ids: &[u32],
    ) -> FinishReason {
        self.num_pending = self.num_pending.saturating_sub(1);
        self.token_ids.push(token_id);
        self.sampler.push(token_id);
        let is_eos = !self.stopping.ignore_eos && eos_token_ids.contains(&token_id);
        let reason = if is_eos || is_complete == Complete::Yes {
            FinishReason::Eos
        } else if self.token_ids.len() - self.prompt_len >= self.stopping.max_new_tokens as usize {
            FinishReason::Length
        } else {
            FinishReason::Unspecified
        };
        self.finished = reason != FinishReason::Unspecified;
        reason
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proto::v1::SamplingParameters;

    use super::*;
    use crate::sampling::neutral_parameters;

    /// A sequence that the shard does not know yet: greedy, at most 16 new tokens.
    pub(in crate::engine) fn new_sequence(sequence_id: u64, token_ids: &[u32]) -> NewSequence {
        NewSequence {
            sequence_id,
            token_ids: token_ids.to_vec(),
            prompt_tokens: token_ids.len() as u32,
            sampling: Some(SamplingParameters { temperature: 0.0, ..neutral_parameters() }),
            stopping: Some(StoppingParameters { max_new_tokens: 16, ignore_eos: false }),
            ..NewSequence::default()
        }
    }

    fn sequence(max_new_tokens: u32, ignore_eos: bool, generated: &[u32]) -> Sequence {
        let mut new = new_sequence(1, &[10, 11]);
        new.token_ids.extend_from_slice(generated);
        new.stopping = Some(StoppingParameters { max_new_tokens, ignore_eos });
        Sequence::new(new)
    }

    #[test]
    fn a_sequence_ends_with_an_eos_token_unless_it_is_ignored() {
        assert_eq!(sequence(5, false, &[]).push(2, Complete::No, &[1, 2]), FinishReason::Eos);
        assert_eq!(sequence(5, true, &[]).push(2, Complete::No, &[1, 2]), FinishReason::Unspecified);
        assert_eq!(sequence(1, false, &[]).push(2, Complete::No, &[1, 2]), FinishReason::Eos);
        assert_eq!(sequence(1, true, &[]).push(2, Complete::No, &[1, 2]), FinishReason::Length);
    }

    #[test]
    fn a_complete_text_ends_a_sequence_whatever_else_is_asked_for() {
        assert_eq!(sequence(5, true, &[]).push(7, Complete::Yes, &[1]), FinishReason::Eos);
        assert_eq!(sequence(1, true, &[]).push(7, Complete::Yes, &[1]), FinishReason::Eos);
    }

    #[test]
    fn tokens_generated_before_a_preemption_count_for_the_length() {
        let mut sequence = sequence(3, false, &[20, 21]);
        assert_eq!(sequence.push(22, Complete::No, &[1]), FinishReason::Length);
        assert!(sequence.finished);
        assert_eq!(sequence.token_ids, [10, 11, 20, 21, 22]);
    }
}
