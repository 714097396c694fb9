//! What a process used, from `/proc`.

use std::time::Duration;

use anyhow::Context;

/// Processor time of a process, all its threads together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProcessorTime {
    /// In the program.
    pub(crate) user: Duration,
    /// In the kernel, for it: sockets above all.
    pub(crate) kernel: Duration,
}

impl ProcessorTime {
    /// Since the process began.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Behind the name, which is in parentheses and may hold anything: state is the first field, the times are the
        // twelfth and the thirteenth.
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has a name in parentheses")?;
        let mut times = fields.split_whitespace().skip(11).map(str::parse::<u64>);
        let mut next = || anyhow::Ok(times.next().context("/proc/PID/stat has thirteen fields and more")??);
        // USER_HZ is 100 on all that Linux runs on today.
        let ticks = |ticks: u64| Duration::from_millis(10 * ticks);
        Ok(Self { user: ticks(next()?), kernel: ticks(next()?) })
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            kernel: self.kernel.saturating_sub(before.kernel),
        }
    }

    pub(crate) fn total(self) -> Duration {
        self.user + self.kernel
    }
}

/// Resident memory of a process in bytes, files that it has mapped left out.
pub(crate) fn memory_bytes(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")).context("RssAnon is in kB")?;
    Ok(kilobytes.parse::<u64>()? * 1024)
}
