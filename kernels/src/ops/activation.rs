//! Element-wise activations and sums.

use super::operands::{SharedRows, matrix, matrix_mut, on_cuda, require_f32_matrix};
use crate::simd::{Float, Kernel, Simd, erf, silu, spans, tanh};
use crate::{Context, Result, View, ViewMut};

#[cfg(feature = "cuda")]
mod cuda;

/// An exponential and a division weigh as much as a few loads.
const ELEMENT_WEIGHT: usize = 4;

/// A function that is applied to each element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + erf(x / sqrt(2))) / 2` (Hendrycks & Gimpel 2016, arXiv:1606.08415).
    Gelu,
    /// Its approximation by a hyperbolic tangent: `gelu_pytorch_tanh`, `gelu_new`.
    GeluTanh,
    /// `max(x, 0)`; NaN becomes 0.
    Relu,
    /// `max(x, 0)^2` (So et al. 2021, "Primer", arXiv:2109.08668); NaN becomes 0.
    SquaredRelu,
}

/// `out = silu(gate) * up`. `gate_up`: f32 `[rows, 2 * cols]`, gates first; `out`: f32 `[rows, cols]`; both on a GPU also
/// f16 or bf16.
pub fn silu_mul(context: &Context, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
    gated(context, Activation::Silu, gate_up, out)
}

/// `out = activation(gate) * up` (Shazeer 2020, arXiv:2002.05202). `gate_up`: f32 `[rows, 2 * cols]`, gates first; `out`:
/// f32 `[rows, cols]`; both on a GPU also f16 or bf16.
pub fn gated(context: &Context, activation: Activation, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "gated";
    on_cuda!(context, |device| cuda::gated(device, activation, gate_up, out));
    let (rows, cols) = (out.rows(), out.cols());
    require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
    require_f32_matrix(OP, "gate_up", matrix(gate_up), (rows, 2 * cols))?;
    let out = SharedRows::new(out);
    context.for_rows(rows, ELEMENT_WEIGHT * cols, |row| {
        let (gate, up) = gate_up.row::<f32>(row).split_at(cols);
        // SAFETY: each task has rows of its own.
        let out = unsafe { out.row(row) };
        context.level().run(Apply { activation, x: gate, factor: Some(up), out });
    });
    Ok(())
}

/// `out = activation(x)`. Both f32 `[rows, cols]`, on a GPU also f16 or bf16.
pub fn activate(context: &Context, activation: Activation, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "activate";
    on_cuda!(context, |device| cuda::activate(device, activation, x, out));
    let (rows, cols) = (out.rows(), out.cols());
    require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
    require_f32_matrix(OP, "x", matrix(x), (rows, cols))?;
    let out = SharedRows::new(out);
    context.for_rows(rows, ELEMENT_WEIGHT * cols, |row| {
        // SAFETY: each task has rows of its own.
        let out = unsafe { out.row(row) };
        context.level().run(Apply { activation, x: x.row(row), factor: None, out });
    });
    Ok(())
}

/// `x += y`. Both f32 `[rows, cols]`, `y` on a GPU also f16 or bf16.
pub fn add(context: &Context, x: ViewMut<'_>, y: View<'_>) -> Result<()> {
    const OP: &str = "add";
    on_cuda!(context, |device| cuda::add(device, x, y));
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

/// One row, or a part of it; all have one length.
pub(super) struct Apply<'a> {
    pub(super) activation: Activation,
    pub(super) x: &'a [f32],
    pub(super) factor: Option<&'a [f32]>,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Apply<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { activation, x, factor, out } = self;
        match activation {
            Activation::Silu => simd.call(Each { function: Silu, x, factor, out }),
            Activation::Gelu => simd.call(Each { function: Gelu, x, factor, out }),
            Activation::GeluTanh => simd.call(Each { function: GeluTanh, x, factor, out }),
            Activation::Relu => simd.call(Each { function: Relu, x, factor, out }),
            Activation::SquaredRelu => simd.call(Each { function: SquaredRelu, x, factor, out }),
        }
    }
}

/// A function of each lane.
trait Function: Copy {
    fn of<S: Simd>(self, simd: S, x: S::Vector) -> S::Vector;
}

struct Each<'a, F> {
    function: F,
    x: &'a [f32],
    factor: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl<F: Function> Kernel for Each<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { function, x, factor, out } = self;
        assert!(
            x.len() == out.len() && factor.is_none_or(|factor| factor.len() == out.len()),
            "checked by the operation"
        );
        for (start, len) in spans(out.len()) {
            // SAFETY: a span lies within all.
            unsafe {
                let mut value = function.of(simd, f32::load_part(simd, x.as_ptr().add(start), len));
                if let Some(factor) = factor {
                    value = simd.mul(value, f32::load_part(simd, factor.as_ptr().add(start), len));
                }
                f32::store_part(simd, out.as_mut_ptr().add(start), len, value);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Silu;
impl Function for Silu {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Vector) -> S::Vector {
        silu(simd, x)
    }
}

#[derive(Clone, Copy)]
struct Gelu;
impl Function for Gelu {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Vector) -> S::Vector {
        let half = simd.mul(x, simd.splat(0.5));
        let erf = erf(simd, simd.mul(x, simd.splat(std::f32::consts::FRAC_1_SQRT_2)));
        simd.mul_add(half, erf, half)
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;
impl Function for GeluTanh {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Vector) -> S::Vector {
        // sqrt(2 / pi) * (x + 0.044715 x^3)
        const SCALE: f32 = 0.797_884_6;
        let half = simd.mul(x, simd.splat(0.5));
        let inner = simd.mul_add(simd.mul(simd.splat(0.044_715), simd.mul(x, x)), x, x);
        let tanh = tanh(simd, simd.mul(inner, simd.splat(SCALE)));
        simd.mul_add(half, tanh, half)
    }
}

#[derive(Clone, Copy)]
struct Relu;
impl Function for Relu {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Vector) -> S::Vector {
        // In this order NaN stays what it is.
        simd.max(simd.splat(0.0), x)
    }
}

#[derive(Clone, Copy)]
struct SquaredRelu;
impl Function for SquaredRelu {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Vector) -> S::Vector {
        // As above.
        let positive = simd.max(simd.splat(0.0), x);
        simd.mul(positive, positive)
    }
}
