//! One child process: its start, its lines, its end.

use std::collections::VecDeque;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::output::Output;

/// Lines that are shown again when a process dies: a panic with its location and some of what led to it.
const LAST_LINES: usize = 20;

/// A line longer than this is passed on in pieces, so that a process cannot fill the launcher's memory.
const LINE_BYTES_MAX: usize = 256 << 10;

/// How long to wait for the rest of the lines after the end of a process. They are in the pipe already; but a pipe
/// that was handed on to another process may stay open for ever.
const LAST_LINES_TIMEOUT: Duration = Duration::from_secs(1);

/// Signals that may wait for their delivery; a process gets two in its life.
const SIGNALS_MAX: usize = 8;

/// A child process that runs, or has not been seen to end.
pub(crate) struct Process {
    signals: mpsc::Sender<Signal>,
}

/// The end of a process.
#[derive(Debug)]
pub(crate) struct Exit {
    pub(crate) name: String,
    pub(crate) status: ExitStatus,
    /// What it said last, oldest first.
    pub(crate) last_lines: Vec<String>,
}

impl Process {
    /// Starts `command`; its lines go to `output` under `name`, its end to `exits`.
    ///
    /// To be called on a thread that lives as long as the launcher: the kernel kills a child with `PR_SET_PDEATHSIG`
    /// when the thread that started it ends.
    pub(crate) fn spawn(
        name: &str,
        mut command: Command,
        output: Output,
        exits: mpsc::Sender<Exit>,
    ) -> std::io::Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C in a terminal goes to the foreground group: to the launcher alone, which then ends its children
            // in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let (signals, signal_receiver) = mpsc::channel(SIGNALS_MAX);
        let watch = Watch { name: name.to_owned(), child, signals: signal_receiver, output };
        tokio::spawn(async move {
            let exit = watch.until_exit().await;
            // Nobody listens any more when the launcher is ending.
            let _ = exits.send(exit).await;
        });
        Ok(Self { signals })
    }

    /// Sends a signal, unless the process has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = self.signals.try_send(signal);
    }
}

/// The owner of a child: only it signals, so a signal never reaches another process that got the same id later.
struct Watch {
    name: String,
    child: Child,
    signals: mpsc::Receiver<Signal>,
    output: Output,
}

impl Watch {
    async fn until_exit(mut self) -> Exit {
        let (lines_sender, mut lines) = mpsc::channel(1);
        if let Some(stdout) = self.child.stdout.take() {
            tokio::spawn(forward_lines(stdout, lines_sender.clone()));
        }
        if let Some(stderr) = self.child.stderr.take() {
            tokio::spawn(forward_lines(stderr, lines_sender.clone()));
        }
        drop(lines_sender);

        let mut last_lines = VecDeque::with_capacity(LAST_LINES);
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status.expect("a child of ours that only we wait for"),
                Some(line) = lines.recv() => self.pass_on(line, &mut last_lines).await,
                Some(signal) = self.signals.recv() => self.deliver(signal),
            }
        };
        let rest = async {
            while let Some(line) = lines.recv().await {
                self.pass_on(line, &mut last_lines).await;
            }
        };
        let _ = tokio::time::timeout(LAST_LINES_TIMEOUT, rest).await;
        Exit { name: self.name, status, last_lines: last_lines.into() }
    }

    async fn pass_on(&self, line: String, last_lines: &mut VecDeque<String>) {
        self.output.line(&self.name, &line).await;
        if last_lines.len() == LAST_LINES {
            last_lines.pop_front();
        }
        last_lines.push_back(line);
    }

    fn deliver(&self, signal: Signal) {
        // No id: it has ended and was waited for.
        if let Some(id) = self.child.id() {
            let _ = kill(Pid::from_raw(id as i32), signal);
        }
    }
}

/// Sends each line of `stream` without its newline, until it ends.
async fn forward_lines(stream: impl AsyncRead + Unpin, lines: mpsc::Sender<String>) {
    let mut stream = BufReader::new(stream);
    while let Some(line) = next_line(&mut stream).await {
        if lines.send(line).await.is_err() {
            return;
        }
    }
}

/// The next line, or piece of a line of at most [`LINE_BYTES_MAX`] bytes; `None` at the end of the stream.
async fn next_line(stream: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    loop {
        // An error of a pipe is its end.
        let available = stream.fill_buf().await.unwrap_or_default();
        if available.is_empty() {
            return (!line.is_empty()).then(|| String::from_utf8_lossy(&line).into_owned());
        }
        let room = &available[..available.len().min(LINE_BYTES_MAX - line.len())];
        let newline = room.iter().position(|&byte| byte == b'\n');
        line.extend_from_slice(&room[..newline.unwrap_or(room.len())]);
        let consumed = newline.map_or(room.len(), |position| position + 1);
        stream.consume(consumed);
        if newline.is_some() || line.len() == LINE_BYTES_MAX {
            return Some(String::from_utf8_lossy(&line).into_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Recorded;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        command
    }

    /// Runs `script` to its end; returns the end and what was said.
    async fn run(script: &str) -> (Exit, String) {
        let recorded = Recorded::default();
        let (output, writer) = Output::start(false, recorded.clone());
        let (sender, mut exits) = mpsc::channel(1);
        let _process = Process::spawn("shard-0", shell(script), output.clone(), sender).unwrap();
        let exit = exits.recv().await.unwrap();
        tokio::task::spawn_blocking(move || output.finish(writer)).await.unwrap();
        (exit, recorded.text())
    }

    #[tokio::test]
    async fn both_streams_are_passed_on_line_by_line() {
        let (exit, text) =
            run("printf 'a b'; printf ' c\\nd\\n'; echo oops >&2; printf unfinished; exit 3").await;
        assert_eq!(exit.status.code(), Some(3));
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["shard-0  | a b c", "shard-0  | d", "shard-0  | oops", "shard-0  | unfinished"]);
    }

    #[tokio::test]
    async fn many_lines_at_once_arrive_whole_and_in_order() {
        let (exit, text) = run("i=0; while [ $i -lt 5000 ]; do echo line $i of many; i=$((i+1)); done").await;
        assert_eq!(text.lines().count(), 5000);
        assert!(text.lines().enumerate().all(|(i, line)| line == format!("shard-0  | line {i} of many")));
        let last: Vec<String> = (4980..5000).map(|i| format!("line {i} of many")).collect();
        assert_eq!(exit.last_lines, last);
    }

    #[tokio::test]
    async fn a_signal_reaches_the_process() {
        let (output, _writer) = Output::start(false, std::io::sink());
        let (sender, mut exits) = mpsc::channel(1);
        let process = Process::spawn("router", shell("exec sleep 1000"), output, sender).unwrap();
        process.signal(Signal::SIGTERM);
        let exit = exits.recv().await.unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&exit.status), Some(Signal::SIGTERM as i32));
    }

    #[tokio::test]
    async fn a_pipe_that_outlives_its_process_does_not_hide_the_exit() {
        let (exit, text) = run("sleep 3 & echo gone").await;
        assert!(exit.status.success());
        assert_eq!(text, "shard-0  | gone\n");
    }

    #[tokio::test]
    async fn a_line_without_end_is_passed_on_in_pieces() {
        let long = "x".repeat(LINE_BYTES_MAX + 10);
        let text = format!("{long}\nnext\n");
        let mut stream = BufReader::new(text.as_bytes());
        assert_eq!(next_line(&mut stream).await.unwrap().len(), LINE_BYTES_MAX);
        assert_eq!(next_line(&mut stream).await.unwrap(), "x".repeat(10));
        assert_eq!(next_line(&mut stream).await.unwrap(), "next");
        assert_eq!(next_line(&mut stream).await, None);
    }
}
