//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864). Scaling for long contexts is the tables' business.

use super::operands::{SharedRows, matrix, matrix_mut, on_cuda, require, require_f32_matrix, u32_vector};
use crate::simd::{Float, Kernel, Simd, spans};
use crate::{Context, Result, Tensor, View, ViewMut};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// Which elements of a head are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryPairs {
    /// Half of the turned elements apart: GPT-NeoX, Llama and most checkpoints of Hugging Face.
    HalfApart,
    /// Side by side: GPT-J, Cohere, GLM.
    Adjacent,
}

/// Angles of all positions.
#[derive(Clone, Copy)]
pub struct RotaryTables<'a> {
    /// f32 `[max position, rotary_dim / 2]`, rotary_dim <= head_dim: the rest of a head stays as it is.
    pub cos: &'a Tensor,
    /// As `cos`.
    pub sin: &'a Tensor,
    /// Which elements the angles are for.
    pub pairs: RotaryPairs,
}

/// Rotates each head of each row by its position, in place.
///
/// `x`: f32 `[rows, heads * head_dim]`, on a GPU also f16 or bf16; `positions`: u32 `[1, rows]`, each in the tables (a GPU,
/// which is not waited for, leaves rows of others as they are).
pub fn rotary(
    context: &Context,
    x: ViewMut<'_>,
    head_dim: usize,
    positions: View<'_>,
    tables: RotaryTables<'_>,
) -> Result<()> {
    const OP: &str = "rotary";
    on_cuda!(context, |device| cuda::rotary(device, x, head_dim, positions, tables));
    let RotaryTables { cos, sin, pairs } = tables;
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
        match pairs {
            RotaryPairs::HalfApart => context.level().run(Rotate { row, head_dim, cos, sin }),
            RotaryPairs::Adjacent => context.level().run(RotateAdjacent { row, head_dim, cos, sin }),
        }
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

/// As [`Rotate`], the pairs side by side.
struct RotateAdjacent<'a> {
    row: &'a mut [f32],
    head_dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for RotateAdjacent<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for head in self.row.chunks_exact_mut(self.head_dim) {
            let (pairs, _) = head.as_chunks_mut::<2>();
            // The compiler makes vectors of it, with the shuffles that `Simd` does not have.
            for (([a, b], cos), sin) in pairs.iter_mut().zip(self.cos).zip(self.sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
