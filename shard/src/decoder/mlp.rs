//! Gated MLP with SiLU (Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202).

use kernels::ops::activation::{Activation, gated};
use kernels::ops::linear::{GatedLinear, linear_gated};
use kernels::{Communicator, Context, DType, Result, Tensor, View};

use super::linear::{Adaptation, ColumnParallel, Projection, RowParallel, lora_cols};
use super::residual::Residual;
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
    /// `width`: of this rank's share.
    pub(super) fn new(context: &Context, width: usize, max_rows: usize, dtype: DType) -> Result<Self> {
        Ok(Self {
            gate_up: context.zeros(max_rows, 2 * width, dtype)?,
            activated: context.zeros(max_rows, width, dtype)?,
        })
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
            gate_up: ColumnParallel::load(weights, &[gate, up])?,
            down: RowParallel::load(weights, projection(names.down, hidden, intermediate))?,
        })
    }

    /// Columns that what adapters change needs between its factors.
    pub(super) fn lora_cols(&self) -> usize {
        lora_cols([self.gate_up.lora(), self.down.lora()])
    }

    /// `x`: `[rows, hidden]`. Adds what comes of it to the residual stream.
    pub(super) fn forward(
        &self,
        context: &Context,
        communicator: &mut dyn Communicator,
        (buffers, adaptation): (&mut MlpBuffers, &mut Adaptation<'_>),
        x: View<'_>,
        residual: &mut Residual<'_>,
    ) -> Result<()> {
        let mut gate_up = buffers.gate_up.view_mut().narrow_rows(0, x.rows());
        let mut activated = buffers.activated.view_mut().narrow_rows(0, x.rows());
        if adaptation.changes(self.gate_up.lora()) {
            // The change comes between the products and the activation.
            self.gate_up.forward(context, adaptation, x, gate_up.reborrow())?;
            gated(context, Activation::Silu, gate_up.as_view(), activated.reborrow())?;
        } else {
            let [gate, up] = self.gate_up.parts();
            let layer = GatedLinear { gate, up, activation: Activation::Silu };
            linear_gated(context, x, layer, gate_up, activated.reborrow())?;
        }
        residual.add_projection(context, communicator, (&self.down, adaptation), activated.as_view())
    }
}
