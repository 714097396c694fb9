//! What lies between the projection to queries, keys and values, and attention, as one operation.

use super::super::operands::{on_fusing_cuda, require};
use super::cache::{KvLayer, write_kv};
use crate::ops::norm::rms_norm_heads;
use crate::ops::rotary::{RotaryTables, rotary};
use crate::{Context, Result, Tensor, View, ViewMut};

/// RMS normalization of each query and each key by itself.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// f32 `[1, head_dim]`.
    pub query: &'a Tensor,
    /// As `query`.
    pub key: &'a Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

/// Where the rows of a batch are, and where their keys and values go.
#[derive(Clone, Copy)]
pub struct RotaryAndPages<'a> {
    /// u32 `[1, rows]`.
    pub positions: View<'a>,
    /// Angles of all positions.
    pub tables: RotaryTables<'a>,
    /// u32 `[1, rows]`: see [`write_kv`].
    pub slots: View<'a>,
}

/// Normalizes queries and keys where there are norms, rotates both, and writes keys and values to the cache.
///
/// `qkv`: `[rows, (query heads + 2 * kv heads) * head_dim]`, queries first, then keys, then values; f32, on a GPU also f16 or
/// bf16. The queries are what attention needs afterwards; keys and values may be as they were or not. On a GPU, which does
/// all in one kernel (but for [`Context::cuda_with_plain_kernels`]), nothing is rounded in between, and rows with a slot that
/// the cache lacks are left alone.
pub fn rotary_write_kv(
    context: &Context,
    mut qkv: ViewMut<'_>,
    norms: Option<HeadNorms<'_>>,
    rotary_and_pages: RotaryAndPages<'_>,
    cache: &mut KvLayer,
) -> Result<()> {
    let (cols, head_dim, key) = (qkv.cols(), cache.head_dim, cache.kv_heads * cache.head_dim);
    require("rotary_write_kv", cols.is_multiple_of(head_dim) && cols > 2 * key, || {
        format!(
            "qkv has {cols} columns, expected those of queries and of 2 * {} heads of {head_dim}",
            cache.kv_heads
        )
    })?;
    on_fusing_cuda!(context, |device| {
        super::cache::cuda::rotary_write_kv(device, qkv, norms, rotary_and_pages, cache)
    });
    let RotaryAndPages { positions, tables, slots } = rotary_and_pages;
    let query = cols - 2 * key;
    if let Some(HeadNorms { query: query_weight, key: key_weight, eps }) = norms {
        rms_norm_heads(context, qkv.reborrow().narrow_cols(0, query), query_weight, eps)?;
        rms_norm_heads(context, qkv.reborrow().narrow_cols(query, key), key_weight, eps)?;
    }
    rotary(context, qkv.reborrow().narrow_cols(0, query + key), head_dim, positions, tables)?;
    let qkv = qkv.as_view();
    write_kv(context, qkv.narrow_cols(query, key), qkv.narrow_cols(query + key, key), slots, cache)
}
