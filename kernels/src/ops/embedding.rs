//! Rows by index.

use crate::{Context, Result, Tensor, View, ViewMut};

/// `out[i] = table[ids[i] - first_id]`, or zeros where the id is not in this rank's part of the table, so that a sum
/// over the ranks gives each row once.
///
/// `table`: f32, f16 or bf16 `[vocab rows of this rank, cols]`; `ids`: u32 `[1, rows]`; `out`: f32 `[rows, cols]`.
pub fn embedding(
    context: &Context,
    ids: View<'_>,
    table: &Tensor,
    first_id: u32,
    mut out: ViewMut<'_>,
) -> Result<()> {
    let _ = context;
    for (row, &id) in ids.into_slice::<u32>().iter().enumerate() {
        match id.checked_sub(first_id).map(|id| id as usize).filter(|&id| id < table.rows()) {
            Some(id) => out.row::<f32>(row).copy_from_slice(&table.view().row_f32(id)?),
            None => out.row::<f32>(row).fill(0.0),
        }
    }
    Ok(())
}

/// `out[i] = x[rows[i]]`. `x`, `out`: f32 of the same width; `rows`: u32 `[1, n]`, each below `x.rows()`.
pub fn gather_rows(context: &Context, x: View<'_>, rows: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    let _ = context;
    for (i, &row) in rows.into_slice::<u32>().iter().enumerate() {
        out.row::<f32>(i).copy_from_slice(x.row::<f32>(row as usize));
    }
    Ok(())
}
