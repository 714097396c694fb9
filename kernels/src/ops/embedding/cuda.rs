//! Launches of `cuda/embedding.cu`.

use super::super::operands::{matrix, matrix_mut, require_device_u32s, require_float, require_on_device};
use crate::cuda::{Device, Grid};
use crate::{DType, Result, Tensor, View, ViewMut};

pub(super) fn embedding(
    device: &Device,
    ids: View<'_>,
    table: &Tensor,
    first_id: u32,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "embedding";
    let (rows, cols) = (out.rows(), table.cols());
    let table = table.view();
    require_float(OP, table.dtype())?;
    require_on_device(OP, "table", matrix(table), table.dtype(), (table.rows(), cols))?;
    require_on_device(OP, "out", matrix_mut(&out), DType::F32, (rows, cols))?;
    require_device_u32s(OP, "ids", ids, rows)?;
    let kernel = device.kernel(OP, &[table.dtype(), out.dtype()])?;
    let arguments = [
        ids.into(),
        first_id.into(),
        table.into(),
        (table.row_stride as u32).into(),
        (table.rows() as u32).into(),
        (out.row_stride as u32).into(),
        out.into(),
        (cols as u32).into(),
    ];
    // SAFETY: the parameters of `embedding_*`; shapes and places are checked above, ids by the kernel.
    unsafe { kernel.launch(device, Grid::of_rows(rows, cols, DType::F32), &arguments) }
}

pub(super) fn gather_rows(device: &Device, x: View<'_>, rows: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "gather_rows";
    let (count, cols) = (out.rows(), x.cols());
    require_float(OP, x.dtype())?;
    require_on_device(OP, "x", matrix(x), x.dtype(), (x.rows(), cols))?;
    require_on_device(OP, "out", matrix_mut(&out), x.dtype(), (count, cols))?;
    require_device_u32s(OP, "rows", rows, count)?;
    let kernel = device.kernel(OP, &[x.dtype()])?;
    let arguments = [
        rows.into(),
        x.into(),
        (x.row_stride as u32).into(),
        (x.rows() as u32).into(),
        (out.row_stride as u32).into(),
        out.into(),
        (cols as u32).into(),
    ];
    // SAFETY: the parameters of `gather_rows_*`; shapes and places are checked above, row numbers by the kernel.
    unsafe { kernel.launch(device, Grid::of_rows(count, cols, x.dtype()), &arguments) }
}

pub(super) fn resolve_ids(
    device: &Device,
    ids: View<'_>,
    last_tokens: View<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "resolve_ids";
    let (rows, num_places) = (ids.cols(), last_tokens.cols());
    require_device_u32s(OP, "ids", ids, rows)?;
    require_device_u32s(OP, "last_tokens", last_tokens, num_places)?;
    require_device_u32s(OP, "out", out.as_view(), rows)?;
    let kernel = device.kernel(OP, &[])?;
    let grid = Grid { blocks: [rows.div_ceil(256) as u32, 1, 1], threads: 256, shared_bytes: 0 };
    let arguments =
        [ids.into(), (rows as u32).into(), last_tokens.into(), (num_places as u32).into(), out.into()];
    // SAFETY: the parameters of `resolve_ids`; shapes and places are checked above, places of tokens by the kernel.
    unsafe { kernel.launch(device, grid, &arguments) }
}
