//! Wherever a request is when its client leaves: its blocks, its place and its sequence are free at once.

use integration_tests::{Model, Stack};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const BLOCKS: &str = "lamplighter_kv_blocks_used";
const RUNNING: &str = "lamplighter_running_sequences";
const WAITING: &str = "tgi_queue_size";
const PREEMPTIONS: &str = "lamplighter_preemptions";
const GENERATED: &str = "lamplighter_generated_tokens";

/// A request whose answer takes half a second and more.
fn long(prompt: &str) -> Value {
    json!({"prompt": prompt, "max_tokens": 1500, "ignore_eos": true, "stream": true})
}

/// A prompt of some 1900 tokens.
fn long_prompt() -> Value {
    let ids: Vec<u32> = (0..1900).map(|position| 300 + position * 7 % 1500).collect();
    json!({"prompt": ids, "max_tokens": 100, "ignore_eos": true})
}

/// A client that waits for its answer until it is told to leave.
struct Client(JoinHandle<()>);

impl Client {
    fn ask(stack: &Stack, body: &Value) -> Self {
        let request = reqwest::Client::new().post(format!("{}/v1/completions", stack.url())).json(body);
        Self(tokio::spawn(async move {
            // Whether it succeeds is not asked here: it is there to be left.
            if let Ok(response) = request.send().await {
                let _ = response.bytes().await;
            }
        }))
    }

    async fn leave(self) {
        self.0.abort();
        let ended = self.0.await;
        assert!(
            ended.is_err_and(|error| error.is_cancelled()),
            "the answer was complete before its client left"
        );
    }
}

/// All is given back, and the server serves as before.
async fn check_empty(stack: &Stack) {
    for name in [BLOCKS, RUNNING, WAITING] {
        stack.until_metric(name, |value| value == 0.0).await;
    }
    stack.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 2})).await.ok();
}

#[tokio::test]
async fn a_request_that_waits_is_forgotten() {
    let stack = Stack::start(Model::Demo, &["--max-batch-size", "1"]).await;
    let running = Client::ask(&stack, &long("Once"));
    stack.until_metric(RUNNING, |running| running >= 1.0).await;
    let waiting = [Client::ask(&stack, &long("There")), Client::ask(&stack, &long("In"))];
    stack.until_metric(WAITING, |waiting| waiting >= 2.0).await;
    for client in waiting {
        client.leave().await;
    }
    stack.until_metric(WAITING, |waiting| waiting == 0.0).await;
    assert!(stack.metric(RUNNING).await > 0.0, "the one that runs goes on");
    running.leave().await;
    check_empty(&stack).await;
}

#[tokio::test]
async fn a_prompt_that_is_half_computed_is_dropped() {
    // A thousand steps, so that there is time to leave.
    let stack =
        Stack::start(Model::Demo, &["--max-batch-prefill-tokens", "2", "--steps-in-flight", "2"]).await;
    let client = Client::ask(&stack, &long_prompt());
    stack.until_metric(BLOCKS, |blocks| blocks > 3.0).await;
    client.leave().await;
    stack.until_metric(BLOCKS, |blocks| blocks == 0.0).await;
    assert!(stack.metric(GENERATED).await < 1.0, "the prompt was computed to its end");
    check_empty(&stack).await;
}

#[tokio::test]
async fn all_choices_of_a_request_are_dropped_while_they_are_generated() {
    for depth in ["1", "2"] {
        let stack = Stack::start(Model::Demo, &["--steps-in-flight", depth]).await;
        let mut several = long("Once");
        several["n"] = json!(3);
        let clients = [Client::ask(&stack, &long("There")), Client::ask(&stack, &several)];
        stack.until_metric(RUNNING, |running| running >= 4.0).await;
        stack.until_metric(GENERATED, |tokens| tokens > 20.0).await;
        for client in clients {
            client.leave().await;
        }
        stack.until_metric(RUNNING, |running| running == 0.0).await;
        assert!(stack.metric(GENERATED).await < 4.0 * 1500.0, "all was generated");
        check_empty(&stack).await;
    }
}

#[tokio::test]
async fn a_preempted_request_is_forgotten() {
    // Both are let in, and only one can grow to its end.
    let flags = ["--max-batch-total-tokens", "1536", "--max-total-tokens", "1536", "--steps-in-flight", "2"];
    let stack = Stack::start(Model::Demo, &flags).await;
    let older = Client::ask(&stack, &long("Once"));
    stack.until_metric(RUNNING, |running| running >= 1.0).await;
    let younger = Client::ask(&stack, &long("There"));
    stack.until_metric(PREEMPTIONS, |preemptions| preemptions >= 1.0).await;
    stack.until_metric(WAITING, |waiting| waiting >= 1.0).await;
    younger.leave().await;
    stack.until_metric(WAITING, |waiting| waiting == 0.0).await;
    older.leave().await;
    check_empty(&stack).await;
}
