//! The scheduler driven by made-up events, against a model of a shard that checks every step it is given.

mod caching;
mod house;
mod model_shard;
mod pacing;
mod planning;
mod promises;
mod properties;
mod standing;
