//! What the ranks of a tensor-parallel group do together.

use std::time::Duration;

use crate::Context;
use crate::ops::operands::{matrix, matrix_mut, require_f32_matrix};
use crate::tensor::{Result, View, ViewMut};

mod meeting;
#[cfg(feature = "cuda")]
mod nccl;
// Network is tested in every build, and used where there are GPUs.
#[cfg(any(feature = "cuda", test))]
mod network;
mod rendezvous;
mod shared_memory;

pub use meeting::MeetingPlace;
pub use shared_memory::SharedMemory;

/// The ranks of a tensor-parallel group. Every rank makes the same calls in the same order. The reduction order is
/// fixed, so all ranks get the same bits. A dead or silent peer is an error, never a hang.
pub trait Communicator: Send {
    /// This rank, `0 <= rank < world_size`.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world_size(&self) -> usize;
    /// Sums `data` over all ranks, in place. f32 on the CPU; on GPUs f32, f16 or bf16, without gaps between rows.
    fn all_reduce_sum(&mut self, data: ViewMut<'_>) -> Result<()>;
    /// Puts the ranks' `data` `[rows, cols]` side by side in `out` `[rows, world_size * cols]`, in order of rank. Element types
    /// as of [`Communicator::all_reduce_sum`].
    fn all_gather_cols(&mut self, data: View<'_>, out: ViewMut<'_>) -> Result<()>;
    /// Gives rank 0's `data` to all ranks.
    fn broadcast(&mut self, data: &mut [u32]) -> Result<()>;

    /// Says that a step's work has been queued (true), or that it is done. While it is under way on GPUs, a peer that is
    /// silent for longer than the group's timeout breaks the group; where the CPU computes, each call has its own deadline.
    fn watch(&mut self, under_way: bool) {
        let _ = under_way;
    }

    /// Whether the group still works, for whoever has waited for a device: where it does not, what the device has computed is
    /// worth nothing.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// Joins the GPUs of `world_size` ranks, one of which is `context`'s, by NCCL, and returns when all are there, or with an error
/// after `timeout`. The same `timeout` holds for a step afterwards (see [`Communicator::watch`]).
///
/// An error where `context` is not on a GPU, or the library is not found.
pub fn join_gpus(
    context: &Context,
    place: &MeetingPlace,
    rank: usize,
    world_size: usize,
    timeout: Duration,
) -> Result<Box<dyn Communicator>> {
    crate::ops::operands::require("join_gpus", rank < world_size, || {
        format!("rank {rank} of a group of {world_size}")
    })?;
    #[cfg(feature = "cuda")]
    let joined =
        nccl::NcclGroup::join(context, place, rank, world_size, timeout).map(|group| Box::new(group) as _);
    #[cfg(not(feature = "cuda"))]
    let joined = {
        let _ = (context, place, timeout);
        Err(crate::Error::Unavailable(
            "this executable was built without GPUs: build it with `cargo build --release --features cuda`"
                .into(),
        ))
    };
    joined
}

/// A group of one.
pub struct Local;

impl Communicator for Local {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn all_reduce_sum(&mut self, data: ViewMut<'_>) -> Result<()> {
        require_f32_matrix("all_reduce_sum", "data", matrix_mut(&data), (data.rows(), data.cols()))
    }
    fn all_gather_cols(&mut self, data: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
        check_gather(data, &out, 1)?;
        for row in 0..data.rows() {
            out.row::<f32>(row).copy_from_slice(data.row::<f32>(row));
        }
        Ok(())
    }
    fn broadcast(&mut self, _data: &mut [u32]) -> Result<()> {
        Ok(())
    }
}

fn check_gather(data: View<'_>, out: &ViewMut<'_>, world_size: usize) -> Result<()> {
    const OP: &str = "all_gather_cols";
    require_f32_matrix(OP, "data", matrix(data), (data.rows(), data.cols()))?;
    require_f32_matrix(OP, "out", matrix_mut(out), (data.rows(), world_size * data.cols()))
}

/// How long a wait lasts before the peers' lives are looked at.
const SLICE: Duration = Duration::from_millis(100);
