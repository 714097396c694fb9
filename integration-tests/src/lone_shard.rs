//! A shard without a router, as an engineer who looks for a fault starts it.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::executable::{golden_directory, lamplighter};
use crate::stack::POLL_INTERVAL;

/// For what must happen before it has loaded a tiny model, on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A running shard, killed when it is dropped.
pub struct LoneShard(Child);

impl LoneShard {
    /// Starts `lamplighter shard` with the model `goldens/{golden}` and flags, and waits until it listens at `socket`.
    pub fn start(golden: &str, socket: &Path, flags: &[&str]) -> Self {
        let mut command = lamplighter();
        command.arg("shard").arg("--model-dir").arg(golden_directory(golden));
        command.arg("--uds-path").arg(socket).args(flags);
        let shard = Self(command.spawn().expect("the executable can be started"));
        let deadline = Instant::now() + TIMEOUT;
        while !socket.exists() {
            assert!(Instant::now() < deadline, "the shard does not listen");
            std::thread::sleep(POLL_INTERVAL);
        }
        shard
    }

    /// Waits until it has a thread called `name`; returns the field `field` of `/proc/PID/task/*/status` for the process's first
    /// thread and all others.
    pub fn threads_with(&self, name: &str, field: &str) -> Vec<String> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let threads = self.threads();
            let value = |status: &String, field: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
                line.unwrap_or_default().trim().to_owned()
            };
            if threads.iter().any(|status| value(status, "Name") == name) {
                return threads.iter().map(|status| value(status, field)).collect();
            }
            assert!(Instant::now() < deadline, "no thread {name}: {threads:?}");
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// What the system says of each of its threads. One that ends meanwhile is left out.
    fn threads(&self) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).expect("the shard runs");
        tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok()).collect()
    }
}

impl Drop for LoneShard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
