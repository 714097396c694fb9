//! gRPC in and out; no tensor code.
//!
//! [`serve`] binds the socket ([`socket`]) or a port ([`connection`]), starts the engine's thread and answers `lamplighter.shard.v1.Shard`
//! ([`shard`]), `grpc.health.v1.Health` and server reflection, so that any gRPC client can debug a shard.

mod connection;
mod server;
mod shard;
mod socket;
mod status;

pub use server::serve;
