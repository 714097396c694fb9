//! A step: what is new for the shards since the one before.

use std::sync::Arc;

use proto::units::{BlockId, SequenceId, TokenId};

use super::request::TokenRequest;

/// What is new since the step before, as the shards are told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    /// Strictly increasing.
    pub(crate) id: u64,
    /// Sequences to forget, before anything else is done.
    pub(crate) release: Vec<SequenceId>,
    /// Sequences that the shards do not know yet.
    pub(crate) admit: Vec<NewSequence>,
    /// What to compute; those of one token first.
    pub(crate) schedule: Vec<Scheduled>,
}

/// A sequence and all that a shard needs to go on with it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NewSequence {
    pub(crate) id: SequenceId,
    /// The prompt, and behind it what was generated before a preemption.
    pub(crate) tokens: Vec<TokenId>,
    /// How tokens are chosen, and when to stop. Its prompt is the beginning of `tokens`.
    pub(crate) request: Arc<TokenRequest>,
    /// Of `tokens`, how many are in `block_ids` already.
    pub(crate) computed_tokens: usize,
    /// The blocks that hold them.
    pub(crate) block_ids: Vec<BlockId>,
    /// Whether to report log-probabilities of the prompt: not again after a preemption.
    pub(crate) prompt_logprobs: bool,
}

/// A sequence's share of a step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scheduled {
    pub(crate) sequence: SequenceId,
    /// Tokens to compute, >= 1.
    pub(crate) num_tokens: usize,
    /// Blocks appended to its block table.
    pub(crate) new_blocks: Vec<BlockId>,
}
