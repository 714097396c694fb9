//! Launches of `cuda/attention.cu`, `attention_decode.cu` and `attention_prefill.cu`.

use super::super::operands::{
    matrix, matrix_mut, require, require_device_u32s, require_float, require_on_device,
};
use super::{AttentionBatch, AttentionParams, KvLayer, OP};
use crate::cuda::{Argument, Device, DevicePtr, Grid, Kernels};
use crate::{DType, Result, Tensor, View, ViewMut};

pub(super) fn paged_attention(
    device: &Device,
    query: View<'_>,
    cache: &KvLayer,
    batch: &AttentionBatch<'_>,
    params: AttentionParams<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check(query, cache, batch, &params, out)?;
    if query.rows() == 0 {
        return Ok(());
    }
    let heads = query.cols() / cache.head_dim;
    let attention = Attention {
        shape: Shape { kv_heads: cache.kv_heads, group: heads / cache.kv_heads, head_dim: cache.head_dim },
        query,
        cache,
        batch,
        params,
        out: out.as_view(),
    };
    match attention.kernels().filter(|_| device.kernels() == Kernels::Tuned) {
        Some(kernels) => {
            attention.decode(device, kernels)?;
            attention.prefill(device, kernels)
        }
        None => attention.plain(device),
    }
}

/// `runs`: of `cuda/block_tables.cu`, within `tables` and `ids`.
pub(super) fn append_blocks(
    device: &Device,
    runs: View<'_>,
    ids: View<'_>,
    tables: &mut Tensor,
) -> Result<()> {
    const WORDS: usize = 4;
    let num_runs = runs.cols() / WORDS;
    let grid = Grid { blocks: [num_runs as u32, 1, 1], threads: 128, shared_bytes: 0 };
    let kernel = device.kernel("block_tables_append", &[])?;
    let stride = tables.cols() as u32;
    let arguments = [runs.into(), ids.into(), tables.view_mut().into(), stride.into()];
    // SAFETY: the parameters of `block_tables_append`; the caller has checked that runs stay within both.
    unsafe { kernel.launch(device, grid, &arguments) }
}

/// The arrays' contents are the device's, which takes what is out of range for the last that is in range.
fn check(
    query: View<'_>,
    cache: &KvLayer,
    batch: &AttentionBatch<'_>,
    params: &AttentionParams<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    let AttentionBatch { max_blocks, num_decodes, max_query_len, max_kv_len, .. } = *batch;
    let (shape, kv_cols) = ((query.rows(), query.cols()), cache.kv_heads * cache.head_dim);
    require_float(OP, query.dtype())?;
    require_on_device(OP, "query", matrix(query), query.dtype(), shape)?;
    require_on_device(OP, "out", matrix_mut(out), query.dtype(), shape)?;
    for (name, pages) in [("cache.keys", &cache.keys), ("cache.values", &cache.values)] {
        let shape = (pages.rows(), cache.head_dim);
        require_on_device(OP, name, matrix(pages.view()), cache.dtype(), shape)?;
    }
    require(OP, shape.1.is_multiple_of(kv_cols) && shape.1 > 0, || {
        format!(
            "query has {} columns, expected a multiple of {} kv heads x {}",
            shape.1, cache.kv_heads, cache.head_dim
        )
    })?;
    require(OP, cache.head_dim <= MAX_HEAD_DIM, || {
        format!("heads of {} elements, expected at most {MAX_HEAD_DIM} on a GPU", cache.head_dim)
    })?;
    require(OP, cache.num_blocks() > 0, || "a cache without blocks".into())?;
    let num_sequences = batch.kv_lens.cols();
    require_device_u32s(OP, "query_starts", batch.query_starts, num_sequences + 1)?;
    require_device_u32s(OP, "kv_lens", batch.kv_lens, num_sequences)?;
    require_device_u32s(OP, "block_tables", batch.block_tables, batch.block_tables.cols())?;
    let num_tables = if batch.table_rows.is_some() { 1 } else { num_sequences };
    require(OP, batch.block_tables.cols() >= num_tables * max_blocks, || {
        format!(
            "{} block table entries for {num_tables} tables of {max_blocks} blocks",
            batch.block_tables.cols()
        )
    })?;
    if let Some(rows) = batch.table_rows {
        require_device_u32s(OP, "table_rows", rows, num_sequences)?;
    }
    require(OP, max_kv_len <= max_blocks * cache.block_size, || {
        format!("max_kv_len {max_kv_len} is more than {max_blocks} blocks of {}", cache.block_size)
    })?;
    require(OP, num_decodes <= num_sequences.min(query.rows()), || {
        format!("{num_decodes} decodes among {num_sequences} sequences of {} rows", query.rows())
    })?;
    require(OP, max_query_len <= query.rows(), || {
        format!("max_query_len {max_query_len} of {} rows", query.rows())
    })?;
    require(OP, num_sequences <= MAX_GRID, || format!("{num_sequences} sequences, at most {MAX_GRID}"))?;
    let heads = shape.1 / cache.head_dim;
    for (name, vector) in [("alibi_slopes", params.alibi_slopes), ("sinks", params.sinks)] {
        if let Some(vector) = vector {
            require_on_device(OP, name, matrix(vector), DType::F32, (1, heads))?;
        }
    }
    Ok(())
}

/// Of the kernel for any head: elements in the registers of a warp.
const MAX_HEAD_DIM: usize = 512;
/// Blocks along the second and third axis of a grid.
const MAX_GRID: usize = 65535;
const WARP: usize = 32;

/// The kernels for one head size.
#[derive(Clone, Copy)]
struct Pair {
    decode: &'static str,
    prefill: &'static str,
}

/// With tensor cores.
fn kernels_for(head_dim: usize) -> Option<Pair> {
    let (decode, prefill) = match head_dim {
        64 => ("attention_decode_64", "attention_prefill_64"),
        80 => ("attention_decode_80", "attention_prefill_80"),
        96 => ("attention_decode_96", "attention_prefill_96"),
        128 => ("attention_decode_128", "attention_prefill_128"),
        256 => ("attention_decode_256", "attention_prefill_256"),
        _ => return None,
    };
    Some(Pair { decode, prefill })
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    kv_heads: usize,
    /// Query heads of a kv head.
    group: usize,
    head_dim: usize,
}

struct Attention<'a> {
    shape: Shape,
    query: View<'a>,
    cache: &'a KvLayer,
    batch: &'a AttentionBatch<'a>,
    params: AttentionParams<'a>,
    out: View<'a>,
}

impl Attention<'_> {
    fn dtypes(&self) -> [DType; 2] {
        [self.query.dtype(), self.cache.dtype()]
    }

    /// Where there are kernels with tensor cores for these types, this head size, and where the rows lie.
    fn kernels(&self) -> Option<Pair> {
        let [query, kv] = self.dtypes();
        let types_fit = query != DType::F32 && (kv == query || kv == DType::F8E4M3);
        // They load and store 16 bytes at once.
        let aligned =
            |view: View<'_>| view.ptr.addr().is_multiple_of(16) && view.row_stride.is_multiple_of(8);
        let rows_fit = aligned(self.query) && aligned(self.out);
        kernels_for(self.shape.head_dim).filter(|_| types_fit && rows_fit)
    }

    fn num_sequences(&self) -> usize {
        self.batch.kv_lens.cols()
    }

    fn scale_window_cap_slopes_sinks(&self) -> [Argument; 5] {
        let AttentionParams { scale, window, soft_cap, alibi_slopes, sinks } = self.params;
        // More than any context is the same as the greatest that the kernels' arithmetic has room for.
        let window = window.map_or(0, |window| window.min(i32::MAX as usize) as u32);
        [scale.into(), window.into(), soft_cap.unwrap_or(0.0).into(), alibi_slopes.into(), sinks.into()]
    }

    /// `BlockTables` of the kernels.
    fn tables(&self) -> [Argument; 4] {
        let AttentionBatch { block_tables, table_rows, max_blocks, .. } = *self.batch;
        let num_tables = block_tables.cols() / max_blocks.max(1);
        [block_tables.into(), (max_blocks as u32).into(), table_rows.into(), (num_tables as u32).into()]
    }

    /// The first sequences, of one row each.
    fn decode(&self, device: &Device, kernels: Pair) -> Result<()> {
        let Shape { kv_heads, group, head_dim } = self.shape;
        let num_sequences = self.batch.num_decodes;
        let tile = DecodeTile::new(head_dim, self.cache.dtype().size_in_bytes());
        let splits = Splits::plan(
            num_sequences * kv_heads * group.div_ceil(ROWS),
            self.batch.max_kv_len,
            device.properties().num_multiprocessors * tile.blocks_at_once(device.properties().shared_bytes),
        );
        let (partials, done) = if splits.needs_memory {
            let rows = splits.max_blocks * group.min(ROWS);
            (
                device.scratch("attention", rows * (head_dim + 2) * size_of::<f32>())?,
                device.scratch("attention_done", splits.max_blocks * size_of::<u32>())?,
            )
        } else {
            (DevicePtr(0), DevicePtr(0))
        };
        let [scale, window, soft_cap, slopes, sinks] = self.scale_window_cap_slopes_sinks();
        let [block_tables, max_blocks, table_rows, num_tables] = self.tables();
        let arguments = [
            self.query.into(),
            (self.query.row_stride as u64).into(),
            self.cache.keys.view().into(),
            self.cache.values.view().into(),
            self.batch.kv_lens.into(),
            block_tables,
            max_blocks,
            table_rows,
            num_tables,
            (self.cache.num_blocks() as u32).into(),
            (kv_heads as u32).into(),
            (group as u32).into(),
            scale,
            window,
            soft_cap,
            slopes,
            sinks,
            (splits.min_positions as u32).into(),
            partials.into(),
            done.into(),
            self.out.into(),
            (self.out.row_stride as u64).into(),
        ];
        let grid = Grid {
            blocks: [(kv_heads * group.div_ceil(ROWS)) as u32, splits.num as u32, num_sequences as u32],
            threads: (tile.warps * WARP) as u32,
            shared_bytes: tile.shared_bytes() as u32,
        };
        let kernel = device.kernel(kernels.decode, &self.dtypes())?;
        // SAFETY: the parameters of `attention_decode_*`; shapes and places are checked above, and `Splits::plan` counts the
        // partial results. Blocks and lengths that the arrays name are kept within the cache by the kernel.
        unsafe { kernel.launch(device, grid, &arguments) }
    }

    /// The sequences behind the decodes.
    fn prefill(&self, device: &Device, kernels: Pair) -> Result<()> {
        let Shape { kv_heads, group, head_dim } = self.shape;
        let first = self.batch.num_decodes;
        let tile = PrefillTile::new(head_dim, self.cache.dtype().size_in_bytes());
        let tiles = (self.batch.max_query_len * group).div_ceil(tile.rows);
        require(OP, tiles <= MAX_GRID, || {
            format!("max_query_len {} x {group} heads: more than a launch covers", self.batch.max_query_len)
        })?;
        let [scale, window, soft_cap, slopes, sinks] = self.scale_window_cap_slopes_sinks();
        let [block_tables, max_blocks, table_rows, num_tables] = self.tables();
        let arguments = [
            self.query.into(),
            (self.query.row_stride as u64).into(),
            self.cache.keys.view().into(),
            self.cache.values.view().into(),
            self.batch.query_starts.into(),
            self.batch.kv_lens.into(),
            block_tables,
            max_blocks,
            table_rows,
            num_tables,
            (self.cache.num_blocks() as u32).into(),
            (group as u32).into(),
            (first as u32).into(),
            (self.query.rows() as u32).into(),
            scale,
            window,
            soft_cap,
            slopes,
            sinks,
            self.out.into(),
            (self.out.row_stride as u64).into(),
        ];
        let grid = Grid {
            blocks: [kv_heads as u32, (self.num_sequences() - first) as u32, tiles as u32],
            threads: PrefillTile::THREADS as u32,
            shared_bytes: tile.shared_bytes as u32,
        };
        let kernel = device.kernel(kernels.prefill, &self.dtypes())?;
        // SAFETY: the parameters of `attention_prefill_*`; shapes and places are checked above. Rows, blocks and lengths
        // that the arrays name are kept within query, output and cache by the kernel.
        unsafe { kernel.launch(device, grid, &arguments) }
    }

    /// All sequences, with the kernel that is for any head and any types.
    fn plain(&self, device: &Device) -> Result<()> {
        const WARPS: usize = 4;
        let Shape { kv_heads, group, head_dim } = self.shape;
        let [scale, window, soft_cap, slopes, sinks] = self.scale_window_cap_slopes_sinks();
        let [block_tables, max_blocks, table_rows, num_tables] = self.tables();
        let arguments = [
            self.query.into(),
            (self.query.row_stride as u64).into(),
            self.cache.keys.view().into(),
            self.cache.values.view().into(),
            self.batch.query_starts.into(),
            self.batch.kv_lens.into(),
            block_tables,
            max_blocks,
            table_rows,
            num_tables,
            (self.cache.num_blocks() as u32).into(),
            (self.query.rows() as u32).into(),
            (kv_heads as u32).into(),
            (head_dim as u32).into(),
            scale,
            window,
            soft_cap,
            slopes,
            sinks,
            self.out.into(),
            (self.out.row_stride as u64).into(),
        ];
        let grid = Grid {
            blocks: [self.batch.max_query_len as u32, self.num_sequences() as u32, (kv_heads * group) as u32],
            threads: (WARPS * WARP) as u32,
            shared_bytes: ((1 + WARPS) * head_dim * size_of::<f32>()) as u32,
        };
        let kernel = device.kernel("attention", &self.dtypes())?;
        // SAFETY: the parameters of `attention_*`; otherwise as of `prefill`.
        unsafe { kernel.launch(device, grid, &arguments) }
    }
}

/// Query rows of a block that decodes.
const ROWS: usize = 16;

/// `DecodeShape` of the kernels.
struct DecodeTile {
    warps: usize,
    stages: usize,
    /// Keys and values that a warp computes with at once.
    unit_bytes: usize,
}

impl DecodeTile {
    fn new(head_dim: usize, element_bytes: usize) -> Self {
        let positions = if element_bytes == 1 || head_dim <= 64 { 32 } else { 16 };
        let unit_bytes = 2 * positions * head_dim * element_bytes;
        Self {
            warps: if unit_bytes > 8192 { 2 } else { 4 },
            stages: if unit_bytes <= 6144 { 4 } else { 3 },
            unit_bytes,
        }
    }

    fn shared_bytes(&self) -> usize {
        self.warps * self.stages * self.unit_bytes
    }

    /// On a multiprocessor that gives one block up to `most_shared_bytes`.
    fn blocks_at_once(&self, most_shared_bytes: usize) -> usize {
        const OWN_BYTES: usize = 2048;
        (most_shared_bytes / (self.shared_bytes() + OWN_BYTES)).max(1)
    }
}

/// `PrefillShape` of the kernels.
struct PrefillTile {
    rows: usize,
    shared_bytes: usize,
}

impl PrefillTile {
    const THREADS: usize = 128;

    fn new(head_dim: usize, element_bytes: usize) -> Self {
        const KEYS: usize = 64;
        let rows = if head_dim <= 128 { 128 } else { 64 };
        Self { rows, shared_bytes: rows * head_dim * 2 + 2 * KEYS * head_dim * element_bytes }
    }
}

/// How many blocks share the positions of a decode row. The kernel divides by the length that it reads, so that the same
/// launch serves every length: splits that a short sequence does not need end at once.
#[derive(Debug, PartialEq, Eq)]
struct Splits {
    num: usize,
    /// Of a split that is not the last.
    min_positions: usize,
    /// Not less than the blocks of this launch, nor of one with fewer sequences: what memory is for.
    max_blocks: usize,
    /// Whether this launch splits, or one with fewer sequences does: the largest step takes the memory of all others.
    needs_memory: bool,
}

impl Splits {
    /// `num_blocks`: without splitting; `at_once`: blocks that the device runs at the same time.
    fn plan(num_blocks: usize, max_kv_len: usize, at_once: usize) -> Self {
        /// As many partial results as the kernel merges.
        const MAX: usize = 64;
        /// Full turns of the device where blocks are many, so that the last, which leaves some of it idle, weighs little, and
        /// a sequence that is longer than the others does not end alone.
        const TURNS: usize = 4;
        // 128 positions outweigh the merging of a split.
        const LEAST_POSITIONS: usize = 128;
        let num_blocks = num_blocks.max(1);
        let (wanted, min_positions) = if 2 * num_blocks <= at_once {
            // One turn: nothing waits.
            (at_once / num_blocks, LEAST_POSITIONS)
        } else {
            let min_positions = if num_blocks < at_once { 512 } else { 1024 };
            ((TURNS * at_once).div_ceil(num_blocks).max(TURNS), min_positions)
        };
        let num = wanted.min(MAX).min(max_kv_len.div_ceil(min_positions)).max(1);
        let needs_memory = max_kv_len > LEAST_POSITIONS;
        Self { num, min_positions, max_blocks: TURNS * (at_once + num_blocks), needs_memory }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: usize = 264;

    #[test]
    fn few_sequences_fill_the_device_once_and_many_are_split_only_where_long() {
        let splits = |num_blocks, max_kv_len| Splits::plan(num_blocks, max_kv_len, AT_ONCE).num;
        assert_eq!(splits(8, 8192), 33);
        assert_eq!(splits(8, 1000), 8);
        assert_eq!(splits(512, 8192), 4);
        assert_eq!(splits(512, 1000), 1);
        assert_eq!(splits(2048, 1 << 17), 4);
        assert_eq!(splits(1, 1 << 17), 64);
        assert_eq!(splits(8, 0), 1);
    }

    #[test]
    fn long_contexts_are_split_as_longer_ones() {
        for num_blocks in 1..5000 {
            let plan = |max_kv_len| Splits::plan(num_blocks, max_kv_len, AT_ONCE);
            assert_eq!(plan(super::super::SAME_LAUNCH_FROM_TOKENS), plan(1 << 20), "{num_blocks}");
        }
    }

    #[test]
    fn memory_for_the_most_sequences_is_enough_for_fewer() {
        for max_kv_len in [1, 1000, 10_000, 1 << 17] {
            let most = (1..5000).map(|num_blocks| {
                let splits = Splits::plan(num_blocks, max_kv_len, AT_ONCE);
                (num_blocks * splits.num, splits, splits_any(num_blocks, max_kv_len))
            });
            let mut needed = 0;
            for (blocks, splits, any) in most {
                needed = blocks.max(needed);
                assert!(needed <= splits.max_blocks, "{needed} blocks in memory for {}", splits.max_blocks);
                assert!(splits.needs_memory || !any, "{splits:?} leaves smaller steps without memory");
            }
        }
    }

    /// Whether a launch of so many blocks or fewer splits.
    fn splits_any(num_blocks: usize, max_kv_len: usize) -> bool {
        [1, num_blocks.div_ceil(2), num_blocks]
            .iter()
            .any(|&blocks| Splits::plan(blocks, max_kv_len, AT_ONCE).num > 1)
    }

    #[test]
    fn shared_memory_of_all_head_sizes_fits_the_smallest_device() {
        // Of compute capability 8.9, less what kernels have of their own.
        const LEAST: usize = 101_376 - 1024;
        for head_dim in [64, 80, 96, 128, 256] {
            assert!(kernels_for(head_dim).is_some());
            for element_bytes in [1, 2] {
                assert!(DecodeTile::new(head_dim, element_bytes).shared_bytes() <= LEAST, "{head_dim}");
                assert!(PrefillTile::new(head_dim, element_bytes).shared_bytes <= LEAST, "{head_dim}");
            }
        }
    }
}
