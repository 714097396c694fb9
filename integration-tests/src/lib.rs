//! The real executable, driven as its users drive it: started with flags, asked over HTTP, stopped with signals. On a
//! CPU, with tiny models.
//!
//! [`Stack`] is a running server; [`Model`] is what it serves; [`Node`] is one of
//! several hosts; [`LoneShard`] has no router before it; [`python`] runs clients that other people wrote. The
//! tests are in `tests/`, a file for each behaviour. `make test` builds the executable first.

mod executable;
mod http;
mod lone_shard;
mod memory;
mod node;
pub mod python;
mod stack;

pub use executable::{Model, golden, lamplighter};
pub use http::{Answer, EventStream, client};
pub use lone_shard::LoneShard;
pub use memory::Memory;
pub use node::Node;
pub use stack::Stack;
