//! Memory for keys and values, allocated once.

use kernels::{DType, KvLayer};

use super::Decoder;

/// This rank's keys and values of all layers, in blocks of tokens. Which block holds what is the router's business.
pub struct KvCache {
    pub(super) layers: Vec<KvLayer>,
    num_blocks: usize,
    block_size: usize,
}

impl KvCache {
    /// A cache for `decoder` with `num_blocks` blocks of `block_size` tokens. The system gives the pages when they are
    /// first written.
    pub fn new(decoder: &Decoder, num_blocks: usize, block_size: usize, dtype: DType) -> Self {
        let (kv_heads, head_dim) = (decoder.kv_heads(), decoder.spec().head_dim);
        let layer = || KvLayer::new(num_blocks, kv_heads, block_size, head_dim, dtype);
        let layers = (0..decoder.spec().num_layers()).map(|_| layer()).collect();
        Self { layers, num_blocks, block_size }
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The layers, for whoever writes keys and values without computing them.
    pub fn layers_mut(&mut self) -> &mut [KvLayer] {
        &mut self.layers
    }

    /// Bytes of all layers.
    pub fn size_in_bytes(&self) -> usize {
        self.layers.iter().map(KvLayer::size_in_bytes).sum()
    }
}
