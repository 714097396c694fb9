//! Linear layers of which each row has its own: the experts of a mixture.

use super::{LinearPart, Weight, linear};
use crate::ops::operands::{on_cuda, require, u32_vector};
use crate::{Context, Result, View, ViewMut};

/// The weights of experts, and which rows are whose.
#[derive(Clone, Copy)]
pub struct Experts<'a> {
    /// `[num_experts * n, k]`, one expert's after the other's.
    pub weight: Weight<'a>,
    /// u32 `[1, num_experts + 1]`: of each expert's rows the first, and the end of all. On a GPU the device alone reads it.
    pub starts: View<'a>,
}

impl Experts<'_> {
    fn num_experts(&self) -> usize {
        self.starts.cols().saturating_sub(1)
    }
}

const OP: &str = "linear_grouped";

/// `out[row] = weight of the row's expert · x[row]`, for rows grouped by expert. Types are those of [`linear`].
///
/// `x`: `[rows, k]`; `out`: `[rows, n]`. Rows behind the end of all are left as they are.
pub fn linear_grouped(
    context: &Context,
    x: View<'_>,
    experts: Experts<'_>,
    mut out: ViewMut<'_>,
) -> Result<()> {
    let (num_experts, n) = (experts.num_experts(), out.cols());
    experts.weight.check()?;
    require(OP, num_experts > 0 && experts.starts.rows() == 1, || {
        let (rows, cols) = (experts.starts.rows(), experts.starts.cols());
        format!("starts are [{rows}, {cols}], expected [1, number of experts + 1]")
    })?;
    require(OP, experts.weight.rows() == num_experts * n && experts.weight.cols() == x.cols(), || {
        format!(
            "the weights are [{}, {}], expected [{num_experts} experts * {n}, {}]",
            experts.weight.rows(),
            experts.weight.cols(),
            x.cols()
        )
    })?;
    require(OP, out.rows() == x.rows(), || format!("out has {} rows, x has {}", out.rows(), x.rows()))?;
    on_cuda!(context, |device| super::cuda::grouped(device, x, experts, num_experts, &out));
    let starts = u32_vector(OP, "starts", experts.starts, num_experts + 1)?;
    for (expert, bounds) in starts.windows(2).enumerate() {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        require(OP, start <= end && end <= x.rows(), || {
            format!("expert {expert} has the rows {start} to {end} of {}", x.rows())
        })?;
        let (x, out) = (x.narrow_rows(start, end - start), out.reborrow().narrow_rows(start, end - start));
        match experts.weight {
            Weight::Dense(weight) => {
                one_expert(context, x, (&weight.narrow_rows(expert * n, n)).into(), out)?;
            }
            Weight::Int8(weight) => one_expert(context, x, (&weight.narrow_rows(expert * n, n)).into(), out)?,
        }
    }
    Ok(())
}

fn one_expert(context: &Context, x: View<'_>, weight: Weight<'_>, out: ViewMut<'_>) -> Result<()> {
    linear(context, x, &[LinearPart { weight, bias: None }], out)
}
