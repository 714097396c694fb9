//! The cores of this machine that this process runs on: logical CPUs, by the numbers that Linux gives them.

/// Cores that this process may use: its affinity and, in a container, its CPU quota (the standard library reads those of both
/// versions of cgroups); at least one.
pub fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
