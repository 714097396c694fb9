//! JSON that OpenAI's endpoints share.

use std::collections::HashMap;

use serde::Serialize;
use serde_json::Value;

use super::fields::Fields;
use crate::error::RequestError;
use crate::scheduler::Token;
use crate::stream::{FinishReason, GeneratedToken};
use crate::text::tokenizer::Tokenizer;
use crate::validate::SamplingParameters;

/// Behind the last chunk of a stream.
pub(super) const DONE: &str = "data: [DONE]\n\n";

/// The version of the server: the same numbers come only from the same one.
pub(super) const SYSTEM_FINGERPRINT: &str = concat!("lamplighter-", env!("CARGO_PKG_VERSION"));

/// In place of minus infinity, as OpenAI writes it.
const LEAST_LOGPROB: f32 = -9999.0;

/// Fields without an effect by their definition: they are about OpenAI's accounts and storage, or hints that a server
/// is free not to follow.
pub(super) const WITHOUT_EFFECT: &[&str] = &[
    "user",
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

/// What every answer begins with.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Head {
    /// `prefix` of a new id, and the answer's kind.
    pub(super) fn new(prefix: &str, object: &'static str, model: &str) -> Self {
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
#[expect(clippy::struct_field_names, reason = "the fields' names are OpenAI's")]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    pub(super) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// `usage` of an answer or of a chunk.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(untagged)]
pub(super) enum ReportedUsage {
    /// Not asked for: there is no such field.
    Absent,
    /// To come with the last chunk: null.
    Later,
    /// Here.
    Now(Usage),
}

impl ReportedUsage {
    /// Of a chunk that is not the last one.
    pub(super) fn later(include_usage: bool) -> Self {
        if include_usage { Self::Later } else { Self::Absent }
    }

    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
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
pub(super) struct Streaming {
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

pub(super) fn take_streaming(fields: &mut Fields) -> Result<Streaming, RequestError> {
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
pub(super) fn refuse_unsupported(fields: &mut Fields) -> Result<(), RequestError> {
    fields.refuse("grammar", |_| false, "leave it out, and describe the form of the answer in the prompt")?;
    fields.refuse("adapter_id", |_| false, "leave it out, and serve the merged model")?;
    fields.refuse("watermark", |value| *value == Value::Bool(false), "leave it out")?;
    fields.refuse("best_of", |value| value.as_u64() == Some(1), "use `n`, and choose one of the answers")?;
    fields.refuse("use_beam_search", |value| *value == Value::Bool(false), "leave it out")
}
