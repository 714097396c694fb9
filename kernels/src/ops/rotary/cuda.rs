//! Launches of `cuda/rotary.cu`.

use super::super::operands::{
    matrix, matrix_mut, require, require_device_u32s, require_float, require_on_device,
};
use super::RotaryTables;
use crate::cuda::{Argument, Device, Grid};
use crate::{DType, Result, View, ViewMut};

pub(super) fn rotary(
    device: &Device,
    x: ViewMut<'_>,
    head_dim: usize,
    positions: View<'_>,
    tables: RotaryTables<'_>,
) -> Result<()> {
    const OP: &str = "rotary";
    let (rows, cols) = (x.rows(), x.cols());
    require_float(OP, x.dtype())?;
    require_on_device(OP, "x", matrix_mut(&x), x.dtype(), (rows, cols))?;
    require(OP, head_dim > 0 && cols.is_multiple_of(head_dim), || {
        format!("x has {cols} columns, a head {head_dim}")
    })?;
    require_device_u32s(OP, "positions", positions, rows)?;
    let [cos, sin, stride, max_position, half, pairs] = table_arguments(OP, tables, head_dim)?;
    let pairs_of_row = cols / head_dim * tables.cos.cols();
    let grid = Grid::of_rows(rows, pairs_of_row, x.dtype());
    let kernel = device.kernel(OP, &[x.dtype()])?;
    let arguments = [
        (x.row_stride as u32).into(),
        x.into(),
        ((cols / head_dim) as u32).into(),
        (head_dim as u32).into(),
        positions.into(),
        cos,
        sin,
        stride,
        max_position,
        half,
        pairs,
    ];
    // SAFETY: the parameters of `rotary_*`; shapes and places are checked above, positions by the kernel.
    unsafe { kernel.launch(device, grid, &arguments) }
}

/// Addresses of cosines and sines, their row stride, number of positions, of pairs, and which the pairs are.
pub(in crate::ops) fn table_arguments(
    op: &'static str,
    tables: RotaryTables<'_>,
    head_dim: usize,
) -> Result<[Argument; 6]> {
    let (cos, sin) = (tables.cos.view(), tables.sin.view());
    let shape = (cos.rows(), cos.cols());
    require_on_device(op, "cos", matrix(cos), DType::F32, shape)?;
    require_on_device(op, "sin", matrix(sin), DType::F32, shape)?;
    require(op, 2 * cos.cols() <= head_dim, || {
        format!("a head has {head_dim} elements, of which 2 x {} are rotated", cos.cols())
    })?;
    require(op, cos.row_stride == sin.row_stride, || {
        format!("rows of cos are {} apart, those of sin {}", cos.row_stride, sin.row_stride)
    })?;
    Ok([
        cos.into(),
        sin.into(),
        (cos.row_stride as u32).into(),
        (cos.rows() as u32).into(),
        (cos.cols() as u32).into(),
        (tables.pairs as u32).into(),
    ])
}
