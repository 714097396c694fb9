//! `POST /generate` and `POST /generate_stream`, as TGI has them.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue};
use proto::units::TokenId;
use serde::Serialize;
use serde_json::Value;

use super::app::{App, Generation};
use super::best_of;
use super::caller::{self, Caller};
use super::error::{self, TgiError};
use super::fields::Fields;
use super::grammar;
use super::sse::{self, Frames};
use crate::error::RequestError;
use crate::metrics;
use crate::scheduler::{Failure, Token, TokenRequest};
use crate::stream::{FinishReason, Generated, GeneratedToken};
use crate::text::tokenizer::Tokenizer;
use crate::validate::{Dialect, GenerationRequest, ModelChoice, Prompt, SamplingParameters};

/// Continues a prompt and answers when it is done.
pub(super) async fn generate(State(app): State<Arc<App>>, request: Request) -> Result<Response, TgiError> {
    metrics::record_request();
    answer(&app, request, Endpoint::Generate).await.map_err(recorded)
}

/// Continues a prompt and tells each token.
pub(super) async fn generate_stream(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, TgiError> {
    metrics::record_request();
    answer(&app, request, Endpoint::GenerateStream).await.map_err(recorded)
}

/// The form of Hugging Face's inference API, which `huggingface_hub` and TGI's own client use: one of the two above by
/// the field `stream`; the prompt is part of the text unless `return_full_text` is false, and an answer in one piece
/// is a list of one.
pub(super) async fn root(State(app): State<Arc<App>>, request: Request) -> Result<Response, TgiError> {
    metrics::record_request();
    answer(&app, request, Endpoint::Root).await.map_err(recorded)
}

fn recorded(error: RequestError) -> TgiError {
    error::record(&error);
    error.into()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Endpoint {
    Generate,
    GenerateStream,
    Root,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Whole,
    WholeInList,
    Stream,
}

impl Endpoint {
    fn take_mode(self, fields: &mut Fields) -> Result<Mode, RequestError> {
        let stream: Option<bool> = fields.take("stream")?;
        Ok(match self {
            // These two paths say it themselves.
            Self::Generate => Mode::Whole,
            Self::GenerateStream => Mode::Stream,
            Self::Root if stream == Some(true) => Mode::Stream,
            Self::Root => Mode::WholeInList,
        })
    }
}

async fn answer(app: &Arc<App>, request: Request, endpoint: Endpoint) -> Result<Response, RequestError> {
    let arrived = Instant::now();
    app.serving()?;
    let caller = Caller::of(request.headers())?;
    let mut fields = Fields::read(request).await?;
    let mode = endpoint.take_mode(&mut fields)?;
    let TgiRequest { inputs, generation, report } = TgiRequest::take(fields, endpoint, caller)?;
    if mode == Mode::Stream && report.details == Details::PromptAndOutput {
        let message = "`decoder_input_details` == true is not supported when streaming tokens";
        return Err(RequestError::invalid("decoder_input_details", message));
    }
    if mode == Mode::Stream && generation.choices() > 1 {
        let message = "`best_of` != 1 is not supported when streaming tokens";
        return Err(RequestError::invalid("best_of", message));
    }
    let input_characters = inputs.chars().count();
    let generation = app.generate(generation, arrived).await?;
    let full_text_before = if report.full_text { inputs } else { String::new() };
    match mode {
        Mode::Whole | Mode::WholeInList => {
            whole(app, mode, report, full_text_before, input_characters, generation).await
        }
        Mode::Stream => stream(app, report, full_text_before, input_characters, generation).await,
    }
}

/// What the client wrote.
struct TgiRequest {
    inputs: String,
    generation: GenerationRequest,
    report: Report,
}

/// What the answer tells beside the text.
#[derive(Clone, Copy)]
struct Report {
    details: Details,
    top_tokens: bool,
    full_text: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Details {
    None,
    Output,
    PromptAndOutput,
}

impl TgiRequest {
    fn take(mut fields: Fields, endpoint: Endpoint, caller: Caller) -> Result<Self, RequestError> {
        let inputs: String = fields.require("inputs")?;
        fields.refuse_misplaced(&caller::FIELDS, "parameters")?;
        let given = fields.object("parameters")?;
        // TGI samples where no parameters are given at all.
        let do_sample_default = given.is_none();
        let mut parameters = given.unwrap_or_default();
        parameters.refuse("watermark", |value| *value == Value::Bool(false), "leave it out")?;
        let grammar = grammar::take(&mut parameters, "grammar")?;
        let sampling = SamplingParameters {
            do_sample: Some(parameters.take("do_sample")?.unwrap_or(do_sample_default)),
            temperature: parameters.take("temperature")?,
            top_k: parameters.take("top_k")?,
            top_p: parameters.take("top_p")?,
            min_p: None,
            typical_p: parameters.take("typical_p")?,
            seed: parameters.seed()?,
            repetition_penalty: parameters.take("repetition_penalty")?,
            frequency_penalty: parameters.take("frequency_penalty")?,
            presence_penalty: None,
            logit_bias: Vec::new(),
        };
        let top_n_tokens: u32 = parameters.take("top_n_tokens")?.unwrap_or(0);
        let prefill = parameters.take("decoder_input_details")?.unwrap_or(false);
        let report = Report {
            details: match parameters.take("details")? {
                // TGI: the prompt's details imply the others.
                _ if prefill => Details::PromptAndOutput,
                Some(true) => Details::Output,
                Some(false) | None => Details::None,
            },
            top_tokens: top_n_tokens > 0,
            full_text: parameters.take("return_full_text")?.unwrap_or(endpoint == Endpoint::Root),
        };
        let generation = GenerationRequest {
            model: ModelChoice { model: None, adapter_id: parameters.take("adapter_id")? },
            prompt: Prompt::Texts(vec![inputs.clone()]),
            dialect: Dialect::Tgi,
            sampling,
            max_new_tokens: parameters.take("max_new_tokens")?,
            ignore_eos: false,
            top_n_tokens,
            prompt_logprobs: prefill,
            stop: parameters.strings("stop")?,
            n: 1,
            best_of: parameters.take("best_of")?,
            truncate: parameters.take("truncate")?,
            grammar,
            standing: caller.take(&mut parameters)?,
        };
        parameters.finish();
        fields.finish();
        Ok(Self { inputs, generation, report })
    }
}

/// A token as TGI writes it. Log-probabilities that are not finite are null.
#[derive(Serialize)]
struct TokenJson<'a> {
    id: TokenId,
    text: Cow<'a, str>,
    logprob: f32,
    special: bool,
}

/// A token of the prompt. The first one has no log-probability.
#[derive(Serialize)]
struct PrefillToken {
    id: TokenId,
    text: String,
    logprob: Option<f32>,
}

fn generated_token<'a>(tokenizer: &Tokenizer, token: &'a GeneratedToken) -> TokenJson<'a> {
    let text =
        if token.special { tokenizer.token_text(token.token.id).into() } else { token.text.as_str().into() };
    TokenJson { id: token.token.id, text, logprob: token.token.logprob, special: token.special }
}

fn top_tokens(tokenizer: &Tokenizer, token: &Token) -> Vec<TokenJson<'static>> {
    let json = |(id, logprob): &(TokenId, f32)| TokenJson {
        id: *id,
        text: tokenizer.token_text(*id).into(),
        logprob: *logprob,
        special: tokenizer.is_special(*id),
    };
    token.top.iter().map(json).collect()
}

fn prefill_tokens(tokenizer: &Tokenizer, prompt: &[TokenId], rest: &[Token]) -> Vec<PrefillToken> {
    let logprobs = std::iter::once(None).chain(rest.iter().map(|token| Some(token.logprob)));
    let json =
        |(id, logprob): (&TokenId, _)| PrefillToken { id: *id, text: tokenizer.token_text(*id), logprob };
    prompt.iter().zip(logprobs).map(json).collect()
}

/// TGI's word.
fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Eos => "eos_token",
        FinishReason::Length => "length",
        FinishReason::StopString => "stop_sequence",
    }
}

/// The answer in one piece.
async fn whole(
    app: &App,
    mode: Mode,
    report: Report,
    full_text_before: String,
    input_characters: usize,
    mut generation: Generation,
) -> Result<Response, RequestError> {
    let sequences = std::mem::take(&mut generation.sequences);
    let (arrived, validation) = (generation.arrived, generation.validation_time);
    let all = generation.collect().await?;
    let best = best_of::most_likely(&all);
    let (sequence, generated) = (&sequences[best], &all[best]);
    let details = (report.details != Details::None).then(|| {
        let of = |index: usize| WholeDetails::new(&app.tokenizer, report, &sequences[index], &all[index]);
        let others = (0..all.len()).filter(|&index| index != best);
        let others =
            others.map(|index| OtherSequence { generated_text: &all[index].text, details: of(index) });
        WholeDetails { best_of_sequences: (all.len() > 1).then(|| others.collect()), ..of(best) }
    });
    let times = Times { total: arrived.elapsed(), validation };
    let mut headers = time_headers(&times, sequence.prompt.len(), generated);
    headers.extend(compute_headers(app, input_characters));
    let body = Whole { generated_text: full_text_before + &generated.text, details };
    Ok(match mode {
        Mode::WholeInList => (headers, Json([body])).into_response(),
        Mode::Whole | Mode::Stream => (headers, Json(body)).into_response(),
    })
}

#[derive(Serialize)]
struct Whole<'a> {
    generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<WholeDetails<'a>>,
}

#[derive(Serialize)]
struct WholeDetails<'a> {
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PrefillToken>,
    tokens: Vec<TokenJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_tokens: Option<Vec<Vec<TokenJson<'a>>>>,
    /// The sequences that were less likely, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    best_of_sequences: Option<Vec<OtherSequence<'a>>>,
}

#[derive(Serialize)]
struct OtherSequence<'a> {
    generated_text: &'a str,
    #[serde(flatten)]
    details: WholeDetails<'a>,
}

impl<'a> WholeDetails<'a> {
    fn new(tokenizer: &Tokenizer, report: Report, sequence: &TokenRequest, generated: &'a Generated) -> Self {
        let top = || generated.tokens.iter().map(|token| top_tokens(tokenizer, &token.token)).collect();
        Self {
            finish_reason: finish_reason(generated.end.reason),
            generated_tokens: generated.end.generated_tokens,
            seed: seed(sequence),
            prefill: match report.details {
                Details::PromptAndOutput => prefill_tokens(tokenizer, &sequence.prompt, &generated.prompt),
                Details::Output | Details::None => Vec::new(),
            },
            tokens: generated.tokens.iter().map(|token| generated_token(tokenizer, token)).collect(),
            top_tokens: report.top_tokens.then(top),
            best_of_sequences: None,
        }
    }
}

/// The seed that was used; none where nothing was drawn.
fn seed(sequence: &TokenRequest) -> Option<u64> {
    (sequence.sampling.temperature > 0.0).then_some(sequence.sampling.seed)
}

struct Times {
    total: Duration,
    validation: Duration,
}

fn time_headers(times: &Times, prompt_tokens: usize, generated: &Generated) -> HeaderMap {
    let timings = generated.end.timings;
    let tokens = generated.end.generated_tokens;
    let milliseconds = |duration: Duration| HeaderValue::from(duration.as_millis() as u64);
    let mut headers = HeaderMap::new();
    let seconds = format!("{:.6}", times.total.as_secs_f64());
    headers.insert("x-compute-time", HeaderValue::try_from(seconds).expect("digits are valid in a header"));
    headers.insert("x-total-time", milliseconds(times.total));
    headers.insert("x-validation-time", milliseconds(times.validation));
    headers.insert("x-queue-time", milliseconds(timings.queue));
    headers.insert("x-inference-time", milliseconds(timings.inference));
    headers.insert("x-time-per-token", milliseconds(timings.inference / tokens.max(1)));
    headers.insert("x-prompt-tokens", HeaderValue::from(prompt_tokens));
    headers.insert("x-generated-tokens", HeaderValue::from(tokens));
    headers
}

fn compute_headers(app: &App, input_characters: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let device = app.serving_info().map(|info| info.device.to_string()).unwrap_or_default();
    headers.insert("x-compute-type", HeaderValue::try_from(device).expect("a device's name is a word"));
    headers.insert("x-compute-characters", HeaderValue::from(input_characters));
    headers
}

/// The answer token by token.
async fn stream(
    app: &App,
    report: Report,
    full_text_before: String,
    input_characters: usize,
    mut generation: Generation,
) -> Result<Response, RequestError> {
    let sequence = generation.sequences.remove(0);
    let frames = GenerateFrames {
        tokenizer: Arc::clone(&app.tokenizer),
        report,
        text: full_text_before,
        index: 0,
        seed: seed(&sequence),
        prompt_tokens: sequence.prompt.len(),
    };
    let mut response = sse::response(generation.streams, frames).await?;
    response.headers_mut().extend(compute_headers(app, input_characters));
    Ok(response)
}

struct GenerateFrames {
    tokenizer: Arc<Tokenizer>,
    report: Report,
    /// All text so far.
    text: String,
    /// Tokens so far.
    index: u32,
    seed: Option<u64>,
    prompt_tokens: usize,
}

#[derive(Serialize)]
struct StreamFrame<'a> {
    index: u32,
    token: TokenJson<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_tokens: Option<Vec<TokenJson<'a>>>,
    generated_text: Option<String>,
    details: Option<StreamDetails>,
}

#[derive(Serialize)]
struct StreamDetails {
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    input_length: usize,
}

impl Frames for GenerateFrames {
    fn token(&mut self, _: usize, token: &GeneratedToken, out: &mut Vec<u8>) {
        self.index += 1;
        self.text.push_str(&token.text);
        let told = self.report.details != Details::None;
        let details = token.end.as_ref().filter(|_| told).map(|end| StreamDetails {
            finish_reason: finish_reason(end.reason),
            generated_tokens: end.generated_tokens,
            seed: self.seed,
            input_length: self.prompt_tokens,
        });
        let frame = StreamFrame {
            index: self.index,
            token: generated_token(&self.tokenizer, token),
            top_tokens: self.report.top_tokens.then(|| top_tokens(&self.tokenizer, &token.token)),
            generated_text: token.end.as_ref().map(|_| std::mem::take(&mut self.text)),
            details,
        };
        sse::data(out, &frame);
    }

    fn failed(&mut self, failure: Failure, out: &mut Vec<u8>) {
        let failure = RequestError::Failed(failure);
        error::record(&failure);
        sse::data(out, &error::tgi_body(&failure));
    }

    fn end(&mut self, _: &mut Vec<u8>) {}
}
