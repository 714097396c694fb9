//! What OpenAI's endpoints share: the way from a body to an answer, whole or in chunks, and parts of their JSON.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::app::{App, Generation};
use super::best_of;
use super::caller::Caller;
use super::error::{self, OpenAiError};
use super::fields::Fields;
use super::sse::{self, Frames};
use crate::error::RequestError;
use crate::metrics;
use crate::scheduler::{Failure, Token};
use crate::stream::{Ended, FinishReason, Generated, GeneratedToken};
use crate::text::tokenizer::Tokenizer;
use crate::validate::{GenerationRequest, ModelChoice, SamplingParameters, StandingParameters};

/// Behind the last chunk of a stream.
const DONE: &[u8] = b"data: [DONE]\n\n";

/// The version of the server: the same numbers come only from the same one.
const SYSTEM_FINGERPRINT: &str = concat!("lamplighter-", env!("CARGO_PKG_VERSION"));

/// In place of minus infinity, as OpenAI writes it.
const LEAST_LOGPROB: f32 = -9999.0;

/// Fields without an effect by their definition: they are about OpenAI's accounts and storage, or hints that a server
/// is free not to follow.
const WITHOUT_EFFECT: &[&str] = &[
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "verbosity",
];

/// What is an endpoint's own: its fields, and the form of its choices.
pub(super) trait Endpoint: Sized + Send + 'static {
    /// What the ids of its answers begin with.
    const ID_PREFIX: &'static str;
    /// `object` of an answer in one piece.
    const WHOLE: &'static str;
    /// `object` of a chunk.
    const CHUNK: &'static str;

    /// A choice of an answer in one piece.
    type WholeChoice: Serialize;
    /// A choice of a chunk.
    type ChunkChoice<'a>: Serialize;
    /// What must be known of a choice's earlier chunks.
    type Progress: Clone + Default + Send;

    /// Takes its fields.
    fn take(
        fields: &mut Fields,
        standing: StandingParameters,
    ) -> Result<(GenerationRequest, Self), RequestError>;

    /// A choice of an answer in one piece.
    fn whole(&self, tokenizer: &Tokenizer, index: usize, generated: Generated) -> Self::WholeChoice;

    /// Gives `write` the chunks for a token of the choice `index`, if there is something to say.
    fn chunks<'a>(
        &self,
        tokenizer: &Tokenizer,
        index: usize,
        progress: &mut Self::Progress,
        token: &'a GeneratedToken,
        write: impl FnMut(Self::ChunkChoice<'a>),
    );
}

/// Answers a request to an endpoint, at once or as a stream.
pub(super) async fn endpoint<E: Endpoint>(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, OpenAiError> {
    metrics::record_request();
    answer::<E>(&app, request).await.map_err(|error| {
        error::record(&error);
        error.into()
    })
}

async fn answer<E: Endpoint>(app: &Arc<App>, request: Request) -> Result<Response, RequestError> {
    let arrived = Instant::now();
    app.serving()?;
    let caller = Caller::of(request.headers())?;
    let mut fields = Fields::read(request).await?;
    let standing = caller.take(&mut fields)?;
    let streaming = take_streaming(&mut fields)?;
    refuse_unsupported(&mut fields)?;
    let (generation, endpoint) = E::take(&mut fields, standing)?;
    fields.without_effect(WITHOUT_EFFECT);
    fields.finish();

    if streaming.stream && generation.choices() > generation.n {
        let message = "`best_of` above `n` cannot be streamed: which sequence is best is known at the end";
        return Err(RequestError::invalid("best_of", message));
    }
    let generation = app.generate(generation, arrived).await?;
    if streaming.stream {
        let frames = ChunkFrames::new(app, endpoint, &generation, streaming.include_usage);
        return sse::response(generation.streams, frames).await;
    }
    whole(app, &endpoint, generation).await
}

/// The answer in one piece.
async fn whole<E: Endpoint>(
    app: &App,
    endpoint: &E,
    generation: Generation,
) -> Result<Response, RequestError> {
    let mut tally = Tally::new(&generation);
    let (per_prompt, answers) = (generation.choices_per_prompt, generation.answers_per_prompt);
    let head = Head::new(E::ID_PREFIX, E::WHOLE, &generation.model_name);
    let mut choices = generation.collect().await?;
    for (index, choice) in choices.iter().enumerate() {
        tally.add(index, &choice.end);
    }
    if answers < per_prompt {
        choices = best_of::keep_best(choices, per_prompt, answers);
    }
    let choices = choices.into_iter().enumerate();
    let choices = choices.map(|(index, choice)| endpoint.whole(&app.tokenizer, index, choice)).collect();
    Ok(Json(Whole { head, choices, usage: tally.usage() }).into_response())
}

#[derive(Serialize)]
struct Whole<C> {
    #[serde(flatten)]
    head: Head,
    choices: Vec<C>,
    usage: Usage,
}

/// The answer in chunks. All that they have in common is written once, when the stream begins.
struct ChunkFrames<E: Endpoint> {
    endpoint: E,
    tokenizer: Arc<Tokenizer>,
    /// Up to the one choice of a chunk.
    beginning: Vec<u8>,
    include_usage: bool,
    /// Of each choice.
    progress: Vec<E::Progress>,
    tally: Tally,
}

impl<E: Endpoint> ChunkFrames<E> {
    fn new(app: &App, endpoint: E, generation: &Generation, include_usage: bool) -> Self {
        let mut beginning = b"data: ".to_vec();
        sse::json(&mut beginning, &Head::new(E::ID_PREFIX, E::CHUNK, &generation.model_name));
        assert_eq!(beginning.pop(), Some(b'}'), "a head is an object");
        beginning.extend_from_slice(b",\"choices\":[");
        Self {
            endpoint,
            tokenizer: Arc::clone(&app.tokenizer),
            beginning,
            include_usage,
            progress: vec![E::Progress::default(); generation.streams.len()],
            tally: Tally::new(generation),
        }
    }
}

impl<E: Endpoint> Frames for ChunkFrames<E> {
    fn token(&mut self, index: usize, token: &GeneratedToken, out: &mut Vec<u8>) {
        if let Some(end) = &token.end {
            self.tally.add(index, end);
        }
        // `usage` comes with the last chunk; where it was asked for, the others say that it is to come.
        let end: &[u8] = if self.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        let progress = &mut self.progress[index];
        self.endpoint.chunks(&self.tokenizer, index, progress, token, |choice| {
            out.extend_from_slice(&self.beginning);
            sse::json(out, &choice);
            out.extend_from_slice(end);
        });
    }

    fn failed(&mut self, failure: Failure, out: &mut Vec<u8>) {
        let failure = RequestError::Failed(failure);
        error::record(&failure);
        sse::data(out, &error::openai_body(&failure));
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.include_usage {
            out.extend_from_slice(&self.beginning);
            out.extend_from_slice(b"],\"usage\":");
            sse::json(out, &self.tally.usage());
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(DONE);
    }
}

/// What every answer begins with.
#[derive(Debug, Clone, Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Head {
    /// `prefix` of a new id, and the answer's kind.
    fn new(prefix: &str, object: &'static str, model: &str) -> Self {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            id: format!("{prefix}-{:032x}", rand::random::<u128>()),
            object,
            created: since_1970.map_or(0, |since| since.as_secs()),
            model: model.to_owned(),
            system_fingerprint: SYSTEM_FINGERPRINT,
        }
    }
}

/// Counts of tokens.
#[derive(Debug, Clone, Copy, Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PromptTokensDetails {
    cached_tokens: usize,
}

/// Counts the tokens of an answer.
struct Tally {
    prompt_tokens: usize,
    completion_tokens: usize,
    choices_per_prompt: usize,
    /// Of each prompt, tokens that none of its choices had to compute: choices find each other's, too, and the client
    /// sent the prompt once.
    cached_tokens: Vec<Option<usize>>,
}

impl Tally {
    fn new(generation: &Generation) -> Self {
        let choices_per_prompt = generation.choices_per_prompt;
        Self {
            prompt_tokens: generation.prompt_tokens,
            completion_tokens: 0,
            choices_per_prompt,
            cached_tokens: vec![None; generation.streams.len().div_ceil(choices_per_prompt)],
        }
    }

    /// Adds the choice `index`.
    fn add(&mut self, index: usize, end: &Ended) {
        self.completion_tokens += end.generated_tokens as usize;
        let cached = &mut self.cached_tokens[index / self.choices_per_prompt];
        *cached = Some(cached.map_or(end.cached_tokens, |fewest| fewest.min(end.cached_tokens)));
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: self.cached_tokens.iter().flatten().sum(),
            },
        }
    }
}

/// A token of `logprobs.content`.
#[derive(Debug, Serialize)]
pub(super) struct TokenLogprob {
    #[serde(flatten)]
    token: TokenText,
    top_logprobs: Vec<TokenText>,
}

#[derive(Debug, Serialize)]
struct TokenText {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl TokenLogprob {
    pub(super) fn new(tokenizer: &Tokenizer, token: &Token) -> Self {
        let text = |id, value| {
            let bytes = tokenizer.token_bytes(id);
            TokenText { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: logprob(value), bytes }
        };
        Self {
            token: text(token.id, token.logprob),
            top_logprobs: token.top.iter().map(|(id, value)| text(*id, *value)).collect(),
        }
    }
}

/// JSON has no infinity.
pub(super) fn logprob(value: f32) -> f32 {
    if value.is_finite() { value } else { LEAST_LOGPROB }
}

/// Whether log-probabilities of this token are reported: all but the end-of-sequence token's, which is no content.
pub(super) fn is_content(token: &GeneratedToken) -> bool {
    !(token.special && token.end.as_ref().is_some_and(|end| end.reason == FinishReason::Eos))
}

/// OpenAI's word.
pub(super) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Eos | FinishReason::StopString => "stop",
        FinishReason::Length => "length",
    }
}

/// Which model, or which adapter of it.
pub(super) fn take_model(fields: &mut Fields) -> Result<ModelChoice, RequestError> {
    Ok(ModelChoice { model: fields.take("model")?, adapter_id: fields.take("adapter_id")? })
}

/// The sampling fields, OpenAI's and the extensions that other servers have too.
pub(super) fn take_sampling(fields: &mut Fields) -> Result<SamplingParameters, RequestError> {
    Ok(SamplingParameters {
        do_sample: None,
        temperature: fields.take("temperature")?,
        top_k: fields.take("top_k")?,
        top_p: fields.take("top_p")?,
        min_p: fields.take("min_p")?,
        typical_p: fields.take("typical_p")?,
        seed: fields.seed()?,
        repetition_penalty: fields.take("repetition_penalty")?,
        frequency_penalty: fields.take("frequency_penalty")?,
        presence_penalty: fields.take("presence_penalty")?,
        logit_bias: take_logit_bias(fields)?,
    })
}

fn take_logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, RequestError> {
    let given: Option<HashMap<String, f32>> = fields.take("logit_bias")?;
    given
        .unwrap_or_default()
        .into_iter()
        .map(|(id, bias)| {
            id.parse().map(|id| (id, bias)).map_err(|_| {
                let message = "`logit_bias`: the keys must be token ids, as in {\"42\": -100}";
                RequestError::invalid("logit_bias", message)
            })
        })
        .collect()
}

/// `stream` and `stream_options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Streaming {
    stream: bool,
    include_usage: bool,
}

fn take_streaming(fields: &mut Fields) -> Result<Streaming, RequestError> {
    let stream = fields.take("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    let include_usage = match options {
        Some(_) if !stream => {
            let message = "`stream_options` is only for streams: leave it out, or set `stream` to true";
            return Err(RequestError::invalid("stream_options", message));
        }
        Some(mut options) => {
            let include_usage = options.take("include_usage")?.unwrap_or(false);
            options.without_effect(&["include_obfuscation"]);
            options.finish();
            include_usage
        }
        None => false,
    };
    Ok(Streaming { stream, include_usage })
}

/// Fields of both OpenAI endpoints that need what is not there yet.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), RequestError> {
    // Other servers' names for the same; as unknown fields they would be ignored.
    for name in
        ["grammar", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"]
    {
        fields.refuse(name, |_| false, "use `response_format`")?;
    }
    fields.refuse("watermark", |value| *value == Value::Bool(false), "leave it out")?;
    fields.refuse("use_beam_search", |value| *value == Value::Bool(false), "leave it out")
}
