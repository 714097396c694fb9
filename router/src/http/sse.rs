//! Server-sent events: frames of a generation's streams, pulled by the connection.
//!
//! Nothing is computed ahead of the reader: a slow one leaves its tokens with the scheduler, and one that goes away
//! drops the body, with it the streams, and so cancels their sequences. All tokens that are there when the connection
//! asks go out in one write.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use crate::error::RequestError;
use crate::metrics::Stage;
use crate::scheduler::Failure;
use crate::stream::{GeneratedToken, GenerationEvent, GenerationStream};

/// After so long without a frame comes a comment, for proxies that close idle connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How long the status line waits for the first token, so that an error before it has its own status. A request that
/// waits longer in the queue gets its headers, and then comments.
const FIRST_TOKEN_WAIT: Duration = Duration::from_secs(10);

/// A write that has so many bytes takes no further events: they wait with the scheduler until the reader asks again.
const ENOUGH_BYTES: usize = 8192;

/// What an endpoint writes for each event.
pub(super) trait Frames: Send + 'static {
    /// Frames for a token of the stream `index`.
    fn token(&mut self, index: usize, token: &GeneratedToken, out: &mut Vec<u8>);

    /// The error frame; the last one of the response.
    fn failed(&mut self, failure: Failure, out: &mut Vec<u8>);

    /// Frames behind the last event of all streams.
    fn end(&mut self, out: &mut Vec<u8>);
}

/// Appends one frame.
pub(super) fn data(out: &mut Vec<u8>, value: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    json(out, value);
    out.extend_from_slice(b"\n\n");
}

/// Appends JSON.
pub(super) fn json(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value).expect("answers are plain data with string keys");
}

/// The response that streams `streams`. Fails with the failure that comes before the first token, if one does.
pub(super) async fn response(
    streams: Vec<GenerationStream>,
    frames: impl Frames,
) -> Result<Response, RequestError> {
    let mut choices = Choices::new(streams);
    let ahead = choices.first_token().await?;
    let mut writer = Writer {
        choices,
        ahead,
        frames,
        out: Vec::new(),
        over: false,
        last_write: Instant::now(),
        keep_alive: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
    };
    let body = stream::poll_fn(move |context| {
        writer.poll_write(context).map(|bytes| bytes.map(Ok::<_, Infallible>))
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Events to bytes.
struct Writer<F> {
    choices: Choices,
    /// Taken before the response began.
    ahead: Option<(usize, GeneratedToken)>,
    frames: F,
    /// Frames that are not written yet; empty between two calls.
    out: Vec<u8>,
    over: bool,
    last_write: Instant,
    /// Not reset by each write, which would cost more than the write's frame: it looks at `last_write` when it ends.
    keep_alive: Pin<Box<Sleep>>,
}

impl<F: Frames> Writer<F> {
    /// The next bytes; none when all is said. Empty ones are never given: they would end a chunked body.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while !self.over && self.out.len() < ENOUGH_BYTES {
            let event = match self.ahead.take() {
                Some((index, token)) => Some((index, GenerationEvent::Token(token))),
                None => match self.choices.poll_next(context) {
                    Poll::Ready(event) => event,
                    Poll::Pending => break,
                },
            };
            Stage::Sse.time(|| self.write(event));
        }
        if !self.out.is_empty() {
            self.last_write = Instant::now();
            let bytes = Bytes::copy_from_slice(&self.out);
            self.out.clear();
            return Poll::Ready(Some(bytes));
        }
        if self.over { Poll::Ready(None) } else { self.poll_keep_alive(context) }
    }

    fn write(&mut self, event: Option<(usize, GenerationEvent)>) {
        match event {
            Some((index, GenerationEvent::Token(token))) => self.frames.token(index, &token, &mut self.out),
            Some((_, GenerationEvent::Prompt(_))) => {}
            Some((_, GenerationEvent::Failed(failure))) => {
                self.over = true;
                // Cancels the sequences beside the one that failed.
                self.choices.clear();
                self.frames.failed(failure, &mut self.out);
            }
            None => {
                self.over = true;
                self.frames.end(&mut self.out);
            }
        }
    }

    fn poll_keep_alive(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while self.keep_alive.as_mut().poll(context).is_ready() {
            let silent = self.last_write.elapsed() >= KEEP_ALIVE;
            if silent {
                self.last_write = Instant::now();
            }
            self.keep_alive.as_mut().reset(self.last_write + KEEP_ALIVE);
            if silent {
                return Poll::Ready(Some(Bytes::from_static(b":\n\n")));
            }
        }
        Poll::Pending
    }
}

/// All streams of a response. They are asked in turn: mostly there is one, and its tokens come one at a time.
struct Choices {
    streams: Vec<Option<GenerationStream>>,
    /// Which is asked first.
    turn: usize,
    /// Streams that are not over.
    left: usize,
}

impl Choices {
    fn new(streams: Vec<GenerationStream>) -> Self {
        Self { left: streams.len(), turn: 0, streams: streams.into_iter().map(Some).collect() }
    }

    /// The next event of any stream; none when all are over.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, GenerationEvent)>> {
        for _ in 0..self.streams.len() {
            let index = self.turn;
            self.turn = (index + 1) % self.streams.len();
            let Some(stream) = &mut self.streams[index] else { continue };
            match stream.poll_next(context) {
                Poll::Ready(Some(event)) => return Poll::Ready(Some((index, event))),
                Poll::Ready(None) => {
                    self.streams[index] = None;
                    self.left -= 1;
                }
                Poll::Pending => {}
            }
        }
        if self.left == 0 { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Waits for the first token, but not for ever. Fails with the failure that comes before it, if one does.
    async fn first_token(&mut self) -> Result<Option<(usize, GeneratedToken)>, RequestError> {
        let deadline = Instant::now() + FIRST_TOKEN_WAIT;
        let mut next = async || {
            let event = poll_fn(|context| self.poll_next(context));
            tokio::time::timeout_at(deadline, event).await.ok().flatten()
        };
        while let Some((index, event)) = next().await {
            match event {
                GenerationEvent::Failed(failure) => return Err(failure.into()),
                GenerationEvent::Prompt(_) => {}
                GenerationEvent::Token(token) => return Ok(Some((index, token))),
            }
        }
        Ok(None)
    }

    /// Drops all streams, and so cancels their sequences.
    fn clear(&mut self) {
        self.streams.clear();
        self.left = 0;
    }
}
