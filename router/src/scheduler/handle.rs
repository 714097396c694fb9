//! The door to the scheduler: counts who is in the house, and refuses the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{Semaphore, mpsc, watch};

use super::event::{Event, RequestId, Submission};
use super::request::{SubmitError, TokenRequest};
use super::token_stream::{self, TokenStream};
use crate::shards::GrammarClient;

/// Whether requests are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// The shards are loading: there is no handle yet.
    Starting,
    /// Requests are taken.
    Ready,
    /// Requests in the house are finished, no new ones are taken.
    Draining,
    /// The shards are gone, for this reason. Nothing is served until a restart.
    Failed(String),
}

/// The door to the scheduler. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SchedulerHandle {
    shared: Arc<Shared>,
    /// None in tests without shards.
    grammars: Option<GrammarClient>,
}

#[derive(Debug)]
struct Shared {
    /// Unbounded, so that nobody ever waits, and yet it has a bound: a request in the house sends at most one
    /// `Submit`, one `ReaderReady` before the scheduler has looked at it again, and one `Cancel`, which takes its
    /// permit along. So there are no more than three events for each of `max_concurrent_requests`.
    events: mpsc::UnboundedSender<Event>,
    permits: Arc<Semaphore>,
    limit: u32,
    /// What each request must fit alone.
    kv_cache_tokens: usize,
    next_request: AtomicU64,
    status: Arc<watch::Sender<Status>>,
}

impl SchedulerHandle {
    /// A door for `limit` requests, and the events that come through it.
    pub(crate) fn new(limit: u32, kv_cache_tokens: usize) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let shared = Shared {
            events,
            permits: Arc::new(Semaphore::new(limit as usize)),
            limit,
            kv_cache_tokens,
            next_request: AtomicU64::new(0),
            status: Arc::new(watch::Sender::new(Status::Ready)),
        };
        (Self { shared: Arc::new(shared), grammars: None }, receiver)
    }

    /// With shards that compile grammars.
    pub(crate) fn with_grammars(self, grammars: GrammarClient) -> Self {
        Self { grammars: Some(grammars), ..self }
    }

    /// What has grammars compiled.
    pub(crate) fn grammars(&self) -> Option<&GrammarClient> {
        self.grammars.as_ref()
    }

    /// Takes all of `requests` or none. Each counts against `max_concurrent_requests` until its stream has ended or is
    /// dropped. The streams are in the order of the requests.
    ///
    /// Panics on a request that could never be served; validation lets none through.
    pub fn submit(&self, requests: Vec<TokenRequest>) -> Result<Vec<TokenStream>, SubmitError> {
        let shared = &*self.shared;
        for request in &requests {
            let total_tokens = request.prompt.len() + request.max_new_tokens as usize;
            assert!(!request.prompt.is_empty() && request.max_new_tokens > 0, "a request without tokens");
            assert!(total_tokens <= shared.kv_cache_tokens, "a request that does not fit an empty cache");
        }
        let overloaded = SubmitError::Overloaded { limit: shared.limit as usize };
        let num_requests = u32::try_from(requests.len()).map_err(|_| overloaded.clone())?;
        // The permits come before the look at the status: whoever drains sets the status before it waits for permits.
        let permits = Arc::clone(&shared.permits).try_acquire_many_owned(num_requests);
        match &*shared.status.borrow() {
            Status::Ready => {}
            Status::Draining => return Err(SubmitError::Draining),
            Status::Starting | Status::Failed(_) => return Err(SubmitError::Unavailable),
        }
        let mut permits = permits.map_err(|_| overloaded)?;
        let submitted_at = Instant::now();
        let streams = requests.into_iter().map(|request| {
            let permit = permits.split(1).expect("one permit for each request was acquired");
            let id = RequestId(shared.next_request.fetch_add(1, Ordering::Relaxed));
            let (events, stream) = token_stream::channel(id, shared.events.clone(), permit);
            // An error drops the sending end, and the stream reports that the scheduler is gone.
            let _ = shared.events.send(Event::Submit(Submission { id, request, events, submitted_at }));
            stream
        });
        Ok(streams.collect())
    }

    /// Whether requests are served.
    pub fn status(&self) -> Status {
        self.shared.status.borrow().clone()
    }

    /// Takes no new requests; those in the house go on.
    pub fn begin_drain(&self) {
        self.shared.status.send_if_modified(|status| {
            let ready = *status == Status::Ready;
            if ready {
                *status = Status::Draining;
            }
            ready
        });
    }

    /// Resolves when nothing is in the house: each stream has ended or was dropped. To be called after `begin_drain`.
    pub async fn drained(&self) {
        let all = self.shared.permits.acquire_many(self.shared.limit).await;
        drop(all.expect("the semaphore is never closed"));
    }

    /// Ends all requests with `Failed(ShuttingDown)`: the graceful timeout is over.
    pub fn fail_all(&self) {
        self.begin_drain();
        // An error means that the scheduler is gone, and its requests with it.
        let _ = self.shared.events.send(Event::Shutdown);
    }

    /// The status, for the task that sets it. Not a handle, since that would keep the task's own events alive.
    pub(crate) fn status_sender(&self) -> Arc<watch::Sender<Status>> {
        Arc::clone(&self.shared.status)
    }
}
