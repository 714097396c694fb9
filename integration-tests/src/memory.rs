//! How much memory processes use, from `/proc`.

use std::path::Path;

use nix::unistd::Pid;

/// Memory of some processes together, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Pages that several processes share are counted once (proportional set size).
    pub proportional: u64,
    /// Pages that several processes share are counted for each of them (resident set size).
    pub resident: u64,
}

/// Of a process and its children.
pub(crate) fn of_family(parent: Pid) -> Memory {
    let parent = parent.as_raw().to_string();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Memory::default() };
    let mut sum = Memory::default();
    for process in processes.flatten() {
        let status = read(&process.path().join("status"));
        if ["Pid:", "PPid:"].iter().any(|name| field(&status, name) == Some(&parent)) {
            let smaps = read(&process.path().join("smaps_rollup"));
            sum.proportional += bytes(&smaps, "Pss:");
            sum.resident += bytes(&smaps, "Rss:");
        }
    }
    sum
}

/// Empty for a process that is gone.
fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()))
}

fn bytes(text: &str, name: &str) -> u64 {
    let kilobytes = field(text, name).and_then(|value| value.strip_suffix(" kB"));
    kilobytes.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or_default() * 1024
}
