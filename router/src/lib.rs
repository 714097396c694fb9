//! Lamplighter's router: HTTP and text in front, scheduling behind; knows no tensors.

pub mod config;
mod metrics;
pub mod scheduler;
mod shards;
