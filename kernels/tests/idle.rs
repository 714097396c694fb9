//! A sleeping pool costs nothing. A test executable of its own, because it reads the CPU time of its threads.

use std::time::Duration;

use kernels::Context;

#[test]
fn sleeping_threads_use_no_cpu_time() {
    let context = Context::cpu(2);
    context.parallel_for(2, |_| ());
    std::thread::sleep(Duration::from_millis(20));
    let before = worker_cpu_ns();
    std::thread::sleep(Duration::from_millis(300));
    let used = worker_cpu_ns() - before;
    // Nothing wakes it, so one per cent is generous; a spinning thread would use a hundred.
    assert!(used < 3_000_000, "a sleeping worker used {used} ns of 300 ms");
    drop(context);
}

/// CPU time of the pool's one worker, in nanoseconds.
fn worker_cpu_ns() -> u64 {
    let times: Vec<u64> = std::fs::read_dir("/proc/self/task")
        .expect("procfs")
        .flatten()
        .filter(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "kernels-1")
        })
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|stat| stat.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(times.len(), 1, "the worker is found by its name");
    times[0]
}
