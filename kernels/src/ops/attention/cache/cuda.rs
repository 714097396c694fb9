//! Launches of `cuda/kv_cache.cu`.

use super::super::super::operands::{
    matrix, matrix_mut, require, require_device_u32s, require_float, require_on_device,
};
use super::super::rotary_write_kv::{HeadNorms, RotaryAndPages};
use super::KvLayer;
use crate::cuda::{Argument, Device, Grid};
use crate::ops::rotary::cuda::table_arguments;
use crate::{DType, Result, View, ViewMut};

pub(super) fn write_kv(
    device: &Device,
    keys: View<'_>,
    values: View<'_>,
    slots: View<'_>,
    cache: &mut KvLayer,
) -> Result<()> {
    const OP: &str = "write_kv";
    let shape = (slots.cols(), cache.kv_heads * cache.head_dim);
    require_float(OP, keys.dtype())?;
    require_on_device(OP, "keys", matrix(keys), keys.dtype(), shape)?;
    require_on_device(OP, "values", matrix(values), keys.dtype(), shape)?;
    require_device_u32s(OP, "slots", slots, slots.cols())?;
    let kernel = device.kernel(OP, &[keys.dtype(), cache.dtype()])?;
    let [key_pages, value_pages, num_slots, kv_heads, block_size, head_dim] = page_arguments(OP, cache)?;
    let arguments = [
        keys.into(),
        (keys.row_stride as u32).into(),
        values.into(),
        (values.row_stride as u32).into(),
        slots.into(),
        key_pages,
        value_pages,
        num_slots,
        kv_heads,
        block_size,
        head_dim,
    ];
    // SAFETY: the parameters of `write_kv_*`; shapes and places are checked above, slots by the kernel.
    unsafe { kernel.launch(device, Grid::of_rows(shape.0, shape.1, keys.dtype()), &arguments) }
}

pub(in crate::ops::attention) fn rotary_write_kv(
    device: &Device,
    qkv: ViewMut<'_>,
    norms: Option<HeadNorms<'_>>,
    rotary_and_pages: RotaryAndPages<'_>,
    cache: &mut KvLayer,
) -> Result<()> {
    const OP: &str = "rotary_write_kv";
    const WARPS: usize = 4;
    let RotaryAndPages { positions, tables, slots } = rotary_and_pages;
    let (rows, cols, head_dim) = (qkv.rows(), qkv.cols(), cache.head_dim);
    require_float(OP, qkv.dtype())?;
    require_on_device(OP, "qkv", matrix_mut(&qkv), qkv.dtype(), (rows, cols))?;
    require_device_u32s(OP, "positions", positions, rows)?;
    require_device_u32s(OP, "slots", slots, rows)?;
    let weight = |name, weight: View<'_>| -> Result<Argument> {
        require_on_device(OP, name, matrix(weight), DType::F32, (1, head_dim))?;
        Ok(weight.into())
    };
    let (query_norm, key_norm, eps) = match norms {
        Some(HeadNorms { query, key, eps }) => {
            (weight("query norm", query.view())?, weight("key norm", key.view())?, eps)
        }
        None => (None.into(), None.into(), 0.0),
    };
    let heads = cols / head_dim;
    let shared_bytes = WARPS * head_dim * size_of::<f32>();
    require(OP, shared_bytes <= device.properties().shared_bytes, || {
        format!("a head of {head_dim} elements is more than a GPU's block keeps in shared memory")
    })?;
    let grid = Grid {
        blocks: [(rows * heads).div_ceil(WARPS) as u32, 1, 1],
        threads: 32 * WARPS as u32,
        shared_bytes: shared_bytes as u32,
    };
    let kernel = device.kernel(OP, &[qkv.dtype(), cache.dtype()])?;
    let [cos, sin, table_stride, max_position, half, pairs] = table_arguments(OP, tables, head_dim)?;
    let query_heads = heads - 2 * cache.kv_heads;
    let [key_pages, value_pages, num_slots, kv_heads, block_size, head_dim] = page_arguments(OP, cache)?;
    let arguments = [
        (qkv.row_stride as u32).into(),
        qkv.into(),
        (rows as u32).into(),
        (query_heads as u32).into(),
        query_norm,
        key_norm,
        eps.into(),
        positions.into(),
        cos,
        sin,
        table_stride,
        max_position,
        half,
        pairs,
        slots.into(),
        key_pages,
        value_pages,
        num_slots,
        kv_heads,
        block_size,
        head_dim,
    ];
    // SAFETY: the parameters of `rotary_write_kv_*`; shapes and places are checked above and by the caller, positions and
    // slots by the kernel.
    unsafe { kernel.launch(device, grid, &arguments) }
}

/// Addresses of keys and values, number of slots, heads, tokens of a block, and elements of a head.
fn page_arguments(op: &'static str, cache: &mut KvLayer) -> Result<[Argument; 6]> {
    let KvLayer { kv_heads, block_size, head_dim, .. } = *cache;
    let num_slots = cache.num_blocks() * block_size;
    let (dtype, shape) = (cache.dtype(), (num_slots * kv_heads, head_dim));
    require_on_device(op, "the keys of the cache", matrix(cache.keys.view()), dtype, shape)?;
    require_on_device(op, "the values of the cache", matrix(cache.values.view()), dtype, shape)?;
    Ok([
        cache.keys.view_mut().into(),
        cache.values.view_mut().into(),
        (num_slots as u32).into(),
        (kv_heads as u32).into(),
        (block_size as u32).into(),
        (head_dim as u32).into(),
    ])
}
