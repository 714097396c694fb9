//! `POST /v1/completions`.

use std::borrow::Cow;

use proto::units::TokenId;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::grammar;
use super::openai::{self, Endpoint};
use crate::error::RequestError;
use crate::stream::{Generated, GeneratedToken};
use crate::text::tokenizer::Tokenizer;
use crate::validate::{Dialect, GenerationRequest, Prompt, StandingParameters};

/// OpenAI's default for this endpoint.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// OpenAI's limit of `logprobs` for this endpoint.
const MAX_LOGPROBS: u32 = 5;

/// Continues one or several prompts.
pub(super) struct Completions {
    logprobs: bool,
}

impl Endpoint for Completions {
    const ID_PREFIX: &'static str = "cmpl";
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";

    type WholeChoice = Choice<'static>;
    type ChunkChoice<'a> = Choice<'a>;
    /// Characters sent.
    type Progress = usize;

    fn take(
        fields: &mut Fields,
        standing: StandingParameters,
    ) -> Result<(GenerationRequest, Self), RequestError> {
        let prompt = prompt(fields.require("prompt")?)?;
        let empty = |value: &Value| value.as_str() == Some("");
        fields.refuse("suffix", empty, "preprocess the prompt, if the model was trained to fill in")?;
        fields.refuse(
            "echo",
            |value| *value == Value::Bool(false),
            "put the prompt before the text yourself",
        )?;
        let grammar = grammar::take(fields, "response_format")?;
        let logprobs: Option<u32> = fields.take("logprobs")?;
        if let Some(given) = logprobs.filter(|given| *given > MAX_LOGPROBS) {
            let message = format!("`logprobs` must be >= 0 and <= {MAX_LOGPROBS}. Given: {given}");
            return Err(RequestError::invalid("logprobs", message));
        }
        let generation = GenerationRequest {
            model: openai::take_model(fields)?,
            prompt,
            dialect: Dialect::OpenAi,
            sampling: openai::take_sampling(fields)?,
            max_new_tokens: Some(fields.take("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS)),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            top_n_tokens: logprobs.unwrap_or(0),
            prompt_logprobs: false,
            stop: fields.strings("stop")?,
            n: fields.take("n")?.unwrap_or(1),
            best_of: fields.take("best_of")?,
            truncate: None,
            grammar,
            standing,
        };
        Ok((generation, Self { logprobs: logprobs.is_some() }))
    }

    fn whole(&self, tokenizer: &Tokenizer, index: usize, generated: Generated) -> Choice<'static> {
        let logprobs = self.logprobs.then(|| {
            let mut logprobs = Logprobs::default();
            let mut text_chars = 0;
            for token in &generated.tokens {
                logprobs.push(tokenizer, token, text_chars);
                text_chars += token.text.chars().count();
            }
            logprobs
        });
        let finish_reason = Some(openai::finish_reason(generated.end.reason));
        Choice { index, text: generated.text.into(), logprobs, finish_reason }
    }

    fn chunks<'a>(
        &self,
        tokenizer: &Tokenizer,
        index: usize,
        text_chars: &mut usize,
        token: &'a GeneratedToken,
        mut write: impl FnMut(Choice<'a>),
    ) {
        let logprobs = (self.logprobs && openai::is_content(token)).then(|| {
            let mut logprobs = Logprobs::default();
            logprobs.push(tokenizer, token, *text_chars);
            logprobs
        });
        *text_chars += token.text.chars().count();
        if token.text.is_empty() && logprobs.is_none() && token.end.is_none() {
            return;
        }
        let finish_reason = token.end.as_ref().map(|end| openai::finish_reason(end.reason));
        write(Choice { index, text: token.text.as_str().into(), logprobs, finish_reason });
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

#[derive(Serialize)]
pub(super) struct Choice<'a> {
    index: usize,
    text: Cow<'a, str>,
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
