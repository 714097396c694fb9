//! Which part of a tensor belongs to a rank.

use std::ops::Range;

/// A rank's place in its tensor-parallel group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// `0 <= rank < world_size`.
    pub rank: usize,
    /// Number of ranks, at least one.
    pub world_size: usize,
}

impl Default for Partition {
    /// A group of one.
    fn default() -> Self {
        Self { rank: 0, world_size: 1 }
    }
}

impl Partition {
    /// This rank's part of `size` things, which `world_size` divides.
    pub fn range(self, size: usize) -> Range<usize> {
        let len = size / self.world_size;
        self.rank * len..(self.rank + 1) * len
    }
}

/// What a rank holds of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slice {
    /// All of it.
    Whole,
    /// Its part of the rows (of the elements, for a vector): a share of the outputs of a linear layer.
    Rows,
    /// Its part of the columns: a share of the inputs of a linear layer.
    Cols,
}
