//! LoRA adapters through the real executable: what peft computes with them, requests of several in one batch.

use std::path::Path;

use futures::future::join_all;
use integration_tests::{Model, Stack, golden, lamplighter};
use serde_json::{Value, json};

const NAMES: [&str; 2] = ["tone", "form"];

fn directory(name: &str) -> String {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/llama_lora").join(name);
    goldens.display().to_string()
}

fn both() -> String {
    NAMES.map(|name| format!("{name}={}", directory(name))).join(",")
}

/// The prompts of all goldens of `llama`, without an adapter and with each.
fn cases() -> Vec<(Option<&'static str>, Value)> {
    let adapters = [None, Some("tone"), Some("form")];
    let prompts = adapters.into_iter().flat_map(|adapter| {
        let name = adapter.map_or("llama".to_owned(), |adapter| format!("llama_lora/{adapter}"));
        let prompts = golden(&name)["prompts"].as_array().expect("prompts").clone();
        prompts.into_iter().map(move |prompt| (adapter, prompt))
    });
    prompts.collect()
}

/// By both APIs, the ids and the text that are generated.
async fn check(stack: &Stack, adapter: Option<&str>, prompt: &Value) {
    let parameters = json!({"max_new_tokens": 32, "details": true, "adapter_id": adapter});
    let request = json!({"inputs": prompt["text"], "parameters": parameters});
    let answer = stack.post("/generate", &request).await.ok();
    let tokens = answer["details"]["tokens"].as_array().expect("tokens");
    let ids: Vec<_> = tokens.iter().map(|token| token["id"].clone()).collect();
    assert_eq!(json!(ids), prompt["greedy"], "{adapter:?}");
    let text = &answer["generated_text"];
    let request = json!({
        "model": adapter, "prompt": prompt["text"], "max_tokens": 32, "temperature": 0, "ignore_eos": true,
    });
    let answer = stack.post("/v1/completions", &request).await.ok();
    assert_eq!(&answer["choices"][0]["text"], text, "{adapter:?}");
    assert_eq!(answer["model"], adapter.unwrap_or("llama"));
}

#[tokio::test]
async fn requests_of_several_adapters_in_one_batch_get_what_peft_computes_on_one_shard_and_on_two() {
    for num_shard in ["1", "2"] {
        let flags = ["--lora-adapters", &both(), "--num-shard", num_shard];
        let stack = Stack::start(Model::Golden("llama"), &flags).await;
        let cases = cases();
        // Twice, so that the second time prompts are in the cache, each under its own adapter.
        for _ in 0..2 {
            join_all(cases.iter().map(|(adapter, prompt)| check(&stack, *adapter, prompt))).await;
        }
        let models = stack.get("/v1/models").await.ok();
        let ids: Vec<_> =
            models["data"].as_array().expect("models").iter().map(|model| &model["id"]).collect();
        assert_eq!(ids, ["llama", "tone", "form"]);
    }
}

#[tokio::test]
async fn an_adapter_without_a_name_is_called_by_its_directory_and_an_unknown_one_is_refused() {
    let path = directory("tone");
    let stack = Stack::start(Model::Golden("llama"), &["--lora-adapters", &path]).await;
    let tone = golden("llama_lora/tone")["prompts"][0].clone();
    let request = |adapter: &str| json!({"inputs": tone["text"], "parameters": {"max_new_tokens": 32, "adapter_id": adapter}});
    let answer = stack.post("/generate", &request(&path)).await.ok();
    assert_eq!(answer["generated_text"], tone["greedy_text"]);
    let answer = stack.post("/generate", &request("tone")).await;
    assert_eq!(answer.status, 422);
    let message = answer.body["error"].as_str().expect("a message").to_owned();
    assert!(message.contains("there is no adapter \"tone\"") && message.contains(&path), "{message}");
}

#[test]
fn an_adapter_that_cannot_be_served_ends_the_start_with_the_reason() {
    let check = |adapters: &str, part: &str| {
        let output = lamplighter()
            .args(Model::Golden("llama").flags())
            .args(["--hostname", "127.0.0.1", "--port", "0", "--lora-adapters", adapters])
            .output()
            .expect("the executable can be started");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(!output.status.success() && text.contains(part), "{part}: {text}");
    };
    check("tone=/nowhere", "/nowhere/adapter_config.json: No such file or directory");
    check("tone=a=b", "is not NAME=DIRECTORY, or DIRECTORY");
    check(&format!("llama={}", directory("tone")), "an adapter and the model are both called \"llama\"");
}
