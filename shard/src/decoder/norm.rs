//! RMS normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

use kernels::ops::norm::{add_rms_norm, rms_norm};
use kernels::{Context, Result, Tensor, View, ViewMut};

use crate::weights::{Error, Slice, Weights};

pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(super) fn load(weights: &mut Weights, name: &str, len: usize, eps: f32) -> Result<Self, Error> {
        Ok(Self { weight: weights.take_vector(&format!("{name}.weight"), len, Slice::Whole)?, eps })
    }

    /// `out = norm(x)`.
    pub(super) fn forward(&self, context: &Context, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        rms_norm(context, x, &self.weight, self.eps, out)
    }

    /// `residual += x; out = norm(residual)`: the end of one block and the beginning of the next.
    pub(super) fn add_forward(
        &self,
        context: &Context,
        residual: ViewMut<'_>,
        x: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        add_rms_norm(context, residual, x, &self.weight, self.eps, out)
    }

    /// f32 `[1, len]`.
    pub(super) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Added to the mean square.
    pub(super) fn eps(&self) -> f32 {
        self.eps
    }
}
