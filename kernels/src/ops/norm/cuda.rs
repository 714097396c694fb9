//! Launches of `cuda/norm.cu`.

use super::super::operands::{device_vector, matrix, matrix_mut, require, require_float, require_on_device};
use super::LayerNormWeights;
use crate::cuda::{Device, Grid};
use crate::{DType, Result, Tensor, View, ViewMut};

pub(super) fn rms_norm(
    device: &Device,
    x: View<'_>,
    weight: &Tensor,
    eps: f32,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "rms_norm";
    let shape = (x.rows(), x.cols());
    require_float(OP, out.dtype())?;
    require_on_device(OP, "x", matrix(x), DType::F32, shape)?;
    require_on_device(OP, "out", matrix_mut(&out), out.dtype(), shape)?;
    let weight = device_vector(OP, "weight", weight, DType::F32, x.cols())?;
    let kernel = device.kernel(OP, &[x.dtype(), out.dtype()])?;
    let arguments = [
        x.into(),
        (x.row_stride as u32).into(),
        weight.into(),
        eps.into(),
        (out.row_stride as u32).into(),
        out.into(),
        (x.cols() as u32).into(),
    ];
    // SAFETY: the parameters of `rms_norm_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, block_for_each_row(shape), &arguments) }
}

pub(super) fn add_rms_norm(
    device: &Device,
    residual: ViewMut<'_>,
    x: View<'_>,
    weight: &Tensor,
    eps: f32,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "add_rms_norm";
    let shape = (x.rows(), x.cols());
    require_float(OP, x.dtype())?;
    require_on_device(OP, "residual", matrix_mut(&residual), DType::F32, shape)?;
    require_on_device(OP, "x", matrix(x), x.dtype(), shape)?;
    require_on_device(OP, "out", matrix_mut(&out), x.dtype(), shape)?;
    let weight = device_vector(OP, "weight", weight, DType::F32, x.cols())?;
    let kernel = device.kernel(OP, &[x.dtype()])?;
    let arguments = [
        (residual.row_stride as u32).into(),
        residual.into(),
        x.into(),
        (x.row_stride as u32).into(),
        weight.into(),
        eps.into(),
        (out.row_stride as u32).into(),
        out.into(),
        (x.cols() as u32).into(),
    ];
    // SAFETY: the parameters of `add_rms_norm_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, block_for_each_row(shape), &arguments) }
}

pub(super) fn rms_norm_heads(device: &Device, x: ViewMut<'_>, weight: &Tensor, eps: f32) -> Result<()> {
    const OP: &str = "rms_norm_heads";
    const WARPS: usize = 4;
    let (rows, cols, head_dim) = (x.rows(), x.cols(), weight.cols());
    require_float(OP, x.dtype())?;
    require_on_device(OP, "x", matrix_mut(&x), x.dtype(), (rows, cols))?;
    require(OP, head_dim > 0 && cols.is_multiple_of(head_dim), || {
        format!("x has {cols} columns, expected a multiple of the weight's {head_dim}")
    })?;
    let weight = device_vector(OP, "weight", weight, DType::F32, head_dim)?;
    let kernel = device.kernel(OP, &[x.dtype()])?;
    let heads = cols / head_dim;
    let grid = Grid {
        blocks: [(rows * heads).div_ceil(WARPS) as u32, 1, 1],
        threads: 32 * WARPS as u32,
        shared_bytes: 0,
    };
    let arguments = [
        (x.row_stride as u32).into(),
        x.into(),
        weight.into(),
        eps.into(),
        (rows as u32).into(),
        (heads as u32).into(),
        (head_dim as u32).into(),
    ];
    // SAFETY: the parameters of `rms_norm_heads_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, grid, &arguments) }
}

pub(super) fn layer_norm(
    device: &Device,
    x: View<'_>,
    weights: LayerNormWeights<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "layer_norm";
    let shape = (x.rows(), x.cols());
    require_float(OP, out.dtype())?;
    require_on_device(OP, "x", matrix(x), DType::F32, shape)?;
    require_on_device(OP, "out", matrix_mut(&out), out.dtype(), shape)?;
    let (weight, bias) = learned(OP, weights, x.cols())?;
    let kernel = device.kernel(OP, &[x.dtype(), out.dtype()])?;
    let arguments = [
        x.into(),
        (x.row_stride as u32).into(),
        weight.into(),
        bias.into(),
        weights.eps.into(),
        (out.row_stride as u32).into(),
        out.into(),
        (x.cols() as u32).into(),
    ];
    // SAFETY: the parameters of `layer_norm_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, block_for_each_row(shape), &arguments) }
}

pub(super) fn add_layer_norm(
    device: &Device,
    residual: ViewMut<'_>,
    x: View<'_>,
    weights: LayerNormWeights<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "add_layer_norm";
    let shape = (x.rows(), x.cols());
    require_float(OP, x.dtype())?;
    require_on_device(OP, "residual", matrix_mut(&residual), DType::F32, shape)?;
    require_on_device(OP, "x", matrix(x), x.dtype(), shape)?;
    require_on_device(OP, "out", matrix_mut(&out), x.dtype(), shape)?;
    let (weight, bias) = learned(OP, weights, x.cols())?;
    let kernel = device.kernel(OP, &[x.dtype()])?;
    let arguments = [
        (residual.row_stride as u32).into(),
        residual.into(),
        x.into(),
        (x.row_stride as u32).into(),
        weight.into(),
        bias.into(),
        weights.eps.into(),
        (out.row_stride as u32).into(),
        out.into(),
        (x.cols() as u32).into(),
    ];
    // SAFETY: the parameters of `add_layer_norm_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, block_for_each_row(shape), &arguments) }
}

fn learned<'a>(
    op: &'static str,
    weights: LayerNormWeights<'a>,
    cols: usize,
) -> Result<(View<'a>, Option<View<'a>>)> {
    let weight = device_vector(op, "weight", weights.weight, DType::F32, cols)?;
    let bias = weights.bias.map(|bias| device_vector(op, "bias", bias, DType::F32, cols)).transpose()?;
    Ok((weight, bias))
}

/// As many threads as keep a row in registers (`KEPT_PACKS` of 4 in the kernels), within what a block may have.
fn block_for_each_row((rows, cols): (usize, usize)) -> Grid {
    let threads = cols.div_ceil(16).next_multiple_of(32).clamp(32, 1024);
    Grid { blocks: [rows as u32, 1, 1], threads: threads as u32, shared_bytes: 0 }
}
