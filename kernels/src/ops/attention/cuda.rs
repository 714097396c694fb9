//! Launches of `cuda/attention.cu`, `attention_decode.cu` and `attention_prefill.cu`.

use super::super::operands::{
    matrix, matrix_mut, require, require_device_u32s, require_float, require_on_device,
};
use super::{AttentionBatch, AttentionParams, KvLayer, OP};
use crate::cuda::{Argument, Device, Grid, Kernels};
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
    let AttentionBatch { max_blocks, num_decodes, max_query_len, .. } = *batch;
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
        let at_once =
            device.properties().num_multiprocessors * tile.blocks_at_once(device.properties().shared_bytes);
        let max_kv_len = self.batch.max_blocks * self.cache.block_size;
        let splits = Splits::new(num_sequences * kv_heads * group.div_ceil(ROWS), max_kv_len, at_once);
        let item_floats = group.min(ROWS) * head_dim + 2 * ROWS;
        let partials = device.scratch("attention", splits.max_items * item_floats * size_of::<f32>())?;
        let counters = device.scratch("attention_done", splits.num_counters * size_of::<u32>())?;
        let [scale, window, soft_cap, slopes, sinks] = self.scale_window_cap_slopes_sinks();
        let [block_tables, max_blocks, table_rows, num_tables] = self.tables();
        let arguments = [
            self.query.into(),
            (self.query.row_stride as u64).into(),
            self.cache.keys.view().into(),
            self.cache.values.view().into(),
            self.batch.kv_lens.into(),
            (num_sequences as u32).into(),
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
            (at_once as u32).into(),
            partials.into(),
            counters.into(),
            self.out.into(),
            (self.out.row_stride as u64).into(),
        ];
        let grid = Grid {
            blocks: [splits.num_blocks as u32, 1, 1],
            threads: (tile.warps * WARP) as u32,
            shared_bytes: tile.shared_bytes() as u32,
        };
        let kernel = device.kernel(kernels.decode, &self.dtypes())?;
        // SAFETY: the parameters of `attention_decode_*`; shapes and places are checked above, and `Splits` counts the items
        // and their counters. Blocks and lengths that the arrays name are kept within the cache by the kernel.
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

/// A launch that decodes. The kernel reads the lengths and cuts them into splits by itself (`Division` there), and its blocks
/// take one after the other, so this is the same for all lengths.
#[derive(Debug, PartialEq, Eq)]
struct Splits {
    /// As many as the device runs at once, unless less can be split so often.
    num_blocks: usize,
    /// Not less than there are splits in this launch, nor in one with fewer sequences: the largest step takes the memory of all
    /// others.
    max_items: usize,
    num_counters: usize,
}

impl Splits {
    /// `num_whole`: items without splitting; `max_kv_len`: what tables have room for.
    fn new(num_whole: usize, max_kv_len: usize, at_once: usize) -> Self {
        /// As many partial results as the kernel merges.
        const MAX: usize = 64;
        /// Numbers of turns that the kernel compares, from the fewest that take all sequences on.
        const TURNS: usize = 16;
        /// Of a split that is not the last.
        const LEAST_POSITIONS: usize = 128;
        let most = MAX.min(max_kv_len.div_ceil(LEAST_POSITIONS)).max(1);
        Self {
            num_blocks: at_once.min(num_whole * most),
            max_items: (num_whole + TURNS * at_once).min(num_whole * MAX),
            num_counters: 1 + num_whole,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: usize = 264;

    #[test]
    fn a_launch_has_the_blocks_that_run_at_once_or_fewer_where_less_can_be_split() {
        let num_blocks = |num_whole, max_kv_len| Splits::new(num_whole, max_kv_len, AT_ONCE).num_blocks;
        assert_eq!(num_blocks(8, 1 << 17), AT_ONCE);
        assert_eq!(num_blocks(2048, 1 << 17), AT_ONCE);
        assert_eq!(num_blocks(2048, 32), AT_ONCE);
        assert_eq!(num_blocks(1, 1 << 17), 64);
        assert_eq!(num_blocks(8, 1000), 64);
        assert_eq!(num_blocks(3, 0), 3);
        assert_eq!(num_blocks(0, 1 << 17), 0);
    }

    #[test]
    fn memory_for_the_most_sequences_is_enough_for_fewer() {
        let all: Vec<_> = (0..5000).map(|num_whole| Splits::new(num_whole, 1 << 17, AT_ONCE)).collect();
        for pair in all.windows(2) {
            let [fewer, more] = pair else { unreachable!("pairs") };
            assert!(fewer.max_items <= more.max_items && fewer.num_counters < more.num_counters, "{pair:?}");
        }
        // Of the heads of Llama-3.1-8B, for 256 sequences.
        let bytes = all[8 * 256].max_items * (4 * 128 + 2 * ROWS) * size_of::<f32>();
        assert!(bytes < 14 << 20, "{bytes}");
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
