//! Every architecture, served by the real executable, continues a prompt as transformers does.

use integration_tests::{Model, Stack, golden};
use serde_json::{Value, json};

/// Compares text in, text and ids out, over HTTP. Greedy continuations are exact: the goldens were chosen such that no
/// step has two tokens closer than 1e-2, far more than two orders of summation differ.
async fn check(model: &'static str, flags: &[&str]) -> Stack {
    let stack = Stack::start(Model::Golden(model), flags).await;
    let golden = golden(model);
    for prompt in golden["prompts"].as_array().expect("prompts") {
        let expected = &prompt["greedy"];
        let expected: &Value = expected.get("token_ids").unwrap_or(expected);
        let num_tokens = expected.as_array().expect("ids").len();
        let parameters =
            json!({"max_new_tokens": num_tokens, "details": true, "decoder_input_details": true});
        let body = json!({"inputs": prompt["text"], "parameters": parameters});
        let answer = stack.post("/generate", &body).await.ok();
        let ids = |tokens: &Value| -> Vec<Value> {
            tokens.as_array().expect("tokens").iter().map(|token| token["id"].clone()).collect()
        };
        assert_eq!(Value::Array(ids(&answer["details"]["prefill"])), prompt["token_ids"], "{model}: prompt");
        assert_eq!(&Value::Array(ids(&answer["details"]["tokens"])), expected, "{model}: continuation");
        check_logprobs(model, &answer["details"]["prefill"], &prompt["logprobs"]);
    }
    stack
}

/// The tolerance of the goldens (see their README) for logits holds for log-probabilities as well.
fn check_logprobs(model: &str, prefill: &Value, expected: &Value) {
    let (prefill, expected) =
        (prefill.as_array().expect("tokens"), expected.as_array().expect("log-probabilities"));
    assert_eq!(prefill.len(), expected.len());
    for (position, (token, expected)) in prefill.iter().zip(expected).enumerate() {
        match (token["logprob"].as_f64(), expected.as_f64()) {
            (None, None) => assert_eq!(position, 0),
            (Some(got), Some(expected)) => {
                assert!((got - expected).abs() < 2e-4, "{model}, position {position}: {got} != {expected}");
            }
            other => panic!("{model}, position {position}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn llama_continues_as_in_transformers() {
    check("llama", &[]).await;
}

#[tokio::test]
async fn llama_in_16_bit_weights_continues_as_in_transformers() {
    check("llama_bf16", &["--dtype", "float32"]).await;
    check("llama_f16", &["--dtype", "float32"]).await;
}

#[tokio::test]
async fn without_custom_kernels_models_continue_as_in_transformers() {
    for model in ["llama", "qwen3"] {
        let stack = check(model, &["--device", "cpu", "--disable-custom-kernels"]).await;
        assert!(stack.log().contains("CPU, Portable"), "{}", stack.log());
    }
}

#[tokio::test]
async fn sharded_safetensors_are_one_model() {
    check("llama_sharded", &[]).await;
}

#[tokio::test]
async fn llama3_rope_and_tied_embeddings_continue_as_in_transformers() {
    check("llama3", &[]).await;
}

#[tokio::test]
async fn the_sliding_window_of_mistral_is_as_in_transformers() {
    check("mistral", &[]).await;
}

#[tokio::test]
async fn qwen2_continues_as_in_transformers() {
    check("qwen2", &[]).await;
}

#[tokio::test]
async fn qwen3_continues_as_in_transformers() {
    check("qwen3", &[]).await;
}

#[tokio::test]
async fn two_shards_continue_as_in_transformers() {
    for model in ["llama", "mistral", "qwen2", "qwen3"] {
        check(model, &["--num-shard", "2"]).await;
    }
}

#[tokio::test]
async fn a_prompt_in_chunks_continues_as_in_transformers() {
    for model in ["llama", "mistral"] {
        check(model, &["--max-batch-prefill-tokens", "16"]).await;
    }
}
