//! One operation, one file: shape contract, CPU code (and, with the `cuda` feature, the CUDA call).
//!
//! All write to an output that the caller owns, and refuse shapes that do not fit with [`crate::Error`].

pub mod activation;
pub mod attention;
pub mod embedding;
pub mod linear;
pub mod logits;
pub mod lora;
pub mod moe;
pub mod norm;
pub(crate) mod operands;
pub mod rotary;
pub mod sampling;
