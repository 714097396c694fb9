//! A running server: launcher, router and shards.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::executable::{Model, lamplighter};
use crate::http::{self, Answer, EventStream};
use crate::memory::{self, Memory};

/// For loading a tiny model on a busy machine.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// For what must happen promptly, on a busy machine.
const PROMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two looks at something that changes.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A running server, stopped when it is dropped.
pub struct Stack {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    url: String,
    client: reqwest::Client,
}

impl Stack {
    /// Starts `lamplighter` with a model and flags, on a free port, and waits until it says that it serves.
    pub async fn start(model: Model, flags: &[&str]) -> Self {
        let mut child = lamplighter()
            .args(model.flags())
            .args(["--hostname", "127.0.0.1", "--port", "0"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the executable can be started");
        let lines = Arc::default();
        collect_lines(child.stdout.take(), &lines);
        collect_lines(child.stderr.take(), &lines);
        let mut stack = Self { child, lines, url: String::new(), client: http::client() };
        stack.url = stack.until_ready().await;
        stack
    }

    /// Where it listens, `http://address:port`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The launcher's process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// What launcher, router and shards use.
    pub fn memory(&self) -> Memory {
        memory::of_family(self.pid())
    }

    /// All that was printed so far.
    pub fn log(&self) -> String {
        self.lines.lock().expect("no test panics while it holds the lines").join("\n")
    }

    /// Sends a signal to the launcher.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the launcher runs");
    }

    /// Waits for the end of the launcher, no longer than `timeout`.
    pub async fn exit(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                return status;
            }
            assert!(Instant::now() < deadline, "the launcher did not end in {timeout:?}:\n{}", self.log());
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Answer {
        Answer::read(self.send(self.client.get(self.address(path))).await).await
    }

    /// `POST path` with JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::read(self.send(self.client.post(self.address(path)).json(body)).await).await
    }

    /// `POST path` with JSON; the answer must be a stream of events.
    pub async fn stream(&self, path: &str, body: &Value) -> EventStream {
        let response = self.send(self.client.post(self.address(path)).json(body)).await;
        if response.status() != 200 {
            Answer::read(response).await.ok();
            unreachable!("{path}: the status is not 200");
        }
        let content_type = response.headers().get("content-type").map(|value| value.as_bytes().to_vec());
        assert_eq!(content_type.as_deref(), Some(b"text/event-stream".as_slice()));
        EventStream::new(response)
    }

    /// `POST path` with JSON, where the connection may be refused.
    pub async fn try_post(&self, path: &str, body: &Value) -> Option<Answer> {
        let response = self.client.post(self.address(path)).json(body).send().await.ok()?;
        Some(Answer::read(response).await)
    }

    /// The value of a metric, all its label sets added up; 0 where it was not recorded yet.
    pub async fn metric(&self, name: &str) -> f64 {
        let response = self.send(self.client.get(self.address("/metrics"))).await;
        let page = response.text().await.expect("the page of metrics");
        let values = page.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = match rest.strip_prefix('{') {
                Some(labels) => labels.rsplit_once("} ")?.1,
                None => rest.strip_prefix(' ')?,
            };
            value.parse::<f64>().ok()
        });
        // The sum of nothing is minus zero.
        values.sum::<f64>() + 0.0
    }

    /// Waits until a metric is as wished; this must happen promptly.
    pub async fn until_metric(&self, name: &str, wished: impl Fn(f64) -> bool) {
        let deadline = Instant::now() + PROMPT_TIMEOUT;
        loop {
            let value = self.metric(name).await;
            if wished(value) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is still {value}:\n{}", self.log());
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn address(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> reqwest::Response {
        request.send().await.unwrap_or_else(|error| panic!("{error:?}\n{}", self.log()))
    }

    async fn until_ready(&mut self) -> String {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let log = self.log();
            if let Some(url) = url_in(&log) {
                return url;
            }
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                panic!("the launcher ended ({status}):\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "not ready in {START_TIMEOUT:?}:\n{log}");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

impl Drop for Stack {
    /// The first signal asks, the second insists: nothing that runs is waited for, and the launcher still removes
    /// its files.
    fn drop(&mut self) {
        let deadline = Instant::now() + PROMPT_TIMEOUT;
        for _ in 0..2 {
            // Not to one that has ended: its id may belong to another process.
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            let _ = kill(self.pid(), Signal::SIGTERM);
            std::thread::sleep(POLL_INTERVAL);
        }
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in the ready block: `Connected: Lamplighter serves ... at http://127.0.0.1:3000 (started in 0.4 s)`, or
/// the field `url` of the JSON line.
fn url_in(log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("Connected"))?;
    let start = line.find("http://")?;
    let url = &line[start..];
    let end = url.find([' ', '"']).unwrap_or(url.len());
    Some(url[..end].to_owned())
}

pub(crate) fn collect_lines(stream: Option<impl Read + Send + 'static>, lines: &Arc<Mutex<Vec<String>>>) {
    let (stream, lines) = (stream.expect("the stream is piped"), Arc::clone(lines));
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            lines.lock().expect("no test panics while it holds the lines").push(line);
        }
    });
}
