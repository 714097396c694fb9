//! A decode step allocates nothing where it computes, and its answer only the messages that it is made of. A test
//! executable of its own, because it counts what all threads of the process allocate.
#![expect(unsafe_code, reason = "an allocator that counts is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::collective::Local;
use kernels::{Context, Level};
use proto::v1::{
    NewSequence, SamplingParameters, ScheduledSequence, StepRequest, StoppingParameters, WarmupRequest,
};
use shard::decoder::{ForwardInput, KvCache, SamplingInput, StepLimits};
use shard::engine::{Engine, Origin};
use shard::models::{self, LoadOptions, Model};
use shard::{Dtype, LoraAdapter, Quantization};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `run` allocates, on all threads.
fn allocations(run: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    run();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

const NUM_SEQUENCES: usize = 3;
const MAX_LEN: usize = 128;
const BLOCK_SIZE: usize = 32;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/goldens").join(name)
}

fn model(context: &Context) -> Model {
    let adapter = |name: &str| LoraAdapter { name: name.to_owned(), path: golden("llama_lora").join(name) };
    let adapters = ["tone", "form"].map(adapter);
    models::load_with_adapters(context, &golden("llama"), LoadOptions::default(), &adapters)
        .expect("a golden")
}

/// One test, because tests of one executable run side by side.
#[test]
fn a_decode_step_allocates_nothing_but_its_answer() {
    for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
        let context = Context::cpu_with_level(2, level);
        // One without an adapter, and one of each.
        forward_and_logits_allocate_nothing(&context, model(&context), &[u32::MAX, 0, 1]);
        // Heads of whole tiles, and all types of weights.
        let as_stored = LoadOptions::default;
        let bf16 = LoadOptions { dtype: Some(Dtype::Bfloat16), ..as_stored() };
        for options in [
            as_stored(),
            LoadOptions { dtype: Some(Dtype::Float16), ..as_stored() },
            bf16,
            LoadOptions { quantize: Some(Quantization::Eetq), ..bf16 },
        ] {
            let model = models::load(&context, &golden("qwen3"), options).expect("a golden");
            forward_and_logits_allocate_nothing(&context, model, &[u32::MAX; NUM_SEQUENCES]);
        }
    }
    a_step_allocates_its_messages_only();
}

/// `adapters`: of each sequence.
fn forward_and_logits_allocate_nothing(context: &Context, mut model: Model, adapters: &[u32]) {
    let limits = StepLimits {
        max_step_tokens: 64,
        max_step_sequences: NUM_SEQUENCES,
        max_logit_rows: 8,
        max_position: MAX_LEN,
        block_size: BLOCK_SIZE,
    };
    model.decoder.prepare(context, limits).expect("memory");
    let blocks = MAX_LEN / BLOCK_SIZE;
    let num_blocks = NUM_SEQUENCES * blocks;
    let mut cache =
        KvCache::new(context, &model.decoder, num_blocks, BLOCK_SIZE, model.kv_dtype).expect("memory");
    let mut staging = ForwardInput::staging(context, &limits).expect("memory");
    let inputs: Vec<ForwardInput> =
        (0..MAX_LEN).map(|position| decode_rows(position, blocks, adapters)).collect();
    let mut compute = |input: &ForwardInput| {
        let step = input.send(context, &mut staging).expect("it fits the limits");
        model.decoder.forward(context, &mut Local, &step, &mut cache).expect("shapes fit");
        model.decoder.logits(context, &mut Local, step.logit_rows).expect("shapes fit");
    };
    // Each thread has its working memory after a step with the longest sequence.
    let (last, others) = inputs.split_last().expect("positions");
    compute(last);
    compute(last);
    // On a busy machine a thread may have had no task until now: what a step allocates, it allocates each time.
    let mut pass = || allocations(|| others.iter().for_each(&mut compute));
    assert_eq!((0..5).map(|_| pass()).min(), Some(0), "{}, {:?}", context.device_name(), model.dtype);
}

/// A row of each sequence at one position.
fn decode_rows(position: usize, blocks: usize, adapters: &[u32]) -> ForwardInput {
    let block_of = |sequence: usize, index: usize| (sequence * blocks + index) as u32;
    let slot = |sequence: usize| {
        block_of(sequence, position / BLOCK_SIZE) * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
    };
    ForwardInput {
        token_ids: (0..NUM_SEQUENCES).map(|sequence| 3 + (position + sequence) as u32).collect(),
        positions: vec![position as u32; NUM_SEQUENCES],
        slot_mapping: (0..NUM_SEQUENCES).map(slot).collect(),
        query_starts: (0..=NUM_SEQUENCES as u32).collect(),
        kv_lens: vec![position as u32 + 1; NUM_SEQUENCES],
        block_tables: (0..NUM_SEQUENCES * blocks).map(|block| block as u32).collect(),
        table_rows: vec![],
        max_blocks: blocks,
        logit_rows: (0..NUM_SEQUENCES as u32).collect(),
        adapters: adapters.to_vec(),
        sampling: SamplingInput::default(),
    }
}

fn a_step_allocates_its_messages_only() {
    let context = Context::cpu(2);
    let model = model(&context);
    let mut engine = Engine::new(model, context, Box::new(Local));
    let warmup = WarmupRequest {
        max_step_tokens: 64,
        max_step_sequences: 8,
        max_total_tokens: MAX_LEN as u32,
        kv_cache_tokens: Some((NUM_SEQUENCES * MAX_LEN) as u64),
    };
    engine.warmup(&warmup).expect("it fits the memory");
    let greedy = SamplingParameters {
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..SamplingParameters::default()
    };
    let random = SamplingParameters { temperature: 0.9, seed: 5, ..greedy.clone() };
    let truncated = SamplingParameters { top_k: 40, top_p: 0.9, min_p: 0.01, seed: 6, ..random.clone() };
    let admit = [greedy, random, truncated].into_iter().zip(1..).map(|(sampling, sequence_id)| NewSequence {
        sequence_id,
        // Lengths of lists double, the next time at 32.
        token_ids: vec![3 + sequence_id as u32; 16],
        prompt_tokens: 16,
        adapter_index: (sequence_id < 3).then_some(sequence_id as u32 - 1),
        sampling: Some(sampling),
        stopping: Some(StoppingParameters { max_new_tokens: 100, ignore_eos: true }),
        ..NewSequence::default()
    });
    let mut first = StepRequest { admit: admit.collect(), ..schedule(1, 16) };
    for (scheduled, block) in first.schedule.iter_mut().zip(0..) {
        scheduled.append_block_ids = vec![block];
    }
    engine.step(first, Origin::Unary).expect("a valid step");
    for step_id in 2..4 {
        engine.step(schedule(step_id, 1), Origin::Unary).expect("a valid step");
    }
    for step_id in 4..12 {
        let request = schedule(step_id, 1);
        let count = allocations(|| drop(engine.step(request, Origin::Unary).expect("a valid step")));
        // The list of outputs, and in each a list of tokens.
        assert_eq!(count, 1 + NUM_SEQUENCES, "step {step_id}");
    }
}

fn schedule(step_id: u64, num_tokens: u32) -> StepRequest {
    let scheduled = |sequence_id| ScheduledSequence { sequence_id, num_tokens, append_block_ids: vec![] };
    StepRequest {
        step_id,
        schedule: (1..=NUM_SEQUENCES as u64).map(scheduled).collect(),
        ..StepRequest::default()
    }
}
