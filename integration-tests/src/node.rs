//! One of several hosts, played by a launcher on this one: without a router, so without an address.

use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::executable::{Model, lamplighter};
use crate::stack::{POLL_INTERVAL, collect_lines};

/// A running launcher, killed when it is dropped.
pub struct Node {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Node {
    /// Starts `lamplighter` with a model, flags and environment variables, and waits for nothing.
    pub fn start(model: Model, flags: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = lamplighter()
            .args(model.flags())
            .args(flags)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the executable can be started");
        let lines = Arc::default();
        collect_lines(child.stdout.take(), &lines);
        collect_lines(child.stderr.take(), &lines);
        Self { child, lines }
    }

    /// All that was printed so far.
    pub fn log(&self) -> String {
        self.lines.lock().expect("no test panics while it holds the lines").join("\n")
    }

    /// Sends a signal to the launcher.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("the launcher runs");
    }

    /// Waits for the end of the launcher, no longer than `timeout`.
    pub async fn exit(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                // Its last lines may still be on their way.
                tokio::time::sleep(POLL_INTERVAL).await;
                return status;
            }
            assert!(Instant::now() < deadline, "the launcher did not end in {timeout:?}:\n{}", self.log());
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Already dead is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
