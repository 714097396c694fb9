//! A sequence's tokens as full blocks, each with a hash of all tokens up to its end: what the prefix cache is asked for.

use std::hash::{DefaultHasher, Hash, Hasher};

use proto::units::TokenId;

use super::request::CacheNamespace;

/// Hashes of a sequence's full blocks. The hash of a block covers all tokens up to its end and the namespace.
#[derive(Debug, Clone)]
pub(crate) struct BlockHashes {
    /// Tokens in a block; `usize::MAX` where nothing is to be cached: then no block is ever full.
    block_size: usize,
    namespace: u64,
    hashes: Vec<u64>,
}

impl BlockHashes {
    /// Of no tokens yet.
    pub(crate) fn new(block_size: usize, namespace: &CacheNamespace) -> Self {
        Self { block_size, namespace: hash_of(namespace), hashes: Vec::new() }
    }

    /// Hashes the blocks that have become full since the last call.
    pub(crate) fn extend(&mut self, prompt: &[TokenId], generated: &[TokenId]) {
        while (self.hashes.len() + 1).saturating_mul(self.block_size) <= prompt.len() + generated.len() {
            let before = self.hashes.last().copied().unwrap_or(self.namespace);
            let (first, second) = block_tokens(prompt, generated, self.hashes.len(), self.block_size);
            let mut hasher = DefaultHasher::new();
            before.hash(&mut hasher);
            for token in first.iter().chain(second) {
                hasher.write_u32(token.0);
            }
            self.hashes.push(hasher.finish());
        }
    }

    /// By index of the block.
    pub(crate) fn as_slice(&self) -> &[u64] {
        &self.hashes
    }
}

/// A sequence's tokens as the cache looks at them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prefix<'a> {
    pub(crate) namespace: &'a CacheNamespace,
    pub(crate) prompt: &'a [TokenId],
    pub(crate) generated: &'a [TokenId],
    pub(crate) hashes: &'a BlockHashes,
}

impl<'a> Prefix<'a> {
    pub(crate) fn hash(&self, index: usize) -> u64 {
        self.hashes.hashes[index]
    }

    pub(crate) fn tokens(&self, index: usize) -> impl Iterator<Item = TokenId> + use<'a> {
        let (first, second) = block_tokens(self.prompt, self.generated, index, self.hashes.block_size);
        first.iter().chain(second).copied()
    }

    /// Blocks that may come from the cache. One token at least is computed: the next one is sampled from its logits.
    pub(crate) fn usable_blocks(&self) -> usize {
        let len = self.prompt.len() + self.generated.len();
        ((len - 1) / self.hashes.block_size).min(self.hashes.hashes.len())
    }
}

/// The tokens of block `index`, those of the prompt first.
fn block_tokens<'a>(
    prompt: &'a [TokenId],
    generated: &'a [TokenId],
    index: usize,
    block_size: usize,
) -> (&'a [TokenId], &'a [TokenId]) {
    let (start, end) = (index * block_size, (index + 1) * block_size);
    let of_prompt = start.min(prompt.len())..end.min(prompt.len());
    let of_generated = start.saturating_sub(prompt.len())..end.saturating_sub(prompt.len());
    (&prompt[of_prompt], &generated[of_generated])
}

fn hash_of(namespace: &CacheNamespace) -> u64 {
    let mut hasher = DefaultHasher::new();
    namespace.hash(&mut hasher);
    hasher.finish()
}
