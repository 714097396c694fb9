//! Linear layers over the ranks of a tensor-parallel group (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053).
//!
//! [`ColumnParallel`] computes this rank's share of the outputs from all inputs; [`RowParallel`] all outputs from this
//! rank's share of the inputs, summed over the ranks. One behind the other they need one sum.

use kernels::ops::linear::{LinearPart, linear};
use kernels::ops::lora::{AdapterRows, Lora, lora_add};
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
    /// What adapters change.
    lora: Option<Lora>,
}

/// What adapters change in a step: which rows, and memory for it.
pub(super) struct Adaptation<'a> {
    pub(super) rows: AdapterRows<'a>,
    /// f32 `[at least as many rows, at least the columns that any layer needs]`.
    pub(super) hidden: ViewMut<'a>,
}

impl Adaptation<'_> {
    /// Whether there is something to add to the outputs of a layer.
    pub(super) fn changes(&self, lora: Option<&Lora>) -> bool {
        self.rows.any && lora.is_some()
    }

    /// Adds to `out`, outputs of a layer for `x`, what the rows' adapters change.
    pub(super) fn add(
        &mut self,
        context: &Context,
        lora: Option<&Lora>,
        x: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        match lora {
            Some(lora) if self.rows.any => {
                let hidden = self.hidden.reborrow().narrow_rows(0, x.rows());
                lora_add(context, x, lora, self.rows, hidden, out)
            }
            _ => Ok(()),
        }
    }
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
        Ok(Self { parts, lora: weights.take_lora(&layers, Slice::Rows)? })
    }

    /// `x`: `[rows, inputs]`; `out`: `[rows, this rank's outputs of all parts, side by side]`.
    pub(super) fn forward(
        &self,
        context: &Context,
        adaptation: &mut Adaptation<'_>,
        x: View<'_>,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        linear(context, x, &self.parts(), out.reborrow())?;
        adaptation.add(context, self.lora(), x, out)
    }

    /// What adapters change.
    pub(super) fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    /// The layers one by one, for who computes more than their outputs.
    pub(super) fn parts(&self) -> [LinearPart<'_>; N] {
        self.parts.each_ref().map(Linear::part)
    }
}

/// A linear layer whose input lies in shares on the ranks.
pub(super) struct RowParallel {
    part: Linear,
    lora: Option<Lora>,
}

impl RowParallel {
    /// This rank's share of the inputs. The bias is rank 0's, so that the sum over the ranks has it once.
    pub(super) fn load(weights: &mut Weights, projection: Projection) -> Result<Self, Error> {
        let Projection { name, outputs, inputs, has_bias } = projection;
        let layers = [(&*name, [outputs, inputs])];
        let mut layouts = take_linears(weights, &layers, Slice::Cols)?;
        let lora = weights.take_lora(&layers, Slice::Cols)?;
        let weight = layouts.pop().expect("one for one layer");
        let bias = has_bias
            .then(|| weights.take_vector(&format!("{name}.bias"), outputs, Slice::Whole))
            .transpose()?
            .filter(|_| weights.partition().rank == 0);
        Ok(Self { part: Linear { weight, bias }, lora })
    }

    /// Of this rank: the outputs' sum over the ranks is the layer's.
    pub(super) fn part(&self) -> LinearPart<'_> {
        self.part.part()
    }

    /// What adapters change, of this rank likewise.
    pub(super) fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }
}

/// The most columns that one of the layers' changes needs between its factors.
pub(super) fn lora_cols(layers: [Option<&Lora>; 2]) -> usize {
    layers.into_iter().flatten().map(Lora::hidden_cols).max().unwrap_or(0)
}
