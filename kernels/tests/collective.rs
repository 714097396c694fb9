//! Ranks in shared memory: as threads and as processes of their own, one of which dies.
//!
//! A process of a group is this test executable again, filtered to the test `a_rank_of_a_process_group`, which does what its
//! file of orders says.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kernels::collective::SharedMemory;
use kernels::{Communicator, DType, Error, Tensor, View, ViewMut};

const LONG: Duration = Duration::from_mins(1);

/// Runs each rank in a thread and gives their results, in order.
fn as_threads<T: Send>(world_size: usize, rank: impl Fn(SharedMemory) -> T + Sync) -> Vec<T> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ranks");
    let (path, rank) = (&path, &rank);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..world_size)
            .map(|i| {
                scope.spawn(move || rank(SharedMemory::join(path, i, world_size, LONG).expect("all join")))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Values whose sum depends on the order of addition.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 31 + rank * 17) % 101) as f32 * 0.1 + 1e7 * (rank % 2) as f32).collect()
}

#[test]
fn sums_have_the_same_bits_on_all_ranks_in_order_of_rank() {
    // The last is longer than two slabs.
    for (world_size, rows, cols) in [(1, 3, 5), (2, 1, 1), (2, 7, 33), (3, 5, 64), (4, 0, 8), (2, 50, 4001)] {
        let sums = as_threads(world_size, |mut group| {
            let mut data = values(group.rank(), rows * cols);
            group.all_reduce_sum(ViewMut::from_slice(&mut data, rows, cols)).expect("sum");
            data
        });
        let mut want = values(0, rows * cols);
        for rank in 1..world_size {
            want.iter_mut().zip(values(rank, rows * cols)).for_each(|(sum, value)| *sum += value);
        }
        for sum in sums {
            assert!(sum.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}

#[test]
fn sums_leave_what_lies_between_the_rows_of_a_strided_view() {
    let sums = as_threads(2, |mut group| {
        let mut data = Tensor::from_slice(&[1.0_f32; 40], 4, 10);
        group.all_reduce_sum(data.view_mut().narrow_cols(3, 5)).expect("sum");
        data.as_slice::<f32>().to_vec()
    });
    for sum in sums {
        for (i, value) in sum.into_iter().enumerate() {
            let want: f32 = if (3..8).contains(&(i % 10)) { 2.0 } else { 1.0 };
            assert_eq!(value.to_bits(), want.to_bits());
        }
    }
}

#[test]
fn gathered_columns_lie_in_order_of_rank() {
    for (world_size, rows, cols) in [(1, 2, 3), (2, 3, 7), (3, 2, 70_001), (2, 0, 4)] {
        let gathered = as_threads(world_size, |mut group| {
            let data = values(group.rank(), rows * cols);
            let mut out = vec![0.0; rows * cols * world_size];
            let view = ViewMut::from_slice(&mut out, rows, world_size * cols);
            group.all_gather_cols(View::from_slice(&data, rows, cols), view).expect("gather");
            out
        });
        let want: Vec<f32> = (0..rows)
            .flat_map(|row| {
                (0..world_size).flat_map(move |rank| values(rank, rows * cols)[row * cols..][..cols].to_vec())
            })
            .collect();
        for out in gathered {
            assert_eq!(out, want);
        }
    }
}

#[test]
fn broadcast_gives_all_ranks_the_data_of_rank_0() {
    for len in [0, 1, 17, 200_000] {
        let received = as_threads(3, |mut group| {
            let mut data: Vec<u32> = (0..len).map(|i| i * 10 + group.rank() as u32).collect();
            group.broadcast(&mut data).expect("broadcast");
            data
        });
        for data in received {
            assert_eq!(data, (0..len).map(|i| i * 10).collect::<Vec<u32>>());
        }
    }
}

#[test]
fn a_long_mixed_sequence_of_calls_stays_in_step() {
    let totals = as_threads(2, |mut group| {
        let mut total = 0.0_f64;
        for step in 0..500_u32 {
            let mut data = [step as f32 + group.rank() as f32; 9];
            group.all_reduce_sum(ViewMut::from_slice(&mut data, 3, 3)).expect("sum");
            let mut ids = [if group.rank() == 0 { step } else { 0 }; 2];
            group.broadcast(&mut ids).expect("broadcast");
            assert_eq!(ids, [step; 2]);
            total += f64::from(data[4]);
        }
        total
    });
    let want: f64 = (0..500).map(|step| 2.0 * f64::from(step) + 1.0).sum();
    assert!(totals.iter().all(|total| total.to_bits() == want.to_bits()));
}

#[test]
fn the_file_is_gone_when_all_have_joined_and_private_before() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ranks");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| SharedMemory::join(&path, 0, 2, LONG));
        while !path.exists() {
            std::thread::yield_now();
        }
        let mode = std::fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = SharedMemory::join(&path, 1, 2, LONG).expect("join");
        let first = first.join().expect("no panic").expect("join");
        assert!(!path.exists());
        drop((first, second));
    });
}

#[test]
fn a_rank_that_never_joins_is_named_after_the_timeout() {
    let directory = tempfile::tempdir().expect("a directory");
    let begin = Instant::now();
    let outcome = SharedMemory::join(&directory.path().join("ranks"), 0, 2, Duration::from_millis(150));
    check_collective_error(outcome.map(|_| ()), "rank 1 of 2 did not join");
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn what_a_failed_group_left_behind_does_not_disturb_the_next() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ranks");
    let alone = SharedMemory::join(&path, 1, 3, Duration::from_millis(20));
    assert!(alone.is_err() && path.exists());
    std::thread::scope(|scope| {
        let other = scope.spawn(|| SharedMemory::join(&path, 1, 2, LONG).map(|_| ()));
        SharedMemory::join(&path, 0, 2, LONG).expect("join");
        other.join().expect("no panic").expect("join");
    });
}

#[test]
fn a_peer_that_leaves_is_an_error_at_once_and_for_every_call_after() {
    let outcomes = as_threads(2, |mut group| {
        if group.rank() == 1 {
            return Ok(());
        }
        let begin = Instant::now();
        let first = group.broadcast(&mut [1]);
        assert!(first.is_err() && group.broadcast(&mut [1]).is_err());
        assert!(begin.elapsed() < Duration::from_secs(10));
        first
    });
    check_collective_error(outcomes.into_iter().next().expect("rank 0"), "rank 1");
}

#[test]
fn ranks_that_make_different_calls_are_told_so() {
    let outcomes = as_threads(2, |mut group| match group.rank() {
        0 => group.broadcast(&mut [1]),
        _ => group.all_reduce_sum(ViewMut::from_slice(&mut [1.0_f32], 1, 1)),
    });
    assert!(outcomes.iter().any(|outcome| {
        matches!(outcome, Err(Error::Collective(message)) if message.contains("made another call"))
    }));
    assert!(outcomes.iter().all(Result::is_err));
}

#[test]
fn wrong_shapes_are_refused_before_the_peers_are_asked() {
    let outcomes = as_threads(2, |mut group| {
        let mut half = Tensor::zeros(1, 4, DType::F16);
        let mut out = Tensor::zeros(1, 9, DType::F32);
        let data = Tensor::zeros(1, 4, DType::F32);
        assert!(matches!(group.all_reduce_sum(half.view_mut()), Err(Error::DType { .. })));
        group.all_gather_cols(data.view(), out.view_mut())
    });
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Shape { .. }))));
}

#[test]
fn processes_sum_and_a_killed_one_is_an_error_for_the_others() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ranks");
    let mut other = Process::spawn(directory.path(), 1);
    let mut group = SharedMemory::join(&path, 0, 2, LONG).expect("the process joins");
    for _ in 0..20 {
        let mut data = values(0, 100);
        group.all_reduce_sum(ViewMut::from_slice(&mut data, 10, 10)).expect("the process sums");
        let want = values(0, 100).into_iter().zip(values(1, 100)).map(|(a, b)| a + b);
        assert!(data.into_iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    // Killed and not waited for: a zombie, whose process id still answers.
    other.0.kill().expect("kill");
    let begin = Instant::now();
    let outcome = (0..2).try_for_each(|_| group.broadcast(&mut [0; 4]));
    check_collective_error(outcome, "rank 1");
    assert!(begin.elapsed() < Duration::from_secs(10), "death is seen long before the timeout");
}

/// The other process of [`processes_sum_and_a_killed_one_is_an_error_for_the_others`]; nothing to do without orders.
#[test]
fn a_rank_of_a_process_group() {
    let Some(orders) = std::env::args().find_map(|arg| Some(arg.strip_prefix("rank_orders=")?.to_owned()))
    else {
        return;
    };
    let (rank, directory) = orders.split_once(',').expect("rank,directory");
    let rank = rank.parse().expect("a number");
    let path = PathBuf::from(directory).join("ranks");
    let mut group = SharedMemory::join(&path, rank, 2, LONG).expect("join");
    loop {
        let mut data = values(rank, 100);
        // Killed while it waits here.
        if group.all_reduce_sum(ViewMut::from_slice(&mut data, 10, 10)).is_err() {
            return;
        }
    }
}

struct Process(Child);

impl Process {
    fn spawn(directory: &Path, rank: usize) -> Self {
        // The harness takes further arguments for filters, of which any may match.
        let child = Command::new(std::env::current_exe().expect("this executable"))
            .args(["a_rank_of_a_process_group", &format!("rank_orders={rank},{}", directory.display())])
            .stdout(Stdio::null())
            .spawn()
            .expect("a process");
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already dead is what we want.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn check_collective_error(outcome: Result<(), Error>, expected: &str) {
    match outcome {
        Err(Error::Collective(message)) => assert!(message.contains(expected), "{message}"),
        other => panic!("expected a collective error with {expected:?}, got {other:?}"),
    }
}
