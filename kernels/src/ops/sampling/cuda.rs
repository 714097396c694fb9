//! Launches of `cuda/sampling.cu`.

use super::super::operands::{matrix, require, require_device_u32s, require_on_device};
use super::{Sampled, SamplingInput, SamplingRow, TokenCounts};
use crate::cuda::{Argument, Device, Grid};
use crate::{Context, DType, Result, Tensor, View, ViewMut};

/// As in `cuda/sampling.cuh`.
const CHUNK: usize = 4096;
const GROUP: usize = 16;
const SUMMARY_WORDS: usize = 5;
const MAX_PIECES: usize = 8;
const MAX_BINS: usize = 2048;
/// Of a 64-bit sum.
const SUM_WORDS: usize = 2;
const SCAN_THREADS: u32 = 256;
const COUNT_THREADS: u32 = 512;

/// What the first kernels leave for those behind.
#[derive(Debug)]
pub(super) struct Buffers {
    /// Logits with what changes them, of the rows that have it: `[max rows, chunks * CHUNK]`.
    changed: Tensor,
    /// Of each group of logits the greatest: `[max rows, groups]`, after the changes and before.
    group_maxima: Tensor,
    raw_group_maxima: Tensor,
    summaries: Tensor,
    /// What the second kernel leaves for the third: sums by bins of each piece, or its sum.
    piece_bins: Tensor,
    piece_sums: Tensor,
}

/// How the second kernel deals out a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pieces {
    num: usize,
    /// Of each but the last.
    chunks: usize,
}

impl Pieces {
    fn of(vocab_size: usize) -> Self {
        let all = vocab_size.div_ceil(CHUNK);
        let chunks = all.div_ceil(MAX_PIECES);
        Self { num: all.div_ceil(chunks), chunks }
    }
}

impl Buffers {
    pub(super) fn new(context: &Context, max_rows: usize, vocab_size: usize) -> Result<Self> {
        let chunks = vocab_size.div_ceil(CHUNK);
        let groups = chunks * (CHUNK / GROUP);
        let pieces = Pieces::of(vocab_size).num;
        Ok(Self {
            changed: context.zeros(max_rows, chunks * CHUNK, DType::F32)?,
            group_maxima: context.zeros(max_rows, groups, DType::F32)?,
            raw_group_maxima: context.zeros(max_rows, groups, DType::F32)?,
            summaries: context.zeros(max_rows, chunks * SUMMARY_WORDS, DType::U32)?,
            piece_bins: context.zeros(max_rows, pieces * MAX_BINS * SUM_WORDS, DType::U32)?,
            piece_sums: context.zeros(max_rows, pieces * SUM_WORDS, DType::U32)?,
        })
    }

    pub(super) fn size_in_bytes(&self) -> usize {
        let Self { changed, group_maxima, raw_group_maxima, summaries, piece_bins, piece_sums } = self;
        let tensors = [changed, group_maxima, raw_group_maxima, summaries, piece_bins, piece_sums];
        tensors.iter().map(|tensor| tensor.size_in_bytes()).sum()
    }
}

/// Shapes of logits, buffers and counts fit each other.
pub(super) fn sample(
    device: &Device,
    buffers: &mut Buffers,
    input: &SamplingInput<'_>,
    counts: Option<&TokenCounts>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "sample";
    let SamplingInput { logits, rows: parameters, biases, masks } = *input;
    let (rows, vocab_size) = (logits.rows(), logits.cols());
    require_on_device(OP, "logits", matrix(logits), DType::F32, (rows, vocab_size))?;
    require_packed("rows", parameters, (rows, SamplingRow::WORDS))?;
    require_packed("out", out.as_view(), (rows, Sampled::WORDS))?;
    require_device_u32s(OP, "biases", biases, biases.cols())?;
    if let Some(masks) = masks {
        let shape = (masks.rows(), vocab_size.div_ceil(32));
        require_on_device(OP, "masks", matrix(masks), DType::U32, shape)?;
    }
    let chunks = vocab_size.div_ceil(CHUNK) as u32;
    let words = counts.map(|counts| counts.words.view());
    let arguments = [
        logits.into(),
        (logits.row_stride as u32).into(),
        (vocab_size as u32).into(),
        parameters.into(),
        biases.into(),
        words.into(),
        count_stride(words),
        masks.into(),
        (masks.map_or(0, |masks| masks.row_stride) as u32).into(),
        buffers.changed.view_mut().into(),
        buffers.group_maxima.view_mut().into(),
        buffers.raw_group_maxima.view_mut().into(),
        buffers.summaries.view_mut().into(),
    ];
    let grid = Grid { blocks: [chunks, rows as u32, 1], threads: SCAN_THREADS, shared_bytes: 0 };
    let kernel = device.kernel("sampling_scan", &[])?;
    // SAFETY: the parameters of `sampling_scan`; shapes and places are checked above, and the rows name biases, masks and
    // slots that are there, by the caller's promise.
    unsafe { kernel.launch(device, grid, &arguments)? };

    let pieces = Pieces::of(vocab_size);
    let arguments = [
        logits.into(),
        (logits.row_stride as u32).into(),
        (vocab_size as u32).into(),
        chunks.into(),
        (pieces.chunks as u32).into(),
        parameters.into(),
        buffers.changed.view().into(),
        buffers.group_maxima.view().into(),
        buffers.summaries.view().into(),
        buffers.piece_bins.view_mut().into(),
        buffers.piece_sums.view_mut().into(),
    ];
    let blocks = [pieces.num as u32, rows as u32, 1];
    let kernel = device.kernel("sampling_count", &[])?;
    let grid = Grid { blocks, threads: COUNT_THREADS, shared_bytes: 0 };
    // SAFETY: the parameters of `sampling_count`; as above.
    unsafe { kernel.launch(device, grid, &arguments)? };

    let arguments = [
        logits.into(),
        (logits.row_stride as u32).into(),
        (vocab_size as u32).into(),
        chunks.into(),
        (pieces.num as u32).into(),
        (pieces.chunks as u32).into(),
        parameters.into(),
        buffers.changed.view().into(),
        buffers.group_maxima.view().into(),
        buffers.raw_group_maxima.view().into(),
        buffers.summaries.view().into(),
        buffers.piece_bins.view().into(),
        buffers.piece_sums.view().into(),
        out.into(),
    ];
    let grid = Grid { blocks: [rows as u32, 1, 1], threads: choosing_threads(vocab_size), shared_bytes: 0 };
    let kernel = device.kernel("sampling_choose", &[])?;
    // SAFETY: the parameters of `sampling_choose`; as above.
    unsafe { kernel.launch(device, grid, &arguments) }
}

/// Four logits at least for each, within what a block may have; a power of two.
fn choosing_threads(vocab_size: usize) -> u32 {
    vocab_size.div_ceil(4).next_power_of_two().clamp(32, 1024) as u32
}

pub(super) fn recount(
    device: &Device,
    counts: &mut TokenCounts,
    slot: u32,
    prompt: View<'_>,
    generated: View<'_>,
) -> Result<()> {
    const OP: &str = "recount";
    require_device_u32s(OP, "prompt", prompt, prompt.cols())?;
    require_device_u32s(OP, "generated", generated, generated.cols())?;
    let stride = count_stride(Some(counts.words.view()));
    let arguments = [
        counts.words.view_mut().narrow_rows(slot as usize, 1).into(),
        stride,
        (counts.vocab_size as u32).into(),
        prompt.into(),
        (prompt.cols() as u32).into(),
        generated.into(),
        (generated.cols() as u32).into(),
    ];
    let grid = Grid { blocks: [1, 1, 1], threads: 1024, shared_bytes: 0 };
    let kernel = device.kernel("sampling_recount", &[])?;
    // SAFETY: the parameters of `sampling_recount`; the slot is one of the counts, tokens are checked by the kernel.
    unsafe { kernel.launch(device, grid, &arguments) }
}

pub(super) fn commit(
    device: &Device,
    tokens: View<'_>,
    slots: View<'_>,
    last_tokens: ViewMut<'_>,
    counts: Option<&mut TokenCounts>,
    vocab_size: usize,
) -> Result<()> {
    const OP: &str = "commit_tokens";
    let (rows, num_slots) = (tokens.rows(), last_tokens.cols());
    require_on_device(OP, "tokens", matrix(tokens), DType::U32, (rows, tokens.cols()))?;
    require_device_u32s(OP, "slots", slots, rows)?;
    require_device_u32s(OP, "last_tokens", last_tokens.as_view(), num_slots)?;
    let stride = count_stride(counts.as_ref().map(|counts| counts.words.view()));
    let words: Argument = match counts {
        Some(counts) => counts.words.view_mut().into(),
        None => None::<View<'_>>.into(),
    };
    let arguments = [
        tokens.into(),
        (tokens.row_stride as u32).into(),
        slots.into(),
        1_u32.into(),
        (rows as u32).into(),
        (vocab_size as u32).into(),
        last_tokens.into(),
        (num_slots as u32).into(),
        words,
        stride,
    ];
    let grid = Grid { blocks: [rows.div_ceil(256) as u32, 1, 1], threads: 256, shared_bytes: 0 };
    let kernel = device.kernel("sampling_commit", &[])?;
    // SAFETY: the parameters of `sampling_commit`; the counts are borrowed exclusively and have a row for each slot, tokens
    // and slots are checked by the kernel.
    unsafe { kernel.launch(device, grid, &arguments) }
}

/// In counts of 16 bits.
fn count_stride(words: Option<View<'_>>) -> Argument {
    (words.map_or(0, |words| 2 * words.row_stride) as u32).into()
}

/// Rows without gaps, as structures in an array.
fn require_packed(name: &str, view: View<'_>, shape: (usize, usize)) -> Result<()> {
    require_on_device("sample", name, matrix(view), DType::U32, shape)?;
    require("sample", view.rows() <= 1 || view.row_stride == view.cols(), || {
        format!("rows of {name} are {} words apart, expected {}", view.row_stride, view.cols())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_row_and_none_of_them_is_empty() {
        for vocab_size in 1..300_000 {
            let Pieces { num, chunks } = Pieces::of(vocab_size);
            let len = chunks * CHUNK;
            assert!(num <= MAX_PIECES && num * len >= vocab_size, "{vocab_size}");
            assert!((num - 1) * len < vocab_size, "{vocab_size}");
        }
        assert_eq!(Pieces::of(128_256), Pieces { num: 8, chunks: 4 });
    }
}
