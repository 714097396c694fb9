//! Memory for keys and values, allocated once.

use kernels::{Context, DType, KvLayer, Result};

use super::Decoder;

/// This rank's keys and values of all layers, in blocks of tokens. Which block holds what is the router's business.
pub struct KvCache {
    pub(super) layers: Vec<KvLayer>,
    num_blocks: usize,
    block_size: usize,
}

impl KvCache {
    /// A cache for `decoder` with `num_blocks` blocks of `block_size` tokens. On a CPU, the system gives
    /// the pages when they are first written.
    pub fn new(
        context: &Context,
        decoder: &Decoder,
        num_blocks: usize,
        block_size: usize,
        dtype: DType,
    ) -> Result<Self> {
        let (kv_heads, head_dim) = (decoder.kv_heads(), decoder.spec().head_dim);
        let layer = |_| KvLayer::new(context, num_blocks, kv_heads, block_size, head_dim, dtype);
        let layers = (0..decoder.spec().num_layers()).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, num_blocks, block_size })
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
