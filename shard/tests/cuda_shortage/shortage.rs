//! Steps that memory does not suffice for, on one GPU and on two.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use kernels::collective::{Local, MeetingPlace, join_gpus};
use kernels::{Communicator, Context, DType, Tensor};
use proto::v1::{FinishReason, NewSequence, ScheduledSequence, StepRequest, StepResponse};
use shard::engine::{Engine, EngineOptions, Origin};
use shard::models::{self, LoadOptions};
use shard::weights::Partition;

use crate::checkpoints::llama;
use crate::driver::{Outcome, Plan, WARMUP, WHOLE_PROMPTS, generate, prompt, request, unequal_requests};

const LONG: Duration = Duration::from_mins(1);

/// The tests of this file share a device, of which each wants all memory.
static DEVICE: Mutex<()> = Mutex::new(());

/// A sequence that is old when memory runs out; the prompt of those that are new then, longer than what is computed without
/// memory of its own; and one that goes on behind its first block.
const OLD: u64 = 1;
const NEW: u64 = 2;
const FOLLOWER: u64 = 3;
const AGAIN: u64 = 4;
const NEW_LEN: usize = 40;

fn engine(rank: usize, communicator: Box<dyn Communicator>, context: Context) -> Engine {
    let partition = Partition { rank, world_size: communicator.world_size() };
    let options = LoadOptions { partition, ..LoadOptions::default() };
    let model = models::load(&context, &llama(), options).unwrap();
    let options = EngineOptions { graph_sizes: vec![1, 2, 4, 8], ..EngineOptions::default() };
    let mut engine = Engine::new(model, context, communicator).with_options(options);
    engine.warmup(&WARMUP).unwrap();
    engine
}

/// Takes all memory that the device has left, as another program may.
fn fill(ordinal: usize) -> Vec<Tensor> {
    let context = Context::cuda(ordinal, 1).unwrap();
    let mut bytes = context.device_memory().unwrap().unwrap().free_bytes;
    let mut taken = Vec::new();
    while bytes >= 4096 {
        match context.zeros(1, bytes / 4, DType::F32) {
            Ok(tensor) => taken.push(tensor),
            Err(_) => bytes /= 2,
        }
    }
    context.synchronize().unwrap();
    taken
}

/// Without a look at the answers, in which ranks but the first say nothing.
const BLIND: Plan = Plan { blind: true, ..WHOLE_PROMPTS };

fn generate_all(engine: &mut Engine, requests: &[NewSequence]) -> Vec<Outcome> {
    generate(requests, BLIND, |request| engine.step(request, Origin::Unary).unwrap())
}

/// What the sequences of [`play`] get where nothing is lacking.
fn undisturbed(engine: &mut Engine) -> [Vec<u32>; 2] {
    let requests = [request(OLD, &prompt(0, 20)), request(NEW, &prompt(1, NEW_LEN))];
    // Each alone: the last bits may depend on company, and these tests ask for the same tokens.
    requests.map(|request| generate_all(engine, &[request]).remove(0).token_ids())
}

fn scheduled(sequence_id: u64, num_tokens: usize, append_block_ids: &[u32]) -> ScheduledSequence {
    let append_block_ids = append_block_ids.to_vec();
    ScheduledSequence { sequence_id, num_tokens: num_tokens as u32, append_block_ids }
}

/// Runs two steps ahead through a shortage, which `begin` brings about and `end` ends.
fn play(
    engine: &mut Engine,
    mut begin: impl FnMut(&Engine),
    mut end: impl FnMut(&Engine),
) -> Vec<StepResponse> {
    let mut follower = request(FOLLOWER, &[prompt(1, NEW_LEN), vec![9, 10]].concat());
    (follower.computed_tokens, follower.block_ids) = (32, vec![2]);
    let admit = |new: NewSequence| vec![new];
    let mut steps = vec![
        (admit(request(OLD, &prompt(0, 20))), vec![scheduled(OLD, 20, &[0, 1])]),
        (vec![], vec![scheduled(OLD, 1, &[])]),
        (vec![], vec![scheduled(OLD, 1, &[])]),
        (
            admit(request(NEW, &prompt(1, NEW_LEN))),
            vec![scheduled(OLD, 1, &[]), scheduled(NEW, NEW_LEN, &[2, 3])],
        ),
        // Sent before the answer to the one above is known.
        (
            admit(follower),
            vec![scheduled(OLD, 1, &[]), scheduled(NEW, 1, &[]), scheduled(FOLLOWER, 10, &[4])],
        ),
        (vec![], vec![scheduled(OLD, 1, &[])]),
        (
            admit(request(AGAIN, &prompt(1, NEW_LEN))),
            vec![scheduled(OLD, 1, &[]), scheduled(AGAIN, NEW_LEN, &[2, 3])],
        ),
    ];
    steps.extend((8..=16).map(|_| (vec![], vec![scheduled(OLD, 1, &[]), scheduled(AGAIN, 1, &[])])));
    let mut answers = Vec::new();
    for (step_id, (admit, schedule)) in (1..).zip(steps) {
        match step_id {
            3 => begin(engine),
            7 => end(engine),
            _ => {}
        }
        if !engine.has_room() {
            answers.push(engine.collect().unwrap());
        }
        let release_sequence_ids = if step_id == 7 { vec![NEW, FOLLOWER] } else { vec![] };
        engine.launch(StepRequest { step_id, release_sequence_ids, admit, schedule }, Origin::Run).unwrap();
    }
    assert_eq!(engine.num_in_flight(), 2);
    while engine.num_in_flight() > 0 {
        answers.push(engine.collect().unwrap());
    }
    engine.end_run();
    answers
}

fn tokens_of(answers: &[StepResponse], sequence_id: u64) -> Vec<u32> {
    let outputs = answers.iter().flat_map(|answer| &answer.outputs);
    let tokens = outputs.filter(|output| output.sequence_id == sequence_id).flat_map(|output| &output.tokens);
    tokens.map(|token| token.token_id).collect()
}

/// The step in which a sequence ended, and why.
fn ends(answers: &[StepResponse], sequence_id: u64) -> Vec<(u64, FinishReason)> {
    let of = |answer: &StepResponse| {
        let output = answer.outputs.iter().find(|output| output.sequence_id == sequence_id)?;
        let reason = output.finish_reason();
        (reason != FinishReason::Unspecified).then_some((answer.step_id, reason))
    };
    answers.iter().filter_map(of).collect()
}

#[test]
fn new_sequences_fail_where_memory_is_lacking_and_old_ones_go_on_with_the_same_tokens() {
    let _device = DEVICE.lock().unwrap();
    let mut engine = engine(0, Box::new(Local), Context::cuda(0, 1).unwrap());
    let [old, new] = undisturbed(&mut engine);
    let taken = Mutex::new(Vec::new());
    let begin = |engine: &Engine| {
        engine.forget_scratch().unwrap();
        *taken.lock().unwrap() = fill(0);
    };
    let answers = play(&mut engine, begin, |_| taken.lock().unwrap().clear());
    assert_eq!(tokens_of(&answers, OLD), old);
    assert_eq!(ends(&answers, OLD), [(16, FinishReason::Length)]);
    assert_eq!(ends(&answers, NEW), [(4, FinishReason::OutOfMemory)]);
    assert_eq!(ends(&answers, FOLLOWER), [(5, FinishReason::MissingPrefix)]);
    let skipped: Vec<_> = answers.iter().map(|answer| answer.skipped_sequence_ids.clone()).collect();
    assert_eq!(skipped[4], [NEW]);
    assert_eq!(skipped.concat(), [NEW]);
    assert_eq!(tokens_of(&answers, AGAIN), new[..10]);
    assert_eq!(ends(&answers, AGAIN), []);
}

#[test]
fn steps_take_no_memory_once_warmup_is_over() {
    let _device = DEVICE.lock().unwrap();
    let mut engine = engine(0, Box::new(Local), Context::cuda(0, 1).unwrap());
    let expected: Vec<_> =
        generate_all(&mut engine, &unequal_requests()).iter().map(Outcome::token_ids).collect();
    drop(engine);
    // All of it afresh, with nothing left from the start on.
    let mut engine = self::engine(0, Box::new(Local), Context::cuda(0, 1).unwrap());
    let _taken = fill(0);
    let found: Vec<_> =
        generate_all(&mut engine, &unequal_requests()).iter().map(Outcome::token_ids).collect();
    assert_eq!(found, expected);
}

/// What each of two ranks does: first one of them alone has no memory left, then steps of both need more than was taken.
fn on_two(rank: usize, directory: &Path) -> ([Vec<u32>; 2], Vec<StepResponse>) {
    let context = Context::cuda(rank, 1).unwrap();
    let place = MeetingPlace::File(directory.join("ranks"));
    let communicator = join_gpus(&context, &place, rank, 2, LONG).unwrap();
    let mut engine = engine(rank, communicator, context);
    let _taken = (rank == 1).then(|| fill(rank));
    let undisturbed = undisturbed(&mut engine);
    let answers = play(&mut engine, |engine| engine.forget_scratch().unwrap(), |_| {});
    (undisturbed, answers)
}

#[test]
fn two_ranks_leave_out_the_same_sequences_and_one_that_lacks_memory_alone_leaves_out_none() {
    // NCCL refuses two ranks on one GPU.
    if kernels::num_gpus().unwrap() < 2 {
        return;
    }
    let _device = DEVICE.lock().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut other = Process::spawn(directory.path());
    let ([old, new], answers) = on_two(0, directory.path());
    assert!(other.0.wait().unwrap().success(), "the other rank came to its end");
    assert_eq!((old.len(), new.len()), (16, 16));
    assert_eq!(tokens_of(&answers, OLD), old);
    assert_eq!(ends(&answers, NEW), [(4, FinishReason::OutOfMemory)]);
    assert_eq!(ends(&answers, FOLLOWER), [(5, FinishReason::MissingPrefix)]);
    // Ranks of a group take no more, whether there is more or not.
    assert_eq!(ends(&answers, AGAIN), [(7, FinishReason::OutOfMemory)]);
}

/// The other process of the test above; nothing to do without orders.
#[test]
fn another_rank() {
    let directory = std::env::args().find_map(|arg| Some(arg.strip_prefix("rank_1_at=")?.to_owned()));
    if let Some(directory) = directory {
        let (_, answers) = on_two(1, Path::new(&directory));
        assert!(answers.iter().all(|answer| answer.outputs.is_empty()));
    }
}

struct Process(Child);

impl Process {
    fn spawn(directory: &Path) -> Self {
        // The harness takes further arguments for filters, of which any may match.
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["another_rank", &format!("rank_1_at={}", directory.display())])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
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
