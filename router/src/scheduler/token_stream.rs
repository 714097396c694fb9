//! The way of a request's events from the scheduler to its reader: bounded, and without waiting on the scheduler's side.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::event::{Event, RequestId};
use super::request::{Failure, TokenEvent};

/// Events that wait for a reader before its request is paused: a second or two of tokens, so that a reader which
/// pauses as long as a garbage collection or a lost packet does not cost a step.
pub(crate) const CAPACITY: usize = 64;

/// The events of one request, in order. Dropping it cancels the request, wherever it is.
#[derive(Debug)]
pub struct TokenStream {
    request: RequestId,
    receiver: mpsc::Receiver<TokenEvent>,
    shared: Arc<Shared>,
    scheduler: mpsc::UnboundedSender<Event>,
    /// The request's place in the house. Absent once the stream has ended.
    permit: Option<OwnedSemaphorePermit>,
}

impl TokenStream {
    /// The next event; none after the last one, which is a `Token` with an `end`, or `Failed`. Cancel-safe.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        poll_fn(|context| self.poll_event(context)).await
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        if self.permit.is_none() {
            return Poll::Ready(None);
        }
        let event = match ready!(self.receiver.poll_recv(context)) {
            Some(event) => event,
            // The scheduler let go of the request before its end; it says why, unless it is gone itself.
            None => TokenEvent::Failed(self.shared.failure.get().cloned().unwrap_or_else(stopped)),
        };
        if matches!(event, TokenEvent::Token { end: Some(_), .. } | TokenEvent::Failed(_)) {
            self.permit = None;
        } else {
            self.wake_scheduler();
        }
        Poll::Ready(Some(event))
    }

    /// Tells a scheduler that has paused this request that there is room again.
    fn wake_scheduler(&self) {
        // Half full, so that a reader at the edge does not cause an event for each token.
        if self.receiver.len() > CAPACITY / 2 {
            return;
        }
        // Pairs with the fence in `EventSender::has_room`: either this sees the flag, or that sees the room.
        fence(Ordering::SeqCst);
        if self.shared.stalled.swap(false, Ordering::Relaxed) {
            // An error means that the scheduler is gone, and `next` will report it.
            let _ = self.scheduler.send(Event::ReaderReady);
        }
    }
}

impl Stream for TokenStream {
    type Item = TokenEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        self.poll_event(context)
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            // The permit travels with the event: the place is free when the scheduler has cleaned up, or, where there
            // is no scheduler any more, when the event is dropped.
            let _ = self.scheduler.send(Event::Cancel { request: self.request, permit: Some(permit) });
        }
    }
}

/// The scheduler's end. Dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct EventSender {
    sender: mpsc::Sender<TokenEvent>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Set by the scheduler when it passes the request over for want of room; cleared by the reader.
    stalled: AtomicBool,
    /// Why the request ended without a result. Outside the channel, so that it needs no room there.
    failure: OnceLock<Failure>,
}

/// The two ends of a request's events. `scheduler` takes the stream's own events.
pub(crate) fn channel(
    request: RequestId,
    scheduler: mpsc::UnboundedSender<Event>,
    permit: OwnedSemaphorePermit,
) -> (EventSender, TokenStream) {
    let (sender, receiver) = mpsc::channel(CAPACITY);
    let shared = Arc::new(Shared::default());
    let stream =
        TokenStream { request, receiver, shared: Arc::clone(&shared), scheduler, permit: Some(permit) };
    (EventSender { sender, shared }, stream)
}

impl EventSender {
    /// Whether `num_events` can be sent without losing one. If not, the stream will send `Event::ReaderReady`.
    pub(crate) fn has_room(&self, num_events: usize) -> bool {
        if self.sender.capacity() >= num_events {
            return true;
        }
        self.shared.stalled.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // Looked at again, since the reader may have emptied the channel before it could see the flag.
        self.sender.capacity() >= num_events
    }

    /// Sends an event for which there is room (`has_room`). A reader that has gone away is not an error: its
    /// cancellation is on the way.
    pub(crate) fn send(&self, event: TokenEvent) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.sender.try_send(event) {
            unreachable!("room for a step's events is checked before the step is planned");
        }
    }

    /// Ends the stream without a result, after the events that are in it.
    pub(crate) fn fail(self, failure: Failure) {
        // Set once only, since this takes `self`.
        let _ = self.shared.failure.set(failure);
    }
}

fn stopped() -> Failure {
    Failure::Shards("the scheduler stopped; see the server's log".to_owned())
}
