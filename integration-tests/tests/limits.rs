//! What happens at the edges: readers that leave, more requests than there is room for, requests that cannot be served.

use std::time::Duration;

use futures::future::join_all;
use integration_tests::{Model, Stack};
use serde_json::{Value, json};

const KV_BLOCKS_USED: &str = "lamplighter_kv_blocks_used";

/// Half a second of work and more.
fn long(stream: bool) -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": true, "stream": stream})
}

#[tokio::test]
async fn a_reader_that_leaves_frees_its_blocks() {
    let stack = Stack::start(Model::Demo, &[]).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = stack.stream("/v1/completions", &long(true)).await;
        stream.next().await.expect("a first event");
        streams.push(stream);
    }
    assert!(stack.metric(KV_BLOCKS_USED).await > 0.0);
    let generated = stack.metric("lamplighter_generated_tokens").await;
    assert!(generated < 4.0 * 1500.0, "the answers were complete before anybody left");
    drop(streams);
    stack.until_metric(KV_BLOCKS_USED, |blocks| blocks == 0.0).await;
    stack.until_metric("lamplighter_running_sequences", |running| running == 0.0).await;
    let computed = stack.metric("lamplighter_generated_tokens").await;
    assert!(computed < 4.0 * 1500.0, "the answers were computed to their ends");
}

#[tokio::test]
async fn a_reader_that_leaves_before_the_first_token_frees_its_place() {
    let stack = Stack::start(Model::Demo, &[]).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/completions", stack.url());
    for _ in 0..8 {
        let post = client.post(&url).json(&long(false)).timeout(Duration::from_millis(30)).send();
        assert!(post.await.is_err(), "1500 tokens in 30 ms");
    }
    stack.until_metric(KV_BLOCKS_USED, |blocks| blocks == 0.0).await;
    stack.until_metric("tgi_queue_size", |waiting| waiting == 0.0).await;
}

#[tokio::test]
async fn more_requests_than_there_is_room_for_are_told_to_come_back() {
    let stack = Stack::start(Model::Demo, &["--max-concurrent-requests", "2"]).await;
    let mut running = Vec::new();
    for _ in 0..2 {
        let mut stream = stack.stream("/v1/completions", &long(true)).await;
        stream.next().await.expect("a first event");
        running.push(stream);
    }
    let request = long(false);
    let refused = join_all((0..6).map(|_| stack.post("/v1/completions", &request))).await;
    for answer in &refused {
        assert_eq!(answer.status, 429, "{}", answer.body);
        assert!(answer.headers["retry-after"].to_str().expect("text").parse::<u64>().is_ok());
        assert!(answer.body["error"]["message"].is_string(), "{}", answer.body);
    }
    let tgi = stack.post("/generate", &json!({"inputs": "Once"})).await;
    assert_eq!((tgi.status, &tgi.body["error_type"]), (429, &json!("overloaded")));
    // Those inside are unharmed, and make room when they are done.
    for stream in running {
        let events = stream.all().await;
        assert_eq!(events.last().expect("events")["choices"][0]["finish_reason"], "length");
    }
    stack.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 2})).await.ok();
}

#[tokio::test]
async fn a_choice_of_n_is_a_request_of_its_own_at_the_door() {
    let stack = Stack::start(Model::Golden("llama"), &["--max-concurrent-requests", "2"]).await;
    let answer = stack.post("/v1/completions", &json!({"prompt": "Once", "n": 3, "max_tokens": 2})).await;
    assert!((400..500).contains(&answer.status), "{}: {}", answer.status, answer.body);
    stack.post("/v1/completions", &json!({"prompt": "Once", "n": 2, "max_tokens": 2})).await.ok();
}

#[tokio::test]
async fn a_slow_reader_stalls_only_itself() {
    let stack = Stack::start(Model::Demo, &[]).await;
    let mut slow = Vec::new();
    for _ in 0..3 {
        let mut stream = stack.stream("/v1/completions", &long(true)).await;
        stream.next().await.expect("a first event");
        slow.push(stream);
    }
    // Nobody reads `slow` while these are served.
    for _ in 0..5 {
        stack.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 20})).await.ok();
    }
    for stream in slow {
        let events = stream.all().await;
        assert_eq!(events.last().expect("events")["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_with_field_limit_and_remedy() {
    let stack = Stack::start(Model::Golden("llama"), &["--max-total-tokens", "64"]).await;
    let check = async |path: &str, body: Value, status: u16, words: &[&str]| {
        let answer = stack.post(path, &body).await;
        let error = &answer.body["error"];
        let message = error["message"].as_str().or(error.as_str()).unwrap_or_default();
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        for word in words {
            assert!(message.contains(word), "{body}: {message:?} lacks {word:?}");
        }
    };
    let chat = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        body
    };
    let completions = "/v1/completions";
    check(completions, json!({"prompt": "a ".repeat(200)}), 400, &["63 tokens", "201", "--max-input-tokens"])
        .await;
    check(completions, json!({"prompt": "a", "max_tokens": 1000}), 400, &["max_tokens", "1000"]).await;
    check(completions, json!({"prompt": "a", "temperature": -1.0}), 400, &["temperature"]).await;
    check(completions, json!({"prompt": "a", "top_p": 2.0}), 400, &["top_p"]).await;
    check(completions, json!({"prompt": "a", "n": 1_000_000_000}), 400, &["n"]).await;
    check(completions, json!({"prompt": "a", "stop": vec!["x"; 100]}), 400, &["stop"]).await;
    check(completions, json!({"prompt": "a", "logit_bias": {"999999": 1.0}}), 400, &["logit_bias"]).await;
    check(completions, json!({}), 400, &["prompt"]).await;
    check("/v1/chat/completions", json!({"messages": []}), 400, &["messages"]).await;
    check(
        "/v1/chat/completions",
        chat(json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}})),
        400,
        &["response_format", "`not` at /"],
    )
    .await;
    check("/generate", json!({"inputs": "a", "parameters": {"max_new_tokens": 0}}), 422, &["max_new_tokens"])
        .await;
    check(
        "/generate",
        json!({"inputs": "a", "parameters": {"top_k": 0, "do_sample": true}}),
        422,
        &["top_k"],
    )
    .await;
    check("/v1/nowhere", json!({}), 404, &["/v1/nowhere"]).await;
    assert_eq!(stack.get("/v1/completions").await.status, 405);
    // After all this it still serves.
    stack.post(completions, &json!({"prompt": "a", "max_tokens": 2})).await.ok();
}
