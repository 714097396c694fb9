//! Files on disk -> this rank's tensors.
//!
//! [`Weights`] hands out each tensor once, whole or as this rank's slice, in place in the mapped file wherever the element
//! type allows it and no other format is asked for. The files' headers are read when it is opened; their pages when they are first multiplied with.

mod adapter;
mod adapter_config;
mod error;
mod mapped;
mod safetensors;
mod slice;
mod store;

pub use adapter::Adapter;
pub use error::{AdapterError, Error};
pub use mapped::MappedWeights;
pub use slice::{Partition, Slice};
pub use store::{WeightTypes, Weights};
