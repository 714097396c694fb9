//! Lamplighter's tensor operations: the only crate with unsafe code, FFI and knowledge of the device.
//!
//! candle owns element types and the plain reference; the hot path is ours: out-variant operations on
//! [`View`]s (pointer, shape, row stride, element type) that allocate nothing. On the CPU, activations are f32 whatever the
//! weights' type, and weights are used in place from the mapped file; on a GPU, activations have the weights' type, and
//! weights are copied to the device ([`Context::upload`]).
//!
//! Key types: [`Context`] (device and threads an operation runs on), [`Tensor`] (owned or mapped storage),
//! [`View`] / [`ViewMut`] (a matrix in it), [`KvLayer`] (paged keys and values of one layer), [`Communicator`]
//! (the ranks of a tensor-parallel group). Operations are in [`ops`], one file each; `cuda` is what they are launched with on a
//! GPU (feature `cuda`), and the kernels' own text is in the folder `cuda` beside `src`.
//!
//! On the CPU a row's result is the same to the bit whatever the number of rows and threads beside it.
#![expect(unsafe_code, reason = "kernels is the one crate for it; each block says why it is sound")]
#![expect(
    clippy::inline_always,
    reason = "a kernel is inlined into the function that enables its instructions"
)]

pub mod collective;
mod context;
mod cores;
#[cfg(feature = "cuda")]
mod cuda;
mod graph;
pub mod mmap;
pub mod ops;
mod pool;
#[doc(hidden)]
pub mod probe;
mod readback;
mod scratch;
mod simd;
mod staging;
mod tensor;

pub use candle_core::DType;
pub use collective::Communicator;
pub use context::{BUILT_WITH_CUDA, Context, Frozen, MemoryUse, num_gpus};
pub use cores::{BindError, MAX_CORES, allowed_cores, available_cores, bind_to_cores};
pub use graph::Graph;
pub use ops::attention::{AttentionBatch, AttentionParams, KvLayer};
pub use readback::Readback;
#[doc(hidden)]
pub use simd::Level;
pub use staging::Staging;
pub use tensor::{Element, Error, Place, Result, Tensor, View, ViewMut};
