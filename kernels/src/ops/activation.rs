//! Element-wise activations and sums.

use crate::{Context, Result, View, ViewMut};

/// `out = silu(gate) * up`. `gate_up`: f32 `[rows, 2 * cols]`, gates first; `out`: f32 `[rows, cols]`.
pub fn silu_mul(context: &Context, gate_up: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    let _ = context;
    for row in 0..gate_up.rows() {
        let (gate, up) = gate_up.row::<f32>(row).split_at(gate_up.cols() / 2);
        for ((o, g), u) in out.row::<f32>(row).iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + (-g).exp()) * u;
        }
    }
    Ok(())
}

/// `x += y`. Both f32 `[rows, cols]`.
pub fn add(context: &Context, mut x: ViewMut<'_>, y: View<'_>) -> Result<()> {
    let _ = context;
    for row in 0..y.rows() {
        x.row::<f32>(row).iter_mut().zip(y.row::<f32>(row)).for_each(|(x, y)| *x += y);
    }
    Ok(())
}
