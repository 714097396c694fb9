//! Who owns which KV block.

use proto::units::BlockId;

/// The KV blocks that are free. All others are owned by a sequence: each block is in exactly one place.
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// Taken from the end: the block used last is the one most likely to be in a CPU's cache.
    free: Vec<BlockId>,
    num_blocks: usize,
}

impl BlockPool {
    /// A pool of blocks `0 .. num_blocks`, all free.
    pub(crate) fn new(num_blocks: u32) -> Self {
        Self { free: (0..num_blocks).rev().map(BlockId).collect(), num_blocks: num_blocks as usize }
    }

    /// Blocks that nobody owns.
    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that there are.
    pub(crate) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Takes `num_blocks` free blocks. The plan counted them before, so that they are there.
    pub(crate) fn allocate(&mut self, num_blocks: usize) -> Vec<BlockId> {
        assert!(
            num_blocks <= self.free.len(),
            "a plan gives {num_blocks} blocks, {} are free",
            self.free.len()
        );
        self.free.split_off(self.free.len() - num_blocks)
    }

    /// Gives blocks back.
    ///
    /// They may be handed out in the very next step even if a step that computes with them is still in flight: shards
    /// work through steps in order, so what that step writes is written before the next one begins, and the next one
    /// names their former owner in `release_sequence_ids`, which shards apply before anything else.
    pub(crate) fn free(&mut self, blocks: Vec<BlockId>) {
        self.free.extend(blocks);
    }

    /// Panics unless each block is either free or in `owned`, and there once.
    pub(crate) fn check_invariants(&self, owned: impl Iterator<Item = BlockId>) {
        let mut places = vec![0_u32; self.num_blocks];
        for BlockId(block) in self.free.iter().copied().chain(owned) {
            let places = places.get_mut(block as usize).expect("a block outside of the pool");
            *places += 1;
        }
        for (block, places) in places.into_iter().enumerate() {
            assert_eq!(places, 1, "block {block} is in {places} places");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_free_or_owned() {
        let mut pool = BlockPool::new(4);
        let first = pool.allocate(1);
        let second = pool.allocate(2);
        pool.check_invariants(first.iter().chain(&second).copied());
        assert_eq!(pool.num_free(), 1);
        pool.free(second);
        pool.check_invariants(first.iter().copied());
        assert_eq!(pool.num_free(), 3);
    }

    #[test]
    #[should_panic(expected = "block 0 is in 2 places")]
    fn a_block_in_two_places_is_noticed() {
        BlockPool::new(2).check_invariants([BlockId(0)].into_iter());
    }

    #[test]
    #[should_panic(expected = "block 0 is in 0 places")]
    fn a_lost_block_is_noticed() {
        let mut pool = BlockPool::new(2);
        drop(pool.allocate(1));
        pool.check_invariants(std::iter::empty());
    }
}
