//! The endpoints as clients see them: requests through all layers, answered by a scripted backend.

mod adapters;
mod errors;
mod grammars;
mod openai;
mod serving;
mod standing;
mod tgi;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use clap::Parser;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use grammar::{GrammarId, Source};
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
use crate::shards::GrammarError;
use crate::stream::TokenEvents;
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
    prepared: Mutex<Vec<Source>>,
    grammars: Option<Result<GrammarId, GrammarError>>,
}

struct Scripted(Arc<Script>);

impl Backend for Scripted {
    fn submit(&self, requests: Vec<TokenRequest>) -> Result<Vec<Box<dyn TokenEvents>>, SubmitError> {
        if let Some(refusal) = &self.0.refusal {
            return Err(refusal.clone());
        }
        let mut answers = self.0.answers.lock().unwrap();
        let streams = requests.iter().map(|_| {
            let events = stream::iter(answers.pop_front().expect("a script"));
            Box::new(events.boxed()) as Box<dyn TokenEvents>
        });
        let streams = streams.collect();
        self.0.submitted.lock().unwrap().extend(requests);
        Ok(streams)
    }

    fn status(&self) -> Status {
        self.0.status.clone().unwrap_or(Status::Ready)
    }

    fn prepare(&self, source: Source) -> BoxFuture<'static, Result<GrammarId, GrammarError>> {
        let answer = self.0.grammars.clone().unwrap_or(Ok(GrammarId(7)));
        self.0.prepared.lock().unwrap().push(source);
        Box::pin(async move { answer })
    }
}

fn token(id: u32, end: Option<EndReason>) -> TokenEvent {
    let top = vec![(TokenId(id), -0.25), (TokenId(u32::from(b'z')), f32::NEG_INFINITY)];
    TokenEvent::Token { token: Token { id: TokenId(id), logprob: -0.25, top }, end, at: Instant::now() }
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
    with_adapters(script, &[])
}

fn with_adapters(script: Script, names: &[&str]) -> Fixture {
    let adapter_names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
    let mut validator = validator();
    validator.models.adapters.clone_from(&adapter_names);
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
            adapter_names,
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
        validator,
        backend: Box::new(Scripted(Arc::clone(&fixture.script))),
    });
    fixture
}

/// As [`says`], less likely: each token has this log-probability.
fn says_at(text: &str, logprob: f32) -> Vec<TokenEvent> {
    let mut events = says(text);
    for event in &mut events {
        if let TokenEvent::Token { token, .. } = event {
            token.logprob = logprob;
        }
    }
    events
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

    async fn post_with(&self, path: &str, header: (&str, &str), body: &Value) -> Response<Body> {
        let request =
            Request::post(path).header("content-type", "application/json").header(header.0, header.1);
        self.send(request.body(body.to_string().into()).unwrap()).await
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
