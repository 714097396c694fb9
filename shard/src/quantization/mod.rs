//! Weight formats: how the weight of a linear layer in a checkpoint becomes one that kernels multiply with.
//!
//! A format is one file here and one line in [`FORMATS`]. It takes what it needs of the checkpoint, in this rank's share,
//! and returns one of the few [`Layout`]s; the kernels know layouts, not formats. Embedding, head, norms and biases are
//! not its business: they stay as they are stored.

mod eetq;

use kernels::Tensor;
use kernels::ops::linear::{Int8Weight, Weight};

use crate::config::Quantization;
use crate::weights::{Error, Slice, Weights};

/// All formats but the plain one.
const FORMATS: &[Format] = &[eetq::FORMAT];

/// How one format's weights are read.
struct Format {
    /// What `--quantize` calls it.
    name: Quantization,
    /// This rank's share of a layer's weight; see [`take_linear`].
    take: fn(&mut Weights<'_>, &str, [usize; 2], Slice) -> Result<Layout, Error>,
}

/// The canonical layouts in which weights of linear layers are kept.
pub(crate) enum Layout {
    /// `[outputs, inputs]`, f32, f16 or bf16.
    Dense(Tensor),
    /// Integers with one scale for each output.
    Int8(Int8Weight),
}

impl Layout {
    /// What is multiplied with.
    pub(crate) fn weight(&self) -> Weight<'_> {
        match self {
            Self::Dense(weight) => Weight::Dense(weight),
            Self::Int8(weight) => Weight::Int8(weight),
        }
    }
}

/// Takes the weights, `[outputs, inputs]` each, of linear layers with one input (`{name}.weight` where they are dense), or
/// this rank's part of them.
///
/// Whatever the slice, each element is the same number as in the whole weight: ranks compute with one model.
pub(crate) fn take_linears(
    weights: &mut Weights,
    layers: &[(&str, [usize; 2])],
    slice: Slice,
) -> Result<Vec<Layout>, Error> {
    let Some(quantization) = weights.quantization() else {
        let matrices: Vec<_> =
            layers.iter().map(|(name, shape)| (format!("{name}.weight"), *shape)).collect();
        return Ok(weights.take_matrices(&matrices, slice)?.into_iter().map(Layout::Dense).collect());
    };
    let format = FORMATS.iter().find(|format| format.name == quantization);
    let take = format.expect("a setting for each format, a format for each setting").take;
    layers.iter().map(|(name, shape)| take(weights, name, *shape, slice)).collect()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_value_of_the_setting_is_a_format() {
        let names: Vec<_> = FORMATS.iter().map(|format| format.name).collect();
        assert_eq!(names, Quantization::value_variants());
    }
}
