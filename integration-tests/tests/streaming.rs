//! A stream, put together, is the answer in one piece.

use integration_tests::{Model, Stack};
use serde_json::{Value, json};

/// Requests whose texts have everything that is hard to cut: several bytes in a character, stop strings over token
/// borders, sampled tokens.
fn variants() -> Vec<Value> {
    vec![
        json!({"temperature": 0.0, "max_tokens": 40}),
        json!({"temperature": 1.0, "seed": 11, "max_tokens": 60, "ignore_eos": true}),
        json!({"temperature": 1.3, "seed": 12, "max_tokens": 60, "ignore_eos": true, "stop": ["e", "の"]}),
        json!({"temperature": 0.0, "max_tokens": 1}),
    ]
}

fn with(base: &Value, more: &Value) -> Value {
    let mut request = base.clone();
    request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    request
}

fn text_of(events: &[Value], pointer: &str) -> String {
    events.iter().filter_map(|event| event.pointer(pointer)?.as_str()).collect()
}

fn last_string(events: &[Value], pointer: &str) -> Value {
    events
        .iter()
        .filter_map(|event| event.pointer(pointer).filter(|value| !value.is_null()))
        .next_back()
        .cloned()
        .into()
}

async fn check_openai(model: Model, path: &str, base: Value, whole_text: &str, piece: &str) {
    let stack = Stack::start(model, &[]).await;
    for variant in variants() {
        let request = with(&base, &variant);
        let whole = stack.post(path, &request).await.ok();
        let stream = with(&request, &json!({"stream": true, "stream_options": {"include_usage": true}}));
        let events = stack.stream(path, &stream).await.all().await;
        assert_eq!(
            whole.pointer(whole_text).and_then(Value::as_str),
            Some(&*text_of(&events, piece)),
            "{variant}"
        );
        assert_eq!(
            whole["choices"][0]["finish_reason"],
            last_string(&events, "/choices/0/finish_reason"),
            "{variant}"
        );
        assert_eq!(whole["usage"], events.last().expect("events")["usage"], "{variant}");
    }
}

#[tokio::test]
async fn chunks_of_a_chat_are_its_answer() {
    let chat =
        json!({"model": "any", "messages": [{"role": "user", "content": "Tell me a story about a fox."}]});
    let (whole, piece) = ("/choices/0/message/content", "/choices/0/delta/content");
    check_openai(Model::Demo, "/v1/chat/completions", chat.clone(), whole, piece).await;
    check_openai(Model::Golden("llama"), "/v1/chat/completions", chat, whole, piece).await;
}

#[tokio::test]
async fn chunks_of_a_completion_are_its_answer() {
    let completion = json!({"model": "any", "prompt": "Once upon a time"});
    let text = "/choices/0/text";
    check_openai(Model::Demo, "/v1/completions", completion.clone(), text, text).await;
    check_openai(Model::Golden("qwen2"), "/v1/completions", completion, text, text).await;
}

#[tokio::test]
async fn tokens_of_a_stream_are_those_of_the_answer() {
    let stack = Stack::start(Model::Golden("mistral"), &[]).await;
    for parameters in [
        json!({"max_new_tokens": 40, "details": true}),
        json!({"max_new_tokens": 40, "details": true, "do_sample": true, "temperature": 1.1, "seed": 3, "top_n_tokens": 2}),
        json!({"max_new_tokens": 60, "details": true, "do_sample": true, "seed": 4, "stop": ["a"]}),
    ] {
        let request = json!({"inputs": "Once upon a time", "parameters": parameters});
        let whole = stack.post("/generate", &request).await.ok();
        let events = stack.stream("/generate_stream", &request).await.all().await;
        let last = events.last().expect("events");
        assert_eq!(last["generated_text"], whole["generated_text"], "{parameters}");
        assert_eq!(last["details"]["finish_reason"], whole["details"]["finish_reason"], "{parameters}");
        assert_eq!(last["details"]["generated_tokens"], whole["details"]["generated_tokens"], "{parameters}");
        let streamed: Vec<Value> = events.iter().map(|event| event["token"].clone()).collect();
        let tokens = whole["details"]["tokens"].as_array().expect("tokens").clone();
        assert_eq!(streamed, tokens, "{parameters}");
    }
}

#[tokio::test]
async fn a_stream_of_several_choices_holds_each_of_them() {
    let stack = Stack::start(Model::Demo, &[]).await;
    let request = json!({
        "messages": [{"role": "user", "content": "Tell me a story about a cat."}],
        "n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 30,
    });
    let whole = stack.post("/v1/chat/completions", &request).await.ok();
    let events =
        stack.stream("/v1/chat/completions", &with(&request, &json!({"stream": true}))).await.all().await;
    let mut texts = Vec::new();
    for index in 0..3 {
        let of_choice: Vec<Value> =
            events.iter().filter(|event| event["choices"][0]["index"] == index).cloned().collect();
        let text = text_of(&of_choice, "/choices/0/delta/content");
        assert_eq!(whole["choices"][index]["message"]["content"], text.as_str());
        texts.push(text);
    }
    texts.dedup();
    assert!(texts.len() > 1, "choices of one seed are drawn independently: {texts:?}");
}
