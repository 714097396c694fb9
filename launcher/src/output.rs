//! Everything the launcher and its children say, on one stream, line by line: no line is split, lost or mixed with
//! another.
//!
//! A thread of its own writes, so that a terminal or a log collector that stops reading slows the children's logs
//! down (the queue is bounded) but does not keep the launcher from hearing a signal.

use std::io::Write;
use std::thread::JoinHandle;

use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait for a slow reader before the children have to wait: at 200 bytes a line, 200 KiB.
const LINES_MAX: usize = 1024;

/// Widest of the usual names, so that the lines of launcher, router and shards stand in one column.
const NAME_WIDTH: usize = 8;

/// The stream that lines go to.
#[derive(Clone)]
pub(crate) struct Output {
    messages: mpsc::Sender<Message>,
    format: Format,
}

/// A `--log-level` that is none.
#[derive(Debug, thiserror::Error)]
#[error(
    "--log-level {log_level:?}: {source}; give error, warn, info, debug or trace, or directives such as info,router=debug"
)]
pub(crate) struct InvalidLogLevel {
    log_level: String,
    source: ParseError,
}

#[derive(Clone, Copy)]
enum Format {
    Text,
    Json,
}

enum Message {
    Lines(String),
    End,
}

impl Output {
    /// Starts the thread that writes to `sink`, JSON objects or text.
    pub(crate) fn start(json: bool, sink: impl Write + Send + 'static) -> (Self, JoinHandle<()>) {
        let (messages, receiver) = mpsc::channel(LINES_MAX);
        let writer = std::thread::spawn(move || write_all(receiver, sink));
        let format = if json { Format::Json } else { Format::Text };
        (Self { messages, format }, writer)
    }

    /// Sends the launcher's own `tracing` events here.
    pub(crate) fn install_tracing(&self, log_level: &str) -> Result<(), InvalidLogLevel> {
        let filter = EnvFilter::try_new(log_level)
            .map_err(|source| InvalidLogLevel { log_level: log_level.to_owned(), source })?;
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_target(false)
            .with_ansi(false)
            .with_writer(self.clone());
        match self.format {
            Format::Text => builder.init(),
            Format::Json => builder.json().flatten_event(true).init(),
        }
        Ok(())
    }

    /// One line of a process, without its newline; waits while the queue is full.
    pub(crate) async fn line(&self, process: &str, line: &str) {
        // The thread ends only with `finish`; what is said after that has no reader.
        let _ = self.messages.send(Message::Lines(self.label(process, line))).await;
    }

    /// A block of lines that belong together and carry no process name; in JSON, one object.
    pub(crate) async fn block(&self, text: &str, fields: &Value) {
        let lines = match self.format {
            Format::Text => format!("{text}\n"),
            Format::Json => self.label("launcher", &fields.to_string()),
        };
        let _ = self.messages.send(Message::Lines(lines)).await;
    }

    /// Writes what is queued, and ends the thread.
    pub(crate) fn finish(self, writer: JoinHandle<()>) {
        let _ = self.messages.blocking_send(Message::End);
        let _ = writer.join();
    }

    fn label(&self, process: &str, line: &str) -> String {
        match self.format {
            Format::Text => format!("{process:NAME_WIDTH$} | {line}\n"),
            Format::Json => {
                let mut object = match serde_json::from_str(line) {
                    Ok(Value::Object(object)) => object,
                    // A line that some library wrote past the logger.
                    _ => Map::from_iter([("message".to_owned(), line.into())]),
                };
                object.insert("process".to_owned(), process.into());
                format!("{}\n", Value::Object(object))
            }
        }
    }
}

/// `tracing` writes each event with one call.
impl Write for Output {
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let lines: String = text.lines().map(|line| self.label("launcher", line)).collect();
        // Called on the thread that must not block. The queue is full only while nobody reads.
        let _ = self.messages.try_send(Message::Lines(lines));
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn write_all(mut messages: mpsc::Receiver<Message>, mut sink: impl Write) {
    while let Some(Message::Lines(lines)) = messages.blocking_recv() {
        // A reader that has gone away is no reason to stop serving.
        let _ = sink.write_all(lines.as_bytes()).and_then(|()| sink.flush());
    }
}

/// A sink that tests can read.
#[cfg(test)]
#[derive(Clone, Default)]
pub(crate) struct Recorded(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

#[cfg(test)]
impl Recorded {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

#[cfg(test)]
impl Write for Recorded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(json: bool, say: impl FnOnce(&Output)) -> String {
        let recorded = Recorded::default();
        let (output, writer) = Output::start(json, recorded.clone());
        say(&output);
        output.finish(writer);
        recorded.text()
    }

    #[test]
    fn text_lines_carry_the_name_of_their_process() {
        let text = record(false, |output| {
            futures_block_on(output.line("shard-0", "weights mapped"));
            futures_block_on(output.line("router", "listening"));
        });
        assert_eq!(text, "shard-0  | weights mapped\nrouter   | listening\n");
    }

    #[test]
    fn json_lines_get_a_field_and_other_lines_become_objects() {
        let text = record(true, |output| {
            futures_block_on(output.line("shard-0", r#"{"level":"INFO","message":"ready"}"#));
            futures_block_on(output.line("shard-0", "thread panicked"));
        });
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["process"], "shard-0");
        assert_eq!(lines[0]["message"], "ready");
        assert_eq!(lines[1]["process"], "shard-0");
        assert_eq!(lines[1]["message"], "thread panicked");
    }

    #[test]
    fn the_launchers_events_are_lines_of_a_process_too() {
        let text = record(false, |output| writeln!(output.clone(), "INFO starting").unwrap());
        assert_eq!(text, "launcher | INFO starting\n");
    }

    fn futures_block_on(future: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future);
    }
}
