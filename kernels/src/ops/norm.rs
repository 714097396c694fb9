//! RMS normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

use crate::{Context, Result, Tensor, View, ViewMut};

fn normalize(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean_square = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * scale * w;
    }
}

/// `out = x / rms(x) * weight`, row by row. `x`, `out`: f32 `[rows, cols]`; `weight`: f32 `[1, cols]`.
pub fn rms_norm(
    context: &Context,
    x: View<'_>,
    weight: &Tensor,
    eps: f32,
    mut out: ViewMut<'_>,
) -> Result<()> {
    let _ = context;
    for row in 0..x.rows() {
        normalize(x.row(row), weight.as_slice(), eps, out.row(row));
    }
    Ok(())
}

/// `residual += x; out = rms_norm(residual)`. All f32 `[rows, cols]`; `weight`: f32 `[1, cols]`.
pub fn add_rms_norm(
    context: &Context,
    mut residual: ViewMut<'_>,
    x: View<'_>,
    weight: &Tensor,
    eps: f32,
    mut out: ViewMut<'_>,
) -> Result<()> {
    let _ = context;
    for row in 0..x.rows() {
        let sum = residual.row::<f32>(row);
        sum.iter_mut().zip(x.row::<f32>(row)).for_each(|(r, x)| *r += x);
        normalize(sum, weight.as_slice(), eps, out.row(row));
    }
    Ok(())
}

/// RMS normalization of each head by itself, in place (query-key norm). `x`: f32 `[rows, heads * head_dim]`; `weight`:
/// f32 `[1, head_dim]`.
pub fn rms_norm_heads(context: &Context, mut x: ViewMut<'_>, weight: &Tensor, eps: f32) -> Result<()> {
    let _ = context;
    for row in 0..x.rows() {
        for head in x.row::<f32>(row).chunks_exact_mut(weight.cols()) {
            let input = head.to_vec();
            normalize(&input, weight.as_slice(), eps, head);
        }
    }
    Ok(())
}
