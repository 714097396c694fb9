//! Server-sent events: frames of a generation's streams, pulled by the connection.
//!
//! Nothing is computed ahead of the reader: a slow one leaves its tokens with the scheduler, and one that goes away
//! drops the body, with it the streams, and so cancels their sequences.

use std::collections::VecDeque;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream::{self, BoxStream, SelectAll, StreamExt};
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde::Serialize;

use crate::error::RequestError;
use crate::scheduler::Failure;
use crate::stream::{GeneratedToken, GenerationEvent, GenerationStream};

/// After so long without a frame comes a comment, for proxies that close idle connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How long the status line waits for the first token, so that an error before it has its own status. A request that
/// waits longer in the queue gets its headers, and then comments.
const FIRST_TOKEN_WAIT: Duration = Duration::from_secs(10);

/// What an endpoint writes for each event.
pub(super) trait Frames: Send + 'static {
    /// Frames for a token of the stream `index`.
    fn token(&mut self, index: usize, token: GeneratedToken) -> String;

    /// The error frame; the last one of the response.
    fn failed(&mut self, failure: Failure) -> String;

    /// Frames behind the last event of all streams.
    fn end(&mut self) -> String;
}

/// One frame.
pub(super) fn data(value: &impl Serialize) -> String {
    let json = serde_json::to_string(value).expect("answers are plain data with string keys");
    format!("data: {json}\n\n")
}

/// The response that streams `streams`. Fails with the failure that comes before the first token, if one does.
pub(super) async fn response(
    streams: Vec<GenerationStream>,
    frames: impl Frames,
) -> Result<Response, RequestError> {
    let tagged = streams
        .into_iter()
        .enumerate()
        .map(|(index, stream)| stream.into_stream().map(move |event| (index, event)).boxed());
    let mut source = Source { events: stream::select_all(tagged), ahead: VecDeque::new(), over: false };
    source.wait_for_first_token().await?;

    let body = stream::unfold((source, frames), |(mut source, mut frames)| async move {
        let frame = source.next_frames(&mut frames).await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(frame)), (source, frames)))
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Events of all streams in the order in which they happen.
struct Source {
    events: SelectAll<BoxStream<'static, (usize, GenerationEvent)>>,
    /// Taken before the response began.
    ahead: VecDeque<(usize, GenerationEvent)>,
    over: bool,
}

impl Source {
    async fn wait_for_first_token(&mut self) -> Result<(), RequestError> {
        let deadline = tokio::time::Instant::now() + FIRST_TOKEN_WAIT;
        while let Ok(Some((index, event))) = tokio::time::timeout_at(deadline, self.events.next()).await {
            match event {
                GenerationEvent::Failed(failure) => return Err(failure.into()),
                GenerationEvent::Prompt(_) => {}
                GenerationEvent::Token(_) => {
                    self.ahead.push_back((index, event));
                    break;
                }
            }
        }
        Ok(())
    }

    /// None when all is said. Empty frames are passed over: they would end a chunked body.
    async fn next_frames(&mut self, frames: &mut impl Frames) -> Option<String> {
        loop {
            if self.over {
                return None;
            }
            let event = match self.ahead.pop_front() {
                Some(event) => Some(event),
                None => match tokio::time::timeout(KEEP_ALIVE, self.events.next()).await {
                    Ok(event) => event,
                    Err(_) => return Some(":\n\n".to_owned()),
                },
            };
            let text = match event {
                Some((index, GenerationEvent::Token(token))) => frames.token(index, token),
                Some((_, GenerationEvent::Prompt(_))) => String::new(),
                Some((_, GenerationEvent::Failed(failure))) => {
                    self.over = true;
                    // Cancels the sequences beside the one that failed.
                    self.events.clear();
                    frames.failed(failure)
                }
                None => {
                    self.over = true;
                    frames.end()
                }
            };
            if !text.is_empty() {
                return Some(text);
            }
        }
    }
}
