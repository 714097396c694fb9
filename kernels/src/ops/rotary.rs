//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864), pairs half a head apart as in Hugging Face checkpoints.

use crate::{Context, Result, Tensor, View, ViewMut};

/// Rotates each head of each row by its position, in place.
///
/// `x`: f32 `[rows, heads * head_dim]`; `positions`: u32 `[1, rows]`; `cos`, `sin`: f32 `[max position, rotary_dim / 2]`,
/// rotary_dim <= head_dim (the rest of a head stays as it is).
pub fn rotary(
    context: &Context,
    mut x: ViewMut<'_>,
    head_dim: usize,
    positions: View<'_>,
    cos: &Tensor,
    sin: &Tensor,
) -> Result<()> {
    let _ = context;
    let half = cos.cols();
    for (row, &position) in positions.into_slice::<u32>().iter().enumerate() {
        let (cos, sin) = (cos.view().row::<f32>(position as usize), sin.view().row::<f32>(position as usize));
        for head in x.row::<f32>(row).chunks_exact_mut(head_dim) {
            for i in 0..half {
                let (a, b) = (head[i], head[half + i]);
                head[i] = a * cos[i] - b * sin[i];
                head[half + i] = b * cos[i] + a * sin[i];
            }
        }
    }
    Ok(())
}
