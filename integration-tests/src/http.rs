//! Answers and event streams, as a plain HTTP client sees them.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::header::HeaderMap;
use serde_json::Value;

/// For one answer, or one event: tiny models on a busy machine, and far from a hang.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(2);

/// Below the half minute after which the server closes a connection that is idle: a request must not meet the closing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that keeps its connections for a while.
pub fn client() -> reqwest::Client {
    let builder = reqwest::Client::builder().pool_idle_timeout(IDLE_TIMEOUT);
    builder.build().expect("a client without settings of its own")
}

/// A complete answer.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: HeaderMap,
    /// The body; null where it is empty or no JSON.
    pub body: Value,
}

impl Answer {
    pub(crate) async fn read(response: reqwest::Response) -> Self {
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let text = tokio::time::timeout(ANSWER_TIMEOUT, response.text())
            .await
            .expect("an answer within two minutes")
            .unwrap_or_else(|error| panic!("the answer is broken off: {error}"));
        Self { status, headers, body: serde_json::from_str(&text).unwrap_or_default() }
    }

    /// The body, which must be a success.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.body
    }
}

/// Server-sent events; dropping it closes the connection.
pub struct EventStream {
    bytes: BoxStream<'static, reqwest::Result<Vec<u8>>>,
    unread: Vec<u8>,
}

impl EventStream {
    pub(crate) fn new(response: reqwest::Response) -> Self {
        let bytes = response.bytes_stream().map(|piece| piece.map(|bytes| bytes.to_vec())).boxed();
        Self { bytes, unread: Vec::new() }
    }

    /// The data of the next event, `[DONE]` as it is; `None` at the end of the answer. Panics where the answer is
    /// broken off or is not made of events.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.unread.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                match event.trim_end().strip_prefix("data:") {
                    Some(data) => return Some(data.trim_start().to_owned()),
                    None if event.starts_with(':') => continue,
                    None => panic!("not an event: {event:?}"),
                }
            }
            let piece = tokio::time::timeout(ANSWER_TIMEOUT, self.bytes.next())
                .await
                .expect("an event within two minutes");
            match piece {
                Some(Ok(piece)) => self.unread.extend(piece),
                Some(Err(error)) => panic!("the stream is broken off: {error}"),
                None => {
                    assert!(
                        self.unread.is_empty(),
                        "half an event: {:?}",
                        String::from_utf8_lossy(&self.unread)
                    );
                    return None;
                }
            }
        }
    }

    /// The next event as JSON; `None` at the end of the answer or at `[DONE]`.
    pub async fn next_json(&mut self) -> Option<Value> {
        let data = self.next().await?;
        if data == "[DONE]" {
            return None;
        }
        Some(serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}")))
    }

    /// All events up to the end.
    pub async fn all(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.next_json().await {
            events.push(event);
        }
        events
    }
}
