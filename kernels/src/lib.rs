//! Lamplighter's tensor operations: the only crate with unsafe code, FFI and knowledge of the device.
//!
//! candle owns element types and the plain reference; the hot path is ours: out-variant operations on
//! [`View`]s (pointer, shape, row stride, element type) that allocate nothing. Activations are f32 on the CPU whatever the
//! weights' type; weights are used in place from the mapped file.
//!
//! Key types: [`Context`] (device and threads an operation runs on), [`Tensor`] (owned or mapped storage),
//! [`View`] / [`ViewMut`] (a matrix in it), [`KvLayer`] (paged keys and values of one layer), [`Communicator`]
//! (the ranks of a tensor-parallel group). Operations are in [`ops`], one file each.
//!
//! On the CPU a row's result is the same to the bit whatever the number of rows and threads beside it.
#![expect(unsafe_code, reason = "kernels is the one crate for it; each block says why it is sound")]
#![expect(
    clippy::inline_always,
    reason = "a kernel is inlined into the function that enables its instructions"
)]

pub mod collective;
pub mod mmap;
pub mod ops;
mod pool;
#[doc(hidden)]
pub mod probe;
mod simd;
mod tensor;

pub use candle_core::DType;
pub use collective::Communicator;
pub use ops::attention::{AttentionBatch, AttentionParams, KvLayer};
pub use pool::{Context, available_cores};
#[doc(hidden)]
pub use simd::Level;
pub use tensor::{Element, Error, Result, Tensor, View, ViewMut};
