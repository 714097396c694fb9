//! Matrix product with weights in place.

use crate::{Context, Result, Tensor, View, ViewMut};

/// One of the weights that are multiplied with the same input.
#[derive(Clone, Copy)]
pub struct LinearPart<'a> {
    /// `[n, k]`, f32, f16 or bf16, any row stride.
    pub weight: &'a Tensor,
    /// `[1, n]` f32, added to each row.
    pub bias: Option<&'a Tensor>,
}

/// `out[i, ..] = concat over parts of (weight · x[i] + bias)`: a fused linear layer (query, key and value; gate and
/// up) over weights that lie apart in the file.
///
/// `x`: f32 `[rows, k]`; `out`: f32 `[rows, sum of n]`. Each weight is read once for up to 16 rows.
pub fn linear(context: &Context, x: View<'_>, parts: &[LinearPart<'_>], mut out: ViewMut<'_>) -> Result<()> {
    let _ = context;
    for row in 0..x.rows() {
        let input = x.row::<f32>(row);
        let mut column = 0;
        for part in parts {
            for n in 0..part.weight.rows() {
                let weights = part.weight.view().row_f32(n)?;
                let bias = part.bias.map_or(0.0, |bias| bias.as_slice::<f32>()[n]);
                out.row::<f32>(row)[column] =
                    bias + weights.iter().zip(input).map(|(w, x)| w * x).sum::<f32>();
                column += 1;
            }
        }
    }
    Ok(())
}
