//! What the scheduler may give.

use super::policy::Policy;

/// What the scheduler may give.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// KV blocks, >= 1. Each request fits in them alone.
    pub(crate) num_blocks: u32,
    /// What one step may use.
    pub(crate) budget: Budget,
    /// Steps that are sent before the first of them is answered, >= 1. With 2, the shards have the next step when they
    /// finish one.
    pub(crate) steps_in_flight: usize,
    /// Whether computed blocks are kept and shared.
    pub(crate) prefix_caching: bool,
    /// Most tokens that a row may sample, >= 1. With more than 1, where shards speculate, nothing is run ahead behind a
    /// row that samples.
    pub(crate) max_sampled_tokens: usize,
    /// Who goes first, and how long anything may take.
    pub(crate) policy: Policy,
}

impl Limits {
    /// Events that one step can cause for one request: log-probabilities of its prompt, and tokens.
    pub(super) fn events_per_step(&self) -> usize {
        1 + self.max_sampled_tokens
    }
}

/// What a step may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Most tokens of prompt chunks, >= 1. Decode rows come on top.
    pub(crate) max_prefill_tokens: usize,
    /// Most sequences, >= 1.
    pub(crate) max_sequences: usize,
    /// Tokens in a KV block, >= 1.
    pub(crate) block_size: usize,
}
