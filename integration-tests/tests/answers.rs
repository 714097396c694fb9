//! What is in an answer: text, ends, counts, log-probabilities, facts about the server.

use integration_tests::{Model, Stack};
use serde_json::{Value, json};

#[tokio::test]
async fn the_demo_model_answers_a_chat() {
    let stack = Stack::start(Model::Demo, &[]).await;
    let request = json!({
        "model": "lamplighter-demo",
        "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
        "temperature": 0.0, "max_tokens": 200,
    });
    let answer = stack.post("/v1/chat/completions", &request).await.ok();
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().expect("text");
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["finish_reason"], "stop", "{text}");
    assert!(text.contains("fox"), "{text}");
    assert!(!text.contains("<|"), "special tokens are no text: {text}");
    let usage = |name: &str| answer["usage"][name].as_u64().expect("a number");
    assert_eq!(usage("total_tokens"), usage("prompt_tokens") + usage("completion_tokens"));
}

#[tokio::test]
async fn stop_strings_end_a_text_and_are_not_in_it() {
    let stack = Stack::start(Model::Demo, &[]).await;
    let base =
        json!({"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0.0, "ignore_eos": true});
    let full = stack.post("/v1/completions", &base).await.ok();
    let full = full["choices"][0]["text"].as_str().expect("text").to_owned();
    // From within the text, over token borders.
    let characters: Vec<char> = full.chars().collect();
    assert!(characters.len() > 40, "{full:?}");
    for (start, length) in [(3, 1), (10, 7), (20, 12)] {
        let stop: String = characters[start..start + length].iter().collect();
        let expected = full.split(&stop).next().expect("a first part");
        let mut request = base.clone();
        request["stop"] = json!([stop]);
        let answer = stack.post("/v1/completions", &request).await.ok();
        assert_eq!(answer["choices"][0]["text"], expected, "stop {stop:?} in {full:?}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn a_text_ends_by_length_where_the_model_does_not_end_it() {
    let stack = Stack::start(Model::Golden("llama"), &[]).await;
    let request = json!({"prompt": "Once", "max_tokens": 7, "ignore_eos": true});
    let answer = stack.post("/v1/completions", &request).await.ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 7);
}

#[tokio::test]
async fn choices_are_as_many_as_asked_for_and_counted_together() {
    let stack = Stack::start(Model::Golden("llama"), &[]).await;
    let request =
        json!({"prompt": "Once", "n": 2, "max_tokens": 9, "ignore_eos": true, "temperature": 1.0, "seed": 1});
    let answer = stack.post("/v1/completions", &request).await.ok();
    let choices = answer["choices"].as_array().expect("choices");
    let indices: Vec<&Value> = choices.iter().map(|choice| &choice["index"]).collect();
    assert_eq!(indices, [0, 1]);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    assert_eq!(answer["usage"]["completion_tokens"], 18);
    // The first of several is the only one of one.
    let mut single = request.clone();
    single["n"] = json!(1);
    let single = stack.post("/v1/completions", &single).await.ok();
    assert_eq!(single["choices"][0]["text"], choices[0]["text"]);
}

#[tokio::test]
async fn several_prompts_are_answered_in_their_order() {
    let stack = Stack::start(Model::Golden("llama"), &[]).await;
    let ask = async |prompt: Value| {
        let request = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0.0, "ignore_eos": true});
        stack.post("/v1/completions", &request).await.ok()
    };
    let together = ask(json!(["Once", "Twice upon"])).await;
    for (index, prompt) in ["Once", "Twice upon"].into_iter().enumerate() {
        let alone = ask(json!(prompt)).await;
        assert_eq!(together["choices"][index]["text"], alone["choices"][0]["text"]);
    }
}

#[tokio::test]
async fn logprobs_are_those_of_the_model_before_any_warping() {
    let stack = Stack::start(Model::Golden("llama"), &[]).await;
    let request = |more: Value| {
        let mut request = json!({
            "messages": [{"role": "user", "content": "Once"}], "max_tokens": 1, "ignore_eos": true,
            "logprobs": true, "top_logprobs": 5,
        });
        request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        request
    };
    let path = "/v1/chat/completions";
    let greedy = stack.post(path, &request(json!({"temperature": 0.0}))).await.ok();
    let warped = json!({"temperature": 0.3, "top_k": 2, "seed": 1, "frequency_penalty": 1.0});
    let warped = stack.post(path, &request(warped)).await.ok();
    let tops = "/choices/0/logprobs/content/0/top_logprobs";
    let top = greedy.pointer(tops).and_then(Value::as_array).expect("log-probabilities");
    assert_eq!(top.len(), 5);
    assert_eq!(warped.pointer(tops), greedy.pointer(tops));
    let values: Vec<f64> = top.iter().filter_map(|token| token["logprob"].as_f64()).collect();
    assert!(values.is_sorted_by(|a, b| a >= b) && values[0] < 0.0, "{values:?}");
    assert_eq!(greedy.pointer("/choices/0/logprobs/content/0/logprob"), top[0].get("logprob"));
}

#[tokio::test]
async fn the_server_tells_what_it_is() {
    let stack = Stack::start(Model::Golden("qwen2"), &["--max-total-tokens", "256"]).await;
    for path in ["/health", "/livez", "/readyz", "/startupz"] {
        assert_eq!(stack.get(path).await.status, 200, "{path}");
    }
    let info = stack.get("/info").await.ok();
    assert_eq!((&info["model_id"], &info["max_total_tokens"]), (&json!("qwen2"), &json!(256)));
    let models = stack.get("/v1/models").await.ok();
    assert_eq!(models["data"][0]["id"], "qwen2");
    stack.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 3})).await.ok();
    assert!(stack.metric("tgi_request_count").await >= 1.0);
    assert!(stack.metric("lamplighter_kv_blocks_total").await > 0.0);
}
