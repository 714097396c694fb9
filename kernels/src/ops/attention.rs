//! Attention over paged keys and values (Kwon et al. 2023, "PagedAttention", arXiv:2309.06180).

use half::{bf16, f16};

use super::operands::{
    SharedRows, matrix, matrix_mut, require, require_f32_matrix, require_float, unsupported_float,
};
use crate::simd::{Float, Kernel, Simd, spans};
use crate::{Context, DType, Result, Tensor, View, ViewMut};

mod online_softmax;

/// Keys and values of one layer, `[num_blocks, kv_heads, block_size, head_dim]` each, in f32, f16 or bf16: one block of
/// one head is contiguous.
pub struct KvLayer {
    keys: Tensor,
    values: Tensor,
    kv_heads: usize,
    block_size: usize,
    head_dim: usize,
}

impl KvLayer {
    /// Zeroed; the system gives pages when they are first written.
    ///
    /// # Panics
    /// Where a block would be empty.
    pub fn new(num_blocks: usize, kv_heads: usize, block_size: usize, head_dim: usize, dtype: DType) -> Self {
        assert!(kv_heads > 0 && block_size > 0 && head_dim > 0, "empty blocks");
        let zeros = || Tensor::zeros(num_blocks * kv_heads * block_size, head_dim, dtype);
        Self { keys: zeros(), values: zeros(), kv_heads, block_size, head_dim }
    }
    /// Bytes of keys and values.
    pub fn size_in_bytes(&self) -> usize {
        self.keys.size_in_bytes() + self.values.size_in_bytes()
    }
    /// Tokens in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }
    fn num_blocks(&self) -> usize {
        self.keys.rows() / (self.kv_heads * self.block_size)
    }
}

/// Where the sequences of a flat batch lie. Sequence `s` owns query rows `query_starts[s] .. query_starts[s + 1]`; the
/// last of them is position `kv_lens[s] - 1`, and each row attends to all positions up to its own.
#[derive(Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// `num_sequences + 1` ascending row numbers, the first 0.
    pub query_starts: &'a [u32],
    /// Tokens of each sequence whose keys and values are in the cache, those of this step included.
    pub kv_lens: &'a [u32],
    /// `[num_sequences, max_blocks]`, row by row; entries behind a sequence's last block are not read.
    pub block_tables: &'a [u32],
    /// Columns of `block_tables`.
    pub max_blocks: usize,
}

/// How scores are made.
#[derive(Clone, Copy)]
pub struct AttentionParams {
    /// Multiplies the dot products.
    pub scale: f32,
    /// A row attends to the last `window` positions only, its own included; at least 1.
    pub window: Option<usize>,
}

/// Writes keys and values of a flat batch to the cache, rounded to nearest. `keys`, `values`: f32
/// `[rows, kv_heads * head_dim]`; `slots[i]` = block id * block size + place in the block.
pub fn write_kv(
    context: &Context,
    keys: View<'_>,
    values: View<'_>,
    slots: &[u32],
    cache: &mut KvLayer,
) -> Result<()> {
    const OP: &str = "write_kv";
    let shape = (slots.len(), cache.kv_heads * cache.head_dim);
    require_f32_matrix(OP, "keys", matrix(keys), shape)?;
    require_f32_matrix(OP, "values", matrix(values), shape)?;
    require_float(OP, cache.keys.dtype())?;
    let num_slots = cache.num_blocks() * cache.block_size;
    require(OP, slots.iter().all(|&slot| (slot as usize) < num_slots), || {
        format!("a slot is beyond the {num_slots} of the cache: {slots:?}")
    })?;
    let (kv_heads, block_size) = (cache.kv_heads, cache.block_size);
    for (source, target) in [(keys, cache.keys.view_mut()), (values, cache.values.view_mut())] {
        let write = Write { source, slots, kv_heads, block_size };
        match target.dtype() {
            DType::F32 => context.level().run(WriteTo::<f32>(write, target.into_slice())),
            DType::F16 => context.level().run(WriteTo::<f16>(write, target.into_slice())),
            DType::BF16 => context.level().run(WriteTo::<bf16>(write, target.into_slice())),
            dtype => return Err(unsupported_float(OP, dtype)),
        }
    }
    Ok(())
}

struct Write<'a> {
    source: View<'a>,
    slots: &'a [u32],
    kv_heads: usize,
    block_size: usize,
}

struct WriteTo<'a, T>(Write<'a>, &'a mut [T]);

impl<T: Float> Kernel for WriteTo<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(Write { source, slots, kv_heads, block_size }, target) = self;
        let head_dim = source.cols() / kv_heads;
        for (row, &slot) in slots.iter().enumerate() {
            let (block, place) = (slot as usize / block_size, slot as usize % block_size);
            for (head, from) in source.row::<f32>(row).chunks_exact(head_dim).enumerate() {
                let line = (block * kv_heads + head) * block_size + place;
                let to = &mut target[line * head_dim..][..head_dim];
                for (start, len) in spans(head_dim) {
                    // SAFETY: a span lies within the `head_dim` elements of both.
                    unsafe {
                        let vector = f32::load_part(simd, from.as_ptr().add(start), len);
                        T::store_part(simd, to.as_mut_ptr().add(start), len, vector);
                    }
                }
            }
        }
    }
}

/// Causal attention of a flat batch of decode rows and prefill chunks over the cache (this step's keys and values must
/// have been written). `query`, `out`: f32 `[rows, heads * head_dim]`, heads a multiple of the cache's kv heads.
///
/// A row's result depends on its query, its position, the window and the cache's contents only, not on how a prompt is cut
/// into chunks, on other rows, or on which blocks hold a sequence: blocks are taken in order, each as a whole.
pub fn paged_attention(
    context: &Context,
    query: View<'_>,
    cache: &KvLayer,
    batch: &AttentionBatch<'_>,
    params: AttentionParams,
    out: ViewMut<'_>,
) -> Result<()> {
    check(query, cache, batch, &out)?;
    require("paged_attention", params.window != Some(0), || "a window of 0 positions".into())?;
    let attention = Attention { query, cache, batch, params, out: SharedRows::new(out) };
    let group = query.cols() / (cache.kv_heads * cache.head_dim);
    // A tile's rows read each block together; a decode row is a tile of its own.
    let tile_rows = (online_softmax::MAX_QUERIES / group).max(1);
    let tiles = |sequence: usize| {
        let rows = batch.query_starts[sequence + 1] - batch.query_starts[sequence];
        (rows as usize).div_ceil(tile_rows)
    };
    let num_sequences = batch.kv_lens.len();
    let num_tasks = (0..num_sequences).map(tiles).sum::<usize>() * cache.kv_heads;
    let run = |task: usize| {
        let (mut tile, kv_head) = (task / cache.kv_heads, task % cache.kv_heads);
        let mut sequence = 0;
        while tile >= tiles(sequence) {
            tile -= tiles(sequence);
            sequence += 1;
        }
        let rows = batch.query_starts[sequence] as usize..batch.query_starts[sequence + 1] as usize;
        let first = rows.start + tile * tile_rows;
        let rows = Rows { sequence, first, len: tile_rows.min(rows.end - first), end: rows.end };
        attention.run(context, rows, kv_head);
    };
    if attention.is_small() {
        (0..num_tasks).for_each(run);
    } else {
        context.parallel_for(num_tasks, run);
    }
    Ok(())
}

fn check(query: View<'_>, cache: &KvLayer, batch: &AttentionBatch<'_>, out: &ViewMut<'_>) -> Result<()> {
    const OP: &str = "paged_attention";
    let AttentionBatch { query_starts, kv_lens, block_tables, max_blocks } = *batch;
    let shape = (query.rows(), query.cols());
    require_f32_matrix(OP, "query", matrix(query), shape)?;
    require_f32_matrix(OP, "out", matrix_mut(out), shape)?;
    require_float(OP, cache.keys.dtype())?;
    let kv_cols = cache.kv_heads * cache.head_dim;
    require(OP, query.cols().is_multiple_of(kv_cols) && query.cols() > 0, || {
        format!(
            "query has {} columns, expected a multiple of {} kv heads x {}",
            shape.1, cache.kv_heads, cache.head_dim
        )
    })?;
    require(
        OP,
        query_starts.len() == kv_lens.len() + 1 && block_tables.len() >= kv_lens.len() * max_blocks,
        || {
            format!(
                "{} query starts and {} block table entries for {} sequences of {max_blocks} blocks",
                query_starts.len(),
                block_tables.len(),
                kv_lens.len()
            )
        },
    )?;
    let covers = query_starts[0] == 0 && query_starts.last().is_some_and(|&end| end as usize == query.rows());
    require(OP, covers && query_starts.is_sorted(), || {
        format!("query starts {query_starts:?} do not ascend from 0 to the {} rows", query.rows())
    })?;
    for (sequence, &kv_len) in kv_lens.iter().enumerate() {
        let rows = query_starts[sequence + 1] - query_starts[sequence];
        let blocks = (kv_len as usize).div_ceil(cache.block_size);
        require(OP, rows <= kv_len && blocks <= max_blocks, || {
            format!("sequence {sequence} has {rows} rows, {kv_len} tokens and a table of {max_blocks} blocks")
        })?;
        let table = &block_tables[sequence * max_blocks..][..blocks];
        require(OP, table.iter().all(|&block| (block as usize) < cache.num_blocks()), || {
            format!(
                "sequence {sequence} has a block beyond the {} of the cache: {table:?}",
                cache.num_blocks()
            )
        })?;
    }
    Ok(())
}

struct Attention<'a> {
    query: View<'a>,
    cache: &'a KvLayer,
    batch: &'a AttentionBatch<'a>,
    params: AttentionParams,
    out: SharedRows<'a>,
}

/// Rows of a tile.
#[derive(Clone, Copy)]
struct Rows {
    sequence: usize,
    first: usize,
    len: usize,
    /// Of the sequence.
    end: usize,
}

impl Attention<'_> {
    /// Whether waking another thread would take longer than the work.
    fn is_small(&self) -> bool {
        const MULTIPLY_ADDS: usize = 200_000;
        let starts = self.batch.query_starts.windows(2);
        let products: usize = starts
            .zip(self.batch.kv_lens)
            .map(|(rows, &len)| (rows[1] - rows[0]) as usize * len as usize)
            .sum();
        2 * products * self.query.cols() < MULTIPLY_ADDS
    }

    fn run(&self, context: &Context, rows: Rows, kv_head: usize) {
        match self.cache.keys.dtype() {
            DType::F32 => context.level().run(self.tile::<f32>(rows, kv_head)),
            DType::F16 => context.level().run(self.tile::<f16>(rows, kv_head)),
            DType::BF16 => context.level().run(self.tile::<bf16>(rows, kv_head)),
            dtype => unreachable!("{}", unsupported_float("paged_attention", dtype)),
        }
    }

    fn tile<T: Float>(&self, rows: Rows, kv_head: usize) -> online_softmax::Tile<'_, T> {
        let KvLayer { kv_heads, block_size, head_dim, .. } = *self.cache;
        let group = self.query.cols() / (kv_heads * head_dim);
        let kv_len = self.batch.kv_lens[rows.sequence] as usize;
        online_softmax::Tile {
            query: self
                .query
                .narrow_rows(rows.first, rows.len)
                .narrow_cols(kv_head * group * head_dim, group * head_dim),
            out: self.out.at(rows.first, kv_head * group * head_dim),
            out_stride: self.out.row_stride(),
            first_position: kv_len - (rows.end - rows.first),
            keys: self.cache.keys.as_slice::<T>(),
            values: self.cache.values.as_slice::<T>(),
            table: &self.batch.block_tables[rows.sequence * self.batch.max_blocks..],
            kv_heads,
            kv_head,
            block_size,
            head_dim,
            params: self.params,
        }
    }
}
