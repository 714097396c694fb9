//! The KV blocks that can be used again: a tree in which each node is a full block, and the way from the root to it spells
//! the tokens that were computed. The idea of the tree is that of `RadixAttention` (Zheng et al. 2023, arXiv:2312.07104),
//! with whole blocks at its edges.
//!
//! A node's block is *in use* by running sequences, or *unused*. Whoever uses a block uses all blocks above it, so the
//! unused ones are whole subtrees, and can all be evicted, leaves first.

use std::collections::{BTreeSet, HashMap};

use proto::units::{BlockId, TokenId};

use super::prefix::Prefix;
use super::request::CacheNamespace;

/// How far a sequence's tokens are in the tree. Remembered from one lookup to the next, which goes on from there.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Match {
    /// Blocks from the root on.
    pub(crate) num_blocks: usize,
    last: Option<Last>,
}

/// The last block of a match, and how to see that it still is what it was.
#[derive(Debug, Clone, Copy)]
struct Last {
    block: BlockId,
    stamp: u64,
    /// Of `PrefixCache::num_forgotten`.
    num_forgotten: u64,
}

/// A block as it entered: another one that has the same place later is not meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shared {
    block: BlockId,
    stamp: u64,
}

/// What became of a block that was to enter.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// It is in the tree, in use by the sequence that computed it.
    Entered,
    /// So it is, instead of this block with the same tokens, which is free now.
    Replaced(BlockId),
    /// Another block with the same tokens stays in the tree, or the block above was forgotten. Blocks further on cannot
    /// enter either.
    Refused,
}

/// The tree.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    /// By block id.
    nodes: Vec<Option<Node>>,
    /// By hash. What it finds is compared token by token.
    index: HashMap<u64, BlockId>,
    /// Unused leaves, the one that was used longest ago first.
    evictable: BTreeSet<(u64, BlockId)>,
    num_unused: usize,
    /// A clock of uses. 0 is kept for what was forgotten.
    now: u64,
    next_stamp: u64,
    num_forgotten: u64,
}

#[derive(Debug)]
struct Node {
    hash: u64,
    parent: Parent,
    tokens: Box<[TokenId]>,
    /// Running sequences that use it.
    users: u32,
    children: u32,
    last_used: u64,
    /// Never the same for two nodes.
    stamp: u64,
    forgotten: bool,
}

#[derive(Debug, PartialEq)]
enum Parent {
    Root(CacheNamespace),
    Block(BlockId),
}

impl Node {
    fn is_evictable(&self) -> bool {
        self.users == 0 && self.children == 0
    }

    /// Whether it is the block `index` of `prefix`, behind `before`.
    fn holds(&self, before: Option<BlockId>, prefix: &Prefix<'_>, index: usize) -> bool {
        let parent = match (&self.parent, before) {
            (Parent::Root(namespace), None) => namespace == prefix.namespace,
            (Parent::Block(parent), Some(before)) => *parent == before,
            _ => false,
        };
        parent && self.tokens.iter().copied().eq(prefix.tokens(index))
    }
}

impl PrefixCache {
    /// An empty tree for a pool of `num_blocks`.
    pub(crate) fn new(num_blocks: u32) -> Self {
        Self {
            nodes: (0..num_blocks).map(|_| None).collect(),
            index: HashMap::new(),
            evictable: BTreeSet::new(),
            num_unused: 0,
            now: 1,
            next_stamp: 0,
            num_forgotten: 0,
        }
    }

    /// Blocks that no sequence uses. Each can be evicted.
    pub(crate) fn num_unused(&self) -> usize {
        self.num_unused
    }

    /// The longest beginning of `prefix` that is in the tree. `before`: what the last lookup for the same sequence gave.
    pub(crate) fn lookup(&self, prefix: &Prefix<'_>, before: Match) -> Match {
        let mut found = if self.is_valid(before) { before } else { Match::default() };
        let usable = prefix.usable_blocks();
        while found.num_blocks < usable {
            let Some(&block) = self.index.get(&prefix.hash(found.num_blocks)) else { break };
            let node = self.node(block);
            if !node.holds(found.last.map(|last| last.block), prefix, found.num_blocks) {
                break;
            }
            let last = Last { block, stamp: node.stamp, num_forgotten: self.num_forgotten };
            found = Match { num_blocks: found.num_blocks + 1, last: Some(last) };
        }
        found
    }

    /// A block is evicted after all below it, so a match is whole as long as its last block is there.
    fn is_valid(&self, found: Match) -> bool {
        found.last.is_none_or(|last| {
            last.num_forgotten == self.num_forgotten
                && self.nodes[last.block.0 as usize].as_ref().is_some_and(|node| node.stamp == last.stamp)
        })
    }

    /// Of a match, the blocks that nobody uses.
    pub(crate) fn num_unused_of(&self, found: Match) -> usize {
        self.upwards(found.last.map(|last| last.block))
            .take_while(|block| self.node(*block).users == 0)
            .count()
    }

    /// Of `blocks`, which are a sequence's first and in the tree, those that only one sequence uses.
    pub(crate) fn num_used_once(&self, blocks: &[BlockId]) -> usize {
        blocks.iter().rev().take_while(|block| self.node(**block).users == 1).count()
    }

    /// Uses the blocks of a match. Returns them in order of position.
    pub(crate) fn acquire(&mut self, found: Match) -> Vec<BlockId> {
        assert!(self.is_valid(found), "a match is looked up again before it is used");
        let mut blocks = self.upwards(found.last.map(|last| last.block)).collect::<Vec<_>>();
        for &block in &blocks {
            let node = self.node_mut(block);
            node.users += 1;
            let (first, evictable) = (node.users == 1, (node.last_used, block));
            if first {
                self.num_unused -= 1;
                self.evictable.remove(&evictable);
            }
        }
        blocks.reverse();
        blocks
    }

    /// Enters block `index` of `prefix`, which is or will be computed before anyone can use it. `before`: the block above
    /// it, in use by the same sequence.
    pub(crate) fn insert(
        &mut self,
        prefix: &Prefix<'_>,
        index: usize,
        before: Option<BlockId>,
        block: BlockId,
    ) -> Inserted {
        if before.is_some_and(|before| self.node(before).forgotten) {
            return Inserted::Refused;
        }
        let hash = prefix.hash(index);
        let twin = self.index.get(&hash).copied();
        // Another prefix with the same hash stays where it is, and is no longer found.
        let twin = twin.filter(|twin| self.node(*twin).holds(before, prefix, index));
        if let Some(twin) = twin {
            if !self.node(twin).is_evictable() {
                return Inserted::Refused;
            }
            self.remove(twin);
        }
        let parent = match before {
            None => Parent::Root(prefix.namespace.clone()),
            Some(before) => {
                self.node_mut(before).children += 1;
                Parent::Block(before)
            }
        };
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        let tokens = prefix.tokens(index).collect();
        let node = Node {
            hash,
            parent,
            tokens,
            users: 1,
            children: 0,
            last_used: self.now,
            stamp,
            forgotten: false,
        };
        let place = self.nodes[block.0 as usize].replace(node);
        assert!(place.is_none(), "{block} is in the tree already");
        self.index.insert(hash, block);
        twin.map_or(Inserted::Entered, Inserted::Replaced)
    }

    /// Ends a sequence's use of `blocks`, which are its first.
    pub(crate) fn release(&mut self, blocks: &[BlockId]) {
        self.now += 1;
        for &block in blocks.iter().rev() {
            let now = self.now;
            let node = self.node_mut(block);
            node.users -= 1;
            if node.users > 0 {
                continue;
            }
            node.last_used = if node.forgotten { 0 } else { now };
            let leaf = node.is_evictable().then_some((node.last_used, block));
            self.num_unused += 1;
            self.evictable.extend(leaf);
        }
    }

    /// Lets nobody find `block` and what is below it any more. Those who use it keep it.
    pub(crate) fn forget(&mut self, block: BlockId) {
        let node = self.node_mut(block);
        node.forgotten = true;
        let hash = node.hash;
        self.remove_from_index(hash, block);
        self.num_forgotten += 1;
    }

    /// A block that is in the tree, to be named later.
    pub(crate) fn shared(&self, block: BlockId) -> Shared {
        Shared { block, stamp: self.node(block).stamp }
    }

    /// The same as `forget`, unless the block has left the tree or was forgotten.
    pub(crate) fn forget_shared(&mut self, Shared { block, stamp }: Shared) {
        let node = self.nodes[block.0 as usize].as_ref();
        if node.is_some_and(|node| node.stamp == stamp && !node.forgotten) {
            self.forget(block);
        }
    }

    /// Takes the leaf out that was used longest ago, if there is one that nobody uses.
    pub(crate) fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.evictable.first().copied()?;
        self.remove(block);
        Some(block)
    }

    /// Takes an unused leaf out.
    fn remove(&mut self, block: BlockId) {
        let node = self.nodes[block.0 as usize].take().expect("a block that is removed is in the tree");
        self.num_unused -= 1;
        self.evictable.remove(&(node.last_used, block));
        self.remove_from_index(node.hash, block);
        if let Parent::Block(parent) = node.parent {
            let above = self.node_mut(parent);
            above.children -= 1;
            let leaf = above.is_evictable().then_some((above.last_used, parent));
            self.evictable.extend(leaf);
        }
    }

    fn remove_from_index(&mut self, hash: u64, block: BlockId) {
        if self.index.get(&hash) == Some(&block) {
            self.index.remove(&hash);
        }
    }

    /// From `block` to the root.
    fn upwards(&self, block: Option<BlockId>) -> impl Iterator<Item = BlockId> {
        std::iter::successors(block, |block| match self.node(*block).parent {
            Parent::Root(_) => None,
            Parent::Block(parent) => Some(parent),
        })
    }

    fn node(&self, block: BlockId) -> &Node {
        self.nodes[block.0 as usize].as_ref().expect("the tree names only blocks that are in it")
    }

    fn node_mut(&mut self, block: BlockId) -> &mut Node {
        self.nodes[block.0 as usize].as_mut().expect("the tree names only blocks that are in it")
    }

    /// Panics where the tree contradicts itself. Returns the blocks that are in it, with the number of their users.
    pub(crate) fn check_invariants(&self) -> HashMap<BlockId, u32> {
        let nodes = self.nodes.iter().enumerate();
        let nodes = nodes.filter_map(|(id, node)| Some((BlockId(id as u32), node.as_ref()?)));
        let mut children = HashMap::new();
        for (block, node) in nodes.clone() {
            if let Parent::Block(parent) = node.parent {
                assert!(self.node(parent).users >= node.users, "{block} is used without the one above it");
                *children.entry(parent).or_insert(0) += 1;
            }
            let listed = self.evictable.contains(&(node.last_used, block));
            assert_eq!(listed, node.is_evictable(), "{block} is evictable when it is an unused leaf");
        }
        for (block, node) in nodes.clone() {
            assert_eq!(
                children.get(&block).copied().unwrap_or(0),
                node.children,
                "{block} miscounts its children"
            );
        }
        assert_eq!(self.evictable.len(), nodes.clone().filter(|(_, node)| node.is_evictable()).count());
        assert_eq!(self.num_unused, nodes.clone().filter(|(_, node)| node.users == 0).count());
        assert!(self.index.iter().all(|(hash, block)| self.node(*block).hash == *hash));
        nodes.map(|(block, node)| (block, node.users)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proto::units::AdapterIndex;

    use super::*;
    use crate::scheduler::prefix::BlockHashes;

    const BLOCK_SIZE: usize = 2;

    /// A sequence, with what `Prefix` borrows.
    struct Text {
        namespace: CacheNamespace,
        prompt: Vec<TokenId>,
        generated: Vec<TokenId>,
        hashes: BlockHashes,
    }

    impl Text {
        fn new(prompt: &[u32], generated: &[u32]) -> Self {
            Self::salted(None, prompt, generated)
        }

        fn salted(salt: Option<&str>, prompt: &[u32], generated: &[u32]) -> Self {
            let namespace = CacheNamespace { adapter: None, salt: salt.map(Into::into) };
            let ids = |tokens: &[u32]| tokens.iter().copied().map(TokenId).collect::<Vec<_>>();
            let (prompt, generated) = (ids(prompt), ids(generated));
            let mut hashes = BlockHashes::new(BLOCK_SIZE, &namespace);
            hashes.extend(&prompt, &generated);
            Self { namespace, prompt, generated, hashes }
        }

        fn prefix(&self) -> Prefix<'_> {
            let Self { namespace, prompt, generated, hashes } = self;
            Prefix { namespace, prompt, generated, hashes }
        }
    }

    /// Enters all full blocks of `text` as a sequence that computes them in `blocks`.
    fn enter(cache: &mut PrefixCache, text: &Text, blocks: &[u32]) {
        for (index, &block) in blocks.iter().enumerate() {
            let before = index.checked_sub(1).map(|above| BlockId(blocks[above]));
            assert_eq!(cache.insert(&text.prefix(), index, before, BlockId(block)), Inserted::Entered);
        }
        cache.check_invariants();
    }

    fn release(cache: &mut PrefixCache, blocks: &[u32]) {
        cache.release(&blocks.iter().copied().map(BlockId).collect::<Vec<_>>());
        cache.check_invariants();
    }

    fn found(cache: &PrefixCache, text: &Text) -> usize {
        cache.lookup(&text.prefix(), Match::default()).num_blocks
    }

    #[test]
    fn the_longest_beginning_in_the_tree_is_found_and_one_token_is_left_to_compute() {
        let mut cache = PrefixCache::new(8);
        enter(&mut cache, &Text::new(&[1, 2, 3, 4, 5], &[6]), &[5, 3, 0]);
        let check = |prompt: &[u32], generated: &[u32], blocks: usize| {
            assert_eq!(found(&cache, &Text::new(prompt, generated)), blocks, "{prompt:?} {generated:?}");
        };
        check(&[1, 2, 3, 4, 5, 6, 7], &[], 3);
        check(&[1, 2, 3], &[4, 5, 6, 7], 3);
        check(&[1, 2, 3, 4, 5, 6], &[], 2);
        check(&[1, 2, 3, 4, 9, 6, 7], &[], 2);
        check(&[1, 2], &[], 0);
        check(&[3, 4, 5, 6, 7], &[], 0);
        let text = Text::new(&[1, 2, 3, 4, 5, 6, 7], &[]);
        let found = cache.lookup(&text.prefix(), Match::default());
        assert_eq!(cache.acquire(found), [BlockId(5), BlockId(3), BlockId(0)]);
    }

    #[test]
    fn namespaces_share_nothing() {
        let mut cache = PrefixCache::new(8);
        enter(&mut cache, &Text::salted(Some("a"), &[1, 2, 3, 4], &[]), &[0, 1]);
        assert_eq!(found(&cache, &Text::salted(Some("a"), &[1, 2, 3, 4, 5], &[])), 2);
        assert_eq!(found(&cache, &Text::salted(Some("b"), &[1, 2, 3, 4, 5], &[])), 0);
        assert_eq!(found(&cache, &Text::new(&[1, 2, 3, 4, 5], &[])), 0);
        let adapter = Text {
            namespace: CacheNamespace { adapter: Some(AdapterIndex(0)), salt: None },
            ..Text::new(&[1, 2, 3, 4, 5], &[])
        };
        assert_eq!(found(&cache, &adapter), 0, "whatever its hashes are");
    }

    #[test]
    fn leaves_go_first_in_the_order_of_their_last_use() {
        let mut cache = PrefixCache::new(8);
        enter(&mut cache, &Text::new(&[1, 2, 3, 4], &[]), &[0, 1]);
        enter(&mut cache, &Text::new(&[5, 6], &[]), &[2]);
        assert_eq!(cache.evict(), None, "all are in use");
        release(&mut cache, &[0, 1]);
        release(&mut cache, &[2]);
        // The chain is used again, so that the other one is older now.
        let text = Text::new(&[1, 2, 3, 4, 5], &[]);
        let again = cache.lookup(&text.prefix(), Match::default());
        assert_eq!(cache.num_unused_of(again), 2);
        cache.acquire(again);
        assert_eq!(cache.num_unused(), 1);
        release(&mut cache, &[0, 1]);
        for block in [2, 1, 0] {
            assert_eq!(cache.evict(), Some(BlockId(block)));
            cache.check_invariants();
        }
        assert_eq!((cache.evict(), cache.num_unused()), (None, 0));
    }

    #[test]
    fn a_match_is_looked_up_again_after_its_last_block_was_evicted() {
        let mut cache = PrefixCache::new(8);
        enter(&mut cache, &Text::new(&[1, 2, 3, 4], &[]), &[0, 1]);
        let text = Text::new(&[1, 2, 3, 4, 5], &[]);
        let before = cache.lookup(&text.prefix(), Match::default());
        release(&mut cache, &[0, 1]);
        assert_eq!(cache.lookup(&text.prefix(), before).num_blocks, 2);
        assert_eq!(cache.evict(), Some(BlockId(1)));
        assert_eq!(cache.lookup(&text.prefix(), before).num_blocks, 1);
        // The same block in the same place, with other tokens.
        let other = Text::new(&[1, 2, 7, 8], &[]);
        let above = cache.lookup(&other.prefix(), Match::default());
        cache.acquire(above);
        cache.insert(&other.prefix(), 1, Some(BlockId(0)), BlockId(1));
        assert_eq!(cache.lookup(&text.prefix(), before).num_blocks, 1);
    }

    #[test]
    fn of_two_blocks_with_the_same_tokens_one_is_kept() {
        let mut cache = PrefixCache::new(8);
        let text = Text::new(&[1, 2, 3, 4], &[]);
        enter(&mut cache, &text, &[0, 1]);
        let insert = |cache: &mut PrefixCache, block| {
            cache.insert(&text.prefix(), 1, Some(BlockId(0)), BlockId(block))
        };
        assert_eq!(insert(&mut cache, 2), Inserted::Refused, "the first one is in use");
        // Two use the upper block; the first of them ends.
        let longer = Text::new(&[1, 2, 3], &[]);
        let above = cache.lookup(&longer.prefix(), Match::default());
        cache.acquire(above);
        release(&mut cache, &[0, 1]);
        assert_eq!(insert(&mut cache, 2), Inserted::Replaced(BlockId(1)));
        cache.check_invariants();
    }

    #[test]
    fn what_was_forgotten_is_not_found_and_goes_first() {
        let mut cache = PrefixCache::new(8);
        enter(&mut cache, &Text::new(&[5, 6], &[]), &[4]);
        release(&mut cache, &[4]);
        let text = Text::new(&[1, 2, 3, 4, 5, 6], &[]);
        enter(&mut cache, &text, &[0, 1]);
        let before = cache.lookup(&text.prefix(), Match::default());
        cache.forget(BlockId(0));
        assert_eq!(cache.lookup(&text.prefix(), before).num_blocks, 0);
        assert_eq!(cache.insert(&text.prefix(), 2, Some(BlockId(0)), BlockId(2)), Inserted::Refused);
        release(&mut cache, &[0, 1]);
        // Its tokens can be computed and found anew, by which the old one is not disturbed.
        assert_eq!(cache.insert(&text.prefix(), 0, None, BlockId(3)), Inserted::Entered);
        cache.check_invariants();
        assert_eq!(found(&cache, &text), 1);
    }
}
