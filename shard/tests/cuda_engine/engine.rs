//! The engine on a GPU (or on the emulated driver: `make test-cuda`): its tokens are those of the CPU, with and without graphs,
//! one step at a time and running ahead.

use kernels::Context;
use kernels::collective::Local;
use proto::v1::{
    Device, FinishReason, NewSequence, StepRequest, StepResponse, StoppingParameters, WarmupRequest,
};
use shard::engine::{Engine, EngineOptions, Origin};
use shard::models::{self, LoadOptions};
use shard::{Error, KvCacheDtype, LoraAdapter};

use crate::checkpoints::{llama, llama_with_broken_token};
use crate::driver::{
    Outcome, Plan, WARMUP, WHOLE_PROMPTS, generate, prepared, prompt, request, schema, unequal_requests,
};

/// Of log-probabilities: f32 against f32 in another order of summation, on both sides.
const TOLERANCE: f32 = 5e-4;

const BLIND: Plan = Plan { blind: true, ..WHOLE_PROMPTS };

fn cold(dir: &std::path::Path, context: Context, graph_sizes: &[usize], options: LoadOptions) -> Engine {
    let model = models::load(&context, dir, options).unwrap();
    let options = EngineOptions { graph_sizes: graph_sizes.to_vec(), ..EngineOptions::default() };
    Engine::new(model, context, Box::new(Local)).with_options(options)
}

fn on_gpu(graph_sizes: &[usize]) -> Engine {
    let mut engine = cold(&llama(), Context::cuda(0, 1).unwrap(), graph_sizes, LoadOptions::default());
    engine.warmup(&WARMUP).unwrap();
    engine
}

fn on_cpu() -> Engine {
    let mut engine = cold(&llama(), Context::cpu(2), &[], LoadOptions::default());
    engine.warmup(&WARMUP).unwrap();
    engine
}

fn run(engine: &mut Engine, requests: &[NewSequence], plan: Plan) -> Vec<Outcome> {
    generate(requests, plan, |request| engine.step(request, Origin::Unary).unwrap())
}

fn token_ids(outcomes: &[Outcome]) -> Vec<Vec<u32>> {
    outcomes.iter().map(Outcome::token_ids).collect()
}

#[test]
fn tokens_and_log_probabilities_are_those_of_the_cpu_and_the_same_with_and_without_graphs() {
    let requests = unequal_requests();
    let expected = run(&mut on_cpu(), &requests, WHOLE_PROMPTS);
    let recorded = run(&mut on_gpu(&[1, 2, 4, 8]), &requests, WHOLE_PROMPTS);
    assert_eq!(token_ids(&recorded), token_ids(&expected));
    for (found, expected) in recorded.iter().zip(&expected) {
        assert_eq!(found.finish_reason, expected.finish_reason);
        assert_eq!(found.prompt_tokens.len(), expected.prompt_tokens.len());
        let tokens = |outcome: &Outcome| [outcome.tokens.clone(), outcome.prompt_tokens.clone()].concat();
        for (found, expected) in tokens(found).iter().zip(tokens(expected)) {
            assert!((found.logprob - expected.logprob).abs() < TOLERANCE, "{found:?} {expected:?}");
            let ids =
                |top: &[proto::v1::TokenLogprob]| top.iter().map(|top| top.token_id).collect::<Vec<_>>();
            assert_eq!(ids(&found.top), ids(&expected.top));
        }
    }
    // Padding and other kernels for it do not change a bit.
    assert_eq!(token_ids(&run(&mut on_gpu(&[]), &requests, WHOLE_PROMPTS)), token_ids(&recorded));
    // Larger than any batch, and smaller than some.
    assert_eq!(token_ids(&run(&mut on_gpu(&[3, 64]), &requests, WHOLE_PROMPTS)), token_ids(&recorded));
}

#[test]
fn steps_take_no_memory_and_copy_nothing_to_the_device_but_by_staging() {
    let requests = unequal_requests();
    for graph_sizes in [&[][..], &[1, 2, 4, 8]] {
        let expected = run(&mut on_gpu(graph_sizes), &requests, WHOLE_PROMPTS);
        let mut engine = on_gpu(graph_sizes);
        engine.freeze_steps();
        // Who was left out would have no tokens.
        assert_eq!(token_ids(&run(&mut engine, &requests, WHOLE_PROMPTS)), token_ids(&expected));
        engine.forget_scratch().unwrap();
        let broken = run(&mut engine, &requests, WHOLE_PROMPTS);
        assert!(broken.iter().any(|outcome| outcome.finish_reason() == FinishReason::OutOfMemory));
    }
}

/// All requests of a run that does not look at answers, and the answers of one step at a time.
fn recorded_steps(engine: &mut Engine, requests: &[NewSequence]) -> (Vec<StepRequest>, Vec<StepResponse>) {
    let (mut steps, mut answers) = (Vec::new(), Vec::new());
    generate(requests, BLIND, |request| {
        let answer = engine.step(request.clone(), Origin::Run).unwrap();
        steps.push(request);
        answers.push(answer.clone());
        answer
    });
    (steps, answers)
}

/// What depends neither on the clock nor, in its last bits, on how many rows a step has; and the log-probabilities.
fn content(answers: Vec<StepResponse>) -> (Vec<StepResponse>, Vec<f32>) {
    let mut logprobs = Vec::new();
    let answers = answers.into_iter().map(|mut answer| {
        answer.skipped_sequence_ids.sort_unstable();
        for output in &mut answer.outputs {
            for token in output.tokens.iter_mut().chain(&mut output.prompt_tokens) {
                logprobs.push(std::mem::take(&mut token.logprob));
                logprobs.extend(token.top.iter_mut().map(|top| std::mem::take(&mut top.logprob)));
            }
        }
        StepResponse { step_us: 0, forward_us: 0, sample_us: 0, mask_us: 0, mask_wait_us: 0, ..answer }
    });
    (answers.collect(), logprobs)
}

#[test]
fn running_ahead_gives_the_same_answers_as_one_step_at_a_time() {
    let mut requests = unequal_requests();
    // The bias makes its first token one that ends it, which nobody knows while the next step is launched.
    let sampling = requests[0].sampling.as_mut().unwrap();
    sampling.logit_bias = vec![proto::v1::LogitBias { token_id: 2, bias: 100.0 }];
    requests[0].stopping = Some(StoppingParameters { max_new_tokens: 10, ignore_eos: false });
    for graph_sizes in [&[][..], &[1, 2, 4, 8]] {
        let mut engine = on_gpu(graph_sizes);
        let (steps, expected) = recorded_steps(&mut engine, &requests);
        engine.end_run();
        let mut answers = Vec::new();
        for step in steps {
            if !engine.has_room() {
                answers.push(engine.collect().unwrap());
            }
            engine.launch(step, Origin::Run).unwrap();
        }
        assert_eq!(engine.num_in_flight(), 2);
        while engine.num_in_flight() > 0 {
            answers.push(engine.collect().unwrap());
        }
        let ((answers, logprobs), (expected, expected_logprobs)) = (content(answers), content(expected));
        assert_eq!(answers, expected);
        for (found, expected) in logprobs.iter().zip(&expected_logprobs) {
            assert!((found - expected).abs() < TOLERANCE, "{found} is not {expected}");
        }
    }
}

#[test]
fn a_preempted_sequence_goes_on_with_the_same_tokens() {
    let mut engine = on_gpu(&[1]);
    // One with penalties, whose counts are made anew, and one by chance.
    for request in [&unequal_requests()[3], &unequal_requests()[4]] {
        let request = &NewSequence {
            stopping: Some(StoppingParameters { max_new_tokens: 8, ignore_eos: true }),
            ..request.clone()
        };
        let expected = run(&mut engine, std::slice::from_ref(request), WHOLE_PROMPTS).remove(0);
        let mut resumed = request.clone();
        resumed.token_ids.extend(&expected.token_ids()[..3]);
        let outcome = run(&mut engine, std::slice::from_ref(&resumed), WHOLE_PROMPTS).remove(0);
        assert_eq!(outcome.token_ids(), expected.token_ids()[3..]);
    }
}

#[test]
fn a_sequence_with_broken_logits_fails_alone() {
    const BROKEN: u32 = 300;
    let dir = llama_with_broken_token(BROKEN as usize);
    let mut engine = cold(dir.path(), Context::cuda(0, 1).unwrap(), &[2], LoadOptions::default());
    engine.warmup(&WARMUP).unwrap();
    let (good, broken) = (request(1, &[5, 6, 7]), request(2, &[5, BROKEN, 6]));
    let alone = run(&mut engine, std::slice::from_ref(&good), WHOLE_PROMPTS).remove(0);
    let outcomes = run(&mut engine, &[good, broken], WHOLE_PROMPTS);
    assert_eq!(outcomes[0].token_ids(), alone.token_ids());
    assert_eq!(outcomes[1].finish_reason(), FinishReason::InvalidLogits);
    assert_eq!(outcomes[1].token_ids(), [0u32; 0]);
}

#[test]
fn keys_and_values_in_8_bits_halve_the_cache_and_are_near_those_in_16() {
    let greedy = request(1, &prompt(0, 40));
    let logprobs = |kv_cache_dtype| {
        let options = LoadOptions { kv_cache_dtype: Some(kv_cache_dtype), ..LoadOptions::default() };
        let mut engine = cold(&llama(), Context::cuda(0, 1).unwrap(), &[], options);
        let bytes = engine.warmup(&WARMUP).unwrap().kv_cache_bytes;
        let mut asked = greedy.clone();
        asked.prompt_logprobs = true;
        let outcome = run(&mut engine, &[asked], WHOLE_PROMPTS).remove(0);
        (bytes, outcome.prompt_tokens.iter().map(|token| token.logprob).collect::<Vec<_>>())
    };
    let (wide_bytes, wide) = logprobs(KvCacheDtype::Bfloat16);
    let (narrow_bytes, narrow) = logprobs(KvCacheDtype::Fp8E4m3fn);
    assert_eq!(narrow_bytes * 2, wide_bytes);
    let distance = wide.iter().zip(&narrow).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Three bits of mantissa; and it is not the same cache.
    assert!(distance > 1e-4 && distance < 1.0, "{distance}");
}

#[test]
fn a_gpu_says_what_it_is_and_what_it_cannot_do() {
    let mut engine = on_gpu(&[]);
    assert_eq!(engine.info().device(), Device::Cuda);
    let first = |new: NewSequence| StepRequest { step_id: 1, admit: vec![new], ..StepRequest::default() };
    let mut refused = |new: NewSequence| engine.step(first(new), Origin::Unary).unwrap_err().to_string();
    let message = refused(NewSequence { top_n_tokens: 21, ..request(1, &[5]) });
    assert!(message.starts_with("admit[0].top_n_tokens must be within 0 ..= 20"), "{message}");

    let too_much = WarmupRequest { max_step_tokens: u32::MAX / 4, ..WARMUP };
    let mut engine = cold(&llama(), Context::cuda(0, 1).unwrap(), &[], LoadOptions::default());
    let error = engine.warmup(&too_much).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    assert!(!error.is_fatal());
    engine.warmup(&WARMUP).unwrap();
}

/// As [`on_gpu`], with grammars; and the ids of a schema's and a regex's.
fn with_grammars(context: Context, graph_sizes: &[usize]) -> (Engine, u64, u64) {
    let engine = cold(&llama(), context, graph_sizes, LoadOptions::default());
    let mut engine = engine.with_grammars(&llama().join("tokenizer.json")).unwrap();
    engine.warmup(&WARMUP).unwrap();
    let compiler = engine.compiler().unwrap();
    let schema = prepared(compiler, schema());
    let regex = prepared(compiler, grammar::Source::regex("[a-z]{2,9}"));
    (engine, schema, regex)
}

/// Held to grammars and not, in one batch; the second ends in the middle, and nobody knows while the next step is launched.
fn mixed_requests(schema: u64, regex: u64) -> Vec<NewSequence> {
    let mut requests = unequal_requests();
    requests.truncate(4);
    for (request, grammar_id) in requests.iter_mut().zip([schema, regex, 0, schema]) {
        request.grammar_id = grammar_id;
        let ignore_eos = request.stopping.unwrap().ignore_eos;
        request.stopping = Some(StoppingParameters { max_new_tokens: 24, ignore_eos });
    }
    requests
}

#[test]
fn texts_that_are_held_to_grammars_are_those_of_the_cpu_with_and_without_graphs() {
    let (mut cpu, schema, regex) = with_grammars(Context::cpu(2), &[]);
    let expected = run(&mut cpu, &mixed_requests(schema, regex), WHOLE_PROMPTS);
    assert_eq!(expected[1].finish_reason(), FinishReason::Eos);
    for graph_sizes in [&[][..], &[1, 2, 4, 8]] {
        let (mut engine, schema, regex) = with_grammars(Context::cuda(0, 1).unwrap(), graph_sizes);
        let found = run(&mut engine, &mixed_requests(schema, regex), WHOLE_PROMPTS);
        assert_eq!(token_ids(&found), token_ids(&expected), "graphs for {graph_sizes:?}");
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.finish_reason, expected.finish_reason);
            for (found, expected) in found.tokens.iter().zip(&expected.tokens) {
                assert!((found.logprob - expected.logprob).abs() < TOLERANCE, "{found:?} {expected:?}");
            }
        }
        // A chunk with log-probabilities of its prompt has more rows of logits than are computed at once.
        let asked = NewSequence { prompt_logprobs: true, ..mixed_requests(schema, regex).remove(3) };
        let whole = run(&mut engine, std::slice::from_ref(&asked), WHOLE_PROMPTS).remove(0);
        assert_eq!(whole.token_ids(), expected[3].token_ids());
        assert_eq!(whole.prompt_tokens.len(), asked.token_ids.len() - 1);
    }
}

#[test]
fn running_ahead_with_grammars_gives_the_same_answers_as_one_step_at_a_time() {
    for graph_sizes in [&[][..], &[1, 2, 4, 8]] {
        let (mut engine, schema, regex) = with_grammars(Context::cuda(0, 1).unwrap(), graph_sizes);
        let (steps, expected) = recorded_steps(&mut engine, &mixed_requests(schema, regex));
        for proceeds in [false, true] {
            engine.end_run();
            let mut answers = Vec::new();
            for step in steps.clone() {
                if !engine.has_room() {
                    answers.push(engine.collect().unwrap());
                    if proceeds {
                        engine.proceed().unwrap();
                    }
                }
                engine.launch(step, Origin::Run).unwrap();
            }
            while engine.num_in_flight() > 0 {
                answers.push(engine.collect().unwrap());
            }
            let ((answers, _), (expected, _)) = (content(answers), content(expected.clone()));
            for (found, expected) in answers.into_iter().zip(expected) {
                // A sequence that has ended is masked no more, or masked for nobody.
                let num_masks = found.num_masks;
                let expected = StepResponse { num_masks, ..expected };
                assert_eq!(found, expected, "graphs for {graph_sizes:?}");
            }
        }
    }
}

#[test]
fn a_grammar_that_is_not_known_fails_its_sequence_and_no_other_on_a_gpu() {
    let (mut engine, schema, regex) = with_grammars(Context::cuda(0, 1).unwrap(), &[1, 2, 4]);
    let mut requests = mixed_requests(schema, regex);
    let expected = run(&mut engine, &requests, WHOLE_PROMPTS);
    requests[0].grammar_id = 999_999;
    let found = run(&mut engine, &requests, WHOLE_PROMPTS);
    assert_eq!(found[0].finish_reason(), FinishReason::Grammar);
    assert_eq!(found[0].token_ids(), [0u32; 0]);
    assert_eq!(token_ids(&found)[1..], token_ids(&expected)[1..]);
}

#[test]
fn plain_kernels_give_the_tokens_of_the_cpu_with_and_without_graphs() {
    let mut requests = unequal_requests();
    for (request, adapter_index) in requests.iter_mut().zip([Some(0), None, Some(1)].into_iter().cycle()) {
        request.adapter_index = adapter_index;
    }
    let expected = run(&mut with_adapters(Context::cpu(2), &[]), &requests, WHOLE_PROMPTS);
    for graph_sizes in [&[][..], &[1, 2, 4, 8]] {
        let context = Context::cuda_with_plain_kernels(0, 1).unwrap();
        let found = run(&mut with_adapters(context, graph_sizes), &requests, WHOLE_PROMPTS);
        assert_eq!(token_ids(&found), token_ids(&expected), "graphs for {graph_sizes:?}");
        for (found, expected) in found.iter().zip(&expected) {
            for (found, expected) in found.tokens.iter().zip(&expected.tokens) {
                assert!((found.logprob - expected.logprob).abs() < TOLERANCE, "{found:?} {expected:?}");
            }
        }
    }
}

/// Bytes that each step after the prompt sends to the device, of one sequence behind a prompt of `prompt_len` tokens.
fn bytes_of_decode_steps(engine: &mut Engine, prompt_len: usize) -> Vec<u64> {
    let mut bytes = Vec::new();
    let greedy = NewSequence {
        stopping: Some(StoppingParameters { max_new_tokens: 40, ignore_eos: true }),
        ..request(1, &prompt(0, prompt_len))
    };
    generate(&[greedy], WHOLE_PROMPTS, |request| {
        let is_decode = request.schedule.iter().any(|scheduled| scheduled.num_tokens == 1);
        let before = engine.copied_bytes();
        let answer = engine.step(request, Origin::Unary).unwrap();
        bytes.extend(is_decode.then(|| engine.copied_bytes() - before));
        answer
    });
    bytes
}

#[test]
fn a_decode_step_sends_no_more_behind_a_long_context_and_of_tables_only_new_blocks() {
    for graph_sizes in [&[][..], &[1, 2, 4, 8]] {
        let mut engine = on_gpu(graph_sizes);
        let (short, long) = (bytes_of_decode_steps(&mut engine, 34), bytes_of_decode_steps(&mut engine, 98));
        // Both get a block at the same place of theirs.
        assert_eq!(short, long, "graphs for {graph_sizes:?}");
        let [least, most] = [short.iter().min(), short.iter().max()].map(|bytes| *bytes.unwrap());
        let num_new_blocks = short.iter().filter(|&&bytes| bytes > least).count();
        assert_eq!((num_new_blocks, most - least <= 32), (1, true), "{short:?}");
        // Ids, positions, slots, lengths and how to choose.
        assert!(least < 384, "{short:?}");
    }
}

#[test]
fn steps_without_adapters_launch_nothing_for_them() {
    let mut with = with_adapters(Context::cuda(0, 1).unwrap(), &[1, 4]).recorded_launches();
    let mut without = on_gpu(&[1, 4]).recorded_launches();
    with.sort_unstable();
    without.sort_unstable();
    let rows = |launches: &[(usize, bool, usize)]| {
        launches.iter().map(|&(rows, adapters, _)| (rows, adapters)).collect::<Vec<_>>()
    };
    assert_eq!(rows(&without), [(1, false), (4, false)]);
    assert_eq!(rows(&with), [(1, false), (1, true), (4, false), (4, true)]);
    for (of_rows, plain) in with.chunks(2).zip(&without) {
        let [(_, _, none), (_, _, any)] = of_rows else { unreachable!("chunks of 2") };
        assert_eq!(*none, plain.2);
        // A shrinking and an expanding kernel for each changed layer, and gate and up are combined apart.
        assert!(*any > none + 2, "{any} kernels with adapters, {none} without");
    }
}

/// With the two adapters of the goldens.
fn with_adapters(context: Context, graph_sizes: &[usize]) -> Engine {
    let adapters = ["tone", "form"].map(|name| LoraAdapter {
        name: name.to_owned(),
        path: llama().with_file_name("llama_lora").join(name),
    });
    let model = models::load_with_adapters(&context, &llama(), LoadOptions::default(), &adapters).unwrap();
    let options = EngineOptions { graph_sizes: graph_sizes.to_vec(), ..EngineOptions::default() };
    let mut engine = Engine::new(model, context, Box::new(Local)).with_options(options);
    engine.warmup(&WARMUP).unwrap();
    engine
}

#[test]
fn recorded_steps_serve_sequences_of_any_adapters_with_the_tokens_of_the_cpu() {
    let mut requests = unequal_requests();
    let without = token_ids(&run(&mut with_adapters(Context::cpu(2), &[]), &requests, WHOLE_PROMPTS));
    for (request, adapter_index) in requests.iter_mut().zip([Some(0), None, Some(1)].into_iter().cycle()) {
        request.adapter_index = adapter_index;
    }
    let expected = token_ids(&run(&mut with_adapters(Context::cpu(2), &[]), &requests, WHOLE_PROMPTS));
    assert_ne!(expected, without, "adapters change something");
    for graph_sizes in [&[][..], &[1, 2, 4, 8]] {
        let mut gpu = with_adapters(Context::cuda(0, 1).unwrap(), graph_sizes);
        assert_eq!(token_ids(&run(&mut gpu, &requests, WHOLE_PROMPTS)), expected);
        // The same graphs without any adapter.
        for request in &mut requests {
            std::mem::take(&mut request.adapter_index);
        }
        assert_eq!(token_ids(&run(&mut gpu, &requests, WHOLE_PROMPTS)), without);
        for (request, adapter_index) in requests.iter_mut().zip([Some(0), None, Some(1)].into_iter().cycle())
        {
            request.adapter_index = adapter_index;
        }
    }
}
