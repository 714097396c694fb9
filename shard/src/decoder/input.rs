//! What a step computes: a flat batch of decode rows and prefill chunks.

use kernels::AttentionBatch;

/// A flat batch. Sequence `s` owns rows `query_starts[s] .. query_starts[s + 1]`, one for each token that this step
/// computes; at least one row in all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForwardInput {
    /// `[rows]`, each below the vocabulary's size.
    pub token_ids: Vec<u32>,
    /// `[rows]`, place of each token in its sequence, below [`StepLimits::max_position`].
    pub positions: Vec<u32>,
    /// `[rows]`, where the token's keys and values go: block id * block size + place in the block.
    pub slot_mapping: Vec<u32>,
    /// `[num_sequences + 1]`, ascending, the first 0, the last the number of rows.
    pub query_starts: Vec<u32>,
    /// `[num_sequences]`, tokens of the sequence in the cache after this step.
    pub kv_lens: Vec<u32>,
    /// `[num_sequences, max_blocks]`, row by row: block ids in the sequence's order. What lies behind a sequence's last
    /// block is not read.
    pub block_tables: Vec<u32>,
    /// Columns of `block_tables`.
    pub max_blocks: usize,
}

impl ForwardInput {
    pub(super) fn attention_batch(&self) -> AttentionBatch<'_> {
        AttentionBatch {
            query_starts: &self.query_starts,
            kv_lens: &self.kv_lens,
            block_tables: &self.block_tables,
            max_blocks: self.max_blocks,
        }
    }
}

/// The largest step that buffers are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows of a [`ForwardInput`].
    pub max_step_tokens: usize,
    /// Rows of one [`super::Decoder::logits`] call.
    pub max_logit_rows: usize,
    /// Positions are below it.
    pub max_position: usize,
}
