//! What a step computes: a flat batch of decode rows and prefill chunks.

use kernels::ops::attention::BlockTables;
use kernels::ops::lora::{AdapterRows, NO_ADAPTER};
use kernels::ops::sampling::{self, SamplingRow};
use kernels::{AttentionBatch, Context, Place, Result, Staging, View};

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
    /// block is not read. Empty where the device keeps the tables.
    pub block_tables: Vec<u32>,
    /// `[num_sequences]`, which row of the device's tables is each sequence's; empty where it keeps none.
    pub table_rows: Vec<u32>,
    /// Blocks of the longest sequence; columns of `block_tables`.
    pub max_blocks: usize,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<u32>,
    /// `[rows]`, the adapter of each, or [`NO_ADAPTER`]; empty: none has one.
    pub adapters: Vec<u32>,
    /// Not read by the decoder, but in the same copy: where tokens are chosen on the device, how.
    pub sampling: SamplingInput,
}

/// How tokens are chosen from a step's rows of logits; empty where that is done on the CPU. See
/// [`kernels::ops::sampling`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SamplingInput {
    /// [`kernels::ops::sampling::SamplingRow::WORDS`] for each row of logits.
    pub rows: Vec<u32>,
    /// `[rows of logits]`, where the sequence's last token is noted.
    pub slots: Vec<u32>,
    /// Pairs of a token and the bits of what is added to its logit.
    pub biases: Vec<u32>,
}

impl ForwardInput {
    /// Room for the arrays of any step within `limits`.
    pub fn staging(context: &Context, limits: &StepLimits) -> Result<Staging> {
        let StepLimits { max_step_tokens: rows, max_step_sequences: sequences, .. } = *limits;
        let tables = sequences * limits.max_blocks();
        let (sampling, biases) = match context.place() {
            Place::Host => (0, 0),
            Place::Device => (rows, 2 * sequences * MAX_LOGIT_BIASES),
        };
        let sampling_words = sampling * SamplingRow::WORDS;
        let index_arrays = [rows, rows, rows, sequences + 1, sequences, tables, sequences, rows, rows];
        Staging::new(context, &[&index_arrays[..], &[sampling_words, sampling, biases]].concat())
    }

    /// The arrays where the context's operations expect them.
    pub fn send<'a>(&'a self, context: &Context, staging: &'a mut Staging) -> Result<StepInput<'a>> {
        let arrays = [
            &*self.token_ids,
            &self.positions,
            &self.slot_mapping,
            &self.query_starts,
            &self.kv_lens,
            &self.block_tables,
            &self.table_rows,
            &self.logit_rows,
            &self.adapters,
            &self.sampling.rows,
            &self.sampling.slots,
            // The last, so that the addresses of all do not depend on how many there are.
            &self.sampling.biases,
        ];
        let [
            token_ids,
            positions,
            slots,
            query_starts,
            kv_lens,
            block_tables,
            table_rows,
            logit_rows,
            adapters,
            sampling_rows,
            sampling_slots,
            biases,
        ] = staging.send(context, arrays)?;
        let row_counts = || self.query_starts.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        let batch = AttentionBatch {
            query_starts,
            kv_lens,
            block_tables,
            table_rows: (!self.table_rows.is_empty()).then_some(table_rows),
            max_blocks: self.max_blocks,
            num_decodes: row_counts().take_while(|&rows| rows == 1).count(),
            max_query_len: row_counts().max().unwrap_or(0),
        };
        let any = self.adapters.iter().any(|&adapter| adapter != NO_ADAPTER);
        Ok(StepInput {
            token_ids,
            positions,
            slots,
            batch,
            adapters: AdapterRows { slots: adapters, any },
            logit_rows,
            sampling_rows,
            sampling_slots,
            biases,
        })
    }

    /// Fills a batch of decode rows, whose tables the device keeps, up to `num_rows` with rows that write nothing, attend
    /// to nothing and choose nothing.
    ///
    /// # Panics
    /// Where there are more rows already.
    pub fn pad(&mut self, num_rows: usize) {
        let padding = num_rows.checked_sub(self.token_ids.len()).expect("no more rows than asked for");
        self.token_ids.resize(num_rows, 0);
        self.positions.resize(num_rows, 0);
        self.slot_mapping.resize(num_rows, u32::MAX);
        self.kv_lens.resize(num_rows, 0);
        self.adapters.resize(num_rows, NO_ADAPTER);
        self.table_rows.resize(num_rows, 0);
        let first = self.query_starts.last().map_or(0, |end| end + 1);
        self.query_starts.extend(first..first + padding as u32);
        for _ in self.logit_rows.len()..num_rows {
            self.sampling.rows.extend_from_slice(&SamplingRow::UNUSED);
        }
        self.logit_rows.resize(num_rows, 0);
        self.sampling.slots.resize(num_rows, sampling::NONE);
    }
}

/// The most entries of a sequence's logit bias, where tokens are chosen on the device.
pub const MAX_LOGIT_BIASES: usize = 1024;

/// A [`ForwardInput`] where operations expect it.
#[derive(Clone, Copy)]
pub struct StepInput<'a> {
    /// `[1, rows]`.
    pub token_ids: View<'a>,
    pub(super) positions: View<'a>,
    pub(super) slots: View<'a>,
    /// Where the sequences lie.
    pub batch: AttentionBatch<'a>,
    /// Which rows have which adapter.
    pub adapters: AdapterRows<'a>,
    /// `[1, rows of logits]`.
    pub logit_rows: View<'a>,
    /// As of [`SamplingInput`], each `[1, n]`.
    pub sampling_rows: View<'a>,
    /// Likewise.
    pub sampling_slots: View<'a>,
    /// Likewise.
    pub biases: View<'a>,
}

impl<'a> StepInput<'a> {
    /// With the block tables that the device keeps.
    #[must_use]
    pub fn with_tables(mut self, tables: &'a BlockTables) -> Self {
        self.batch.block_tables = tables.entries();
        self.batch.max_blocks = tables.max_blocks();
        self
    }

    /// With ids that lie elsewhere.
    #[must_use]
    pub fn with_token_ids(self, token_ids: View<'a>) -> Self {
        Self { token_ids, ..self }
    }
}

/// The largest step that buffers are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows of a [`ForwardInput`].
    pub max_step_tokens: usize,
    /// Sequences of a [`ForwardInput`].
    pub max_step_sequences: usize,
    /// Rows of one [`super::Decoder::logits`] call.
    pub max_logit_rows: usize,
    /// Positions are below it.
    pub max_position: usize,
    /// Tokens in a block of the cache.
    pub block_size: usize,
}

impl StepLimits {
    /// Blocks of the longest sequence.
    pub fn max_blocks(&self) -> usize {
        self.max_position.div_ceil(self.block_size)
    }
}
