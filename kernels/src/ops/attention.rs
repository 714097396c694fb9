//! Attention over paged keys and values (Kwon et al. 2023, "PagedAttention", arXiv:2309.06180).

use crate::{Context, DType, Result, Tensor, View, ViewMut};

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
    pub fn new(num_blocks: usize, kv_heads: usize, block_size: usize, head_dim: usize, dtype: DType) -> Self {
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
    /// A row attends to the last `window` positions only, its own included.
    pub window: Option<usize>,
}

/// Writes keys and values of a flat batch to the cache. `keys`, `values`: f32 `[rows, kv_heads * head_dim]`; `slots[i]` =
/// block id * block size + place in the block.
pub fn write_kv(
    context: &Context,
    keys: View<'_>,
    values: View<'_>,
    slots: &[u32],
    cache: &mut KvLayer,
) -> Result<()> {
    let _ = context;
    let (block_size, head_dim) = (cache.block_size, cache.head_dim);
    let cast = |tensor: &mut Tensor, row: usize, data: &[f32]| match tensor.dtype() {
        DType::F32 => tensor.view_mut().row::<f32>(row).copy_from_slice(data),
        DType::F16 => {
            let out = tensor.view_mut();
            let mut out = out.narrow_rows(row, 1);
            out.row::<half::f16>(0).iter_mut().zip(data).for_each(|(o, v)| *o = half::f16::from_f32(*v));
        }
        _ => {
            let mut out = tensor.view_mut().narrow_rows(row, 1);
            out.row::<half::bf16>(0).iter_mut().zip(data).for_each(|(o, v)| *o = half::bf16::from_f32(*v));
        }
    };
    for (row, &slot) in slots.iter().enumerate() {
        let (block, place) = (slot as usize / block_size, slot as usize % block_size);
        for head in 0..cache.kv_heads {
            let line = (block * cache.kv_heads + head) * block_size + place;
            let part = head * head_dim..(head + 1) * head_dim;
            cast(&mut cache.keys, line, &keys.row::<f32>(row)[part.clone()]);
            cast(&mut cache.values, line, &values.row::<f32>(row)[part]);
        }
    }
    Ok(())
}

/// Causal attention of a flat batch of decode rows and prefill chunks over the cache (this step's keys and values must
/// have been written). `query`, `out`: f32 `[rows, heads * head_dim]`, heads a multiple of the cache's kv heads.
pub fn paged_attention(
    context: &Context,
    query: View<'_>,
    cache: &KvLayer,
    batch: &AttentionBatch<'_>,
    params: AttentionParams,
    mut out: ViewMut<'_>,
) -> Result<()> {
    let _ = context;
    let (block_size, head_dim) = (cache.block_size, cache.head_dim);
    let heads = query.cols() / head_dim;
    let group = heads / cache.kv_heads;
    for sequence in 0..batch.kv_lens.len() {
        let rows = batch.query_starts[sequence] as usize..batch.query_starts[sequence + 1] as usize;
        let table = &batch.block_tables[sequence * batch.max_blocks..];
        let kv_len = batch.kv_lens[sequence] as usize;
        for row in rows.clone() {
            let position = kv_len - (rows.end - row);
            let first = params.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads {
                let q = &query.row::<f32>(row)[head * head_dim..(head + 1) * head_dim];
                let line = |p: usize| {
                    (table[p / block_size] as usize * cache.kv_heads + head / group) * block_size
                        + p % block_size
                };
                let mut scores = Vec::new();
                for p in first..=position {
                    let key = cache.keys.view().row_f32(line(p))?;
                    scores.push(q.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * params.scale);
                }
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = scores.iter().map(|s| (s - max).exp()).sum();
                let output = &mut out.row::<f32>(row)[head * head_dim..(head + 1) * head_dim];
                output.fill(0.0);
                for (p, score) in (first..=position).zip(scores) {
                    let value = cache.values.view().row_f32(line(p))?;
                    let weight = (score - max).exp() / total;
                    output.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
                }
            }
        }
    }
    Ok(())
}
