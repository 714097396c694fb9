//! Lamplighter's router: HTTP and text in front, scheduling behind; knows no tensors.
//!
//! The way of a request: an endpoint in `http` reads it; `validate` makes it one that can be served, with `text` for
//! templates and tokens; [`scheduler`] decides which of its tokens are computed when, and has them computed through
//! `shards`; `stream` turns tokens into text; and `http` writes the answer.

pub mod config;
mod error;
mod http;
mod lifecycle;
mod metrics;
pub mod scheduler;
mod shards;
mod stream;
mod telemetry;
mod text;
mod validate;

pub use lifecycle::run;
