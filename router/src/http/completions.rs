//! `POST /v1/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use proto::units::TokenId;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::app::{App, Generation};
use super::error::{self, OpenAiError};
use super::fields::Fields;
use super::openai::{self, Head, ReportedUsage, Streaming, Usage};
use super::sse::{self, Frames};
use crate::error::RequestError;
use crate::metrics;
use crate::scheduler::Failure;
use crate::stream::GeneratedToken;
use crate::text::tokenizer::Tokenizer;
use crate::validate::{Dialect, GenerationRequest, Prompt};

/// OpenAI's default for this endpoint.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// OpenAI's limit of `logprobs` for this endpoint.
const MAX_LOGPROBS: u32 = 5;

/// Continues one or several prompts, at once or as a stream.
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, OpenAiError> {
    metrics::record_request();
    answer(&app, request).await.map_err(|error| {
        error::record(&error);
        error.into()
    })
}

async fn answer(app: &Arc<App>, request: Request) -> Result<Response, RequestError> {
    let arrived = Instant::now();
    app.serving()?;
    let completion = CompletionRequest::take(Fields::read(request).await?)?;
    let generation = app.generate(completion.generation, arrived).await?;
    if completion.streaming.stream {
        let frames = CompletionFrames {
            head: Head::new("cmpl", "text_completion", &app.model_name),
            tokenizer: Arc::clone(&app.tokenizer),
            logprobs: completion.logprobs,
            include_usage: completion.streaming.include_usage,
            text_chars: vec![0; generation.streams.len()],
            prompt_tokens: generation.prompt_tokens,
            completion_tokens: 0,
        };
        return sse::response(generation.streams, frames).await;
    }
    whole(app, completion.logprobs, generation).await
}

/// What the client wrote.
struct CompletionRequest {
    generation: GenerationRequest,
    streaming: Streaming,
    logprobs: bool,
}

impl CompletionRequest {
    fn take(mut fields: Fields) -> Result<Self, RequestError> {
        let prompt = prompt(fields.require("prompt")?)?;
        openai::refuse_unsupported(&mut fields)?;
        let empty = |value: &Value| value.as_str() == Some("");
        fields.refuse("suffix", empty, "preprocess the prompt, if the model was trained to fill in")?;
        fields.refuse(
            "echo",
            |value| *value == Value::Bool(false),
            "put the prompt before the text yourself",
        )?;
        fields.refuse(
            "response_format",
            |format| format["type"] == "text",
            "it needs grammar-constrained generation; describe the form of the answer in the prompt",
        )?;
        let logprobs: Option<u32> = fields.take("logprobs")?;
        if let Some(given) = logprobs.filter(|given| *given > MAX_LOGPROBS) {
            let message = format!("`logprobs` must be >= 0 and <= {MAX_LOGPROBS}. Given: {given}");
            return Err(RequestError::invalid("logprobs", message));
        }
        let generation = GenerationRequest {
            prompt,
            dialect: Dialect::OpenAi,
            sampling: openai::take_sampling(&mut fields)?,
            max_new_tokens: Some(fields.take("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS)),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            top_n_tokens: logprobs.unwrap_or(0),
            prompt_logprobs: false,
            stop: fields.strings("stop")?,
            n: fields.take("n")?.unwrap_or(1),
            truncate: None,
        };
        let streaming = openai::take_streaming(&mut fields)?;
        // Any name is answered by the model that there is.
        fields.without_effect(&["model"]);
        fields.without_effect(openai::WITHOUT_EFFECT);
        fields.finish();
        Ok(Self { generation, streaming, logprobs: logprobs.is_some() })
    }
}

/// A text, texts, a prompt's token ids, or several prompts' token ids.
fn prompt(given: Value) -> Result<Prompt, RequestError> {
    let invalid = |error: &dyn std::fmt::Display| {
        let message = format!(
            "`prompt` must be a string, a list of strings, or token ids (in one list or several): {error}"
        );
        RequestError::invalid("prompt", message)
    };
    match &given {
        Value::String(text) => Ok(Prompt::Texts(vec![text.clone()])),
        Value::Array(list) => match list.first() {
            Some(Value::Number(_)) => serde_json::from_value::<Vec<TokenId>>(given)
                .map(|ids| Prompt::Ids(vec![ids]))
                .map_err(|e| invalid(&e)),
            Some(Value::Array(_)) => {
                serde_json::from_value::<Vec<Vec<TokenId>>>(given).map(Prompt::Ids).map_err(|e| invalid(&e))
            }
            _ => serde_json::from_value::<Vec<String>>(given).map(Prompt::Texts).map_err(|e| invalid(&e)),
        },
        _ => Err(invalid(&"it is neither")),
    }
}

/// The answer in one piece.
async fn whole(app: &App, logprobs: bool, generation: Generation) -> Result<Response, RequestError> {
    let prompt_tokens = generation.prompt_tokens;
    let choices = generation.collect().await?;
    let completion_tokens = choices.iter().map(|choice| choice.end.generated_tokens as usize).sum();
    let choices = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| {
            let logprobs = logprobs.then(|| {
                let mut logprobs = Logprobs::default();
                let mut text_chars = 0;
                for token in &choice.tokens {
                    logprobs.push(&app.tokenizer, token, text_chars);
                    text_chars += token.text.chars().count();
                }
                logprobs
            });
            Choice {
                index,
                text: choice.text,
                logprobs,
                finish_reason: Some(openai::finish_reason(choice.end.reason)),
            }
        })
        .collect();
    let head = Head::new("cmpl", "text_completion", &app.model_name);
    let usage = ReportedUsage::Now(Usage::new(prompt_tokens, completion_tokens));
    Ok(Json(Completion { head: &head, choices, usage }).into_response())
}

#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "ReportedUsage::is_absent")]
    usage: ReportedUsage,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

/// Four lists of the same length.
#[derive(Default, Serialize)]
#[expect(clippy::struct_field_names, reason = "the fields' names are OpenAI's")]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

impl Logprobs {
    /// `text_chars`: characters of text before this token.
    fn push(&mut self, tokenizer: &Tokenizer, token: &GeneratedToken, text_chars: usize) {
        if !openai::is_content(token) {
            return;
        }
        let entry =
            |(id, value): &(TokenId, f32)| (tokenizer.token_text(*id), json!(openai::logprob(*value)));
        self.tokens.push(tokenizer.token_text(token.token.id));
        self.token_logprobs.push(openai::logprob(token.token.logprob));
        self.top_logprobs.push(token.token.top.iter().map(entry).collect());
        self.text_offset.push(text_chars);
    }
}

/// The answer in chunks.
struct CompletionFrames {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    include_usage: bool,
    /// Of each choice, characters sent.
    text_chars: Vec<usize>,
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Frames for CompletionFrames {
    fn token(&mut self, index: usize, token: GeneratedToken) -> String {
        let logprobs = (self.logprobs && openai::is_content(&token)).then(|| {
            let mut logprobs = Logprobs::default();
            logprobs.push(&self.tokenizer, &token, self.text_chars[index]);
            logprobs
        });
        self.text_chars[index] += token.text.chars().count();
        if token.text.is_empty() && logprobs.is_none() && token.end.is_none() {
            return String::new();
        }
        if let Some(end) = &token.end {
            self.completion_tokens += end.generated_tokens as usize;
        }
        let finish_reason = token.end.map(|end| openai::finish_reason(end.reason));
        let choice = Choice { index, text: token.text, logprobs, finish_reason };
        let usage = ReportedUsage::later(self.include_usage);
        sse::data(&Completion { head: &self.head, choices: vec![choice], usage })
    }

    fn failed(&mut self, failure: Failure) -> String {
        let failure = RequestError::Failed(failure);
        error::record(&failure);
        sse::data(&error::openai_body(&failure))
    }

    fn end(&mut self) -> String {
        let mut frames = String::new();
        if self.include_usage {
            let usage = ReportedUsage::Now(Usage::new(self.prompt_tokens, self.completion_tokens));
            frames += &sse::data(&Completion { head: &self.head, choices: Vec::new(), usage });
        }
        frames + openai::DONE
    }
}
