//! What the scheduler takes and gives: token ids and numbers only, no text.

use std::sync::Arc;
use std::time::{Duration, Instant};

use grammar::GrammarId;
use proto::units::{AdapterIndex, TokenId};

/// A request as the scheduler sees it. It exists only if it can be served: prompt and `max_new_tokens` together fit
/// `max_total_tokens` and an empty KV cache, and every number is in its range.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRequest {
    /// At least one id.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to generate, >= 1.
    pub max_new_tokens: u32,
    /// Whether to go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Number of most likely tokens reported beside each token.
    pub top_n_tokens: u32,
    /// Whether log-probabilities of the prompt's tokens are reported.
    pub prompt_logprobs: bool,
    /// Where it stands among others.
    pub standing: Standing,
    /// Which cached prefixes it may use.
    pub cache_namespace: CacheNamespace,
    /// What its text is held to; the shards have compiled it.
    pub grammar: Option<GrammarId>,
}

/// Where a request stands among others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// Lower goes first; 0 is usual. Named classes are constants of this type.
    pub priority: i32,
    /// Whom its tokens are charged to when they are shared out fairly. Requests without one share one account.
    pub account: Option<Arc<str>>,
    /// Longest time from submission to the end.
    pub timeout: Option<Duration>,
}

impl Standing {
    /// Someone waits for each token.
    pub const PRIORITY_INTERACTIVE: i32 = -100;
    /// Nothing was said.
    pub const PRIORITY_DEFAULT: i32 = 0;
    /// Nobody waits.
    pub const PRIORITY_BATCH: i32 = 100;
}

/// Requests share cached blocks only within one namespace: keys and values depend on the adapter, and who measures how
/// fast a prompt is answered must not learn another tenant's prompts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct CacheNamespace {
    /// The adapter that changes the model's weights for the request.
    pub adapter: Option<AdapterIndex>,
    /// What keeps tenants apart.
    pub salt: Option<Arc<str>>,
}

/// How the next token is chosen; fields and ranges as in `SamplingParameters` of `shard.proto`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0: greedy.
    pub temperature: f32,
    /// 0: off.
    pub top_k: u32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off.
    pub typical_p: f32,
    /// Key of the counter-based random number generator.
    pub seed: u64,
    /// 1: off.
    pub repetition_penalty: f32,
    /// 0: off.
    pub frequency_penalty: f32,
    /// 0: off.
    pub presence_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(TokenId, f32)>,
}

/// A token of prompt or output with what was asked to be reported about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// Log-probability in the model's raw distribution.
    pub logprob: f32,
    /// The most likely tokens at its place, most likely first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a sequence ended by itself. (Stop strings are text: `crate::stream` ends those by dropping the token stream.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The model sampled an end-of-sequence token; it is the last token given.
    Eos,
    /// `max_new_tokens` were generated.
    Length,
}

/// What happens to a running request, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The request left the queue after this time.
    Started {
        /// From submission to the first step.
        queue_time: Duration,
        /// Tokens of the prompt whose keys and values came from the prefix cache.
        cached_tokens: usize,
    },
    /// Prompt tokens from the second one on, in order, in one or several events, before the first `Token`.
    Prompt(Vec<Token>),
    /// A generated token, and whether it was the last one.
    Token {
        /// The token.
        token: Token,
        /// Present with the last token.
        end: Option<EndReason>,
        /// When the shards' answer came. Its reader may see it later.
        at: Instant,
    },
    /// The request ended without a result; nothing follows.
    Failed(Failure),
}

/// Why a request ended without a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The shards failed or went away while the request was running.
    #[error("the shards failed while computing this request: {0}; send it again")]
    Shards(String),
    /// The model's logits were not finite.
    #[error(
        "the model produced logits that are not finite: the checkpoint or the chosen dtype is broken for this input"
    )]
    InvalidLogits,
    /// The shards had no memory left to compute it beside the others.
    #[error(
        "the server had no memory left to compute this request: send it again later (the operator lowers \
         --cuda-memory-fraction or --max-batch-prefill-tokens, or stops what else uses the GPU)"
    )]
    OutOfMemory,
    /// Its grammar could not be enforced to the end.
    #[error("the grammar cannot be enforced any longer: {0}")]
    Grammar(String),
    /// Its deadline passed in the queue: nothing was computed.
    #[error(
        "the request waited {} ms, as long as its time allows, and was not begun: send it again later, or raise \
         `timeout` (or --request-timeout, if that is shorter)",
        timeout.as_millis()
    )]
    QueueTimeout {
        /// As asked.
        timeout: Duration,
    },
    /// Its deadline passed while it was being computed.
    #[error(
        "the request was not finished within its {} ms: ask for fewer tokens, or raise `timeout` (or \
         --request-timeout, if that is shorter)",
        timeout.as_millis()
    )]
    Timeout {
        /// As asked.
        timeout: Duration,
    },
    /// The router shut down before the request was finished.
    #[error("the server shut down before the request was finished; send it again")]
    ShuttingDown,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// `max_concurrent_requests` are in the house.
    #[error(
        "the server is overloaded: {limit} requests are waiting or running (--max-concurrent-requests); try again later"
    )]
    Overloaded {
        /// `max_concurrent_requests`.
        limit: usize,
    },
    /// Shutting down.
    #[error("the server is shutting down; send the request to another replica")]
    Draining,
    /// Not ready yet, or the shards are gone.
    #[error(
        "the model is not being served: the shards are starting or have failed; see /readyz and the server's log"
    )]
    Unavailable,
}
