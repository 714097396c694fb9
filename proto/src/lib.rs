//! The contract between Lamplighter's router and its shards: `proto/lamplighter/shard/v1/shard.proto`.
//!
//! [`v1`] holds the generated messages, client and server; [`client`] connects to a shard over a Unix socket or TCP;
//! [`units`] are the numbers that must not be mixed up. The generated code is committed; a test regenerates it.

pub mod client;
pub mod units;

mod gen_v1 {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        reason = "generated; the comments of the .proto file are its documentation"
    )]
    include!("gen/lamplighter.shard.v1.rs");
}

/// Generated from `shard.proto`, version 1.
pub mod v1 {
    pub use crate::gen_v1::*;
}

/// The compiled `.proto` files, for gRPC server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/shard_descriptor.bin");
