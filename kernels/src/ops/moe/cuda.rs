//! Launches of `cuda/moe.cu`.

use super::super::operands::{matrix, matrix_mut, require, require_float, require_on_device};
use super::TopK;
use crate::cuda::{Device, Grid};
use crate::{Context, DType, Error, Result, Tensor, View, ViewMut};

/// Where the rows of a step go, in device memory.
#[derive(Debug)]
pub(super) struct OnDevice {
    num_choices: usize,
    experts_per_row: usize,
    /// Of each choice, the expert, its weight, and its slot: u32, f32, u32.
    chosen: Tensor,
    weights: Tensor,
    slots: Tensor,
    /// Of each slot its row: u32.
    rows: Tensor,
    /// u32 `[1, experts + 1]`.
    starts: Tensor,
}

/// What was routed before.
pub(super) fn routed<'a>(op: &'static str, on_device: Option<&'a OnDevice>) -> Result<&'a OnDevice> {
    on_device
        .ok_or_else(|| Error::Shape { op, message: "nothing was routed: call Routing::route first".into() })
}

impl OnDevice {
    pub(super) fn reserve(
        place: &mut Option<Self>,
        context: &Context,
        max_choices: usize,
        experts: usize,
    ) -> Result<()> {
        let fits =
            |reserved: &Self| reserved.chosen.cols() >= max_choices && reserved.starts.cols() == experts + 1;
        if place.as_ref().is_some_and(fits) {
            return Ok(());
        }
        *place = Some(Self {
            num_choices: 0,
            experts_per_row: 1,
            chosen: context.zeros(1, max_choices, DType::U32)?,
            weights: context.zeros(1, max_choices, DType::F32)?,
            slots: context.zeros(1, max_choices, DType::U32)?,
            rows: context.zeros(1, max_choices, DType::U32)?,
            starts: context.zeros(1, experts + 1, DType::U32)?,
        });
        Ok(())
    }

    /// The number of experts for a row has been checked.
    pub(super) fn route(&mut self, device: &Device, router_logits: View<'_>, top_k: TopK) -> Result<()> {
        const WARPS: usize = 4;
        let TopK { experts_per_row, renormalize } = top_k;
        let (rows, experts) = (router_logits.rows(), router_logits.cols());
        require_on_device("route", "router_logits", matrix(router_logits), DType::F32, (rows, experts))?;
        self.num_choices = rows * experts_per_row;
        self.experts_per_row = experts_per_row;
        let shared_bytes = WARPS * experts * size_of::<f32>();
        require("route", shared_bytes <= device.properties().shared_bytes, || {
            format!("{experts} experts are more than a GPU's block keeps in shared memory")
        })?;
        let grid = Grid {
            blocks: [rows.div_ceil(WARPS) as u32, 1, 1],
            threads: 32 * WARPS as u32,
            shared_bytes: shared_bytes as u32,
        };
        let arguments = [
            router_logits.into(),
            (router_logits.row_stride as u32).into(),
            (rows as u32).into(),
            (experts as u32).into(),
            (experts_per_row as u32).into(),
            u32::from(renormalize).into(),
            self.chosen.view_mut().into(),
            self.weights.view_mut().into(),
        ];
        let kernel = device.kernel("moe_choose", &[])?;
        // SAFETY: the parameters of `moe_choose`; there is room for the choices of all rows, by `reserve`.
        unsafe { kernel.launch(device, grid, &arguments)? };
        // Even without rows, so that the starts are those of no rows.
        let grid = Grid { blocks: [experts as u32, 1, 1], threads: 256, shared_bytes: 0 };
        let arguments = [
            self.chosen.view().into(),
            (self.num_choices as u32).into(),
            (experts_per_row as u32).into(),
            self.starts.view_mut().into(),
            self.slots.view_mut().into(),
            self.rows.view_mut().into(),
        ];
        let kernel = device.kernel("moe_group", &[])?;
        // SAFETY: the parameters of `moe_group`; there is room for all choices and experts, by `reserve`.
        unsafe { kernel.launch(device, grid, &arguments) }
    }

    pub(super) fn starts(&self) -> View<'_> {
        self.starts.view()
    }

    pub(super) fn rows(&self) -> View<'_> {
        self.rows.view().narrow_cols(0, self.num_choices)
    }

    pub(super) fn combine(&self, device: &Device, expert_out: View<'_>, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "moe_combine";
        let (rows, cols) = (self.num_choices / self.experts_per_row, expert_out.cols());
        require_float(OP, out.dtype())?;
        require_on_device(OP, "expert_out", matrix(expert_out), out.dtype(), (self.num_choices, cols))?;
        require_on_device(OP, "out", matrix_mut(&out), out.dtype(), (rows, cols))?;
        let grid = Grid::of_rows(rows, cols, out.dtype());
        let kernel = device.kernel(OP, &[out.dtype()])?;
        let arguments = [
            expert_out.into(),
            (expert_out.row_stride as u32).into(),
            self.slots.view().into(),
            self.weights.view().into(),
            (self.experts_per_row as u32).into(),
            (out.row_stride as u32).into(),
            out.into(),
            (cols as u32).into(),
        ];
        // SAFETY: the parameters of `moe_combine_*`; shapes and places are checked above, slots are those of `route`.
        unsafe { kernel.launch(device, grid, &arguments) }
    }
}
