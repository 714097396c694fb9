//! How much of everything: counts and lengths.

use std::time::Duration;

use proto::units::TokenId;

use super::{Dialect, GenerationRequest, Prompt};
use crate::error::RequestError;

/// TGI's default of `--max-stop-sequences`; OpenAI's limit too.
const MAX_STOP_STRINGS: usize = 4;
/// Each token is compared with all stop strings, and a stream waits for up to this much text.
const MAX_STOP_BYTES: usize = 256;
/// OpenAI's limit of `top_logprobs`.
const MAX_TOP_N_TOKENS: u32 = 20;
/// TGI's default of `--max-client-batch-size`.
const MAX_PROMPTS: usize = 4;

/// What can be served.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Longest prompt, in tokens.
    pub(crate) max_input_tokens: usize,
    /// Longest prompt and output together, in tokens.
    pub(crate) max_total_tokens: usize,
    /// Token ids are below it.
    pub(crate) vocab_size: usize,
    /// Most sequences at once; a request with more would never be taken.
    pub(crate) max_concurrent_requests: usize,
    /// Most sequences of which an answer is the best.
    pub(crate) max_best_of: usize,
    /// Most time that a request gets; none: any.
    pub(crate) request_timeout: Option<Duration>,
}

impl Limits {
    /// Whether there is something to choose from, and not too much.
    pub(super) fn check_best_of(
        &self,
        request: &GenerationRequest,
        is_sampled: bool,
    ) -> Result<(), RequestError> {
        let Some(best_of) = request.best_of else { return Ok(()) };
        let invalid = |message: String| Err(RequestError::invalid("best_of", message));
        if best_of == 0 || best_of as usize > self.max_best_of {
            return invalid(format!(
                "`best_of` must be > 0 and <= {}. Given: {best_of}; the server's flag --max-best-of allows more",
                self.max_best_of
            ));
        }
        if best_of < request.n {
            return invalid(format!("`best_of` must be >= `n`, which is {}. Given: {best_of}", request.n));
        }
        if best_of > request.n && !is_sampled {
            return invalid(
                "you must use sampling when `best_of` is > 1: the sequences would be the same".to_owned(),
            );
        }
        Ok(())
    }

    /// Everything that can be said without the prompt's tokens.
    pub(super) fn check_counts(&self, request: &GenerationRequest) -> Result<(), RequestError> {
        let num_prompts = match &request.prompt {
            Prompt::Chat(_) => 1,
            Prompt::Texts(texts) => texts.len(),
            Prompt::Ids(ids) => ids.len(),
        };
        let prompt_param = request.prompt_param();
        if num_prompts == 0 {
            return Err(RequestError::invalid(prompt_param, format!("`{prompt_param}` cannot be empty")));
        }
        if num_prompts > MAX_PROMPTS {
            let message = format!(
                "Number of prompts exceeds the maximum allowed batch size of {MAX_PROMPTS}. Given: {num_prompts}; \
                 send several requests"
            );
            return Err(RequestError::invalid(prompt_param, message));
        }
        let n = request.choices() as usize;
        let max_n = self.max_concurrent_requests / num_prompts;
        if request.n == 0 || n > max_n {
            let param = if request.best_of.is_some() && request.n > 0 { "best_of" } else { "n" };
            let message = format!(
                "`{param}` must be > 0 and, with {num_prompts} prompt(s), <= {max_n}, as the server takes \
                 {} sequences at once. Given: {n}",
                self.max_concurrent_requests
            );
            return Err(RequestError::invalid(param, message));
        }
        if request.top_n_tokens > MAX_TOP_N_TOKENS {
            let param = request.dialect.top_n_tokens();
            let given = request.top_n_tokens;
            let message = format!("`{param}` must be >= 0 and <= {MAX_TOP_N_TOKENS}. Given: {given}");
            return Err(RequestError::invalid(param, message));
        }
        if let Some(truncate) = request.truncate
            && (truncate == 0 || truncate > self.max_input_tokens)
        {
            let message = format!(
                "`truncate` must be strictly positive and <= {}. Given: {truncate}",
                self.max_input_tokens
            );
            return Err(RequestError::invalid("truncate", message));
        }
        check_stop_strings(&request.stop)
    }

    /// A prompt's ids and their number.
    pub(super) fn check_prompt(&self, prompt: &[TokenId]) -> Result<(), RequestError> {
        let invalid = |message| RequestError::Invalid { param: None, message };
        if prompt.is_empty() {
            return Err(invalid("`inputs` cannot be empty: the prompt has no tokens".to_owned()));
        }
        if prompt.len() > self.max_input_tokens {
            return Err(invalid(format!(
                "`inputs` must have at most {} tokens. Given: {}; shorten the prompt, or let the operator raise \
                 --max-input-tokens",
                self.max_input_tokens,
                prompt.len()
            )));
        }
        match prompt.iter().find(|id| id.0 as usize >= self.vocab_size) {
            Some(id) => Err(invalid(format!(
                "token id {id} is outside of the model's vocabulary of {} tokens",
                self.vocab_size
            ))),
            None => Ok(()),
        }
    }

    /// How many tokens are generated behind `prompt_tokens`.
    pub(super) fn max_new_tokens(
        &self,
        prompt_tokens: usize,
        asked: Option<u32>,
        dialect: Dialect,
    ) -> Result<u32, RequestError> {
        let param = dialect.max_new_tokens();
        let room = u32::try_from(self.max_total_tokens.saturating_sub(prompt_tokens)).unwrap_or(u32::MAX);
        let max_total_tokens = self.max_total_tokens;
        match asked {
            Some(0) => Err(RequestError::invalid(param, format!("`{param}` must be strictly positive"))),
            Some(asked) if asked > room => {
                let message = format!(
                    "`inputs` tokens + `{param}` must be <= {max_total_tokens}. Given: {prompt_tokens} `inputs` \
                     tokens and {asked} `{param}`; lower `{param}` or shorten the prompt"
                );
                Err(RequestError::invalid(param, message))
            }
            Some(asked) => Ok(asked),
            // A prompt is shorter than the total, by the limits that the scheduler checked when it started.
            None => Ok(room.max(1)),
        }
    }
}

impl GenerationRequest {
    /// Sequences computed for each prompt.
    pub(crate) fn choices(&self) -> u32 {
        self.best_of.unwrap_or(self.n)
    }

    fn prompt_param(&self) -> &'static str {
        match (&self.prompt, self.dialect) {
            (Prompt::Chat(_), _) => "messages",
            (_, Dialect::OpenAi) => "prompt",
            (_, Dialect::Tgi) => "inputs",
        }
    }
}

fn check_stop_strings(stop: &[String]) -> Result<(), RequestError> {
    let given = stop.len();
    if given > MAX_STOP_STRINGS {
        let message = format!("`stop` supports up to {MAX_STOP_STRINGS} stop sequences. Given: {given}");
        return Err(RequestError::invalid("stop", message));
    }
    if stop.iter().any(String::is_empty) {
        return Err(RequestError::invalid("stop", "`stop` must not contain an empty string: leave it out"));
    }
    match stop.iter().map(String::len).find(|bytes| *bytes > MAX_STOP_BYTES) {
        Some(bytes) => {
            let message = format!("`stop` sequences must have <= {MAX_STOP_BYTES} bytes. Given: {bytes}");
            Err(RequestError::invalid("stop", message))
        }
        None => Ok(()),
    }
}
