//! Element-wise activations and sums.

use super::operands::{SharedRows, matrix, matrix_mut, require_f32_matrix};
use crate::simd::{Float, Kernel, Simd, silu, spans};
use crate::{Context, Result, View, ViewMut};

/// `out = silu(gate) * up`. `gate_up`: f32 `[rows, 2 * cols]`, gates first; `out`: f32 `[rows, cols]`.
pub fn silu_mul(context: &Context, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "silu_mul";
    let (rows, cols) = (out.rows(), out.cols());
    require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
    require_f32_matrix(OP, "gate_up", matrix(gate_up), (rows, 2 * cols))?;
    let out = SharedRows::new(out);
    // The exponential and the division weigh as much as a few loads.
    context.for_rows(rows, 4 * cols, |row| {
        let (gate, up) = gate_up.row::<f32>(row).split_at(cols);
        // SAFETY: each task has rows of its own.
        let out = unsafe { out.row(row) };
        context.level().run(SiluMul { gate, up, out });
    });
    Ok(())
}

/// `x += y`. Both f32 `[rows, cols]`.
pub fn add(context: &Context, x: ViewMut<'_>, y: View<'_>) -> Result<()> {
    const OP: &str = "add";
    let (rows, cols) = (x.rows(), x.cols());
    require_f32_matrix(OP, "x", matrix_mut(&x), (rows, cols))?;
    require_f32_matrix(OP, "y", matrix(y), (rows, cols))?;
    let x = SharedRows::new(x);
    context.for_rows(rows, cols, |row| {
        // SAFETY: each task has rows of its own.
        let x = unsafe { x.row(row) };
        x.iter_mut().zip(y.row::<f32>(row)).for_each(|(x, y)| *x += y);
    });
    Ok(())
}

/// One row; the three have one length.
struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(
            self.gate.len() == self.out.len() && self.up.len() == self.out.len(),
            "checked by the operation"
        );
        for (start, len) in spans(self.out.len()) {
            // SAFETY: a span lies within the three.
            unsafe {
                let gate = f32::load_part(simd, self.gate.as_ptr().add(start), len);
                let up = f32::load_part(simd, self.up.as_ptr().add(start), len);
                let product = simd.mul(silu(simd, gate), up);
                f32::store_part(simd, self.out.as_mut_ptr().add(start), len, product);
            }
        }
    }
}
