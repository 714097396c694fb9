//! Sequences and their steps. One thread owns model, KV cache and sequences; the service talks to it by commands.
//!
//! A step: [`validate`] refuses what breaks the contract before anything is changed, [`sequence`] keeps what the
//! router sends only once, [`batch`] makes the flat input of the model, [`step`] runs it and chooses tokens.

mod batch;
mod memory;
mod sequence;
mod step;
mod thread;
mod validate;
mod warmup;

pub use step::{Engine, Origin};
pub(crate) use thread::{Answer, EngineEvents, EngineGone, EngineHandle, spawn};

/// Tokens in one KV block. Large enough that attention reads contiguous memory and tables stay short, small enough
/// that half a block wasted per sequence does not count.
const BLOCK_SIZE_TOKENS: usize = 32;
