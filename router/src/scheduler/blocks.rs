//! Who has which KV block: each is free, cached (its tokens can be used again, and nobody uses them now), or owned by one
//! or more running sequences.

use std::collections::HashMap;

use proto::units::BlockId;

use super::prefix::Prefix;
use super::prefix_cache::{Inserted, Match, PrefixCache, Shared};
use crate::metrics;

/// The KV blocks of the shards.
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// Taken from the end: the block used last is the one most likely to be in a CPU's cache.
    free: Vec<BlockId>,
    cache: PrefixCache,
    num_blocks: usize,
}

/// The blocks of a sequence: those that are in the cache too, which it only reads and may share with others; then its own.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    blocks: Vec<BlockId>,
    num_shared: usize,
    /// Whether its own blocks cannot enter the cache any more: others with the same tokens are there.
    closed: bool,
}

impl BlockTable {
    /// In order of position.
    pub(crate) fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many of the first ones are in the cache.
    pub(crate) fn num_shared(&self) -> usize {
        self.num_shared
    }

    /// Whether no further block of it will be in the cache.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Those in the cache, and its own.
    fn parts(&self) -> (&[BlockId], &[BlockId]) {
        self.blocks.split_at(self.num_shared)
    }
}

impl BlockPool {
    /// A pool of blocks `0 .. num_blocks`, all free.
    pub(crate) fn new(num_blocks: u32) -> Self {
        Self {
            free: (0..num_blocks).rev().map(BlockId).collect(),
            cache: PrefixCache::new(num_blocks),
            num_blocks: num_blocks as usize,
        }
    }

    /// Blocks that can be given to a sequence: free and cached ones.
    pub(crate) fn num_available(&self) -> usize {
        self.free.len() + self.cache.num_unused()
    }

    /// Blocks that nobody uses and that can be used again.
    pub(crate) fn num_cached(&self) -> usize {
        self.cache.num_unused()
    }

    /// Blocks that there are.
    pub(crate) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// The longest beginning of `prefix` that is cached or in use. `before`: what the last lookup for it gave.
    pub(crate) fn lookup(&self, prefix: &Prefix<'_>, before: Match) -> Match {
        self.cache.lookup(prefix, before)
    }

    /// Blocks that `acquire` takes from those that are available.
    pub(crate) fn num_available_of(&self, found: Match) -> usize {
        self.cache.num_unused_of(found)
    }

    /// Blocks that would become available if the sequence gave its blocks back.
    pub(crate) fn num_returned_by(&self, table: &BlockTable) -> usize {
        let (shared, own) = table.parts();
        own.len() + self.cache.num_used_once(shared)
    }

    /// A table that begins with the blocks of a match.
    pub(crate) fn acquire(&mut self, found: Match) -> BlockTable {
        BlockTable { blocks: self.cache.acquire(found), num_shared: found.num_blocks, closed: false }
    }

    /// Appends `num_blocks` blocks to a sequence's table, and returns them. The plan counted them before, so that they are
    /// there. What is cached goes only when nothing is free.
    pub(crate) fn allocate(&mut self, table: &mut BlockTable, num_blocks: usize) -> Vec<BlockId> {
        let num_evicted = num_blocks.saturating_sub(self.free.len());
        for _ in 0..num_evicted {
            let evicted = self.cache.evict();
            self.free.push(evicted.expect("a plan gives no more blocks than are available"));
        }
        if num_evicted > 0 {
            metrics::record_prefix_cache_evictions(num_evicted);
        }
        let blocks = self.free.split_off(self.free.len() - num_blocks);
        table.blocks.extend_from_slice(&blocks);
        blocks
    }

    /// Lets others use the sequence's first `num_blocks` blocks, all of them full and on their way to be computed. Returns
    /// whether further ones may follow.
    pub(crate) fn share(&mut self, table: &mut BlockTable, prefix: &Prefix<'_>, num_blocks: usize) -> bool {
        while table.num_shared < num_blocks && !table.closed {
            let index = table.num_shared;
            let before = index.checked_sub(1).map(|above| table.blocks[above]);
            match self.cache.insert(prefix, index, before, table.blocks[index]) {
                Inserted::Entered => table.num_shared += 1,
                Inserted::Replaced(twin) => {
                    table.num_shared += 1;
                    self.free.push(twin);
                }
                Inserted::Refused => table.closed = true,
            }
        }
        !table.closed
    }

    /// The sequence's blocks that have entered the cache since there were `num_before` of them.
    pub(crate) fn shared_since(&self, table: &BlockTable, num_before: usize) -> Vec<Shared> {
        table.blocks[num_before..table.num_shared].iter().map(|&block| self.cache.shared(block)).collect()
    }

    /// Takes blocks out of the cache that turned out not to be computed, as far as they are there.
    pub(crate) fn forget_shared(&mut self, shared: &[Shared]) {
        for &shared in shared {
            self.cache.forget_shared(shared);
        }
    }

    /// Takes those of the sequence's blocks out of the cache that it has computed itself: behind the first `num_acquired`.
    pub(crate) fn forget(&mut self, table: &BlockTable, num_acquired: usize) {
        for &block in &table.blocks[num_acquired..table.num_shared] {
            self.cache.forget(block);
        }
    }

    /// Takes a sequence's blocks back. Its own are free; those in the cache stay there.
    ///
    /// They may be handed out in the very next step even if a step that computes with them is still in flight: shards
    /// work through steps in order, so what that step writes is written before the next one begins, and the next one
    /// names their former owner in `release_sequence_ids`, which shards apply before anything else.
    pub(crate) fn release(&mut self, table: &BlockTable) {
        let (shared, own) = table.parts();
        self.cache.release(shared);
        self.free.extend(own);
    }

    /// Panics unless each block is free, in the cache, or one sequence's own; and in use as often as `tables` say.
    pub(crate) fn check_invariants<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let in_cache = self.cache.check_invariants();
        let mut users = HashMap::new();
        let mut places = vec![0_u32; self.num_blocks];
        let mut place = |BlockId(block)| {
            let places = places.get_mut(block as usize).expect("a block outside of the pool");
            *places += 1;
        };
        for table in tables {
            let (shared, own) = table.parts();
            for block in shared {
                *users.entry(*block).or_insert(0) += 1;
            }
            own.iter().copied().for_each(&mut place);
        }
        self.free.iter().chain(in_cache.keys()).copied().for_each(&mut place);
        for (block, places) in places.into_iter().enumerate() {
            assert_eq!(places, 1, "block {block} is in {places} places");
        }
        for (block, in_use) in &in_cache {
            let users = users.remove(block).unwrap_or(0);
            assert_eq!(*in_use, users, "{block} is used by {users}");
        }
        assert!(users.is_empty(), "{users:?} are shared and not in the cache");
    }
}

#[cfg(test)]
mod tests {
    use proto::units::TokenId;

    use super::*;
    use crate::scheduler::prefix::BlockHashes;
    use crate::scheduler::request::CacheNamespace;

    /// Tokens 0, 1, 2, … in blocks of two.
    struct Text(Vec<TokenId>, CacheNamespace, BlockHashes);

    impl Text {
        fn new(len: u32) -> Self {
            let tokens = (0..len).map(TokenId).collect::<Vec<_>>();
            let namespace = CacheNamespace::default();
            let mut hashes = BlockHashes::new(2, &namespace);
            hashes.extend(&tokens, &[]);
            Self(tokens, namespace, hashes)
        }

        fn prefix(&self) -> Prefix<'_> {
            Prefix { namespace: &self.1, prompt: &self.0, generated: &[], hashes: &self.2 }
        }
    }

    #[test]
    fn a_block_is_free_cached_or_owned() {
        let mut pool = BlockPool::new(6);
        let text = Text::new(7);
        let mut first = BlockTable::default();
        pool.allocate(&mut first, 4);
        assert!(pool.share(&mut first, &text.prefix(), 3));
        pool.check_invariants([&first].into_iter());
        assert_eq!((pool.num_available(), pool.num_cached()), (2, 0));

        let mut second = pool.acquire(pool.lookup(&text.prefix(), Match::default()));
        pool.allocate(&mut second, 1);
        assert_eq!(&second.blocks()[..3], &first.blocks()[..3]);
        pool.check_invariants([&first, &second].into_iter());
        assert_eq!(pool.num_returned_by(&first), 1, "the others are in use");

        pool.release(&first);
        assert_eq!((pool.num_available(), pool.num_cached()), (2, 0));
        assert_eq!(pool.num_returned_by(&second), 4);
        pool.release(&second);
        pool.check_invariants(std::iter::empty());
        assert_eq!((pool.num_available(), pool.num_cached()), (6, 3));
    }

    #[test]
    fn cached_blocks_are_given_away_when_no_other_is_free() {
        let mut pool = BlockPool::new(4);
        let text = Text::new(5);
        let mut first = BlockTable::default();
        pool.allocate(&mut first, 3);
        pool.share(&mut first, &text.prefix(), 2);
        pool.release(&first);
        let mut second = BlockTable::default();
        pool.allocate(&mut second, 2);
        assert_eq!(pool.num_cached(), 2);
        pool.allocate(&mut second, 1);
        assert_eq!(pool.lookup(&text.prefix(), Match::default()).num_blocks, 1, "its end went first");
        pool.check_invariants([&second].into_iter());
    }

    #[test]
    fn a_second_copy_is_not_shared_nor_what_follows_it() {
        let mut pool = BlockPool::new(6);
        let text = Text::new(7);
        let (mut first, mut second) = (BlockTable::default(), BlockTable::default());
        pool.allocate(&mut first, 3);
        pool.allocate(&mut second, 3);
        assert!(pool.share(&mut first, &text.prefix(), 2));
        assert!(!pool.share(&mut second, &text.prefix(), 3));
        assert_eq!((first.num_shared(), second.num_shared()), (2, 0));
        pool.check_invariants([&first, &second].into_iter());
    }

    #[test]
    #[should_panic(expected = "block 0 is in 2 places")]
    fn a_block_in_two_places_is_noticed() {
        let table = BlockTable { blocks: vec![BlockId(0)], ..BlockTable::default() };
        BlockPool::new(2).check_invariants([&table].into_iter());
    }

    #[test]
    #[should_panic(expected = "block 0 is in 0 places")]
    fn a_lost_block_is_noticed() {
        let mut pool = BlockPool::new(2);
        pool.allocate(&mut BlockTable::default(), 1);
        pool.check_invariants(std::iter::empty());
    }
}
