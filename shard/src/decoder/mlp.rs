//! Gated MLP with SiLU (Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202).

use kernels::ops::activation::silu_mul;
use kernels::{Communicator, Context, DType, Result, Tensor, View, ViewMut};

use super::linear::{ColumnParallel, Projection, RowParallel};
use super::spec::{DecoderSpec, TensorNames};
use crate::weights::{Error, Weights};

pub(super) struct Mlp {
    gate_up: ColumnParallel<2>,
    down: RowParallel,
}

/// Scratch space, shared by the layers.
pub(super) struct MlpBuffers {
    gate_up: Tensor,
    activated: Tensor,
}

impl MlpBuffers {
    pub(super) fn new(spec: &DecoderSpec, world_size: usize, max_rows: usize) -> Self {
        let width = spec.intermediate_size / world_size;
        Self {
            gate_up: Tensor::zeros(max_rows, 2 * width, DType::F32),
            activated: Tensor::zeros(max_rows, width, DType::F32),
        }
    }

    pub(super) fn size_in_bytes(&self) -> usize {
        self.gate_up.size_in_bytes() + self.activated.size_in_bytes()
    }
}

impl Mlp {
    pub(super) fn load(
        spec: &DecoderSpec,
        names: &TensorNames,
        prefix: &str,
        weights: &mut Weights,
    ) -> Result<Self, Error> {
        let projection = |name: &str, outputs: usize, inputs: usize| Projection {
            name: format!("{prefix}{name}"),
            outputs,
            inputs,
            has_bias: spec.mlp_bias,
        };
        let (hidden, intermediate) = (spec.hidden_size, spec.intermediate_size);
        let gate = projection(names.gate, intermediate, hidden);
        let up = projection(names.up, intermediate, hidden);
        Ok(Self {
            gate_up: ColumnParallel::load(weights, [gate, up])?,
            down: RowParallel::load(weights, projection(names.down, hidden, intermediate))?,
        })
    }

    /// `x`, `out`: `[rows, hidden]`.
    pub(super) fn forward(
        &self,
        context: &Context,
        communicator: &mut dyn Communicator,
        buffers: &mut MlpBuffers,
        x: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let mut gate_up = buffers.gate_up.view_mut().narrow_rows(0, x.rows());
        self.gate_up.forward(context, x, gate_up.reborrow())?;
        let mut activated = buffers.activated.view_mut().narrow_rows(0, x.rows());
        silu_mul(context, gate_up.as_view(), activated.reborrow())?;
        self.down.forward(context, communicator, activated.as_view(), out)
    }
}
