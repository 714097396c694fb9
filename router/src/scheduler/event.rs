//! What can happen to the scheduler.

use std::time::Instant;

use tokio::sync::OwnedSemaphorePermit;

use super::answer::StepAnswer;
use super::request::TokenRequest;
use super::token_stream::EventSender;

/// A request as the scheduler names it; the lower, the older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RequestId(pub(crate) u64);

/// What can happen.
#[derive(Debug)]
pub(crate) enum Event {
    /// A request came through the door.
    Submit(Submission),
    /// Its reader is gone. Handling it, or dropping it, frees the request's place in the house.
    Cancel { request: RequestId, permit: Option<OwnedSemaphorePermit> },
    /// A reader that had stalled has room again.
    ReaderReady,
    /// The oldest step in flight was answered.
    StepDone(StepAnswer),
    /// Nothing but time has passed: a deadline has come.
    Tick,
    /// There are no shards any more, for this reason.
    ShardsFailed(String),
    /// All requests are to end now.
    Shutdown,
}

/// A request at the door.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) id: RequestId,
    pub(crate) request: TokenRequest,
    pub(crate) events: EventSender,
    pub(crate) submitted_at: Instant,
}
