//! From what a client wrote to what is computed. Nothing behind this module validates user input.

mod adapter;
mod limits;
mod sampling;
mod standing;

use std::sync::Arc;

use grammar::{GrammarId, Source};
use proto::units::{AdapterIndex, TokenId};

pub(crate) use adapter::{ModelChoice, ModelNames};
pub(crate) use limits::Limits;
pub(crate) use sampling::{Dialect, SamplingParameters};
pub(crate) use standing::{PRIORITY_HEADER, PriorityClass, StandingParameters};

use crate::error::RequestError;
use crate::scheduler::{CacheNamespace, SubmitError, TokenRequest};
use crate::text::chat_template::{ChatTemplate, Conversation};
use crate::text::stop_strings::{StopStrings, StopText};
use crate::text::text_workers::{QueueFull, TextWorkers};
use crate::text::tokenizer::Tokenizer;

/// What a client asked for, whichever endpoint it asked.
#[derive(Debug)]
pub(crate) struct GenerationRequest {
    /// What continues it.
    pub(crate) model: ModelChoice,
    /// What is continued.
    pub(crate) prompt: Prompt,
    /// Whose ranges apply.
    pub(crate) dialect: Dialect,
    /// How tokens are chosen.
    pub(crate) sampling: SamplingParameters,
    /// Absent: as many as fit.
    pub(crate) max_new_tokens: Option<u32>,
    /// Whether to go on behind an end-of-sequence token.
    pub(crate) ignore_eos: bool,
    /// Likely tokens reported beside each token.
    pub(crate) top_n_tokens: u32,
    /// Whether log-probabilities of the prompt are reported.
    pub(crate) prompt_logprobs: bool,
    /// Texts at which the output ends.
    pub(crate) stop: Vec<String>,
    /// Answers to each prompt.
    pub(crate) n: u32,
    /// Sequences computed for each prompt, of which the `n` most likely ones are its answers; absent: `n`.
    pub(crate) best_of: Option<u32>,
    /// Of a longer prompt, take only that many last tokens.
    pub(crate) truncate: Option<usize>,
    /// What the text is held to.
    pub(crate) grammar: Option<RequestedGrammar>,
    /// Where it stands among others.
    pub(crate) standing: StandingParameters,
}

/// A grammar that is not compiled yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RequestedGrammar {
    /// Its text.
    pub(crate) source: Source,
    /// The field that it came in.
    pub(crate) param: &'static str,
}

/// What is continued.
#[derive(Debug)]
pub(crate) enum Prompt {
    /// Messages for the chat template.
    Chat(Conversation),
    /// Texts, each a prompt.
    Texts(Vec<String>),
    /// Token ids, each list a prompt.
    Ids(Vec<Vec<TokenId>>),
}

/// A request that can be served.
#[derive(Debug)]
pub(crate) struct ValidRequest {
    /// Each prompt's choices, one after the other.
    pub(crate) sequences: Vec<TokenRequest>,
    /// The adapter of all of them.
    pub(crate) adapter: Option<AdapterIndex>,
    /// To be cloned for each sequence.
    pub(crate) stop: StopStrings,
    /// Tokens of the prompts, each counted once.
    pub(crate) prompt_tokens: usize,
    /// Sequences of each prompt: `best_of` or `n`.
    pub(crate) choices_per_prompt: usize,
    /// `n`: those of them that are told.
    pub(crate) answers_per_prompt: usize,
}

/// Makes valid requests.
pub(crate) struct Validator {
    /// The model's tokenizer.
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// The model's chat template, if it has one.
    pub(crate) chat_template: Option<Arc<ChatTemplate>>,
    /// Where templating and tokenizing are done.
    pub(crate) workers: TextWorkers,
    /// What can be served.
    pub(crate) limits: Limits,
    /// By which models.
    pub(crate) models: ModelNames,
}

impl Validator {
    /// Checks each number first, then the prompt, which costs time. `grammar`: the request's, compiled.
    pub(crate) async fn validate(
        &self,
        request: GenerationRequest,
        grammar: Option<GrammarId>,
    ) -> Result<ValidRequest, RequestError> {
        let limits = &self.limits;
        let sampling = request.sampling.check(request.dialect, limits.vocab_size)?;
        limits.check_best_of(&request, sampling.temperature > 0.0)?;
        limits.check_counts(&request)?;
        let choices = request.choices();
        let (standing, cache_namespace) = request.standing.check(limits.request_timeout)?;
        let adapter = self.models.check(request.model)?;
        let cache_namespace = CacheNamespace { adapter, ..cache_namespace };
        let stop_text = match request.dialect {
            Dialect::OpenAi => StopText::Cut,
            Dialect::Tgi => StopText::Keep,
        };
        let mut prompts = self.tokenize(request.prompt).await?;
        let mut sequences = Vec::with_capacity(prompts.len() * choices as usize);
        let mut prompt_tokens = 0;
        for prompt in &mut prompts {
            if let Some(truncate) = request.truncate {
                prompt.drain(..prompt.len().saturating_sub(truncate));
            }
            limits.check_prompt(prompt)?;
            let max_new_tokens =
                limits.max_new_tokens(prompt.len(), request.max_new_tokens, request.dialect)?;
            prompt_tokens += prompt.len();
            for choice in 0..choices {
                let mut sampling = sampling.clone();
                sampling.seed = sampling.seed.wrapping_add(u64::from(choice));
                sequences.push(TokenRequest {
                    prompt: prompt.clone(),
                    sampling,
                    max_new_tokens,
                    ignore_eos: request.ignore_eos,
                    top_n_tokens: request.top_n_tokens,
                    prompt_logprobs: request.prompt_logprobs,
                    standing: standing.clone(),
                    cache_namespace: cache_namespace.clone(),
                    grammar,
                });
            }
        }
        Ok(ValidRequest {
            sequences,
            adapter,
            stop: StopStrings::new(request.stop, stop_text),
            prompt_tokens,
            choices_per_prompt: choices as usize,
            answers_per_prompt: request.n as usize,
        })
    }

    /// The ids of each prompt.
    async fn tokenize(&self, prompt: Prompt) -> Result<Vec<Vec<TokenId>>, RequestError> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let invalid = |error: crate::text::tokenizer::EncodeError| RequestError::Invalid {
            param: None,
            message: error.to_string(),
        };
        let result = match prompt {
            Prompt::Ids(prompts) => return Ok(prompts),
            Prompt::Texts(texts) => {
                let work =
                    move || texts.iter().map(|text| tokenizer.encode(text, true).map_err(invalid)).collect();
                self.workers.run(work).await
            }
            Prompt::Chat(conversation) => {
                let template = self.chat_template.clone().ok_or_else(|| {
                    RequestError::unsupported(
                        "messages",
                        "the model has no chat template: put its chat_template.jinja into the model directory, or \
                         send the text of the prompt to /v1/completions",
                    )
                })?;
                let work = move || {
                    let text = template.render(&conversation)?;
                    // The template writes the special tokens itself.
                    Ok(vec![tokenizer.encode(&text, false).map_err(invalid)?])
                };
                self.workers.run(work).await
            }
        };
        result.unwrap_or_else(|QueueFull| {
            Err(SubmitError::Overloaded { limit: self.limits.max_concurrent_requests }.into())
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;
    use crate::text::chat_template::tests::CHATML;
    use crate::text::tokenizer::tests::byte_level;

    /// Serves the test tokenizer within small limits.
    pub(crate) fn validator() -> Validator {
        let template = vec![("default".to_owned(), CHATML.to_owned())];
        Validator {
            tokenizer: Arc::new(byte_level()),
            chat_template: Some(Arc::new(ChatTemplate::compile(template, None, None).unwrap())),
            workers: TextWorkers::new(8),
            limits: Limits {
                max_input_tokens: 60,
                max_total_tokens: 64,
                vocab_size: 265,
                max_concurrent_requests: 8,
                request_timeout: None,
                max_best_of: 3,
            },
            models: ModelNames { base: "tiny".to_owned(), adapters: Vec::new() },
        }
    }

    pub(crate) fn request(prompt: Prompt) -> GenerationRequest {
        GenerationRequest {
            model: ModelChoice::default(),
            prompt,
            dialect: Dialect::OpenAi,
            sampling: SamplingParameters { seed: Some(7), ..Default::default() },
            max_new_tokens: None,
            ignore_eos: false,
            top_n_tokens: 0,
            prompt_logprobs: false,
            stop: Vec::new(),
            n: 1,
            best_of: None,
            truncate: None,
            grammar: None,
            standing: StandingParameters::default(),
        }
    }

    async fn error(change: impl FnOnce(&mut GenerationRequest)) -> String {
        let mut request = request(Prompt::Texts(vec!["the".to_owned()]));
        change(&mut request);
        validator().validate(request, None).await.expect_err("the request is not valid").to_string()
    }

    #[tokio::test]
    async fn a_prompt_without_a_length_is_filled_up_to_the_limit() {
        let valid =
            validator().validate(request(Prompt::Texts(vec!["the cat".to_owned()])), None).await.unwrap();
        assert_eq!(valid.prompt_tokens, 5);
        assert_eq!(valid.sequences[0].max_new_tokens, 59);
    }

    #[tokio::test]
    async fn chats_are_templated_and_control_tokens_are_ids() {
        let conversation =
            Conversation { messages: vec![json!({"role": "user", "content": "the"})], ..Default::default() };
        let valid = validator().validate(request(Prompt::Chat(conversation)), None).await.unwrap();
        let prompt: Vec<u32> = valid.sequences[0].prompt.iter().map(|id| id.0).collect();
        assert_eq!(prompt[0], 263);
        assert_eq!(prompt[prompt.len() - 11], 263);
        assert_eq!(prompt[6], 257);
    }

    #[tokio::test]
    async fn choices_share_the_prompt_and_have_their_own_seeds() {
        let mut request = request(Prompt::Ids(vec![vec![TokenId(1)], vec![TokenId(2), TokenId(3)]]));
        request.n = 2;
        let valid = validator().validate(request, None).await.unwrap();
        let seeds: Vec<_> = valid.sequences.iter().map(|s| (s.prompt[0].0, s.sampling.seed)).collect();
        assert_eq!(seeds, [(1, 7), (1, 8), (2, 7), (2, 8)]);
        assert_eq!(valid.prompt_tokens, 3);
    }

    #[tokio::test]
    async fn truncation_keeps_the_end() {
        let mut request = request(Prompt::Texts(vec!["abcdef".to_owned()]));
        request.truncate = Some(2);
        let valid = validator().validate(request, None).await.unwrap();
        assert_eq!(valid.sequences[0].prompt, [TokenId(u32::from(b'e')), TokenId(u32::from(b'f'))]);
    }

    #[tokio::test]
    async fn what_cannot_be_served_is_refused_with_the_numbers() {
        let check = |message: String, parts: &[&str]| {
            for part in parts {
                assert!(message.contains(part), "{part:?} is not in {message:?}");
            }
        };
        let long = "a".repeat(61);
        check(error(|r| r.prompt = Prompt::Texts(vec![long])).await, &["61", "60"]);
        check(error(|r| r.prompt = Prompt::Texts(vec![String::new()])).await, &["empty"]);
        check(error(|r| r.prompt = Prompt::Texts(Vec::new())).await, &["empty"]);
        check(error(|r| r.prompt = Prompt::Ids(vec![vec![TokenId(265)]])).await, &["265", "vocabulary"]);
        check(error(|r| r.max_new_tokens = Some(64)).await, &["64", "1"]);
        check(error(|r| r.max_new_tokens = Some(0)).await, &["strictly positive"]);
        check(error(|r| r.n = 9).await, &["`n`", "8"]);
        check(error(|r| r.n = 0).await, &["`n`"]);
        check(
            error(|r| r.best_of = Some(4)).await,
            &["`best_of` must be > 0 and <= 3. Given: 4", "--max-best-of"],
        );
        check(error(|r| r.best_of = Some(0)).await, &["`best_of` must be > 0"]);
        check(error(|r| (r.n, r.best_of) = (3, Some(2))).await, &["`best_of`", "`n`, which is 3"]);
        let greedy = |r: &mut GenerationRequest| (r.best_of, r.sampling.temperature) = (Some(2), Some(0.0));
        check(error(greedy).await, &["you must use sampling when `best_of` is > 1"]);
        check(error(|r| r.stop = vec!["x".to_owned(); 5]).await, &["`stop`", "4", "5"]);
        check(error(|r| r.stop = vec![String::new()]).await, &["`stop`", "empty"]);
        check(error(|r| r.stop = vec!["x".repeat(257)]).await, &["`stop`", "256"]);
        check(error(|r| r.top_n_tokens = 21).await, &["20", "21"]);
        check(error(|r| r.prompt = Prompt::Texts(vec!["x".to_owned(); 5])).await, &["prompts", "4"]);
        check(error(|r| r.truncate = Some(0)).await, &["`truncate`"]);
        check(error(|r| r.truncate = Some(61)).await, &["`truncate`", "60"]);
    }
}
