//! Launches of `cuda/activation.cu`.

use super::super::operands::{matrix, matrix_mut, require_float, require_on_device};
use super::Activation;
use crate::cuda::{Device, Grid};
use crate::{DType, Result, View, ViewMut};

pub(super) fn gated(
    device: &Device,
    activation: Activation,
    gate_up: View<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "gated";
    let (rows, cols) = (out.rows(), out.cols());
    require_float(OP, out.dtype())?;
    require_on_device(OP, "out", matrix_mut(&out), out.dtype(), (rows, cols))?;
    require_on_device(OP, "gate_up", matrix(gate_up), out.dtype(), (rows, 2 * cols))?;
    let grid = Grid::of_rows(rows, cols, out.dtype());
    let kernel = device.kernel(OP, &[out.dtype()])?;
    let arguments = [
        (activation as u32).into(),
        gate_up.into(),
        (gate_up.row_stride as u32).into(),
        (out.row_stride as u32).into(),
        out.into(),
        (cols as u32).into(),
    ];
    // SAFETY: the parameters of `gated_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, grid, &arguments) }
}

pub(super) fn activate(device: &Device, activation: Activation, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "activate";
    let (rows, cols) = (out.rows(), out.cols());
    require_float(OP, out.dtype())?;
    require_on_device(OP, "out", matrix_mut(&out), out.dtype(), (rows, cols))?;
    require_on_device(OP, "x", matrix(x), out.dtype(), (rows, cols))?;
    let grid = Grid::of_rows(rows, cols, out.dtype());
    let kernel = device.kernel(OP, &[out.dtype()])?;
    let arguments = [
        (activation as u32).into(),
        x.into(),
        (x.row_stride as u32).into(),
        (out.row_stride as u32).into(),
        out.into(),
        (cols as u32).into(),
    ];
    // SAFETY: the parameters of `activate_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, grid, &arguments) }
}

pub(super) fn add(device: &Device, x: ViewMut<'_>, y: View<'_>) -> Result<()> {
    const OP: &str = "add";
    let (rows, cols) = (x.rows(), x.cols());
    require_float(OP, y.dtype())?;
    require_on_device(OP, "x", matrix_mut(&x), DType::F32, (rows, cols))?;
    require_on_device(OP, "y", matrix(y), y.dtype(), (rows, cols))?;
    let kernel = device.kernel(OP, &[x.dtype(), y.dtype()])?;
    let arguments = [
        (x.row_stride as u32).into(),
        x.into(),
        y.into(),
        (y.row_stride as u32).into(),
        (cols as u32).into(),
    ];
    // SAFETY: the parameters of `add_f32_*`; shapes and places are checked above.
    unsafe { kernel.launch(device, Grid::of_rows(rows, cols, DType::F32), &arguments) }
}
