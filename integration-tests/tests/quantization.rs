//! Weights that are quantized when a model is loaded, through the real executable.

use integration_tests::{Model, Stack, golden, lamplighter};
use serde_json::{Value, json};

/// Log-probabilities of the golden's second prompt.
async fn logprobs(flags: &[&str]) -> Vec<f64> {
    let stack = Stack::start(Model::Golden("llama"), flags).await;
    let prompt = &golden("llama")["prompts"][1]["text"];
    let parameters = json!({"max_new_tokens": 1, "details": true, "decoder_input_details": true});
    let answer = stack.post("/generate", &json!({"inputs": prompt, "parameters": parameters})).await.ok();
    let prefill = answer["details"]["prefill"].as_array().expect("tokens");
    prefill.iter().filter_map(|token| token["logprob"].as_f64()).collect()
}

/// The greatest difference.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[tokio::test]
async fn eetq_stays_near_the_stored_weights_and_does_not_depend_on_the_number_of_shards() {
    let stored: Vec<f64> = golden("llama")["prompts"][1]["logprobs"]
        .as_array()
        .expect("log-probabilities")
        .iter()
        .filter_map(Value::as_f64)
        .collect();
    let quantized = logprobs(&["--quantize", "eetq"]).await;
    let two_shards = logprobs(&["--quantize", "eetq", "--num-shard", "2"]).await;
    // Eight bits are kept, of weights that make logits of the order of ten; far more than the goldens' tolerance.
    let distance_to_stored = distance(&quantized, &stored);
    assert!((1e-3..0.5).contains(&distance_to_stored), "{distance_to_stored}");
    // The same weights, sums in another order.
    let distance_of_shards = distance(&quantized, &two_shards);
    assert!(distance_of_shards < 2e-4, "{distance_of_shards}");
}

#[test]
fn a_format_that_is_not_supported_is_refused_with_those_that_are() {
    let output = lamplighter().args(["--quantize", "gptq"]).output().expect("the executable can be started");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("invalid value 'gptq' for '--quantize"), "{message}");
    assert!(message.contains("[possible values: eetq]"), "{message}");
}
