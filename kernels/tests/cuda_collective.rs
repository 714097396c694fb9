//! Ranks on GPUs: what NCCL sums and gathers is in order, also from a recorded step, and a dead peer ends in an error.
//! Processes are ranks, as they are when models are served.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use half::bf16;
use kernels::collective::{MeetingPlace, join_gpus};
use kernels::{Communicator, Context, DType, Error, Tensor};

const LONG: Duration = Duration::from_secs(30);
/// Rows and columns of what a rank has: odd, so that nothing is aligned by chance.
const SHAPES: [(usize, usize); 3] = [(1, 24), (5, 7), (3, 64)];

fn group(context: &Context, directory: &Path, rank: usize, world_size: usize) -> Box<dyn Communicator> {
    let place = MeetingPlace::File(directory.join("ranks"));
    join_gpus(context, &place, rank, world_size, LONG).expect("all ranks join")
}

/// Small integers, exact in all types.
fn values(rank: usize, rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| ((i * 7 + rank * 31) % 23) as f32 - 11.0).collect()
}

fn uploaded(context: &Context, values: &[f32], rows: usize, cols: usize, dtype: DType) -> Tensor {
    let tensor = Tensor::from_slice(values, rows, cols).to_dtype(dtype).expect("a float type");
    context.upload(&tensor).expect("room")
}

fn downloaded(context: &Context, tensor: &Tensor) -> Vec<f32> {
    let len = tensor.rows() * tensor.cols();
    if tensor.dtype() == DType::BF16 {
        let mut out = vec![bf16::ZERO; len];
        context.download(tensor.view(), &mut out).expect("done");
        return out.into_iter().map(bf16::to_f32).collect();
    }
    let mut out = vec![0.0; len];
    context.download(tensor.view(), &mut out).expect("done");
    out
}

/// What each rank does, and checks.
fn sum_and_gather(context: &Context, group: &mut dyn Communicator) {
    let (rank, world_size) = (group.rank(), group.world_size());
    for (rows, cols) in SHAPES {
        for dtype in [DType::F32, DType::BF16] {
            let mut data = uploaded(context, &values(rank, rows, cols), rows, cols, dtype);
            let parts: Vec<Vec<f32>> = (0..world_size).map(|rank| values(rank, rows, cols)).collect();

            let nothing = vec![f32::NAN; rows * world_size * cols];
            let mut out = uploaded(context, &nothing, rows, world_size * cols, dtype);
            group.all_gather_cols(data.view(), out.view_mut()).expect("gathered");
            let expected: Vec<f32> = (0..rows)
                .flat_map(|row| parts.iter().flat_map(move |part| part[row * cols..][..cols].to_vec()))
                .collect();
            assert_eq!(downloaded(context, &out), expected, "gathered {rows} x {cols}, {dtype:?}");

            group.all_reduce_sum(data.view_mut()).expect("summed");
            let sum: Vec<f32> = (0..rows * cols).map(|i| parts.iter().map(|part| part[i]).sum()).collect();
            assert_eq!(downloaded(context, &data), sum, "summed {rows} x {cols}, {dtype:?}");
        }
    }
    let mut said = [rank as u32 + 5, 7];
    group.broadcast(&mut said).expect("said");
    assert_eq!(said, [5, 7]);
}

/// A sum is recorded once and then done twice.
fn sum_in_a_graph(context: &Context, group: &mut dyn Communicator) {
    let (rank, world_size) = (group.rank(), group.world_size());
    let mut data = uploaded(context, &values(rank, 4, 8), 4, 8, DType::F32);
    let graph = context.capture(|| group.all_reduce_sum(data.view_mut())).expect("recorded");
    graph.launch().expect("launched");
    graph.launch().expect("launched");
    let sum = |i: usize| (0..world_size).map(|rank| values(rank, 4, 8)[i]).sum::<f32>() * world_size as f32;
    assert_eq!(downloaded(context, &data), (0..32).map(sum).collect::<Vec<f32>>());
    group.check().expect("nothing is wrong");
}

#[test]
fn one_rank_is_a_group() {
    let directory = tempfile::tempdir().expect("a directory");
    let context = Context::cuda(0, 1).expect("a GPU");
    let mut group = group(&context, directory.path(), 0, 1);
    sum_and_gather(&context, group.as_mut());
    sum_in_a_graph(&context, group.as_mut());
}

#[test]
fn ranks_are_gpus() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = MeetingPlace::File(directory.path().join("ranks"));
    let error = join_gpus(&Context::cpu(1), &place, 0, 1, LONG).err().expect("no GPU");
    assert!(error.to_string().contains("computes on the CPU"), "{error}");
}

#[test]
fn two_processes_sum_and_gather() {
    if has_one_gpu() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut other = Process::spawn(directory.path(), "work");
    let context = Context::cuda(0, 1).expect("a GPU");
    let mut group = group(&context, directory.path(), 0, 2);
    sum_and_gather(&context, group.as_mut());
    sum_in_a_graph(&context, group.as_mut());
    assert!(other.0.wait().expect("it ends").success(), "the other rank has found the same");
}

#[test]
fn a_killed_rank_is_an_error_for_the_others() {
    if has_one_gpu() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut other = Process::spawn(directory.path(), "wait");
    let context = Context::cuda(0, 1).expect("a GPU");
    let mut group = group(&context, directory.path(), 0, 2);
    other.0.kill().expect("kill");
    let began = Instant::now();
    let mut data = uploaded(&context, &values(0, 4, 8), 4, 8, DType::F32);
    // Whether the sum is still queued depends on how fast the death is seen.
    group.watch(true);
    let queued = group.all_reduce_sum(data.view_mut());
    let mut outcome = queued.and_then(|()| context.synchronize());
    while outcome.is_ok() {
        outcome = group.check();
        assert!(began.elapsed() < LONG, "death is not seen");
    }
    group.watch(false);
    match outcome {
        Err(Error::Collective(message)) => assert!(message.contains("rank 1 (process "), "{message}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(group.all_reduce_sum(data.view_mut()), Err(Error::Collective(_))));
}

/// The other process of these tests; nothing to do without orders.
#[test]
fn another_rank() {
    let Some(orders) = std::env::args().find_map(|arg| Some(arg.strip_prefix("rank_orders=")?.to_owned()))
    else {
        return;
    };
    let (what, directory) = orders.split_once(',').expect("what,directory");
    let context = Context::cuda(1, 1).expect("a second GPU");
    let mut group = group(&context, Path::new(directory), 1, 2);
    if what == "work" {
        sum_and_gather(&context, group.as_mut());
        sum_in_a_graph(&context, group.as_mut());
    } else {
        // Killed meanwhile.
        while group.check().is_ok() {
            std::thread::park_timeout(LONG);
        }
    }
}

/// NCCL refuses two ranks on one GPU.
fn has_one_gpu() -> bool {
    kernels::num_gpus().expect("a driver") < 2
}

struct Process(Child);

impl Process {
    fn spawn(directory: &Path, what: &str) -> Self {
        // The harness takes further arguments for filters, of which any may match.
        let child = Command::new(std::env::current_exe().expect("this executable"))
            .args(["another_rank", &format!("rank_orders={what},{}", directory.display())])
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
