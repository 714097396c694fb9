//! What the ranks of a tensor-parallel group do together.

use std::path::Path;
use std::time::Duration;

use crate::tensor::{Error, Result, ViewMut};

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
    fn all_gather_cols(&mut self, data: crate::View<'_>, out: ViewMut<'_>) -> Result<()>;
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
    fn all_reduce_sum(&mut self, _data: ViewMut<'_>) -> Result<()> {
        Ok(())
    }
    fn all_gather_cols(&mut self, data: crate::View<'_>, mut out: ViewMut<'_>) -> Result<()> {
        for row in 0..data.rows() {
            out.row::<f32>(row).copy_from_slice(data.row::<f32>(row));
        }
        Ok(())
    }
    fn broadcast(&mut self, _data: &mut [u32]) -> Result<()> {
        Ok(())
    }
}

/// Ranks on one host that meet in a shared-memory file. Waiting ranks sleep (futex), so two ranks on two cores that are
/// halves of one do not slow each other down.
pub struct SharedMemory {
    rank: usize,
    world_size: usize,
}

impl SharedMemory {
    /// Joins the group at `path` (created by whoever comes first, on a memory file system where there is one), and
    /// returns when all `world_size` ranks have joined, or with an error after `timeout`. The same `timeout` holds for
    /// each collective call afterwards.
    pub fn join(path: &Path, rank: usize, world_size: usize, timeout: Duration) -> Result<Self> {
        let _ = (path, timeout);
        Ok(Self { rank, world_size })
    }
}

impl Communicator for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.world_size
    }
    fn all_reduce_sum(&mut self, _data: ViewMut<'_>) -> Result<()> {
        Err(Error::Collective("not written yet".into()))
    }
    fn all_gather_cols(&mut self, _data: crate::View<'_>, _out: ViewMut<'_>) -> Result<()> {
        Err(Error::Collective("not written yet".into()))
    }
    fn broadcast(&mut self, _data: &mut [u32]) -> Result<()> {
        Err(Error::Collective("not written yet".into()))
    }
}
