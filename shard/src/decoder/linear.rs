//! Linear layers over the ranks of a tensor-parallel group (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053).
//!
//! [`ColumnParallel`] computes this rank's share of the outputs from all inputs; [`RowParallel`] all outputs from this
//! rank's share of the inputs, summed over the ranks. One behind the other they need one sum.

use kernels::ops::linear::{LinearPart, linear};
use kernels::{Communicator, Context, Result, Tensor, View, ViewMut};

use crate::quantization::{Layout, take_linear};
use crate::weights::{Error, Slice, Weights};

/// A linear layer as the checkpoint has it: a weight `[outputs, inputs]` (where it is dense, at `{name}.weight`), and
/// `[outputs]` at `{name}.bias`.
pub(super) struct Projection {
    pub(super) name: String,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) has_bias: bool,
}

struct Linear {
    weight: Layout,
    bias: Option<Tensor>,
}

impl Linear {
    fn part(&self) -> LinearPart<'_> {
        LinearPart { weight: self.weight.weight(), bias: self.bias.as_ref() }
    }
}

/// `N` linear layers with the same input, computed as one: query, key and value; gate and up.
pub(super) struct ColumnParallel<const N: usize> {
    parts: [Linear; N],
}

impl<const N: usize> ColumnParallel<N> {
    /// This rank's share of each layer's outputs.
    pub(super) fn load(weights: &mut Weights, projections: [Projection; N]) -> Result<Self, Error> {
        let mut parts = Vec::with_capacity(N);
        for Projection { name, outputs, inputs, has_bias } in projections {
            let weight = take_linear(weights, &name, [outputs, inputs], Slice::Rows)?;
            let bias = has_bias
                .then(|| weights.take_vector(&format!("{name}.bias"), outputs, Slice::Rows))
                .transpose()?;
            parts.push(Linear { weight, bias });
        }
        let parts = parts.try_into().unwrap_or_else(|_| unreachable!("one part for each projection"));
        Ok(Self { parts })
    }

    /// `x`: `[rows, inputs]`; `out`: `[rows, this rank's outputs of all parts, side by side]`.
    pub(super) fn forward(&self, context: &Context, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        linear(context, x, &self.parts.each_ref().map(Linear::part), out)
    }
}

/// A linear layer whose input lies in shares on the ranks.
pub(super) struct RowParallel {
    part: Linear,
}

impl RowParallel {
    /// This rank's share of the inputs. The bias is rank 0's, so that the sum over the ranks has it once.
    pub(super) fn load(weights: &mut Weights, projection: Projection) -> Result<Self, Error> {
        let Projection { name, outputs, inputs, has_bias } = projection;
        let weight = take_linear(weights, &name, [outputs, inputs], Slice::Cols)?;
        let bias = has_bias
            .then(|| weights.take_vector(&format!("{name}.bias"), outputs, Slice::Whole))
            .transpose()?
            .filter(|_| weights.partition().rank == 0);
        Ok(Self { part: Linear { weight, bias } })
    }

    /// `x`: `[rows, this rank's inputs]`; `out`: `[rows, outputs]`, the same on all ranks.
    pub(super) fn forward(
        &self,
        context: &Context,
        communicator: &mut dyn Communicator,
        x: View<'_>,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        linear(context, x, &[self.part.part()], out.reborrow())?;
        communicator.all_reduce_sum(out)
    }
}
