//! The least that is an HTTP client: the cores are for the router.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How an event begins.
const EVENT: &[u8] = b"data: ";

/// A connection that is kept.
pub(crate) struct Client {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, unread: Vec::with_capacity(16 << 10) })
    }

    /// `GET path`: the body.
    pub(crate) async fn get(&mut self, path: &str) -> anyhow::Result<String> {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n").as_bytes()).await?;
        let body = self.whole_answer().await?;
        Ok(String::from_utf8(body)?)
    }

    /// `POST /v1/completions`, an answer in one piece.
    pub(crate) async fn post(&mut self, body: &str) -> anyhow::Result<Vec<u8>> {
        self.send(post(body).as_bytes()).await?;
        self.whole_answer().await
    }

    /// `POST /v1/completions`, a stream; read on with `next_events`.
    pub(crate) async fn stream(&mut self, body: &str) -> anyhow::Result<()> {
        self.send(post(body).as_bytes()).await?;
        self.head().await?;
        Ok(())
    }

    /// Waits for further events and tells how many there are; none at the end.
    pub(crate) async fn next_events(&mut self) -> anyhow::Result<Option<usize>> {
        loop {
            let events = count(&self.unread, EVENT);
            let over = self.unread.ends_with(b"0\r\n\r\n");
            // What may be the beginning of a mark, and too short for a whole one, is looked at again with what follows.
            let looked_at = self.unread.len().saturating_sub(EVENT.len() - 1);
            self.unread.drain(..looked_at);
            if events > 0 {
                return Ok(Some(events));
            }
            if over {
                return Ok(None);
            }
            self.fill().await?;
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.unread.clear();
        Ok(self.stream.write_all(bytes).await?)
    }

    async fn whole_answer(&mut self) -> anyhow::Result<Vec<u8>> {
        let length = self.head().await?.context("an answer in one piece has a length")?;
        while self.unread.len() < length {
            self.fill().await?;
        }
        Ok(self.unread.drain(..length).collect())
    }

    /// Takes the head off; its content-length.
    async fn head(&mut self) -> anyhow::Result<Option<usize>> {
        let end = loop {
            if let Some(end) = self.unread.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            self.fill().await?;
        };
        let head = String::from_utf8(self.unread.drain(..end + 4).collect())?.to_ascii_lowercase();
        ensure!(head.starts_with("http/1.1 200"), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        Ok(length.map(|length| length.trim().parse()).transpose()?)
    }

    async fn fill(&mut self) -> anyhow::Result<()> {
        let read = self.stream.read_buf(&mut self.unread).await?;
        ensure!(read > 0, "the router closed the connection");
        Ok(())
    }
}

fn post(body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn count(bytes: &[u8], mark: &[u8]) -> usize {
    bytes.windows(mark.len()).filter(|window| window == &mark).count()
}
