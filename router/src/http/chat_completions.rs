//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::app::{App, Generation};
use super::error::{self, OpenAiError};
use super::fields::Fields;
use super::openai::{self, Head, ReportedUsage, Streaming, TokenLogprob, Usage};
use super::sse::{self, Frames};
use crate::error::RequestError;
use crate::metrics;
use crate::scheduler::Failure;
use crate::stream::{Generated, GeneratedToken};
use crate::text::chat_template::Conversation;
use crate::text::tokenizer::Tokenizer;
use crate::validate::{Dialect, GenerationRequest, Prompt};

/// Answers a chat, at once or as a stream.
pub(super) async fn chat_completions(
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
    let chat = ChatRequest::take(Fields::read(request).await?)?;
    let generation = app.generate(chat.generation, arrived).await?;
    if chat.streaming.stream {
        let frames = ChatFrames {
            head: Head::new("chatcmpl", "chat.completion.chunk", &app.model_name),
            tokenizer: Arc::clone(&app.tokenizer),
            logprobs: chat.logprobs,
            include_usage: chat.streaming.include_usage,
            begun: vec![false; generation.streams.len()],
            prompt_tokens: generation.prompt_tokens,
            completion_tokens: 0,
        };
        return sse::response(generation.streams, frames).await;
    }
    whole(app, chat.logprobs, generation).await
}

/// What the client wrote.
struct ChatRequest {
    generation: GenerationRequest,
    streaming: Streaming,
    logprobs: bool,
}

impl ChatRequest {
    fn take(mut fields: Fields) -> Result<Self, RequestError> {
        let messages: Vec<Map<String, Value>> = fields.require("messages")?;
        let messages: Vec<Value> = messages.into_iter().map(message).collect::<Result<_, _>>()?;
        if messages.is_empty() {
            return Err(RequestError::invalid(
                "messages",
                "`messages` cannot be empty: send at least one message",
            ));
        }
        let tools: Option<Vec<Value>> = fields.take("tools")?;
        let tools = tools.filter(|tools| !tools.is_empty());
        let tools = match ToolChoice::take(&mut fields)? {
            ToolChoice::Auto => tools,
            ToolChoice::None => None,
        };
        check_response_format(&mut fields)?;
        openai::refuse_unsupported(&mut fields)?;
        fields.refuse("functions", |_| false, "use `tools`")?;
        fields.refuse("function_call", |value| value == "auto" || value == "none", "use `tools`")?;
        fields.refuse("audio", |_| false, "the model gives text")?;
        fields.refuse("modalities", |value| *value == json!(["text"]), "the model gives text")?;
        fields.refuse("tool_prompt", |_| false, "write it into a system message")?;
        fields.refuse("web_search_options", |_| false, "the server has no access to the network")?;

        let logprobs = fields.take("logprobs")?.unwrap_or(false);
        let top_logprobs: Option<u32> = fields.take("top_logprobs")?;
        if top_logprobs.is_some_and(|top| top > 0) && !logprobs {
            let message = "`top_logprobs` needs `logprobs`: set it to true";
            return Err(RequestError::invalid("top_logprobs", message));
        }
        let variables: Option<Map<String, Value>> = fields.take("chat_template_kwargs")?;
        // The older name of the same field.
        let max_tokens: Option<u32> = fields.take("max_tokens")?;
        let generation = GenerationRequest {
            prompt: Prompt::Chat(Conversation { messages, tools, variables: variables.unwrap_or_default() }),
            dialect: Dialect::OpenAi,
            sampling: openai::take_sampling(&mut fields)?,
            max_new_tokens: fields.take("max_completion_tokens")?.or(max_tokens),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            top_n_tokens: top_logprobs.unwrap_or(0),
            prompt_logprobs: false,
            stop: fields.strings("stop")?,
            n: fields.take("n")?.unwrap_or(1),
            truncate: None,
        };
        let streaming = openai::take_streaming(&mut fields)?;
        // Any name is answered by the model that there is.
        fields.without_effect(&["model", "reasoning_effort"]);
        fields.without_effect(openai::WITHOUT_EFFECT);
        fields.finish();
        Ok(Self { generation, streaming, logprobs })
    }
}

/// A message in the form that templates expect: its content is one string, and its calls' arguments are objects.
fn message(mut message: Map<String, Value>) -> Result<Value, RequestError> {
    if !message.get("role").is_some_and(Value::is_string) {
        return Err(RequestError::invalid(
            "messages",
            "`messages`: each message needs a `role`, such as \"user\"",
        ));
    }
    let calls =
        message.get("tool_calls").is_some_and(|calls| calls.as_array().is_some_and(|list| !list.is_empty()));
    let content = match message.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts.iter().map(part_text).collect::<Result<String, _>>()?,
        None | Some(Value::Null) if calls || message["role"] == "assistant" => String::new(),
        _ => {
            let message = "`messages`: the `content` of a message must be a string or a list of text parts";
            return Err(RequestError::invalid("messages", message));
        }
    };
    message.insert("content".to_owned(), content.into());
    // Clients fill in what they do not set; templates ask whether these are defined.
    message.retain(|_, value| !value.is_null());
    if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for call in calls {
            parse_arguments(call);
        }
    }
    Ok(Value::Object(message))
}

fn part_text(part: &Value) -> Result<&str, RequestError> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text") | None, _) => Err(RequestError::invalid(
            "messages",
            "`messages`: a text part is {\"type\": \"text\", \"text\": ...}",
        )),
        (Some(_), _) => Err(RequestError::unsupported(
            "messages",
            "`messages`: only parts of type `text` are supported: the model reads no images, sounds or files",
        )),
    }
}

/// OpenAI's arguments are JSON in a string; templates write them with `tojson`, and would quote them once more.
fn parse_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok())
        && object.is_object()
    {
        *arguments = object;
    }
}

/// Whether the tools are shown to the model.
enum ToolChoice {
    Auto,
    None,
}

impl ToolChoice {
    fn take(fields: &mut Fields) -> Result<Self, RequestError> {
        let given: Option<Value> = fields.take("tool_choice")?;
        match given.as_ref().map(|value| value.as_str()) {
            None | Some(Some("auto")) => Ok(Self::Auto),
            Some(Some("none")) => Ok(Self::None),
            Some(_) => Err(RequestError::unsupported(
                "tool_choice",
                "`tool_choice` other than \"auto\" and \"none\" needs grammar-constrained generation, which is not \
                 available yet: use \"auto\", and ask for the call in a message",
            )),
        }
    }
}

fn check_response_format(fields: &mut Fields) -> Result<(), RequestError> {
    let format: Option<Value> = fields.take("response_format")?;
    match format.as_ref().map(|format| format["type"].as_str()) {
        None | Some(Some("text")) => Ok(()),
        Some(_) => Err(RequestError::unsupported(
            "response_format",
            "`response_format` other than {\"type\": \"text\"} needs grammar-constrained generation, which is not \
             available yet: describe the form of the answer in a message",
        )),
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
        .map(|(index, choice)| WholeChoice {
            index,
            logprobs: logprobs.then(|| Logprobs::all(&app.tokenizer, &choice)),
            finish_reason: openai::finish_reason(choice.end.reason),
            message: Message { role: "assistant", content: choice.text },
        })
        .collect();
    let head = Head::new("chatcmpl", "chat.completion", &app.model_name);
    Ok(Json(ChatCompletion { head, choices, usage: Usage::new(prompt_tokens, completion_tokens) })
        .into_response())
}

#[derive(Serialize)]
struct ChatCompletion {
    #[serde(flatten)]
    head: Head,
    choices: Vec<WholeChoice>,
    usage: Usage,
}

#[derive(Serialize)]
struct WholeChoice {
    index: usize,
    message: Message,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
}

impl Logprobs {
    fn all(tokenizer: &Tokenizer, choice: &Generated) -> Self {
        let content = choice.tokens.iter().filter(|token| openai::is_content(token));
        Self { content: content.map(|token| TokenLogprob::new(tokenizer, &token.token)).collect() }
    }

    fn one(tokenizer: &Tokenizer, token: &GeneratedToken) -> Self {
        Self { content: vec![TokenLogprob::new(tokenizer, &token.token)] }
    }
}

/// The answer in chunks.
struct ChatFrames {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    include_usage: bool,
    /// Of each choice, whether its first chunk was sent.
    begun: Vec<bool>,
    prompt_tokens: usize,
    completion_tokens: usize,
}

#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "ReportedUsage::is_absent")]
    usage: ReportedUsage,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

impl ChatFrames {
    fn chunk(&self, choice: Choice) -> String {
        let usage = ReportedUsage::later(self.include_usage);
        sse::data(&Chunk { head: &self.head, choices: vec![choice], usage })
    }
}

impl Frames for ChatFrames {
    fn token(&mut self, index: usize, token: GeneratedToken) -> String {
        let mut frames = String::new();
        if !std::mem::replace(&mut self.begun[index], true) {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            frames += &self.chunk(Choice { index, delta, logprobs: None, finish_reason: None });
        }
        let logprobs =
            (self.logprobs && openai::is_content(&token)).then(|| Logprobs::one(&self.tokenizer, &token));
        if !token.text.is_empty() || logprobs.is_some() {
            let delta = Delta { role: None, content: Some(token.text) };
            frames += &self.chunk(Choice { index, delta, logprobs, finish_reason: None });
        }
        if let Some(end) = token.end {
            self.completion_tokens += end.generated_tokens as usize;
            let finish_reason = Some(openai::finish_reason(end.reason));
            frames += &self.chunk(Choice { index, delta: Delta::default(), logprobs: None, finish_reason });
        }
        frames
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
            frames += &sse::data(&Chunk { head: &self.head, choices: Vec::new(), usage });
        }
        frames + openai::DONE
    }
}
