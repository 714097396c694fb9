//! The threads that work on the CPU is spread over.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::{JoinHandle, Thread};

use crate::cores::available_cores;

/// Threads that share the tasks of a region: each has the same consecutive ones whenever the region is run again, so that it
/// reads the same memory, from its first byte to its last; who is done helps those that are held up.
///
/// Regions do not overlap: one that begins while another runs, or inside one, runs on its caller's thread alone.
pub(crate) struct Pool {
    workers: Vec<Worker>,
    shared: Arc<Shared>,
    /// Held while a region runs.
    region: Mutex<()>,
}

impl Pool {
    /// `num_threads`, of which the caller's is one; at least one.
    ///
    /// # Panics
    /// Where the system refuses another thread.
    pub(crate) fn new(num_threads: usize) -> Self {
        let shared = Arc::new(Shared::new(num_threads.max(1), spin_rounds(num_threads)));
        let workers = (1..num_threads).map(|i| Worker::spawn(i, &shared)).collect();
        Self { workers, shared, region: Mutex::new(()) }
    }

    /// Threads, the caller's included.
    pub(crate) fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0) .. task(num_tasks - 1)`, spread evenly over the threads, and returns when all are done. Tasks should cost
    /// the same. Allocates nothing.
    ///
    /// # Panics
    /// Where a task panics, with its payload, after the other threads have stopped.
    pub(crate) fn parallel_for(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        let helpers = self.workers.len().min(num_tasks.saturating_sub(1));
        let guard = match self.region.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if helpers == 0 || guard.is_none() {
            return (0..num_tasks).for_each(task);
        }
        self.shared.publish(&task, num_tasks, helpers);
        self.workers[..helpers].iter().for_each(Worker::wake);
        let outcome = catch_unwind(AssertUnwindSafe(|| self.shared.work(0, &task)));
        self.shared.wait_for_helpers();
        let helper_panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = outcome.err().or(helper_panic) {
            resume_unwind(payload)
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::Release);
        for worker in &mut self.workers {
            worker.wake();
            if let Some(thread) = worker.thread.take() {
                // A worker catches its tasks' panics, so it ends normally.
                let _ = thread.join();
            }
        }
    }
}

/// How often a thread looks before it sleeps: some ten microseconds, which is longer than what a decode step does on one
/// thread between two regions, and much less than what a token takes. So threads stay awake during a step, and sleep
/// soon after it. None where threads would take each other's core.
fn spin_rounds(num_threads: usize) -> u32 {
    if num_threads > 1 && num_threads <= available_cores() { 2_000 } else { 0 }
}

struct Worker {
    /// Raised for each region that this worker is to help with.
    epoch: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn spawn(index: usize, shared: &Arc<Shared>) -> Self {
        let epoch = Arc::new(AtomicU32::new(0));
        let (worker_shared, worker_epoch) = (Arc::clone(shared), Arc::clone(&epoch));
        let thread = std::thread::Builder::new()
            .name(format!("kernels-{index}"))
            .spawn(move || worker_shared.serve(index, &worker_epoch))
            .expect("the system gives a thread");
        Self { epoch, thread: Some(thread) }
    }

    /// Cheap where the worker has not fallen asleep.
    fn wake(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

/// The region being run; the lifetime of the closure is erased, `publish` and `wait_for_helpers` stand for it.
struct Region {
    task: *const (dyn Fn(usize) + Sync + 'static),
    caller: Thread,
}

/// The tasks of one thread that nobody has begun; on a cache line of its own, since its thread alone uses it, as a rule.
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

struct Shared {
    region: UnsafeCell<Option<Region>>,
    /// Of each thread, the caller's first.
    shares: Box<[Share]>,
    /// Helpers that have not finished with the region.
    helpers: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    shutdown: AtomicBool,
    spin_rounds: u32,
}

// SAFETY: `region` is written only by the thread that holds `Pool::region`, while `helpers` is 0; helpers read it
// between the release of their epoch and their decrement of `helpers`. The task it points to is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(num_threads: usize, spin_rounds: u32) -> Self {
        let empty = |_| Share { next: AtomicUsize::new(0), end: AtomicUsize::new(0) };
        Self {
            region: UnsafeCell::new(None),
            shares: (0..num_threads).map(empty).collect(),
            helpers: AtomicUsize::new(0),
            panic: Mutex::new(None),
            shutdown: AtomicBool::new(false),
            spin_rounds,
        }
    }

    fn publish<'a>(&self, task: &'a (dyn Fn(usize) + Sync + 'a), num_tasks: usize, helpers: usize) {
        let task: *const (dyn Fn(usize) + Sync + 'a) = task;
        #[expect(clippy::transmute_ptr_to_ptr, reason = "a cast may not extend the lifetime")]
        // SAFETY: the same fat pointer; only the lifetime is erased. It is followed only until `wait_for_helpers`
        // returns, which the caller of `publish` awaits while it borrows the task.
        let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(task) };
        // SAFETY: no helper is in a region now (see `Sync` above).
        unsafe { *self.region.get() = Some(Region { task, caller: std::thread::current() }) }
        let threads = helpers + 1;
        for (i, share) in self.shares.iter().enumerate() {
            let (first, end) = if i < threads { (i, i + 1) } else { (0, 0) };
            share.next.store(first * num_tasks / threads, Ordering::Relaxed);
            share.end.store(end * num_tasks / threads, Ordering::Relaxed);
        }
        self.helpers.store(helpers, Ordering::Relaxed);
    }

    /// Takes the tasks of a thread, then what is left of the others'.
    fn work(&self, thread: usize, task: &(dyn Fn(usize) + Sync)) {
        for i in 0..self.shares.len() {
            let share = &self.shares[(thread + i) % self.shares.len()];
            let end = share.end.load(Ordering::Relaxed);
            while share.next.load(Ordering::Relaxed) < end {
                let index = share.next.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                task(index);
            }
        }
    }

    fn wait_for_helpers(&self) {
        for _ in 0..self.spin_rounds {
            if self.helpers.load(Ordering::Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        while self.helpers.load(Ordering::Acquire) != 0 {
            std::thread::park();
        }
    }

    /// A worker's life.
    fn serve(&self, thread: usize, epoch: &AtomicU32) {
        let mut seen = 0;
        loop {
            let mut rounds = self.spin_rounds;
            while epoch.load(Ordering::Acquire) == seen {
                if rounds == 0 {
                    std::thread::park();
                } else {
                    rounds -= 1;
                    std::hint::spin_loop();
                }
            }
            if self.shutdown.load(Ordering::Acquire) {
                return;
            }
            seen = seen.wrapping_add(1);
            self.help(thread);
        }
    }

    fn help(&self, thread: usize) {
        // SAFETY: this worker's epoch was raised after the region was written, and the region stays until all helpers
        // have been counted off below.
        let (task, caller) = unsafe {
            let region = (*self.region.get()).as_ref().expect("a worker is woken for a region");
            (&*region.task, region.caller.clone())
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.work(thread, task))) {
            // The remaining tasks are not begun; the caller hears of the panic.
            self.shares.iter().for_each(|share| share.next.store(usize::MAX / 2, Ordering::Relaxed));
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
        if self.helpers.fetch_sub(1, Ordering::AcqRel) == 1 {
            caller.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for num_threads in 0..5 {
            let pool = Pool::new(num_threads);
            for num_tasks in [0, 1, 2, 3, 7, 100, 1000] {
                let counts: Vec<AtomicU64> = (0..num_tasks).map(|_| AtomicU64::new(0)).collect();
                pool.parallel_for(num_tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_thread_that_is_held_up_loses_its_tasks_to_the_others() {
        let pool = Pool::new(2);
        let done = AtomicUsize::new(0);
        // The first task waits until all others are done, those of its own thread too.
        pool.parallel_for(16, |i| {
            while i == 0 && done.load(Ordering::Acquire) < 15 {
                std::thread::yield_now();
            }
            done.fetch_add(1, Ordering::Release);
        });
        assert_eq!(done.into_inner(), 16);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_stays_usable() {
        let pool = Pool::new(3);
        for bad in [0, 5, 63] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.parallel_for(64, |i| assert!(i != bad, "task {i} breaks"));
            }));
            let payload = outcome.expect_err("the panic is propagated");
            assert_eq!(payload.downcast_ref::<String>(), Some(&format!("task {bad} breaks")));
            let sum = AtomicU64::new(0);
            pool.parallel_for(10, |i| {
                sum.fetch_add(i as u64, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn a_region_inside_a_region_runs_on_its_own_thread() {
        let pool = Pool::new(2);
        let sum = AtomicU64::new(0);
        pool.parallel_for(8, |_| {
            pool.parallel_for(8, |i| {
                sum.fetch_add(i as u64, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 8 * 28);
    }
}
