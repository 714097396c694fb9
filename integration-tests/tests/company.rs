//! What a request gets does not depend on what else the server does, nor on how it is set up: alone or in a batch, in
//! one piece or in chunks, with a cache or without, preempted or not, on one shard or two.

use futures::future::join_all;
use integration_tests::{EventStream, Model, Stack};
use serde_json::{Value, json};

const PREEMPTIONS: &str = "lamplighter_preemptions";
const HIT_TOKENS: &str = "lamplighter_prefix_cache_hit_tokens";

/// Where a request goes, and its body.
type Request = (&'static str, Value);

/// Sixteen requests that differ in everything: length of prompt and answer, greedy or sampled, with all warpers and
/// penalties, one choice or several, with log-probabilities of the prompt or without. Most begin alike, so that they
/// share cached blocks.
fn unequal_requests() -> Vec<Request> {
    (0..16)
        .map(|index: usize| {
            let prompt =
                "The lamplighter walks from lamp to lamp. ".repeat(1 + index * index % 13) + &index.to_string();
            let mut sampling = json!({});
            if !index.is_multiple_of(3) {
                sampling = json!({"temperature": 0.7 + 0.1 * index as f64, "seed": index * 1000});
            }
            if index % 3 == 2 {
                merge(&mut sampling, json!({
                    "top_k": 50, "top_p": 0.95, "typical_p": 0.98, "repetition_penalty": 1.2, "frequency_penalty": 0.4,
                }));
            }
            // Those with short prompts are long, so that they grow out of a small cache.
            let max_tokens = if [0, 1, 12, 13].contains(&index) { 150 } else { 5 + 7 * (index % 6) };
            if index % 4 == 3 {
                // Its answer has token ids, and its prompt's log-probabilities.
                let mut parameters = json!({
                    "max_new_tokens": max_tokens, "details": true, "decoder_input_details": true, "top_n_tokens": 2,
                });
                merge(&mut parameters, sampling);
                return ("/generate", json!({"inputs": prompt, "parameters": parameters}));
            }
            let mut request = json!({
                "model": "any", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "logprobs": 2,
                "temperature": 0.0, "n": 1 + usize::from(index % 5 == 2) * 2,
            });
            if index % 3 == 2 {
                let more = json!({"min_p": 0.01, "presence_penalty": 0.3, "logit_bias": {"40": 1.5, "41": -100.0}});
                merge(&mut request, more);
            }
            merge(&mut request, sampling);
            ("/v1/completions", request)
        })
        .collect()
}

fn merge(into: &mut Value, more: Value) {
    let Value::Object(more) = more else { unreachable!("an object") };
    into.as_object_mut().expect("an object").extend(more);
}

/// The part of an answer that must not change: text, tokens, log-probabilities to the last bit.
fn essence(answer: &Value) -> Value {
    match answer.get("choices") {
        Some(choices) => choices.clone(),
        None => json!([answer["generated_text"], answer["details"]]),
    }
}

async fn alone(stack: &Stack, requests: &[Request]) -> Vec<Value> {
    let mut answers = Vec::new();
    for (path, request) in requests {
        answers.push(stack.post(path, request).await.ok());
    }
    answers
}

async fn together(stack: &Stack, requests: &[Request]) -> Vec<Value> {
    let answers = requests.iter().map(|(path, request)| stack.post(path, request));
    join_all(answers).await.into_iter().map(integration_tests::Answer::ok).collect()
}

/// How the requests of a case are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    /// One after the other.
    Alone,
    /// All at once.
    Together,
    /// All at once, after they have been served before.
    TogetherAgain,
}

/// What shows that the case is what its name says: a metric that has risen by more than so much.
type Evidence = Option<(&'static str, f64)>;

/// Settings that must change nothing.
const CASES: [(&str, Order, &[&str], Evidence); 11] = [
    ("in a batch of sixteen", Order::Together, &["--prefix-caching", "false"], None),
    ("with a cold cache", Order::Alone, &[], Some((HIT_TOKENS, 0.0))),
    ("with a cold cache, in a batch", Order::Together, &[], None),
    ("with a warm cache", Order::TogetherAgain, &[], Some((HIT_TOKENS, 1000.0))),
    ("chunks of one token", Order::Together, &["--max-batch-prefill-tokens", "1"], None),
    ("chunks of up to 7 tokens", Order::Together, &["--max-batch-prefill-tokens", "7"], None),
    ("chunks of up to 16 tokens", Order::TogetherAgain, &["--max-batch-prefill-tokens", "16"], None),
    ("one step in flight", Order::Together, &["--steps-in-flight", "1"], None),
    ("two steps in flight", Order::TogetherAgain, &["--steps-in-flight", "2"], None),
    ("preempted", Order::Together, &["--max-batch-total-tokens", "224"], Some((PREEMPTIONS, 0.0))),
    (
        "preempted, cached, in chunks, two steps in flight",
        Order::TogetherAgain,
        &["--max-batch-total-tokens", "224", "--max-batch-prefill-tokens", "13", "--steps-in-flight", "2"],
        Some((PREEMPTIONS, 0.0)),
    ),
];

#[tokio::test]
async fn a_request_gets_the_same_whatever_the_company_and_the_settings() {
    for model in [Model::Golden("llama"), Model::Demo] {
        let requests = unequal_requests();
        let reference = Stack::start(model, &["--prefix-caching", "false", "--steps-in-flight", "1"]).await;
        let steps = "tgi_batch_inference_count";
        let expected: Vec<Value> = alone(&reference, &requests).await.iter().map(essence).collect();
        let steps_alone = reference.metric(steps).await;
        for (name, order, flags, evidence) in CASES {
            let stack = Stack::start(model, flags).await;
            if order == Order::TogetherAgain {
                together(&stack, &requests).await;
            }
            let got = match order {
                Order::Alone => alone(&stack, &requests).await,
                Order::Together | Order::TogetherAgain => together(&stack, &requests).await,
            };
            for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
                assert_eq!(&essence(got), expected, "{model:?}, {name}: request {index}");
            }
            if let Some((metric, least)) = evidence {
                let value = stack.metric(metric).await;
                assert!(value > least, "{model:?}, {name}: {metric} is {value}");
            }
            if name == "in a batch of sixteen" {
                let steps_together = stack.metric(steps).await;
                assert!(
                    steps_together < steps_alone / 2.0,
                    "{steps_together} steps, {steps_alone} alone: no batch"
                );
            }
            stack.until_metric("lamplighter_kv_blocks_used", |blocks| blocks == 0.0).await;
        }
    }
}

#[tokio::test]
async fn tokens_from_the_cache_are_told_and_change_nothing() {
    let stack = Stack::start(Model::Golden("llama"), &[]).await;
    let request = json!({
        "prompt": "The lamplighter walks from lamp to lamp. ".repeat(5), "max_tokens": 20, "ignore_eos": true, "logprobs": 2,
        "temperature": 1.0, "seed": 3,
    });
    let cold = stack.post("/v1/completions", &request).await.ok();
    let warm = stack.post("/v1/completions", &request).await.ok();
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached(&cold).unwrap_or(0), 0, "{}", cold["usage"]);
    assert!(cached(&warm).expect("a number") > 0, "{}", warm["usage"]);
    assert_eq!(essence(&warm), essence(&cold));
    // Another tenant's prompts are not found.
    let mut salted = request.clone();
    salted["cache_salt"] = json!("another tenant");
    let other = stack.post("/v1/completions", &salted).await.ok();
    assert_eq!(cached(&other).unwrap_or(0), 0, "{}", other["usage"]);
    assert_eq!(essence(&other), essence(&cold));
}

/// Three grow in a cache of 62 blocks, of 32 tokens each. When it is full, the youngest gives its blocks. It gets them back
/// when the first one ends, and gives them once more to the second, which grows on.
#[tokio::test]
async fn a_request_that_is_preempted_twice_gets_what_it_gets_undisturbed() {
    let penalties = json!({
        "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.3,
        "logit_bias": {"40": 1.5, "41": -100.0},
    });
    let warpers = json!({
        "temperature": 0.9, "seed": 5, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.98,
    });
    let with = |parts: &[&Value]| {
        let mut sampling = json!({"temperature": 0.0});
        for part in parts {
            merge(&mut sampling, (*part).clone());
        }
        sampling
    };
    let samplings = [
        ("greedy", with(&[])),
        ("greedy, every penalty", with(&[&penalties])),
        ("seeded, every warper and penalty", with(&[&warpers, &penalties])),
    ];
    let body = |prompt: &str, max_tokens: u32, sampling: &Value| {
        let mut body = json!({
            "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "logprobs": 1, "stream": true,
        });
        merge(&mut body, sampling.clone());
        body
    };
    let roomy = Stack::start(Model::Demo, &["--prefix-caching", "false", "--steps-in-flight", "1"]).await;
    let flags = ["--max-batch-total-tokens", "1984", "--max-total-tokens", "1984"];
    for (name, sampling) in samplings {
        let youngest = body("The fox", 1300, &sampling);
        let expected = choices(roomy.stream("/v1/completions", &youngest).await).await;
        let narrow = Stack::start(Model::Demo, &flags).await;
        let first = narrow.stream("/v1/completions", &body("Once", 900, &sampling)).await;
        let second = narrow.stream("/v1/completions", &body("There", 1700, &sampling)).await;
        let youngest = narrow.stream("/v1/completions", &youngest).await;
        let (_, _, got) = futures::join!(choices(first), choices(second), choices(youngest));
        let preemptions = narrow.metric(PREEMPTIONS).await;
        assert!(preemptions >= 2.0, "{name}: {preemptions} preemptions");
        assert!(got == expected, "{name}: the tokens differ");
        narrow.until_metric("lamplighter_kv_blocks_used", |blocks| blocks == 0.0).await;
    }
}

/// The choices of all events.
async fn choices(stream: EventStream) -> Vec<Value> {
    stream.all().await.iter().map(|event| event["choices"].clone()).collect()
}

#[tokio::test]
async fn two_shards_give_the_same_text_as_one() {
    for model in [Model::Golden("llama"), Model::Demo] {
        let one = Stack::start(model, &[]).await;
        let two = Stack::start(model, &["--num-shard", "2"]).await;
        // Greedy ones only: the ranks' partial sums are added in another order than one rank adds them, and a
        // sampled token can lie on the edge.
        let requests: Vec<Request> = unequal_requests().into_iter().step_by(3).collect();
        let (expected, got) = (alone(&one, &requests).await, together(&two, &requests).await);
        assert_eq!(texts(&got), texts(&expected));
    }
}

#[tokio::test]
async fn a_seed_gives_the_same_on_every_server_and_another_seed_something_else() {
    let request = |seed: u64| {
        let body = json!({
            "prompt": "Once", "max_tokens": 24, "temperature": 1.0, "seed": seed, "ignore_eos": true, "logprobs": 1,
        });
        ("/v1/completions", body)
    };
    let first = Stack::start(Model::Golden("qwen3"), &[]).await;
    let expected = alone(&first, &[request(7), request(8)]).await;
    assert_ne!(texts(&expected)[0], texts(&expected)[1]);
    let second = Stack::start(Model::Golden("qwen3"), &[]).await;
    let got = alone(&second, &[request(7), request(8)]).await;
    assert_eq!(texts(&got), texts(&expected));
    assert_eq!(got.iter().map(essence).collect::<Vec<_>>(), expected.iter().map(essence).collect::<Vec<_>>());
}

/// The texts of all choices.
fn texts(answers: &[Value]) -> Vec<Vec<Value>> {
    let text = |choice: &Value| choice["text"].clone();
    let texts = answers.iter().map(|answer| match answer["choices"].as_array() {
        Some(choices) => choices.iter().map(text).collect(),
        None => vec![answer["generated_text"].clone()],
    });
    texts.collect()
}
