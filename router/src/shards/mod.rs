//! All ranks of a tensor-parallel group, seen as one shard: every rank gets the same steps in the same order, and a step
//! is answered when all have answered.

mod codec;
mod connect;
mod from_proto;
mod grammars;
mod group;
mod info;
mod to_proto;

#[cfg(test)]
mod tests;

pub(crate) use connect::ShardError;
pub use info::{DataType, Device};

pub(crate) use connect::connect;
pub(crate) use grammars::{GrammarClient, GrammarError};
pub(crate) use group::ShardGroup;
pub(crate) use info::GroupInfo;
