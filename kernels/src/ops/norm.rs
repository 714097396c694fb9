//! RMS normalization (Zhang & Sennrich 2019, arXiv:1910.07467) and layer normalization (Ba et al. 2016,
//! arXiv:1607.06450).

use super::activation::add;
use super::operands::{
    SharedRows, f32_vector, matrix, matrix_mut, on_cuda, on_fusing_cuda, require, require_f32_matrix,
};
use crate::simd::{Float, Kernel, Simd, spans};
use crate::{Context, Place, Result, Tensor, View, ViewMut};

#[cfg(feature = "cuda")]
mod cuda;

/// `out = x / rms(x) * weight`, row by row. `x`: f32 `[rows, cols]`; `weight`: f32 `[1, cols]`; `out`: as `x`, on a GPU also
/// f16 or bf16.
pub fn rms_norm(context: &Context, x: View<'_>, weight: &Tensor, eps: f32, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "rms_norm";
    on_cuda!(context, |device| cuda::rms_norm(device, x, weight, eps, out));
    let (rows, cols) = (x.rows(), x.cols());
    require_f32_matrix(OP, "x", matrix(x), (rows, cols))?;
    require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
    let weight = f32_vector(OP, "weight", weight, cols)?;
    let out = SharedRows::new(out);
    context.for_rows(rows, cols, |row| {
        // SAFETY: each task has rows of its own.
        let out = unsafe { out.row(row) };
        context.level().run(Normalize { x: x.row(row).as_ptr(), weight, eps, out });
    });
    Ok(())
}

/// `residual += x; out = rms_norm(residual)`. All f32 `[rows, cols]`, `x` and `out` on a GPU also f16 or bf16; `weight`: f32
/// `[1, cols]`.
pub fn add_rms_norm(
    context: &Context,
    mut residual: ViewMut<'_>,
    x: View<'_>,
    weight: &Tensor,
    eps: f32,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "add_rms_norm";
    on_fusing_cuda!(context, |device| cuda::add_rms_norm(device, residual, x, weight, eps, out));
    if context.place() == Place::Device {
        add(context, residual.reborrow(), x)?;
        return rms_norm(context, residual.as_view(), weight, eps, out);
    }
    let (rows, cols) = (x.rows(), x.cols());
    require_f32_matrix(OP, "x", matrix(x), (rows, cols))?;
    require_f32_matrix(OP, "residual", matrix_mut(&residual), (rows, cols))?;
    require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
    let weight = f32_vector(OP, "weight", weight, cols)?;
    let (residual, out) = (SharedRows::new(residual), SharedRows::new(out));
    context.for_rows(rows, 2 * cols, |row| {
        // SAFETY: each task has rows of its own.
        let (residual, out) = unsafe { (residual.row(row), out.row(row)) };
        residual.iter_mut().zip(x.row::<f32>(row)).for_each(|(sum, x)| *sum += x);
        context.level().run(Normalize { x: residual.as_ptr(), weight, eps, out });
    });
    Ok(())
}

/// RMS normalization of each head by itself, in place (query-key norm). `x`: f32 `[rows, heads * head_dim]`, on
/// a GPU also f16 or bf16; `weight`: f32 `[1, head_dim]`.
pub fn rms_norm_heads(context: &Context, x: ViewMut<'_>, weight: &Tensor, eps: f32) -> Result<()> {
    const OP: &str = "rms_norm_heads";
    on_cuda!(context, |device| cuda::rms_norm_heads(device, x, weight, eps));
    let (rows, cols, head_dim) = (x.rows(), x.cols(), weight.cols());
    require_f32_matrix(OP, "x", matrix_mut(&x), (rows, cols))?;
    require(OP, head_dim > 0 && cols.is_multiple_of(head_dim), || {
        format!("x has {cols} columns, expected a multiple of the weight's {head_dim}")
    })?;
    let weight = f32_vector(OP, "weight", weight, head_dim)?;
    let x = SharedRows::new(x);
    context.for_rows(rows, cols, |row| {
        // SAFETY: each task has rows of its own.
        for head in unsafe { x.row(row) }.chunks_exact_mut(head_dim) {
            context.level().run(Normalize { x: head.as_ptr(), weight, eps, out: head });
        }
    });
    Ok(())
}

/// What layer normalization learns: each f32 `[1, cols]`.
#[derive(Clone, Copy)]
pub struct LayerNormWeights<'a> {
    /// Multiplies the normalized row.
    pub weight: &'a Tensor,
    /// Is added then.
    pub bias: Option<&'a Tensor>,
    /// Added to the variance.
    pub eps: f32,
}

/// `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, row by row. `x`: f32 `[rows, cols]`; `out`: as `x`,
/// on a GPU also f16 or bf16.
pub fn layer_norm(
    context: &Context,
    x: View<'_>,
    weights: LayerNormWeights<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "layer_norm";
    on_cuda!(context, |device| cuda::layer_norm(device, x, weights, out));
    let (rows, cols) = (x.rows(), x.cols());
    require_f32_matrix(OP, "x", matrix(x), (rows, cols))?;
    require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
    let LayerNormWeights { weight, bias, eps } = weights;
    let weight = f32_vector(OP, "weight", weight, cols)?;
    let bias = bias.map(|bias| f32_vector(OP, "bias", bias, cols)).transpose()?;
    let out = SharedRows::new(out);
    context.for_rows(rows, 2 * cols, |row| {
        // SAFETY: each task has rows of its own.
        let out = unsafe { out.row(row) };
        context.level().run(Standardize { x: x.row(row), weight, bias, eps, out });
    });
    Ok(())
}

/// `residual += x; out = layer_norm(residual)`. All f32 `[rows, cols]`, `x` and `out` on a GPU also f16 or bf16.
pub fn add_layer_norm(
    context: &Context,
    mut residual: ViewMut<'_>,
    x: View<'_>,
    weights: LayerNormWeights<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    on_fusing_cuda!(context, |device| cuda::add_layer_norm(device, residual, x, weights, out));
    add(context, residual.reborrow(), x)?;
    layer_norm(context, residual.as_view(), weights, out)
}

/// One row; all have one length.
struct Standardize<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Standardize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, weight, bias, eps, out } = self;
        let len = x.len();
        let same = weight.len() == len && out.len() == len && bias.is_none_or(|bias| bias.len() == len);
        assert!(same, "checked by the operation");
        let mut sum = simd.splat(0.0);
        for (start, len) in spans(len) {
            // SAFETY: a span lies within the row.
            sum = simd.add(sum, unsafe { f32::load_part(simd, x.as_ptr().add(start), len) });
        }
        let mean = simd.splat(simd.sum(sum) / len as f32);
        let mut squares = simd.splat(0.0);
        for (start, len) in spans(len) {
            // SAFETY: a span lies within the row and the output, which holds differences until the end. They are read
            // again, so that behind the end of the row there is zero, not the mean.
            let difference = unsafe {
                let x = f32::load_part(simd, x.as_ptr().add(start), len);
                let at = out.as_mut_ptr().add(start);
                f32::store_part(simd, at, len, simd.sub(x, mean));
                f32::load_part(simd, at, len)
            };
            squares = simd.mul_add(difference, difference, squares);
        }
        let scale = simd.splat(1.0 / (simd.sum(squares) / len as f32 + eps).sqrt());
        for (start, len) in spans(len) {
            // SAFETY: a span lies within all; it is read before it is written.
            unsafe {
                let at = out.as_mut_ptr().add(start);
                let weight = f32::load_part(simd, weight.as_ptr().add(start), len);
                let scaled = simd.mul(f32::load_part(simd, at, len), scale);
                let value = match bias {
                    Some(bias) => {
                        simd.mul_add(scaled, weight, f32::load_part(simd, bias.as_ptr().add(start), len))
                    }
                    None => simd.mul(scaled, weight),
                };
                f32::store_part(simd, at, len, value);
            }
        }
    }
}

/// One row; `x` has as many elements as `weight` and `out`, and may be `out`.
struct Normalize<'a> {
    x: *const f32,
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Normalize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.weight.len();
        assert_eq!(len, self.out.len(), "checked by the operation");
        // With `x` perhaps the same memory, `out` is reached by its pointer alone.
        let out = self.out.as_mut_ptr();
        let x = if std::ptr::eq(self.x, out) { out.cast_const() } else { self.x };
        let mut squares = simd.splat(0.0);
        for (start, len) in spans(len) {
            // SAFETY: a span lies within the row.
            let x = unsafe { f32::load_part(simd, x.add(start), len) };
            squares = simd.mul_add(x, x, squares);
        }
        let mean = simd.sum(squares) / len as f32;
        let scale = simd.splat(1.0 / (mean + self.eps).sqrt());
        for (start, len) in spans(len) {
            // SAFETY: a span lies within the three; it is read before it is written.
            unsafe {
                let weight = f32::load_part(simd, self.weight.as_ptr().add(start), len);
                let scaled = simd.mul(f32::load_part(simd, x.add(start), len), scale);
                f32::store_part(simd, out.add(start), len, simd.mul(scaled, weight));
            }
        }
    }
}
