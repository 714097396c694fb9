//! EETQ: dense checkpoints become 8-bit integers with one scale for each output when they are loaded; activations stay as
//! they are (https://github.com/NetEase-FuXi/EETQ). What is quantized is what is stored, whatever `--dtype` says.

use kernels::ops::linear::Int8Weight;
use kernels::{DType, Tensor};

use super::{Format, Layout};
use crate::config::Quantization;
use crate::weights::{Error, Slice, Weights};

pub(super) const FORMAT: Format = Format { name: Quantization::Eetq, take };

fn take(
    weights: &mut Weights<'_>,
    name: &str,
    [outputs, inputs]: [usize; 2],
    slice: Slice,
) -> Result<Layout, Error> {
    let stored = weights.take_stored(&format!("{name}.weight"), [outputs, inputs])?;
    let partition = weights.partition();
    let quantize = |dense: &Tensor| {
        Int8Weight::quantize(weights.context(), dense).map_err(|source| stored.error(source.to_string()))
    };
    let quantized = match slice {
        Slice::Whole => quantize(&stored.matrix)?,
        Slice::Rows => {
            let part = partition.range(outputs);
            quantize(&stored.matrix.narrow_rows(part.start, part.len()))?
        }
        // An output's scale is that of its whole row, so that all ranks mean the same numbers.
        Slice::Cols => {
            let part = partition.range(inputs);
            copy(&quantize(&stored.matrix)?.narrow_cols(part.start, part.len()))?
        }
    };
    stored.release();
    weights.add_size(quantized.size_in_bytes());
    Ok(Layout::Int8(quantized.upload(weights.context())?))
}

/// The same weight in memory of its own: a share of the columns would keep all of them.
fn copy(weight: &Int8Weight) -> Result<Int8Weight, Error> {
    let mut values = Tensor::zeros(weight.rows(), weight.cols(), DType::U8);
    let rows = values.as_mut_slice::<u8>().chunks_exact_mut(weight.cols());
    for (row, to) in rows.enumerate() {
        to.copy_from_slice(weight.values().view().row::<u8>(row));
    }
    Ok(Int8Weight::new(values, weight.scales().clone())?)
}
