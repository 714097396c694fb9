//! What a request gets does not depend on what else the server does, nor on how it is set up: alone or in a batch, in
//! one piece or in chunks, on one shard or two, preempted or not.

use futures::future::join_all;
use integration_tests::{Model, Stack};
use serde_json::{Value, json};

/// Sixteen requests that differ in everything: length of prompt and answer, greedy or sampled, with all warpers and
/// penalties.
fn unequal_requests() -> Vec<Value> {
    (0..16)
        .map(|index: usize| {
            let mut request = json!({
                "model": "any",
                "prompt": "The lamplighter walks from lamp to lamp. ".repeat(1 + index * index % 13) + &index.to_string(),
                "max_tokens": 5 + 7 * (index % 6),
                "ignore_eos": true,
                "logprobs": 2,
                "temperature": 0.0,
            });
            if !index.is_multiple_of(3) {
                request["temperature"] = json!(0.7 + 0.1 * index as f64);
                request["seed"] = json!(index * 1000);
            }
            if index % 3 == 2 {
                let all = json!({
                    "top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.98, "repetition_penalty": 1.2,
                    "frequency_penalty": 0.4, "presence_penalty": 0.3, "logit_bias": {"40": 1.5, "41": -100.0},
                });
                request.as_object_mut().expect("an object").extend(all.as_object().expect("an object").clone());
            }
            request
        })
        .collect()
}

/// The part of an answer that must not change: text, tokens, log-probabilities to the last bit, usage.
fn essence(answer: &Value) -> (Value, Value) {
    (answer["choices"].clone(), answer["usage"].clone())
}

async fn alone(stack: &Stack, requests: &[Value]) -> Vec<(Value, Value)> {
    let mut answers = Vec::new();
    for request in requests {
        answers.push(essence(&stack.post("/v1/completions", request).await.ok()));
    }
    answers
}

async fn together(stack: &Stack, requests: &[Value]) -> Vec<(Value, Value)> {
    let answers = requests.iter().map(|request| stack.post("/v1/completions", request));
    join_all(answers).await.into_iter().map(|answer| essence(&answer.ok())).collect()
}

fn texts(answers: &[(Value, Value)]) -> Vec<&Value> {
    answers.iter().map(|(choices, _)| &choices[0]["text"]).collect()
}

/// Far more than one step of one request: whether the requests were in one batch can be seen in the steps.
async fn steps(stack: &Stack) -> f64 {
    stack.metric("tgi_batch_inference_count").await
}

async fn alone_equals_together(model: Model) {
    let stack = Stack::start(model, &[]).await;
    let requests = unequal_requests();
    let before = steps(&stack).await;
    let expected = alone(&stack, &requests).await;
    let steps_alone = steps(&stack).await - before;
    let got = together(&stack, &requests).await;
    let steps_together = steps(&stack).await - before - steps_alone;
    assert!(
        steps_together < steps_alone / 2.0,
        "{steps_together} steps together, {steps_alone} alone: no batch"
    );
    for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
        assert_eq!(got, expected, "request {index}");
    }
}

#[tokio::test]
async fn a_request_alone_gets_what_it_gets_among_sixteen() {
    alone_equals_together(Model::Golden("llama")).await;
}

#[tokio::test]
async fn a_request_to_the_demo_model_alone_gets_what_it_gets_among_sixteen() {
    alone_equals_together(Model::Demo).await;
}

#[tokio::test]
async fn a_prompt_in_chunks_gives_the_same_as_in_one_piece() {
    let whole = Stack::start(Model::Golden("llama"), &[]).await;
    let chunked = Stack::start(Model::Golden("llama"), &["--max-batch-prefill-tokens", "16"]).await;
    let requests = unequal_requests();
    assert_eq!(together(&chunked, &requests).await, alone(&whole, &requests).await);
}

#[tokio::test]
async fn two_shards_give_the_same_text_as_one() {
    for model in [Model::Golden("llama"), Model::Demo] {
        let one = Stack::start(model, &[]).await;
        let two = Stack::start(model, &["--num-shard", "2"]).await;
        // Greedy ones only: the ranks' partial sums are added in another order than one rank adds them, and a
        // sampled token can lie on the edge.
        let requests: Vec<Value> = unequal_requests().into_iter().step_by(3).collect();
        let (expected, got) = (alone(&one, &requests).await, together(&two, &requests).await);
        assert_eq!(texts(&got), texts(&expected));
    }
}

#[tokio::test]
async fn preempted_requests_get_what_they_get_undisturbed() {
    // Short prompts and long answers: all are let in, and then grow out of the cache.
    let requests: Vec<Value> = (0..8)
        .map(|index| {
            let temperature = f64::from(index % 2);
            json!({
                "prompt": format!("Lamp {index}"), "max_tokens": 150 + 10 * index, "ignore_eos": true, "logprobs": 1,
                "temperature": temperature, "seed": index, "frequency_penalty": 0.2 * temperature,
            })
        })
        .collect();
    let roomy = Stack::start(Model::Golden("llama"), &[]).await;
    let expected = alone(&roomy, &requests).await;
    let flags = ["--max-batch-total-tokens", "320", "--max-total-tokens", "256"];
    let narrow = Stack::start(Model::Golden("llama"), &flags).await;
    let got = together(&narrow, &requests).await;
    assert!(narrow.metric("lamplighter_preemptions").await > 0.0, "nothing was preempted");
    assert_eq!(got, expected);
    narrow.until_metric("lamplighter_kv_blocks_used", |blocks| blocks == 0.0).await;
}

#[tokio::test]
async fn a_seed_gives_the_same_on_every_server_and_another_seed_something_else() {
    let request = |seed: u64| json!({"prompt": "Once", "max_tokens": 24, "temperature": 1.0, "seed": seed, "ignore_eos": true, "logprobs": 1});
    let first = Stack::start(Model::Golden("qwen3"), &[]).await;
    let expected = alone(&first, &[request(7), request(8)]).await;
    assert_ne!(texts(&expected)[0], texts(&expected)[1]);
    let second = Stack::start(Model::Golden("qwen3"), &[]).await;
    assert_eq!(alone(&second, &[request(7), request(8)]).await, expected);
}
