//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864), pairs half a head apart as in Hugging Face checkpoints.

use super::operands::{SharedRows, matrix, matrix_mut, require, require_f32_matrix, u32_vector};
use crate::simd::{Float, Kernel, Simd, spans};
use crate::{Context, Result, Tensor, View, ViewMut};

/// Rotates each head of each row by its position, in place.
///
/// `x`: f32 `[rows, heads * head_dim]`; `positions`: u32 `[1, rows]`; `cos`, `sin`: f32 `[max position, rotary_dim / 2]`,
/// rotary_dim <= head_dim (the rest of a head stays as it is).
pub fn rotary(
    context: &Context,
    x: ViewMut<'_>,
    head_dim: usize,
    positions: View<'_>,
    cos: &Tensor,
    sin: &Tensor,
) -> Result<()> {
    const OP: &str = "rotary";
    let (rows, cols) = (x.rows(), x.cols());
    require_f32_matrix(OP, "x", matrix_mut(&x), (rows, cols))?;
    require_f32_matrix(OP, "cos", matrix(cos.view()), (cos.rows(), cos.cols()))?;
    require_f32_matrix(OP, "sin", matrix(sin.view()), (cos.rows(), cos.cols()))?;
    require(OP, head_dim > 0 && cols.is_multiple_of(head_dim) && 2 * cos.cols() <= head_dim, || {
        format!("x has {cols} columns, a head {head_dim}, of which 2 x {} are rotated", cos.cols())
    })?;
    let positions = u32_vector(OP, "positions", positions, rows)?;
    require(OP, positions.iter().all(|&position| (position as usize) < cos.rows()), || {
        format!("a position is beyond the {} of the tables: {:?}", cos.rows(), positions.iter().max())
    })?;
    let x = SharedRows::new(x);
    context.for_rows(rows, 2 * cols, |row| {
        let position = positions[row] as usize;
        let (cos, sin) = (cos.view().row(position), sin.view().row(position));
        // SAFETY: each task has rows of its own.
        let row = unsafe { x.row(row) };
        context.level().run(Rotate { row, head_dim, cos, sin });
    });
    Ok(())
}

/// The heads of one row; `cos` and `sin` have half as many elements as are rotated.
struct Rotate<'a> {
    row: &'a mut [f32],
    head_dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.cos.len();
        assert!(self.sin.len() == half && 2 * half <= self.head_dim, "checked by the operation");
        for head in self.row.chunks_exact_mut(self.head_dim) {
            let (first, second) = head.split_at_mut(half);
            for (start, len) in spans(half) {
                let (a_at, b_at) = (first[start..].as_mut_ptr(), second[start..].as_mut_ptr());
                // SAFETY: a span lies within the half of each.
                unsafe {
                    let cos = f32::load_part(simd, self.cos.as_ptr().add(start), len);
                    let sin = f32::load_part(simd, self.sin.as_ptr().add(start), len);
                    let (a, b) = (f32::load_part(simd, a_at, len), f32::load_part(simd, b_at, len));
                    f32::store_part(simd, a_at, len, simd.sub(simd.mul(a, cos), simd.mul(b, sin)));
                    f32::store_part(simd, b_at, len, simd.add(simd.mul(b, cos), simd.mul(a, sin)));
                }
            }
        }
    }
}
