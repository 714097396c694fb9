//! Linear layers over the ranks of a tensor-parallel group (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053).
//!
//! [`ColumnParallel`] computes this rank's share of the outputs from all inputs; [`RowParallel`] all outputs from this
//! rank's share of the inputs, summed over the ranks. One behind the other they need one sum.

use kernels::ops::linear::{LinearPart, linear};
use kernels::{Context, Result, Tensor, View, ViewMut};

use crate::quantization::{Layout, take_linears};
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
    pub(super) fn load(weights: &mut Weights, projections: &[Projection; N]) -> Result<Self, Error> {
        let layers = projections.each_ref().map(|layer| (&*layer.name, [layer.outputs, layer.inputs]));
        let layouts = take_linears(weights, &layers, Slice::Rows)?;
        let mut parts = Vec::with_capacity(N);
        for (Projection { name, outputs, has_bias, .. }, weight) in projections.iter().zip(layouts) {
            let bias = has_bias
                .then(|| weights.take_vector(&format!("{name}.bias"), *outputs, Slice::Rows))
                .transpose()?;
            parts.push(Linear { weight, bias });
        }
        let parts = parts.try_into().unwrap_or_else(|_| unreachable!("one part for each projection"));
        Ok(Self { parts })
    }

    /// `x`: `[rows, inputs]`; `out`: `[rows, this rank's outputs of all parts, side by side]`.
    pub(super) fn forward(&self, context: &Context, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        linear(context, x, &self.parts(), out)
    }

    /// The layers one by one, for who computes more than their outputs.
    pub(super) fn parts(&self) -> [LinearPart<'_>; N] {
        self.parts.each_ref().map(Linear::part)
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
        let mut layouts = take_linears(weights, &[(&name, [outputs, inputs])], Slice::Cols)?;
        let weight = layouts.pop().expect("one for one layer");
        let bias = has_bias
            .then(|| weights.take_vector(&format!("{name}.bias"), outputs, Slice::Whole))
            .transpose()?
            .filter(|_| weights.partition().rank == 0);
        Ok(Self { part: Linear { weight, bias } })
    }

    /// Of this rank: the outputs' sum over the ranks is the layer's.
    pub(super) fn part(&self) -> LinearPart<'_> {
        self.part.part()
    }
}
