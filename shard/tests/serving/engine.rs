//! One engine, without a service.

use kernels::Context;
use kernels::collective::Local;
use proto::v1::{
    DataType, FinishReason, NewSequence, SamplingParameters, ScheduledSequence, StepRequest, StepResponse,
    StoppingParameters, WarmupRequest,
};
use shard::Error;
use shard::engine::{Engine, Origin};
use shard::models::{self, LoadOptions};

use crate::checkpoints::{golden, golden_prompts, llama, llama_with_broken_token};
use crate::driver::{
    BLOCK_SIZE, Outcome, Plan, WARMUP, WHOLE_PROMPTS, generate, prompt, request, unequal_requests,
};

/// As in the tests of the decoder: f32 against f32 in another order of summation.
const LOGPROB_TOLERANCE: f32 = 2e-4;

fn cold(dir: &std::path::Path) -> Engine {
    let context = Context::cpu(2);
    let model = models::load(&context, dir, LoadOptions::default()).unwrap();
    Engine::new(model, context, Box::new(Local))
}

fn warm(dir: &std::path::Path) -> Engine {
    let mut engine = cold(dir);
    engine.warmup(&WARMUP).unwrap();
    engine
}

fn unary(engine: &mut Engine) -> impl FnMut(StepRequest) -> StepResponse {
    |request| engine.step(request, Origin::Unary).unwrap()
}

fn run(engine: &mut Engine, requests: &[NewSequence], plan: Plan) -> Vec<Outcome> {
    generate(requests, plan, unary(engine))
}

fn run_alone(engine: &mut Engine, request: &NewSequence) -> Outcome {
    run(engine, std::slice::from_ref(request), WHOLE_PROMPTS).remove(0)
}

/// A step that computes all of one sequence that the shard does not know yet, in blocks from `first_block` on.
fn first_step(new: NewSequence, first_block: u32) -> StepRequest {
    let num_blocks = new.token_ids.len().div_ceil(BLOCK_SIZE) as u32;
    let append_block_ids = (first_block..first_block + num_blocks).collect();
    let scheduled = ScheduledSequence {
        sequence_id: new.sequence_id,
        num_tokens: new.token_ids.len() as u32,
        append_block_ids,
    };
    StepRequest { step_id: 1, admit: vec![new], schedule: vec![scheduled], ..StepRequest::default() }
}

fn decode_step(step_id: u64, sequence_id: u64) -> StepRequest {
    let scheduled = ScheduledSequence { sequence_id, num_tokens: 1, append_block_ids: vec![] };
    StepRequest { step_id, schedule: vec![scheduled], ..StepRequest::default() }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for name in ["llama", "mistral", "qwen2", "qwen3"] {
        let mut engine = warm(&golden(name));
        for golden in golden_prompts(name) {
            let mut request = request(1, &golden.token_ids);
            let max_new_tokens = golden.greedy.len() as u32;
            request.stopping = Some(StoppingParameters { max_new_tokens, ignore_eos: true });
            let outcome = run_alone(&mut engine, &request);
            assert_eq!(outcome.token_ids(), golden.greedy, "{name}");
            assert_eq!(outcome.finish_reason(), FinishReason::Length);
        }
    }
}

#[test]
fn prompt_logprobs_are_those_of_transformers_however_the_prompt_is_cut() {
    let golden = golden_prompts("llama").remove(1);
    let mut request = request(1, &golden.token_ids);
    request.prompt_logprobs = true;
    request.top_n_tokens = 2;
    // Two rows of logits at a time where a step has two sequences at most.
    let few_rows = WarmupRequest { max_step_sequences: 2, ..WARMUP };
    let mut engine = cold(&llama());
    let mut outcomes = Vec::new();
    for (warmup, chunk) in [(WARMUP, 64), (few_rows, 64), (WARMUP, 5), (WARMUP, 1)] {
        engine.warmup(&warmup).unwrap();
        outcomes.extend(run(&mut engine, std::slice::from_ref(&request), Plan { chunk, blind: false }));
    }
    for outcome in &outcomes {
        assert_eq!(outcome, &outcomes[0]);
    }
    let ids: Vec<u32> = outcomes[0].prompt_tokens.iter().map(|token| token.token_id).collect();
    assert_eq!(ids, golden.token_ids[1..]);
    for (token, expected) in outcomes[0].prompt_tokens.iter().zip(&golden.logprobs[1..]) {
        assert!((token.logprob - expected.unwrap()).abs() < LOGPROB_TOLERANCE);
        assert_eq!(token.top.len(), 2);
        assert!(token.top[0].logprob >= token.top[1].logprob && token.top[0].logprob >= token.logprob);
    }
}

#[test]
fn a_request_gets_the_same_tokens_alone_and_in_company() {
    let mut engine = warm(&llama());
    let requests = unequal_requests();
    let together = run(&mut engine, &requests, WHOLE_PROMPTS);
    for (request, outcome) in requests.iter().zip(&together) {
        // To the last bit of each log-probability.
        assert_eq!(&run_alone(&mut engine, request), outcome);
    }
    assert_eq!(together[0].tokens[0].top.len(), 3);
    assert_eq!(together[0].tokens[0].top[0].token_id, together[0].tokens[0].token_id);
    assert_eq!(together[5].prompt_tokens.len(), 89);
}

#[test]
fn a_prompt_in_chunks_gives_the_same_tokens_as_in_one_piece() {
    let mut engine = warm(&llama());
    let requests = unequal_requests();
    let expected = run(&mut engine, &requests, WHOLE_PROMPTS);
    for chunk in [1, 7, 32] {
        assert_eq!(run(&mut engine, &requests, Plan { chunk, blind: false }), expected, "chunks of {chunk}");
    }
}

#[test]
fn steps_queued_ahead_give_the_same_tokens_and_skip_what_has_ended() {
    let mut engine = warm(&llama());
    let mut requests = unequal_requests();
    // The bias makes its first token one that ends it.
    let sampling = requests[0].sampling.as_mut().unwrap();
    sampling.logit_bias = vec![proto::v1::LogitBias { token_id: 2, bias: 100.0 }];
    requests[0].stopping = Some(StoppingParameters { max_new_tokens: 10, ignore_eos: false });

    let expected = run(&mut engine, &requests, WHOLE_PROMPTS);
    let ahead = run(&mut engine, &requests, Plan { blind: true, ..WHOLE_PROMPTS });
    for (one, other) in ahead.iter().zip(&expected) {
        assert_eq!(one.tokens, other.tokens);
        assert_eq!(one.finish_reason, other.finish_reason);
    }
    assert_eq!(ahead[0].finish_reason(), FinishReason::Eos);
    assert_eq!(ahead[0].token_ids(), [2]);
    assert_eq!(ahead[0].num_skipped, 9);
    assert!(ahead[1..].iter().all(|outcome| outcome.num_skipped == 0));
}

#[test]
fn a_preempted_sequence_goes_on_with_the_same_tokens() {
    let mut engine = warm(&llama());
    for request in unequal_requests() {
        let expected = run_alone(&mut engine, &request);
        for num_generated in 1..expected.tokens.len() {
            let mut resumed = NewSequence { prompt_logprobs: false, ..request.clone() };
            resumed.token_ids.extend(&expected.token_ids()[..num_generated]);
            let outcome = run_alone(&mut engine, &resumed);
            assert_eq!(outcome.tokens, expected.tokens[num_generated..]);
            assert_eq!(outcome.finish_reason, expected.finish_reason);
        }
    }
}

#[test]
fn blocks_that_another_sequence_has_computed_are_used_as_they_are() {
    let mut engine = warm(&llama());
    let first = request(1, &prompt(0, 90));
    let expected = run_alone(&mut engine, &first);
    engine
        .step(
            first_step(NewSequence { token_ids: prompt(0, 64), prompt_tokens: 64, ..first.clone() }, 4),
            Origin::Unary,
        )
        .unwrap();
    let shared = NewSequence { sequence_id: 2, computed_tokens: 64, block_ids: vec![4, 5], ..first };
    assert_eq!(run_alone(&mut engine, &shared).tokens, expected.tokens);
}

#[test]
fn two_sequences_go_on_over_the_same_blocks() {
    let mut engine = warm(&llama());
    let first = request(1, &prompt(0, 64));
    let longer = request(2, &prompt(0, 90));
    let expected = [&first, &longer].map(|request| run_alone(&mut engine, request).tokens);
    let response = engine.step(first_step(first, 4), Origin::Unary).unwrap();
    assert_eq!(response.outputs[0].tokens, expected[0][..1]);

    // The first one writes behind the blocks that it shares, in the same step in which the second one reads them.
    let scheduled = |sequence_id, num_tokens, block| ScheduledSequence {
        sequence_id,
        num_tokens,
        append_block_ids: vec![block],
    };
    let step = StepRequest {
        admit: vec![NewSequence { computed_tokens: 64, block_ids: vec![4, 5], ..longer }],
        schedule: vec![scheduled(1, 1, 6), scheduled(2, 26, 7)],
        ..StepRequest::default()
    };
    let response = engine.step(step, Origin::Unary).unwrap();
    assert_eq!(response.outputs[0].tokens, expected[0][1..2]);
    assert_eq!(response.outputs[1].tokens, expected[1][..1]);
    // The blocks outlive the one that computed them.
    let step = StepRequest { release_sequence_ids: vec![1], ..decode_step(3, 2) };
    let response = engine.step(step, Origin::Unary).unwrap();
    assert_eq!(response.outputs[0].tokens, expected[1][1..2]);
}

#[test]
fn a_sequence_with_broken_logits_fails_alone() {
    const BROKEN: u32 = 300;
    let dir = llama_with_broken_token(BROKEN as usize);
    let mut engine = warm(dir.path());
    let mut broken = request(2, &[5, BROKEN, 6]);
    broken.prompt_logprobs = true;
    let good = request(1, &[5, 6, 7]);
    let alone = run_alone(&mut engine, &good);
    let outcomes = run(&mut engine, &[good, broken], WHOLE_PROMPTS);
    assert_eq!(outcomes[0], alone);
    assert_eq!(outcomes[1].finish_reason(), FinishReason::InvalidLogits);
    assert_eq!(outcomes[1].token_ids(), [0u32; 0]);
}

#[test]
fn a_released_sequence_is_forgotten_and_its_blocks_can_be_given_away_in_the_same_step() {
    let mut engine = warm(&llama());
    let expected = run_alone(&mut engine, &request(2, &prompt(1, 40))).tokens;
    engine.step(first_step(request(1, &prompt(0, 40)), 0), Origin::Unary).unwrap();
    let step = StepRequest { release_sequence_ids: vec![1, 99], ..first_step(request(2, &prompt(1, 40)), 0) };
    let response = engine.step(step, Origin::Unary).unwrap();
    assert_eq!(response.outputs[0].tokens, expected[..1]);
    let message = engine.step(decode_step(3, 1), Origin::Unary).unwrap_err().to_string();
    assert!(message.starts_with("schedule[0].sequence_id 1 is not known"), "{message}");
}

#[test]
fn a_refused_step_changes_nothing() {
    let mut engine = warm(&llama());
    let expected = run_alone(&mut engine, &request(1, &prompt(0, 40))).tokens;
    let first = engine.step(first_step(request(1, &prompt(0, 40)), 0), Origin::Unary).unwrap();
    assert_eq!(first.outputs[0].tokens, expected[..1]);

    // All of it is refused for its last part: the release, the admission, the first entry.
    let mut bad = decode_step(2, 1);
    bad.release_sequence_ids = vec![1];
    bad.admit = vec![request(2, &[3])];
    bad.schedule.push(ScheduledSequence { sequence_id: 3, num_tokens: 1, append_block_ids: vec![] });
    assert!(matches!(engine.step(bad, Origin::Unary), Err(Error::InvalidArgument { .. })));

    let second = engine.step(decode_step(3, 1), Origin::Unary).unwrap();
    assert_eq!(second.outputs[0].tokens, expected[1..2]);
    let admitted = engine.step(first_step(request(2, &[3]), 4), Origin::Unary);
    assert_eq!(admitted.unwrap().outputs[0].sequence_id, 2);
}

#[test]
fn nothing_follows_a_refused_step_in_its_stream_and_the_next_stream_starts_anew() {
    let mut engine = warm(&llama());
    engine.step(first_step(request(1, &[5]), 0), Origin::Run).unwrap();
    let again = engine.step(decode_step(1, 1), Origin::Run).unwrap_err().to_string();
    assert!(again.starts_with("step_id must be above 1"), "{again}");
    assert!(matches!(engine.step(decode_step(2, 1), Origin::Run), Err(Error::RunRefused)));
    engine.end_run();
    let forgotten = engine.step(decode_step(1, 1), Origin::Unary).unwrap_err();
    assert!(matches!(forgotten, Error::InvalidArgument { .. }));
    engine.step(first_step(request(1, &[5]), 0), Origin::Run).unwrap();
}

#[test]
fn a_step_without_sequences_is_answered() {
    let mut engine = warm(&llama());
    let response = engine.step(StepRequest { step_id: 77, ..StepRequest::default() }, Origin::Unary).unwrap();
    assert_eq!(response.step_id, 77);
    assert!(response.outputs.is_empty());
}

#[test]
fn warmup_comes_first_and_a_second_one_starts_anew() {
    let mut engine = cold(&llama());
    assert!(matches!(engine.step(decode_step(1, 1), Origin::Unary), Err(Error::NotWarmedUp)));
    let response = engine.warmup(&WARMUP).unwrap();
    assert_eq!(response.num_blocks, 40);
    assert_eq!(response.kv_cache_bytes, 40 * BLOCK_SIZE as u64 * engine.info().kv_bytes_per_token);
    assert!(response.workspace_bytes > 0);

    engine.step(first_step(request(1, &[5]), 0), Origin::Unary).unwrap();
    engine.warmup(&WarmupRequest { kv_cache_tokens: None, ..WARMUP }).unwrap();
    let message = engine.step(decode_step(2, 1), Origin::Unary).unwrap_err().to_string();
    assert!(message.contains("is not known"), "{message}");
}

#[test]
fn info_says_what_is_served() {
    let info = cold(&llama()).info();
    assert_eq!((info.rank, info.world_size), (0, 1));
    assert_eq!(info.data_type(), DataType::F32);
    assert_eq!(info.block_size_tokens as usize, BLOCK_SIZE);
    assert_eq!((info.vocab_size, info.max_position_embeddings, info.num_layers), (384, 1024, 2));
    assert_eq!(info.eos_token_ids, [2]);
    assert_eq!(info.sliding_window_tokens, None);
    // Keys and values, two layers, two heads of 16 floats.
    assert_eq!(info.kv_bytes_per_token, 2 * 2 * 2 * 16 * 4);
    assert_eq!(info.weight_bytes, info.num_parameters * 4);
    assert!(cold(&golden("mistral")).info().sliding_window_tokens.is_some());
    assert_eq!(cold(&golden("llama_bf16")).info().data_type(), DataType::Bf16);
}

#[test]
fn sampling_with_another_seed_gives_other_tokens() {
    let mut engine = warm(&llama());
    let with_seed = |seed| {
        let mut request = request(1, &prompt(0, 8));
        let sampling = request.sampling.take().unwrap();
        request.sampling = Some(SamplingParameters { temperature: 2.0, seed, ..sampling });
        request
    };
    let first = run_alone(&mut engine, &with_seed(1));
    assert_eq!(run_alone(&mut engine, &with_seed(1)), first);
    assert_ne!(run_alone(&mut engine, &with_seed(2)), first);
}
