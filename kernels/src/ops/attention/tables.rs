//! Block tables that stay where attention reads them: of each sequence, only the ids of new blocks are sent.

use super::super::operands::{on_cuda, require};
use crate::{Context, DType, Result, Staging, Tensor, View};

const OP: &str = "block_tables";

/// The block tables of the sequences that a device knows, a row for each: see
/// [`AttentionBatch::table_rows`](super::AttentionBatch::table_rows).
pub struct BlockTables {
    /// u32 `[rows, max_blocks]`.
    entries: Tensor,
    staging: Staging,
    /// Kept from call to call: [`Run`]s, and the ids that they take.
    runs: Vec<u32>,
    ids: Vec<u32>,
}

/// What is new in a row of [`BlockTables`].
#[derive(Debug, Clone, Copy)]
pub struct NewBlocks<'a> {
    /// The sequence's.
    pub row: usize,
    /// Of the first new entry.
    pub column: usize,
    /// The entries.
    pub ids: &'a [u32],
}

/// Words of a `Run` of `cuda/block_tables.cu`.
const RUN_WORDS: usize = 4;

impl BlockTables {
    /// Zeroed tables of `rows` sequences of up to `max_blocks` blocks, where up to `max_new` rows get new blocks at once.
    pub fn new(context: &Context, rows: usize, max_blocks: usize, max_new: usize) -> Result<Self> {
        Ok(Self {
            entries: context.zeros(rows, max_blocks, DType::U32)?,
            staging: Staging::new(context, &[max_new * RUN_WORDS, max_new * max_blocks])?,
            runs: Vec::new(),
            ids: Vec::new(),
        })
    }

    /// Writes new entries, behind the operations queued so far and before those to come. No row is named twice.
    pub fn append<'a>(
        &mut self,
        context: &Context,
        new: impl IntoIterator<Item = NewBlocks<'a>>,
    ) -> Result<()> {
        let (rows, max_blocks) = (self.entries.rows(), self.entries.cols());
        self.runs.clear();
        self.ids.clear();
        for NewBlocks { row, column, ids } in new.into_iter().filter(|new| !new.ids.is_empty()) {
            require(OP, row < rows && column + ids.len() <= max_blocks, || {
                format!(
                    "{} entries from [{row}, {column}] on, the tables are [{rows}, {max_blocks}]",
                    ids.len()
                )
            })?;
            self.runs.extend([row, column, ids.len(), self.ids.len()].map(|word| word as u32));
            self.ids.extend_from_slice(ids);
        }
        if self.runs.is_empty() {
            return Ok(());
        }
        let [runs, ids] = self.staging.send(context, [&self.runs, &self.ids])?;
        on_cuda!(context, |device| super::cuda::append_blocks(device, runs, ids, &mut self.entries));
        let (runs, ids): (&[u32], &[u32]) = (runs.into_slice(), ids.into_slice());
        for run in runs.chunks_exact(RUN_WORDS) {
            let [row, column, len, from] = [0, 1, 2, 3].map(|word| run[word] as usize);
            self.entries.view_mut().row(row)[column..][..len].copy_from_slice(&ids[from..][..len]);
        }
        Ok(())
    }

    /// u32 `[1, rows * max_blocks]`, as an [`AttentionBatch`](super::AttentionBatch) has it.
    pub fn entries(&self) -> View<'_> {
        self.entries.view().reshape(1, self.entries.rows() * self.entries.cols())
    }

    /// Columns.
    pub fn max_blocks(&self) -> usize {
        self.entries.cols()
    }

    /// Bytes of all entries.
    pub fn size_in_bytes(&self) -> usize {
        self.entries.size_in_bytes()
    }
}
