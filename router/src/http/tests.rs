//! The endpoints as clients see them: requests through all layers, answered by a scripted backend.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use clap::Parser;
use futures::stream::{self, BoxStream, StreamExt};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use proto::units::TokenId;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::app::{App, Backend, Serving};
use super::routes;
use crate::config::RouterConfig;
use crate::scheduler::{
    DataType, Device, EndReason, Failure, Sampling, ServingInfo, Status, SubmitError, Token, TokenEvent,
    TokenRequest,
};
use crate::text::tokenizer::tests::byte_level;
use crate::validate::tests::validator;

const EOS: u32 = 262;

/// Answers each sequence with the next script.
#[derive(Default)]
struct Script {
    answers: Mutex<VecDeque<Vec<TokenEvent>>>,
    submitted: Mutex<Vec<TokenRequest>>,
    refusal: Option<SubmitError>,
    status: Option<Status>,
}

struct Scripted(Arc<Script>);

impl Backend for Scripted {
    fn submit(
        &self,
        requests: Vec<TokenRequest>,
    ) -> Result<Vec<BoxStream<'static, TokenEvent>>, SubmitError> {
        if let Some(refusal) = &self.0.refusal {
            return Err(refusal.clone());
        }
        let mut answers = self.0.answers.lock().unwrap();
        let streams = requests.iter().map(|_| stream::iter(answers.pop_front().expect("a script")).boxed());
        let streams = streams.collect();
        self.0.submitted.lock().unwrap().extend(requests);
        Ok(streams)
    }

    fn status(&self) -> Status {
        self.0.status.clone().unwrap_or(Status::Ready)
    }
}

fn token(id: u32, end: Option<EndReason>) -> TokenEvent {
    let top = vec![(TokenId(id), -0.25), (TokenId(u32::from(b'z')), f32::NEG_INFINITY)];
    TokenEvent::Token { token: Token { id: TokenId(id), logprob: -0.25, top }, end }
}

/// The bytes of `text`, then the end of the sequence.
fn says(text: &str) -> Vec<TokenEvent> {
    let mut events = vec![TokenEvent::Started { queue_time: Duration::from_millis(3), cached_tokens: 0 }];
    events.extend(text.bytes().map(|byte| token(u32::from(byte), None)));
    events.push(token(EOS, Some(EndReason::Eos)));
    events
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: RouterConfig,
}

struct Fixture {
    app: Arc<App>,
    routes: Router,
    script: Arc<Script>,
}

fn starting() -> Fixture {
    let config = Cli::parse_from(["router"]).config;
    let app = Arc::new(App::new("tiny".to_owned(), config, Arc::new(byte_level()), None));
    Fixture { routes: routes(Arc::clone(&app)), app, script: Arc::default() }
}

fn with_script(script: Script) -> Fixture {
    let mut fixture = starting();
    fixture.script = Arc::new(script);
    fixture.app.serve(Serving {
        info: ServingInfo {
            num_shards: 1,
            device: Device::Cpu,
            dtype: DataType::Bf16,
            vocab_size: 265,
            max_position_embeddings: 128,
            sliding_window_tokens: None,
            eos_token_ids: vec![TokenId(EOS)],
            num_layers: 1,
            num_parameters: 10,
            weight_bytes: 20,
            kv_bytes_per_token: 4,
            block_size: 16,
            kv_cache_tokens: 256,
            max_total_tokens: 64,
            max_input_tokens: 60,
            max_batch_prefill_tokens: 32,
            max_batch_size: 8,
            max_concurrent_requests: 8,
        },
        validator: validator(),
        backend: Box::new(Scripted(Arc::clone(&fixture.script))),
    });
    fixture
}

fn serving(answers: &[&str]) -> Fixture {
    let answers = answers.iter().map(|text| says(text)).collect();
    with_script(Script { answers: Mutex::new(answers), ..Default::default() })
}

impl Fixture {
    async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.routes.clone().oneshot(request).await.expect("routes do not fail")
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        json_of(self.send(Request::get(path).body(Body::empty()).unwrap()).await).await
    }

    async fn post(&self, path: &str, body: &Value) -> Response<Body> {
        self.post_bytes(path, body.to_string()).await
    }

    async fn post_bytes(&self, path: &str, body: impl Into<Body>) -> Response<Body> {
        let request =
            Request::post(path).header("content-type", "application/json").body(body.into()).unwrap();
        self.send(request).await
    }

    async fn answer(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        json_of(self.post(path, body).await).await
    }

    fn submitted(&self) -> TokenRequest {
        self.script.submitted.lock().unwrap().last().expect("a request was submitted").clone()
    }
}

async fn text_of(response: Response<Body>) -> String {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

async fn json_of(response: Response<Body>) -> (StatusCode, Value) {
    let status = response.status();
    let text = text_of(response).await;
    (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: {text:?} is not JSON")))
}

/// The frames' data; the last `[DONE]` as a string.
async fn frames_of(response: Response<Body>) -> Vec<Value> {
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = text_of(response).await;
    text.split_terminator("\n\n")
        .map(|frame| {
            let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("{frame:?} has no data"));
            serde_json::from_str(data).unwrap_or_else(|_| json!(data))
        })
        .collect()
}

fn chat(more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "the"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_chat_is_answered_in_openais_form() {
    let fixture = serving(&["Hello"]);
    let (status, body) = fixture.answer("/v1/chat/completions", &chat(&json!({"model": "any"}))).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["model"], "tiny");
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(body["choices"][0]["message"], json!({"role": "assistant", "content": "Hello"}));
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["logprobs"], Value::Null);
    let prompt_tokens = fixture.submitted().prompt.len();
    let usage = json!({
        "prompt_tokens": prompt_tokens, "completion_tokens": 6, "total_tokens": prompt_tokens + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    });
    assert_eq!(body["usage"], usage);
}

#[tokio::test]
async fn a_streamed_chat_has_the_text_of_the_other_one() {
    let answer = "Zwei <b> 你好";
    let request = chat(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let frames = frames_of(serving(&[answer]).post("/v1/chat/completions", &request).await).await;
    assert_eq!(frames[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String =
        frames.iter().filter_map(|frame| frame["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, answer);
    let [.., last, usage, done] = frames.as_slice() else { panic!("too few frames: {frames:?}") };
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["usage"], Value::Null);
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], answer.len() + 1);
    assert_eq!(*done, json!("[DONE]"));
    let (_, whole) = serving(&[answer]).answer("/v1/chat/completions", &chat(&json!({}))).await;
    assert_eq!(whole["choices"][0]["message"]["content"], text);
}

#[tokio::test]
async fn explicit_nulls_are_absent_fields() {
    let body = chat(&json!({
        "model": null, "max_tokens": null, "max_completion_tokens": null, "temperature": null, "top_p": null, "n": null,
        "stop": null, "stream": null, "stream_options": null, "seed": null, "frequency_penalty": null,
        "presence_penalty": null, "logit_bias": null, "logprobs": null, "top_logprobs": null, "top_k": null,
        "min_p": null, "typical_p": null, "repetition_penalty": null, "ignore_eos": null, "tools": null,
        "tool_choice": null, "response_format": null, "user": null, "grammar": null, "functions": null, "unknown": null,
    }));
    let (status, body) = serving(&["ok"]).answer("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let parameters = json!({
        "best_of": null, "temperature": null, "repetition_penalty": null, "frequency_penalty": null, "top_k": null,
        "top_p": null, "typical_p": null, "do_sample": null, "max_new_tokens": null, "return_full_text": null,
        "stop": null, "truncate": null, "watermark": null, "details": null, "decoder_input_details": null,
        "seed": null, "top_n_tokens": null, "grammar": null, "adapter_id": null,
    });
    for body in [json!({"inputs": "a", "parameters": parameters}), json!({"inputs": "a", "parameters": null})]
    {
        let (status, answer) = serving(&["ok"]).answer("/generate", &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
}

#[tokio::test]
async fn fields_reach_the_scheduler() {
    let fixture = serving(&["ok", "ok"]);
    let body = chat(&json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "typical_p": 0.8, "seed": -1, "n": 2,
        "repetition_penalty": 1.5, "frequency_penalty": -1.0, "presence_penalty": 0.5, "max_completion_tokens": 9,
        "ignore_eos": true, "logprobs": true, "top_logprobs": 2, "logit_bias": {"97": -100},
    }));
    let (status, answer) = fixture.answer("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    let request = fixture.submitted();
    let expected = Sampling {
        temperature: 0.5,
        top_k: 7,
        top_p: 0.9,
        min_p: 0.1,
        typical_p: 0.8,
        // The second choice's: one more than was asked for.
        seed: 0,
        repetition_penalty: 1.5,
        frequency_penalty: -1.0,
        presence_penalty: 0.5,
        logit_bias: vec![(TokenId(97), -100.0)],
    };
    assert_eq!(request.sampling, expected);
    assert_eq!((request.max_new_tokens, request.ignore_eos, request.top_n_tokens), (9, true, 2));
}

#[tokio::test]
async fn chat_logprobs_have_text_bytes_and_finite_numbers() {
    let body = chat(&json!({"logprobs": true, "top_logprobs": 2}));
    let (_, answer) = serving(&["é"]).answer("/v1/chat/completions", &body).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 2, "one for each byte, none for the end: {content:?}");
    assert_eq!(content[0]["bytes"], json!([0xc3]));
    assert_eq!(content[1]["bytes"], json!([0xa9]));
    assert_eq!(content[0]["logprob"], json!(-0.25));
    assert_eq!(content[0]["top_logprobs"][1], json!({"token": "z", "logprob": -9999.0, "bytes": [122]}));
    let frames = frames_of(
        serving(&["é"]).post("/v1/chat/completions", &chat(&json!({"logprobs": true, "stream": true}))).await,
    )
    .await;
    let reported =
        frames.iter().filter(|frame| frame["choices"][0]["logprobs"]["content"].is_array()).count();
    assert_eq!(reported, 2);
}

#[tokio::test]
async fn stop_strings_are_cut_in_openais_answers_and_kept_in_tgis() {
    let (_, answer) =
        serving(&["one<end>two"]).answer("/v1/chat/completions", &chat(&json!({"stop": "<end>"}))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "one");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let body = json!({"inputs": "a", "parameters": {"stop": ["<end>"], "details": true}});
    let (_, answer) = serving(&["one<end>two"]).answer("/generate", &body).await;
    assert_eq!(answer["generated_text"], "one<end>");
    assert_eq!(answer["details"]["finish_reason"], "stop_sequence");
}

#[tokio::test]
async fn messages_may_have_parts_and_earlier_tool_calls() {
    let fixture = serving(&["ok", "ok"]);
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "th"}, {"type": "text", "text": "e"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "0", "type": "function",
            "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "content": "5", "tool_call_id": "0"},
    ]);
    let (status, answer) = fixture.answer("/v1/chat/completions", &json!({"messages": messages})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let messages = json!([messages[0]]);
    let (status, answer) = fixture.answer("/v1/chat/completions", &json!({"messages": messages})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert!(fixture.submitted().prompt.contains(&TokenId(257)), "the parts are one text");
}

#[tokio::test]
async fn completions_take_texts_and_ids_and_answer_in_order() {
    let fixture = serving(&["one", "two"]);
    let body = json!({"prompt": ["a", "b"], "logprobs": 1});
    let (status, answer) = fixture.answer("/v1/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["object"], "text_completion");
    let texts: Vec<_> =
        answer["choices"].as_array().unwrap().iter().map(|c| (&c["index"], &c["text"])).collect();
    assert_eq!(texts, [(&json!(0), &json!("one")), (&json!(1), &json!("two"))]);
    let logprobs = &answer["choices"][1]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["t", "w", "o"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    assert_eq!(logprobs["top_logprobs"][0]["t"], json!(-0.25));
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    assert_eq!(fixture.submitted().max_new_tokens, 16);
    for (prompt, choices) in [(json!([97, 98]), 1), (json!([[97], [98, 99]]), 2), (json!("text"), 1)] {
        let (status, answer) =
            serving(&["x", "y"]).answer("/v1/completions", &json!({"prompt": prompt})).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(answer["choices"].as_array().unwrap().len(), choices);
    }
}

#[tokio::test]
async fn streamed_completions_interleave_choices_by_index() {
    let body = json!({"prompt": "a", "n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let frames = frames_of(serving(&["one", "two"]).post("/v1/completions", &body).await).await;
    for (index, expected) in [(0, "one"), (1, "two")] {
        let of_choice = || frames.iter().filter(|frame| frame["choices"][0]["index"] == index);
        let text: String = of_choice().filter_map(|frame| frame["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, expected);
        assert_eq!(of_choice().filter(|frame| frame["choices"][0]["finish_reason"] == "stop").count(), 1);
    }
    assert_eq!(frames[frames.len() - 2]["usage"]["completion_tokens"], 8);
    assert_eq!(frames[frames.len() - 1], json!("[DONE]"));
}

#[tokio::test]
async fn generate_answers_in_tgis_form() {
    let mut events = says("ok");
    let prompt_token = Token { id: TokenId(98), logprob: -2.0, top: Vec::new() };
    events.insert(1, TokenEvent::Prompt(vec![prompt_token]));
    let fixture = with_script(Script { answers: Mutex::new([events].into()), ..Default::default() });
    let parameters = json!({"decoder_input_details": true, "top_n_tokens": 2, "return_full_text": true,
        "do_sample": true, "seed": 42, "max_new_tokens": 5});
    let response = fixture.post("/generate", &json!({"inputs": "ab", "parameters": parameters})).await;
    let headers = response.headers().clone();
    let (status, answer) = json_of(response).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["generated_text"], "abok");
    let details = &answer["details"];
    assert_eq!(details["finish_reason"], "eos_token");
    assert_eq!(details["generated_tokens"], 3);
    assert_eq!(details["seed"], 42);
    let prefill = json!([{"id": 97, "text": "a", "logprob": null}, {"id": 98, "text": "b", "logprob": -2.0}]);
    assert_eq!(details["prefill"], prefill);
    assert_eq!(details["tokens"][0], json!({"id": 111, "text": "o", "logprob": -0.25, "special": false}));
    assert_eq!(details["tokens"][2], json!({"id": 262, "text": "</s>", "logprob": -0.25, "special": true}));
    assert_eq!(details["top_tokens"][0][1]["logprob"], Value::Null);
    let header = |name: &str| headers[name].to_str().unwrap().to_owned();
    assert_eq!(header("x-compute-type"), "cpu");
    assert_eq!(header("x-compute-characters"), "2");
    assert_eq!(header("x-prompt-tokens"), "2");
    assert_eq!(header("x-generated-tokens"), "3");
    assert_eq!(header("x-queue-time"), "3");
    for name in ["x-total-time", "x-validation-time", "x-inference-time", "x-time-per-token"] {
        assert!(header(name).parse::<u64>().is_ok(), "{name}");
    }
    assert!(header("x-compute-time").parse::<f64>().is_ok());
}

#[tokio::test]
async fn generate_without_details_is_the_text_alone() {
    let fixture = serving(&["ok", "ok"]);
    let (_, answer) = fixture.answer("/generate", &json!({"inputs": "a"})).await;
    assert_eq!(answer, json!({"generated_text": "ok"}));
    assert!(fixture.submitted().sampling.temperature > 0.0, "without parameters TGI samples");
    assert_eq!(fixture.submitted().max_new_tokens, 63);
    fixture.answer("/generate", &json!({"inputs": "a", "parameters": {}})).await;
    assert!(fixture.submitted().sampling.temperature <= 0.0, "with parameters it does not");
}

#[tokio::test]
async fn generate_stream_tells_each_token_and_the_text_at_the_end() {
    let body = json!({"inputs": "ab", "parameters": {"details": true, "top_n_tokens": 1}});
    let response = serving(&["ok"]).post("/generate_stream", &body).await;
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    assert_eq!(response.headers()["x-compute-type"], "cpu");
    let frames = frames_of(response).await;
    assert_eq!(frames.len(), 3, "{frames:?}");
    assert_eq!(frames[0]["index"], 1);
    assert_eq!(frames[0]["token"], json!({"id": 111, "text": "o", "logprob": -0.25, "special": false}));
    assert!(frames[0]["top_tokens"].is_array());
    assert_eq!((&frames[0]["generated_text"], &frames[0]["details"]), (&Value::Null, &Value::Null));
    assert_eq!(frames[2]["generated_text"], "ok");
    let details =
        json!({"finish_reason": "eos_token", "generated_tokens": 3, "seed": null, "input_length": 2});
    assert_eq!(frames[2]["details"], details);
}

#[tokio::test]
async fn the_root_answers_as_hugging_faces_inference_api() {
    let fixture = serving(&["ok", "ok", "ok"]);
    let (_, answer) = fixture.answer("/", &json!({"inputs": "ab"})).await;
    assert_eq!(answer, json!([{"generated_text": "abok"}]));
    let short = json!({"inputs": "ab", "parameters": {"return_full_text": false}, "stream": false});
    assert_eq!(fixture.answer("/", &short).await.1, json!([{"generated_text": "ok"}]));
    let frames = frames_of(fixture.post("/", &json!({"inputs": "ab", "stream": true})).await).await;
    assert_eq!(frames.last().unwrap()["generated_text"], "abok");
}

#[tokio::test]
async fn errors_have_their_status_and_the_apis_form() {
    let check = async |path: &str, body: &Value, status: StatusCode, part: &str| {
        let (given, answer) = serving(&[]).answer(path, body).await;
        assert_eq!(given, status, "{path} {body}: {answer}");
        let (message, kind) = if path.starts_with("/v1/") {
            (&answer["error"]["message"], &answer["error"]["type"])
        } else {
            (&answer["error"], &answer["error_type"])
        };
        assert!(message.as_str().unwrap().contains(part), "{part:?} is not in {answer}");
        assert!(kind.is_string());
    };
    let (bad, unprocessable) = (StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY);
    let chats = "/v1/chat/completions";
    check(chats, &json!({}), bad, "`messages`").await;
    check(chats, &json!({"messages": []}), bad, "empty").await;
    check(chats, &json!({"messages": [{"content": "x"}]}), bad, "`role`").await;
    check(chats, &json!({"messages": [{"role": "user"}]}), bad, "`content`").await;
    let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]});
    check(chats, &image, unprocessable, "`text`").await;
    check(chats, &chat(&json!({"top_p": 2})), bad, "`top_p` must be > 0.0 and <= 1.0. Given: 2").await;
    check(chats, &chat(&json!({"temperature": "hot"})), bad, "`temperature`").await;
    check(chats, &chat(&json!({"top_logprobs": 2})), bad, "`logprobs`").await;
    check(chats, &chat(&json!({"max_tokens": 1000})), bad, "1000").await;
    check(chats, &chat(&json!({"stream_options": {}})), bad, "`stream_options`").await;
    check(chats, &chat(&json!({"logit_bias": {"x": 1}})), bad, "`logit_bias`").await;
    check(
        chats,
        &chat(&json!({"response_format": {"type": "json_object"}})),
        unprocessable,
        "not available yet",
    )
    .await;
    check(chats, &chat(&json!({"tool_choice": "required"})), unprocessable, "grammar-constrained").await;
    check(chats, &chat(&json!({"grammar": {}})), unprocessable, "`grammar`").await;
    check(chats, &chat(&json!({"best_of": 2})), unprocessable, "`best_of`").await;
    let texts = "/v1/completions";
    check(texts, &json!({"prompt": ["a", "a", "a", "a", "a"]}), bad, "batch size of 4").await;
    check(texts, &json!({"prompt": []}), bad, "empty").await;
    check(texts, &json!({"prompt": {"a": 1}}), bad, "`prompt`").await;
    check(texts, &json!({"prompt": [1, "a"]}), bad, "`prompt`").await;
    check(texts, &json!({"prompt": [-1]}), bad, "`prompt`").await;
    check(texts, &json!({"prompt": [100_000]}), bad, "vocabulary").await;
    check(texts, &json!({"prompt": "a", "logprobs": 6}), bad, "`logprobs`").await;
    check(texts, &json!({"prompt": "a", "suffix": "b"}), unprocessable, "`suffix`").await;
    check(texts, &json!({"prompt": "a", "echo": true}), unprocessable, "`echo`").await;
    for path in ["/generate", "/generate_stream"] {
        let with = |parameters: Value| json!({"inputs": "a", "parameters": parameters});
        check(path, &json!({}), unprocessable, "Input validation error: missing field `inputs`").await;
        check(
            path,
            &json!({"inputs": ""}),
            unprocessable,
            "Input validation error: `inputs` cannot be empty",
        )
        .await;
        check(
            path,
            &with(json!({"temperature": 0})),
            unprocessable,
            "`temperature` must be strictly positive",
        )
        .await;
        check(path, &with(json!({"top_k": 0})), unprocessable, "`top_k` must be strictly positive").await;
        check(path, &with(json!({"grammar": {"type": "json"}})), unprocessable, "`grammar`").await;
        check(path, &with(json!({"adapter_id": "x"})), unprocessable, "`adapter_id`").await;
        check(path, &with(json!({"watermark": true})), unprocessable, "`watermark`").await;
        check(path, &with(json!({"best_of": 2})), unprocessable, "`best_of`").await;
    }
    let prefill = json!({"inputs": "a", "parameters": {"decoder_input_details": true}});
    check("/generate_stream", &prefill, unprocessable, "`decoder_input_details`").await;
}

#[tokio::test]
async fn values_that_ask_for_nothing_are_accepted() {
    let body = chat(&json!({
        "response_format": {"type": "text"}, "tool_choice": "none", "tools": [{"type": "function"}], "best_of": 1,
        "user": "x", "store": false, "metadata": {}, "parallel_tool_calls": true, "service_tier": "auto",
        "min_tokens": 0, "something_new": [1],
    }));
    let (status, answer) = serving(&["ok"]).answer("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let body = json!({"inputs": "a", "parameters": {"watermark": false, "best_of": 1, "top_p": 1.0}});
    let (status, answer) = serving(&["ok"]).answer("/generate", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn bodies_are_checked_before_they_are_read() {
    let fixture = serving(&[]);
    let plain = Request::post("/generate").body(Body::from("{}")).unwrap();
    assert_eq!(json_of(fixture.send(plain).await).await.0, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let (status, answer) = json_of(fixture.post_bytes("/v1/completions", "{\"prompt\":").await).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::BAD_REQUEST, &json!("malformed_json")));
    let long = " ".repeat(2_000_001);
    let (status, answer) = json_of(fixture.post_bytes("/v1/completions", long.clone()).await).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
    let chunks = stream::iter([Ok::<_, std::io::Error>(long)]);
    let (status, _) = json_of(fixture.post_bytes("/generate", Body::from_stream(chunks)).await).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "without a content length");
}

#[tokio::test]
async fn unknown_paths_and_methods_are_answered_in_json() {
    let fixture = serving(&[]);
    let (status, answer) = fixture.get("/v1/nothing").await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    let (status, answer) = fixture.get("/nothing").await;
    assert_eq!((status, &answer["error_type"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    let (status, answer) = fixture.get("/generate").await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{answer}");
}

#[tokio::test]
async fn overload_and_drain_are_told_with_when_to_try_again() {
    let check = async |refusal: SubmitError, status: StatusCode, seconds: &str| {
        let fixture = with_script(Script { refusal: Some(refusal), ..Default::default() });
        for path in ["/v1/completions", "/generate", "/generate_stream"] {
            let response = fixture.post(path, &json!({"prompt": "a", "inputs": "a"})).await;
            assert_eq!(response.status(), status, "{path}");
            assert_eq!(response.headers()["retry-after"], seconds);
            json_of(response).await;
        }
    };
    check(SubmitError::Overloaded { limit: 8 }, StatusCode::TOO_MANY_REQUESTS, "1").await;
    check(SubmitError::Draining, StatusCode::SERVICE_UNAVAILABLE, "5").await;
    check(SubmitError::Unavailable, StatusCode::SERVICE_UNAVAILABLE, "5").await;
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_its_status() {
    let failing = |failure: Failure| {
        let events = vec![
            TokenEvent::Started { queue_time: Duration::ZERO, cached_tokens: 0 },
            TokenEvent::Failed(failure),
        ];
        with_script(Script { answers: Mutex::new([events].into()), ..Default::default() })
    };
    let check = async |path: &str, status: StatusCode| {
        let body = json!({"prompt": "a", "inputs": "a", "stream": true});
        let (given, answer) = failing(Failure::Shards("gone".to_owned())).answer(path, &body).await;
        assert_eq!(given, status, "{answer}");
    };
    check("/generate", StatusCode::FAILED_DEPENDENCY).await;
    check("/generate_stream", StatusCode::FAILED_DEPENDENCY).await;
    check("/v1/completions", StatusCode::INTERNAL_SERVER_ERROR).await;
    let (status, _) = failing(Failure::ShuttingDown).answer("/generate", &json!({"inputs": "a"})).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_failure_behind_the_first_token_is_the_last_frame() {
    let failing = || {
        let events = vec![token(97, None), TokenEvent::Failed(Failure::Shards("gone".to_owned()))];
        with_script(Script { answers: Mutex::new([events].into()), ..Default::default() })
    };
    let frames = frames_of(failing().post("/generate_stream", &json!({"inputs": "a"})).await).await;
    assert_eq!(frames.last().unwrap()["error_type"], "generation");
    let body = chat(&json!({"stream": true}));
    let frames = frames_of(failing().post("/v1/chat/completions", &body).await).await;
    assert_eq!(frames.last().unwrap()["error"]["code"], "generation_failed");
}

#[tokio::test]
async fn probes_tell_the_life_of_the_server() {
    let fixture = starting();
    let starting = json!({"status": "starting", "reason": "the router is starting"});
    assert_eq!(fixture.get("/readyz").await, (StatusCode::SERVICE_UNAVAILABLE, starting.clone()));
    assert_eq!(fixture.get("/startupz").await, (StatusCode::SERVICE_UNAVAILABLE, starting));
    assert_eq!(fixture.get("/livez").await.0, StatusCode::OK);
    assert_eq!(fixture.get("/health").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let (status, answer) = fixture.answer("/v1/completions", &json!({"prompt": "a"})).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("not_ready")));
    assert_eq!(fixture.get("/info").await.1["status"], "starting");

    let fixture = serving(&[]);
    assert_eq!(fixture.get("/readyz").await, (StatusCode::OK, json!({"status": "ready", "reason": null})));
    assert_eq!(fixture.get("/startupz").await.0, StatusCode::OK);
    fixture.app.set_draining();
    assert_eq!(fixture.get("/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let (status, answer) = fixture.answer("/v1/completions", &json!({"prompt": "a"})).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("shutting_down"))
    );

    let fixture =
        with_script(Script { status: Some(Status::Failed("why".to_owned())), ..Default::default() });
    let failed = json!({"status": "failed", "reason": "why"});
    assert_eq!(fixture.get("/readyz").await, (StatusCode::SERVICE_UNAVAILABLE, failed));
}

#[tokio::test]
async fn models_and_info_tell_what_is_served() {
    let fixture = serving(&[]);
    let (_, models) = fixture.get("/v1/models").await;
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["max_model_len"], 64);
    let (_, info) = fixture.get("/info").await;
    for (name, value) in [
        ("model_id", json!("tiny")),
        ("model_dtype", json!("bfloat16")),
        ("model_device_type", json!("cpu")),
        ("max_input_tokens", json!(60)),
        ("max_total_tokens", json!(64)),
        ("kv_cache_tokens", json!(256)),
        ("max_concurrent_requests", json!(128)),
        ("status", json!("ready")),
    ] {
        assert_eq!(info[name], value, "{name}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_lets_go_of_its_sequence() {
    struct Told(Arc<std::sync::atomic::AtomicBool>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }
    struct Endless(Arc<std::sync::atomic::AtomicBool>);
    impl Backend for Endless {
        fn submit(&self, _: Vec<TokenRequest>) -> Result<Vec<BoxStream<'static, TokenEvent>>, SubmitError> {
            let told = Told(Arc::clone(&self.0));
            let events = stream::unfold(told, |told| async move { Some((token(97, None), told)) });
            Ok(vec![events.boxed()])
        }
        fn status(&self) -> Status {
            Status::Ready
        }
    }
    let dropped = Arc::default();
    let fixture = starting();
    let info = serving(&[]).app.serving_info().unwrap().clone();
    let backend = Box::new(Endless(Arc::clone(&dropped)));
    fixture.app.serve(Serving { info, validator: validator(), backend });
    let response = fixture.post("/generate_stream", &json!({"inputs": "a"})).await;
    let mut body = response.into_body();
    for _ in 0..3 {
        body.frame().await.unwrap().unwrap();
    }
    assert!(!dropped.load(std::sync::atomic::Ordering::SeqCst));
    drop(body);
    assert!(dropped.load(std::sync::atomic::Ordering::SeqCst));
}

#[tokio::test]
async fn log_probabilities_have_the_same_digits_streamed_or_not() {
    let parameters = json!({"details": true});
    let events = || {
        let token = Token { id: TokenId(97), logprob: -0.1, top: Vec::new() };
        let events = vec![TokenEvent::Token { token, end: Some(EndReason::Length) }];
        with_script(Script { answers: Mutex::new([events].into()), ..Default::default() })
    };
    let body = json!({"inputs": "a", "parameters": parameters});
    for path in ["/generate", "/generate_stream"] {
        let text = text_of(events().post(path, &body).await).await;
        assert!(text.contains("\"logprob\":-0.1,"), "{text}");
    }
}
