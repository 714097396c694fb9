//! The way of a request's events from the scheduler to its reader: bounded, and without waiting on the scheduler's side.
//!
//! A queue of our own and not one of tokio's channels, because those wake the reader with each event. With some hundred
//! streams that is most of what an answer costs, and the next step would wait for it. Here the scheduler takes the wakers
//! ([`Wakes`]), and calls them when the next step is on its way.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};

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
    channel: Arc<Channel>,
    scheduler: mpsc::UnboundedSender<Event>,
    /// The request's place in the house. Absent once the stream has ended.
    permit: Option<OwnedSemaphorePermit>,
}

impl TokenStream {
    /// The next event; none after the last one, which is a `Token` with an `end`, or `Failed`. Cancel-safe.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        poll_fn(|context| self.poll_event(context)).await
    }

    /// From now on the reader is woken only when the stream has ended or half of the room for events is used: for a reader
    /// that does nothing before the end. What it would do for each token costs less when it is done for many.
    pub(crate) fn wake_rarely(&mut self) {
        self.channel.lock().wake_at = CAPACITY / 2;
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        if self.permit.is_none() {
            return Poll::Ready(None);
        }
        let Received { event, has_room_again } = ready!(self.channel.receive(context));
        if matches!(event, TokenEvent::Token { end: Some(_), .. } | TokenEvent::Failed(_)) {
            self.permit = None;
        } else if has_room_again {
            // An error means that the scheduler is gone, and the next event will report it.
            let _ = self.scheduler.send(Event::ReaderReady);
        }
        Poll::Ready(Some(event))
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
    channel: Arc<Channel>,
}

impl EventSender {
    /// Whether `num_events` can be sent without losing one. If not, the stream will send `Event::ReaderReady`.
    pub(crate) fn has_room(&self, num_events: usize) -> bool {
        let mut state = self.channel.lock();
        let has_room = CAPACITY - state.events.len() >= num_events;
        if !has_room {
            state.stalled = true;
            // One that is not woken for each event is not to be waited for in vain.
            let reader = state.reader.take();
            drop(state);
            reader.into_iter().for_each(Waker::wake);
        }
        has_room
    }

    /// Sends an event for which there is room (`has_room`), and adds the reader to `wakes` if it waits. A reader that has
    /// gone away is not an error: its cancellation is on the way.
    pub(crate) fn send(&self, event: TokenEvent, wakes: &mut Wakes) {
        let mut state = self.channel.lock();
        assert!(
            state.events.len() < CAPACITY,
            "room for a step's events is checked before the step is planned"
        );
        let is_last = matches!(event, TokenEvent::Token { end: Some(_), .. });
        state.events.push_back(event);
        if is_last || state.events.len() >= state.wake_at {
            wakes.0.extend(state.reader.take());
        }
    }

    /// Ends the stream without a result, after the events that are in it.
    pub(crate) fn fail(self, failure: Failure) {
        self.channel.lock().failure = Some(failure);
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        let mut state = self.channel.lock();
        state.closed = true;
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

/// Readers that have something to read and do not know it yet. They are woken at the latest when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Wakes(Vec<Waker>);

impl Wakes {
    /// Wakes them all.
    pub(crate) fn wake(&mut self) {
        self.0.drain(..).for_each(Waker::wake);
    }
}

impl Drop for Wakes {
    fn drop(&mut self) {
        self.wake();
    }
}

/// The two ends of a request's events. `scheduler` takes the stream's own events.
pub(crate) fn channel(
    request: RequestId,
    scheduler: mpsc::UnboundedSender<Event>,
    permit: OwnedSemaphorePermit,
) -> (EventSender, TokenStream) {
    let channel = Arc::new(Channel::default());
    let stream = TokenStream { request, channel: Arc::clone(&channel), scheduler, permit: Some(permit) };
    (EventSender { channel }, stream)
}

/// What is between them. Held for some nanoseconds at a time.
#[derive(Debug, Default)]
struct Channel(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// At most `CAPACITY`.
    events: VecDeque<TokenEvent>,
    /// The reader, while it waits.
    reader: Option<Waker>,
    /// Events at which it is woken, if none of them is the last one.
    wake_at: usize,
    /// Whether the scheduler has passed the request over for want of room, and was not told since that there is some.
    stalled: bool,
    /// Whether the scheduler has let go of the request.
    closed: bool,
    /// Why the request ended without a result. Outside the queue, so that it needs no room there.
    failure: Option<Failure>,
}

struct Received {
    event: TokenEvent,
    /// Whether a scheduler that has paused the request is to be told that there is room.
    has_room_again: bool,
}

impl Channel {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder of the lock panics")
    }

    fn receive(&self, context: &mut Context<'_>) -> Poll<Received> {
        let mut state = self.lock();
        let event = match state.events.pop_front() {
            Some(event) => event,
            // The scheduler let go of the request before its end; it says why, unless it is gone itself.
            None if state.closed => TokenEvent::Failed(state.failure.clone().unwrap_or_else(stopped)),
            None => {
                if !state.reader.as_ref().is_some_and(|reader| reader.will_wake(context.waker())) {
                    state.reader = Some(context.waker().clone());
                }
                return Poll::Pending;
            }
        };
        // Half full, so that a reader at the edge does not cause an event for each token.
        let has_room_again = state.stalled && state.events.len() <= CAPACITY / 2;
        state.stalled &= !has_room_again;
        Poll::Ready(Received { event, has_room_again })
    }
}

fn stopped() -> Failure {
    Failure::Shards("the scheduler stopped; see the server's log".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;
    use std::time::{Duration, Instant};

    use proto::units::TokenId;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::scheduler::request::{EndReason, Token};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A sender, a stream that was polled once and waits, and how often it was woken.
    fn waiting() -> (EventSender, TokenStream, Arc<Count>) {
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let (sender, mut stream) = channel(RequestId(1), mpsc::unbounded_channel().0, permit);
        let count = Arc::new(Count::default());
        assert!(poll(&mut stream, &count).is_pending());
        (sender, stream, count)
    }

    fn poll(stream: &mut TokenStream, count: &Arc<Count>) -> Poll<Option<TokenEvent>> {
        stream.poll_event(&mut Context::from_waker(&Waker::from(Arc::clone(count))))
    }

    fn event() -> TokenEvent {
        TokenEvent::Started { queue_time: Duration::ZERO, cached_tokens: 0 }
    }

    fn woken(count: &Count) -> usize {
        count.0.load(Ordering::Relaxed)
    }

    #[test]
    fn a_reader_is_woken_once_for_all_events_when_it_is_time() {
        let (sender, mut stream, count) = waiting();
        let mut wakes = Wakes::default();
        sender.send(event(), &mut wakes);
        sender.send(event(), &mut wakes);
        assert_eq!(woken(&count), 0);
        wakes.wake();
        wakes.wake();
        assert_eq!(woken(&count), 1);
        for _ in 0..2 {
            assert_eq!(poll(&mut stream, &count), Poll::Ready(Some(event())));
        }
        assert!(poll(&mut stream, &count).is_pending());
        sender.send(event(), &mut wakes);
        wakes.wake();
        assert_eq!(woken(&count), 2);
    }

    #[test]
    fn a_reader_that_wants_all_is_woken_when_half_is_full_when_others_wait_for_it_and_at_the_end() {
        let last = || TokenEvent::Token {
            token: Token { id: TokenId(1), logprob: 0.0, top: Vec::new() },
            end: Some(EndReason::Length),
            at: Instant::now(),
        };
        let mut wakes = Wakes::default();
        let mut woken_by = |events: Vec<TokenEvent>, room: usize| {
            let (sender, mut stream, count) = waiting();
            stream.wake_rarely();
            for event in events {
                sender.send(event, &mut wakes);
            }
            assert_eq!(sender.has_room(room), room == 0);
            wakes.wake();
            let woken = woken(&count);
            drop((sender, stream));
            woken
        };
        assert_eq!(woken_by(vec![event(); CAPACITY / 2 - 1], 0), 0);
        assert_eq!(woken_by(vec![event(); CAPACITY / 2], 0), 1);
        assert_eq!(woken_by(vec![event(); 5], CAPACITY), 1);
        assert_eq!(woken_by(vec![event(), last()], 0), 1);
    }

    #[test]
    fn a_scheduler_that_is_gone_leaves_nobody_asleep() {
        // Before it came to waking the reader, and with nothing to read.
        let (sender, mut stream, count) = waiting();
        let mut wakes = Wakes::default();
        sender.send(event(), &mut wakes);
        drop(sender);
        assert_eq!(woken(&count), 0);
        drop(wakes);
        assert_eq!(woken(&count), 1);
        assert_eq!(poll(&mut stream, &count), Poll::Ready(Some(event())));
        assert_eq!(poll(&mut stream, &count), Poll::Ready(Some(TokenEvent::Failed(stopped()))));

        let (sender, mut stream, count) = waiting();
        sender.fail(Failure::ShuttingDown);
        assert_eq!(woken(&count), 1);
        let failed = TokenEvent::Failed(Failure::ShuttingDown);
        assert_eq!(poll(&mut stream, &count), Poll::Ready(Some(failed)));
        assert_eq!(poll(&mut stream, &count), Poll::Ready(None));
    }
}
