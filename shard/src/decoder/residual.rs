//! The residual stream, and how the blocks' outputs join it.

use kernels::ops::activation::add;
use kernels::ops::linear::{linear, linear_add};
use kernels::{Communicator, Context, Result, View, ViewMut};

use super::linear::{Adaptation, RowParallel};
use super::norm::RmsNorm;

/// The residual stream of a step. Where nothing stands between a projection and the sum, the projection adds to the
/// stream by itself; over several ranks the partial outputs are summed first, and the next norm adds them.
pub(super) struct Residual<'a> {
    /// f32 `[rows, hidden]`.
    pub(super) stream: ViewMut<'a>,
    /// `[rows, hidden]` in the type of activations.
    pub(super) branch: ViewMut<'a>,
    /// Whether `branch` is still to be added.
    pub(super) is_pending: bool,
}

impl Residual<'_> {
    /// Adds the projection of `x`, a block's end, to the stream.
    pub(super) fn add_projection(
        &mut self,
        context: &Context,
        communicator: &mut dyn Communicator,
        (projection, adaptation): (&RowParallel, &mut Adaptation<'_>),
        x: View<'_>,
    ) -> Result<()> {
        let parts = [projection.part()];
        if communicator.world_size() == 1 {
            linear_add(context, x, &parts, self.stream.reborrow())?;
            return adaptation.add(context, projection.lora(), x, self.stream.reborrow());
        }
        linear(context, x, &parts, self.branch.reborrow())?;
        adaptation.add(context, projection.lora(), x, self.branch.reborrow())?;
        self.is_pending = true;
        communicator.all_reduce_sum(self.branch.reborrow())
    }

    /// `out = norm(stream)`: a block's beginning.
    pub(super) fn normalize(&mut self, context: &Context, norm: &RmsNorm, out: ViewMut<'_>) -> Result<()> {
        if std::mem::take(&mut self.is_pending) {
            return norm.add_forward(context, self.stream.reborrow(), self.branch.as_view(), out);
        }
        norm.forward(context, self.stream.as_view(), out)
    }

    /// Adds what is left.
    pub(super) fn finish(mut self, context: &Context) -> Result<()> {
        if self.is_pending { add(context, self.stream.reborrow(), self.branch.as_view()) } else { Ok(()) }
    }
}
