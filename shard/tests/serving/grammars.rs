//! Sequences that are held to grammars, on one engine and on several ranks.

use grammar::{Engine as Grammars, Source};
use kernels::Context;
use kernels::collective::Local;
use proto::v1::{FinishReason, NewSequence, SamplingParameters};
use shard::engine::{Engine, Origin};
use shard::models::{self, LoadOptions};

use crate::checkpoints::llama;
use crate::driver::{Outcome, Plan, WARMUP, WHOLE_PROMPTS, constrained, generate, greedy, prepared, schema};

pub(crate) fn engine() -> Engine {
    let context = Context::cpu(2);
    let model = models::load(&context, &llama(), LoadOptions::default()).unwrap();
    let engine = Engine::new(model, context, Box::new(Local));
    let mut engine = engine.with_grammars(&llama().join("tokenizer.json")).unwrap();
    engine.warmup(&WARMUP).unwrap();
    engine
}

fn run(engine: &mut Engine, requests: &[NewSequence], plan: Plan) -> Vec<Outcome> {
    generate(requests, plan, |request| engine.step(request, Origin::Unary).unwrap())
}

/// The text, without what ends it.
fn text(grammars: &Grammars, outcome: &Outcome) -> String {
    let bytes = outcome.token_ids().into_iter().filter(|id| *id != 2);
    let bytes = bytes.flat_map(|id| grammars.token_bytes(id).to_vec()).collect();
    String::from_utf8(bytes).expect("an ended text is UTF-8")
}

fn grammars() -> Grammars {
    let json = std::fs::read_to_string(llama().join("tokenizer.json")).unwrap();
    Grammars::new(&json, 384, &[2]).unwrap()
}

fn assert_fits(outcome: &Outcome) {
    let text = text(&grammars(), outcome);
    let value: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields: Vec<&String> = value.as_object().expect("an object").keys().collect();
    assert_eq!(fields, ["name", "age", "tags"], "{text}");
    assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
    assert!(value["age"].as_u64().unwrap() <= 99, "{text}");
    let tags = value["tags"].as_array().unwrap();
    assert!(tags.len() <= 2 && tags.iter().all(|tag| *tag == "x" || *tag == "y"), "{text}");
}

#[test]
fn texts_fit_their_grammar_and_end_with_it() {
    let mut engine = engine();
    let id = prepared(engine.compiler().unwrap(), schema());
    let requests: Vec<_> = (1..=8).map(|sequence| constrained(sequence, id, 140)).collect();
    let outcomes = run(&mut engine, &requests, WHOLE_PROMPTS);
    let ended: Vec<_> =
        outcomes.iter().filter(|outcome| outcome.finish_reason() == FinishReason::Eos).collect();
    assert!(ended.len() >= 4, "{} of 8 texts ended", ended.len());
    for outcome in ended {
        assert_fits(outcome);
        // An object that is closed needs no end token.
        assert!(!outcome.token_ids().contains(&2));
    }
}

#[test]
fn tokens_do_not_depend_on_company_chunks_or_steps_ahead() {
    let mut engine = engine();
    let id = prepared(engine.compiler().unwrap(), schema());
    let digits = prepared(engine.compiler().unwrap(), Source::regex("[0-9]{1,20}"));
    let mut requests: Vec<_> = (1..=4).map(|sequence| constrained(sequence, id, 60)).collect();
    requests.push(constrained(5, digits, 60));
    requests.push(constrained(6, 0, 40));
    let alone: Vec<_> = requests
        .iter()
        .map(|request| run(&mut engine, std::slice::from_ref(request), WHOLE_PROMPTS).remove(0))
        .collect();
    let together = run(&mut engine, &requests, WHOLE_PROMPTS);
    assert_eq!(together, alone);
    assert_eq!(run(&mut engine, &requests, Plan { chunk: 3, blind: false }), alone);
    let ahead = run(&mut engine, &requests, Plan { chunk: 64, blind: true });
    for (outcome, expected) in ahead.iter().zip(&alone) {
        assert_eq!((&outcome.tokens, outcome.finish_reason), (&expected.tokens, expected.finish_reason));
    }
    let number = text(&grammars(), &alone[4]);
    assert!(!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()), "{number:?}");
}

#[test]
fn a_preempted_sequence_goes_on_in_its_grammar() {
    let mut engine = engine();
    let id = prepared(engine.compiler().unwrap(), schema());
    let whole = run(&mut engine, &[constrained(3, id, 60)], WHOLE_PROMPTS).remove(0);
    for len in [1, 5, whole.tokens.len() - 1] {
        let mut resumed = constrained(3, id, 60);
        resumed.token_ids.extend(&whole.token_ids()[..len]);
        let rest = run(&mut engine, &[resumed], WHOLE_PROMPTS).remove(0);
        assert_eq!(rest.tokens, whole.tokens[len..], "resumed behind {len} tokens");
        assert_eq!(rest.finish_reason, whole.finish_reason);
    }
}

#[test]
fn an_end_token_ends_a_text_that_could_go_on_also_where_ends_are_ignored() {
    let mut engine = engine();
    let id = prepared(engine.compiler().unwrap(), Source::regex("(?s).*"));
    // Its bias makes the end token certain as soon as the grammar allows it.
    let mut request = constrained(2, id, 30);
    let logit_bias = vec![proto::v1::LogitBias { token_id: 2, bias: 100.0 }];
    request.sampling = Some(SamplingParameters { logit_bias, ..greedy() });
    assert!(request.stopping.unwrap().ignore_eos);
    let outcome = run(&mut engine, &[request.clone()], WHOLE_PROMPTS).remove(0);
    assert_eq!((outcome.token_ids(), outcome.finish_reason()), (vec![2], FinishReason::Eos));
    // Nothing is chosen that the grammar forbids, whatever its bias.
    request.grammar_id = prepared(engine.compiler().unwrap(), Source::regex("[a-z]{5}"));
    let outcome = run(&mut engine, &[request], WHOLE_PROMPTS).remove(0);
    assert_eq!(text(&grammars(), &outcome).len(), 5);
    assert_eq!(outcome.finish_reason(), FinishReason::Eos);
}

#[test]
fn log_probabilities_are_those_of_the_raw_distribution() {
    let mut engine = engine();
    let id = prepared(engine.compiler().unwrap(), Source::regex("[a-z]{8}"));
    let constrained = NewSequence { top_n_tokens: 3, ..constrained(1, id, 1) };
    let free = NewSequence { grammar_id: 0, ..constrained.clone() };
    let first = |request: NewSequence| run(&mut engine, &[request], WHOLE_PROMPTS).remove(0).tokens.remove(0);
    let [constrained, free] = [constrained, free].map(first);
    assert_eq!(constrained.top, free.top);
    assert!(constrained.logprob < 0.0);
}

#[test]
fn a_grammar_that_is_not_known_fails_its_sequence_and_no_other() {
    let mut engine = engine();
    let id = prepared(engine.compiler().unwrap(), Source::regex("[a-z]{8}"));
    let requests = [constrained(1, id, 20), constrained(2, 999_999, 20), constrained(3, 0, 20)];
    let outcomes = run(&mut engine, &requests, WHOLE_PROMPTS);
    assert_eq!(outcomes[1].finish_reason(), FinishReason::Grammar);
    assert!(outcomes[1].tokens.is_empty());
    assert_eq!(outcomes[0].finish_reason(), FinishReason::Eos);
    assert_eq!(outcomes[0], run(&mut engine, &requests[..1], WHOLE_PROMPTS).remove(0));
    assert!(!outcomes[2].tokens.is_empty());
}

#[test]
fn an_answer_says_what_masks_cost_and_why_a_grammar_failed() {
    let mut engine = engine();
    let id = prepared(engine.compiler().unwrap(), Source::regex("[a-z]{8}"));
    let requests = [constrained(1, id, 4), constrained(2, 999_999, 4), constrained(3, 0, 4)];
    let mut masks = Vec::new();
    let mut failures = Vec::new();
    generate(&requests, WHOLE_PROMPTS, |request| {
        let response = engine.step(request, Origin::Unary).unwrap();
        if response.num_masks > 0 {
            assert!(response.mask_us < 1_000_000 && response.mask_wait_us < 1_000_000);
        }
        masks.push(response.num_masks);
        let failed = response.outputs.iter().filter(|output| !output.failure.is_empty());
        failures.extend(failed.map(|output| (output.sequence_id, output.failure.clone())));
        response
    });
    assert_eq!(masks, [1, 1, 1, 1, 0]);
    assert_eq!(failures.len(), 1);
    assert!(failures[0].0 == 2 && failures[0].1.contains("forgotten"), "{failures:?}");
}
