//! Rows by index.

use half::{bf16, f16};

use super::operands::{
    SharedRows, matrix, matrix_mut, on_cuda, require, require_f32_matrix, require_float, u32_vector,
    u32_vector_mut, unsupported_float,
};
use crate::simd::{Float, Kernel, Simd, spans};
use crate::{Context, DType, Error, Result, Tensor, View, ViewMut};

#[cfg(feature = "cuda")]
mod cuda;

/// `out[i] = table[ids[i] - first_id]`, or zeros where the id is not in this rank's part of the table, so that a sum
/// over the ranks gives each row once.
///
/// `table`: f32, f16 or bf16 `[vocab rows of this rank, cols]`; `ids`: u32 `[1, rows]`; `out`: f32 `[rows, cols]`.
pub fn embedding(
    context: &Context,
    ids: View<'_>,
    table: &Tensor,
    first_id: u32,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "embedding";
    on_cuda!(context, |device| cuda::embedding(device, ids, table, first_id, out));
    let (rows, cols) = (out.rows(), table.cols());
    require_float(OP, table.dtype())?;
    require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
    let ids = u32_vector(OP, "ids", ids, rows)?;
    let out = SharedRows::new(out);
    context.for_rows(rows, cols, |row| {
        // SAFETY: each task has rows of its own.
        let out = unsafe { out.row(row) };
        let id = ids[row].checked_sub(first_id).map(|id| id as usize).filter(|&id| id < table.rows());
        let Some(id) = id else { return out.fill(0.0) };
        match table.dtype() {
            DType::F32 => context.level().run(Widen::<f32> { from: table.view().row(id), to: out }),
            DType::F16 => context.level().run(Widen::<f16> { from: table.view().row(id), to: out }),
            DType::BF16 => context.level().run(Widen::<bf16> { from: table.view().row(id), to: out }),
            dtype => unreachable!("{}", unsupported_float(OP, dtype)),
        }
    });
    Ok(())
}

/// `out[i] = x[rows[i]]`. `x`, `out`: f32 of the same width, on a GPU also both f16 or both bf16; `rows`: u32 `[1, n]`, each
/// below `x.rows()` (a GPU, which is not waited for, answers others with zeros).
pub fn gather_rows(context: &Context, x: View<'_>, rows: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "gather_rows";
    on_cuda!(context, |device| cuda::gather_rows(device, x, rows, out));
    require_f32_matrix(OP, "x", matrix(x), (x.rows(), x.cols()))?;
    require_f32_matrix(OP, "out", matrix_mut(&out), (out.rows(), x.cols()))?;
    let rows = u32_vector(OP, "rows", rows, out.rows())?;
    require(OP, rows.iter().all(|&row| (row as usize) < x.rows()), || {
        format!("a row is beyond the {} of x: {rows:?}", x.rows())
    })?;
    let out = SharedRows::new(out);
    context.for_rows(rows.len(), x.cols(), |i| {
        // SAFETY: each task has rows of its own.
        unsafe { out.row(i) }.copy_from_slice(x.row(rows[i] as usize));
    });
    Ok(())
}

/// The bit of an id that makes it the number of a place among the last tokens.
pub const LAST_TOKEN_OF: u32 = 1 << 31;

/// `out[i] = ids[i]`, or the last token at the place that the other bits of the id name where it has the bit
/// [`LAST_TOKEN_OF`]: tokens that a step needs before the host has seen them. `ids`, `out`: u32 `[1, rows]`; `last_tokens`: u32
/// `[1, places]` (a GPU answers other places with token 0).
pub fn resolve_ids(context: &Context, ids: View<'_>, last_tokens: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "resolve_ids";
    on_cuda!(context, |device| cuda::resolve_ids(device, ids, last_tokens, out));
    let ids = u32_vector(OP, "ids", ids, ids.cols())?;
    let last_tokens = u32_vector(OP, "last_tokens", last_tokens, last_tokens.cols())?;
    let out = u32_vector_mut(OP, "out", out, ids.len())?;
    for (out, &id) in out.iter_mut().zip(ids) {
        *out = if id & LAST_TOKEN_OF == 0 {
            id
        } else {
            let place = id & !LAST_TOKEN_OF;
            *last_tokens.get(place as usize).ok_or_else(|| Error::Shape {
                op: OP,
                message: format!("place {place} is beyond the {} last tokens", last_tokens.len()),
            })?
        };
    }
    Ok(())
}

/// One row; both have one length.
struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Float> Kernel for Widen<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert_eq!(self.from.len(), self.to.len(), "checked by the operation");
        for (start, len) in spans(self.to.len()) {
            // SAFETY: a span lies within both.
            unsafe {
                let vector = T::load_part(simd, self.from.as_ptr().add(start), len);
                f32::store_part(simd, self.to.as_mut_ptr().add(start), len, vector);
            }
        }
    }
}
