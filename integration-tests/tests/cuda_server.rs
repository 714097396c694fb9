//! The real executable on a GPU (or on the emulated driver: `make test-cuda`).

use std::process::Output;

use integration_tests::{Model, Stack, golden, lamplighter};
use serde_json::json;

/// Small, because a driver that runs on the CPU computes the largest steps at the start too.
const SMALL: [&str; 6] =
    ["--max-batch-prefill-tokens", "64", "--max-batch-size", "4", "--max-total-tokens", "128"];

#[tokio::test]
async fn the_server_on_a_gpu_answers_what_transformers_computes_to_several_clients_at_once() {
    let stack = answers_what_transformers_computes(&[]).await;
    assert!(!stack.log().contains("plain kernels"), "{}", stack.log());
}

#[tokio::test]
async fn without_custom_kernels_the_answers_are_the_same() {
    let stack = answers_what_transformers_computes(&["--disable-custom-kernels"]).await;
    assert!(stack.log().contains("plain kernels"), "{}", stack.log());
}

/// The end of a launch that finds no GPU, and then no place for its shards.
fn without_a_gpu(flags: &[&str]) -> Output {
    let mut command = lamplighter();
    // Of the driver, and of the one for tests.
    command.env("CUDA_VISIBLE_DEVICES", "").env("CUDA_ON_CPU_DEVICES", "0");
    command.args(["--port", "0", "--shard-uds-path", "/there-is-no-such-directory/shard"]).args(flags);
    command.output().expect("the executable can be started")
}

#[test]
fn where_there_is_no_gpu_the_server_says_why_in_one_sentence_and_serves_on_the_cpu_unless_told_otherwise() {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let why = "the NVIDIA driver finds no usable GPU";
    let auto = text(&without_a_gpu(&[]).stdout);
    let lines: Vec<_> = auto.lines().filter(|line| line.contains(why)).collect();
    assert!(matches!(lines[..], [line] if line.contains("serving on the CPU")), "{auto}");
    let cpu = without_a_gpu(&["--device", "cpu"]);
    assert!(!text(&cpu.stdout).contains("GPU"), "{}", text(&cpu.stdout));
    let cuda = without_a_gpu(&["--device", "cuda"]);
    let error = text(&cuda.stderr);
    assert!(!cuda.status.success() && error.contains(why) && error.lines().count() == 1, "{error}");
}

async fn answers_what_transformers_computes(flags: &[&str]) -> Stack {
    let flags = [&["--device", "cuda", "--dtype", "float32"], flags, &SMALL[..]].concat();
    let stack = Stack::start(Model::Golden("llama"), &flags).await;
    assert_eq!(stack.get("/info").await.ok()["model_device_type"], "cuda");
    let golden = golden("llama");
    let prompts = golden["prompts"].as_array().expect("prompts");
    let ask = async |prompt: &serde_json::Value| {
        let greedy = prompt["greedy"].as_array().expect("ids");
        let parameters = json!({"max_new_tokens": greedy.len(), "details": true, "ignore_eos": true});
        let answer =
            stack.post("/generate", &json!({"inputs": prompt["text"], "parameters": parameters})).await.ok();
        let tokens = answer["details"]["tokens"].as_array().expect("tokens");
        let ids: Vec<_> = tokens.iter().map(|token| token["id"].clone()).collect();
        // Where the sequence ends with an end token, what follows was not asked for.
        assert_eq!(ids, greedy[..ids.len()], "{}", stack.log());
        assert!(!ids.is_empty());
    };
    let answers = prompts.iter().chain(prompts).map(ask);
    futures::future::join_all(answers).await;
    assert!(stack.log().contains("memory of the GPU"), "{}", stack.log());
    stack
}

#[tokio::test]
async fn the_demo_model_is_served_on_a_gpu() {
    let flags = [&["--device", "cuda"], &SMALL[..]].concat();
    let stack = Stack::start(Model::Demo, &flags).await;
    let parameters =
        json!({"max_new_tokens": 8, "do_sample": true, "seed": 7, "temperature": 0.8, "details": true});
    let body = json!({"inputs": "Once upon a time", "parameters": parameters});
    let first = stack.post("/generate", &body).await.ok();
    assert_eq!(first["details"]["generated_tokens"], 8, "{first}");
    let again = stack.post("/generate", &body).await.ok();
    assert_eq!(first["generated_text"], again["generated_text"]);
}
