//! Lamplighter's shard: owns tensors, computes tokens, knows no text.

mod config;
pub mod decoder;
pub mod models;
pub mod weights;

pub use config::{Dtype, ShardConfig, ShardPlacement};
