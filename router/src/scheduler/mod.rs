//! Decides which tokens are computed next, and in which KV blocks. Ids and numbers only: no text, no IO.
//!
//! [`SchedulerHandle::submit`] turns [`TokenRequest`]s into [`TokenStream`]s. Behind it one task owns the state of all
//! requests: it takes an event (a submission, a cancellation, an answer of the shards), applies it, and asks what to
//! compute next. How that is decided, and how to tune it: `docs/scheduling.md`.

mod advance;
mod answer;
mod blocks;
mod chunks;
mod deadlines;
mod entry;
mod event;
mod fairness;
mod handle;
mod headroom;
mod in_flight;
mod invariants;
mod limits;
mod pace;
mod plan;
mod planner;
mod policy;
mod prefix;
mod prefix_cache;
mod queue;
mod rank;
mod request;
mod sharing;
#[doc(hidden)]
pub mod simulation;
mod start;
mod state;
mod step;
mod task;
mod token_stream;

#[cfg(test)]
mod tests;

pub use handle::{SchedulerHandle, Status};
pub use request::{
    CacheNamespace, EndReason, Failure, Sampling, Standing, SubmitError, Token, TokenEvent, TokenRequest,
};
pub use start::{ServingInfo, StartError, StartPhase, start};
pub use token_stream::TokenStream;

pub use crate::shards::{DataType, Device};

pub(crate) use answer::{MaskTimes, Outcome, SequenceOutput, StepAnswer, StepTimes};
pub(crate) use step::{NewSequence, Scheduled, Step};
