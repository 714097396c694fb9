//! What the ranks of a tensor-parallel group do together.

use std::time::Duration;

use crate::ops::operands::{matrix, matrix_mut, require_f32_matrix};
use crate::tensor::{Result, View, ViewMut};

mod rendezvous;
mod shared_memory;

pub use shared_memory::SharedMemory;

/// The ranks of a tensor-parallel group. Every rank makes the same calls in the same order. The reduction order is
/// fixed, so all ranks get the same bits. A dead or silent peer is an error, never a hang.
pub trait Communicator: Send {
    /// This rank, `0 <= rank < world_size`.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world_size(&self) -> usize;
    /// Sums `data` (f32) over all ranks, in place.
    fn all_reduce_sum(&mut self, data: ViewMut<'_>) -> Result<()>;
    /// Puts the ranks' `data` (f32 `[rows, cols]`) side by side in `out` `[rows, world_size * cols]`, in order of rank.
    fn all_gather_cols(&mut self, data: View<'_>, out: ViewMut<'_>) -> Result<()>;
    /// Gives rank 0's `data` to all ranks.
    fn broadcast(&mut self, data: &mut [u32]) -> Result<()>;
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
