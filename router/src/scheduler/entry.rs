//! A request and where it stands.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::units::{SequenceId, TokenId};

use super::blocks::BlockTable;
use super::event::{RequestId, Submission};
use super::fairness::{GENERATED_TOKEN, PROMPT_TOKEN};
use super::prefix::{BlockHashes, Prefix};
use super::prefix_cache::Match;
use super::queue::Place;
use super::request::{EndReason, Failure, Token, TokenEvent, TokenRequest};
use super::sharing::Hold;
use super::token_stream::{EventSender, Wakes};
use crate::metrics;

/// A request with all that survives a preemption.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: RequestId,
    pub(crate) request: Arc<TokenRequest>,
    pub(crate) events: EventSender,
    pub(crate) submitted_at: Instant,
    /// Where it stands among others.
    pub(crate) place: Place,
    /// Longest time from submission to its end.
    pub(crate) timeout: Option<Duration>,
    /// Tokens of requests behind it that were let in while it waited.
    pub(crate) overtaken_by: usize,
    /// Whether its reader knows that it left the queue.
    pub(crate) started: bool,
    /// Tokens generated so far; the reader has them.
    pub(crate) generated: Vec<TokenId>,
    /// Position of the last prompt token of which the reader has the log-probability. The first token has none.
    pub(crate) prompt_reported: usize,
    hashes: BlockHashes,
    /// What of it was in the cache when that was last looked at.
    pub(crate) found: Cell<Match>,
    /// Since when it waits for a block that another one computes.
    pub(crate) hold: Cell<Option<Hold>>,
}

impl Entry {
    /// As it comes through the door. `block_size`: as in [`BlockHashes`]. `longest`: what the operator allows.
    pub(crate) fn new(
        submission: Submission,
        block_size: usize,
        place: Place,
        longest: Option<Duration>,
    ) -> Self {
        let Submission { id, request, events, submitted_at } = submission;
        let timeout = request.standing.timeout.into_iter().chain(longest).min();
        let mut hashes = BlockHashes::new(block_size, &request.cache_namespace);
        hashes.extend(&request.prompt, &[]);
        Self {
            id,
            request: Arc::new(request),
            events,
            submitted_at,
            place,
            timeout,
            overtaken_by: 0,
            started: false,
            generated: Vec::new(),
            prompt_reported: 0,
            hashes,
            found: Cell::default(),
            hold: Cell::default(),
        }
    }

    /// When it must have ended.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.submitted_at.checked_add(self.timeout?)
    }

    /// Ends it because its deadline has come.
    pub(crate) fn time_out(self) {
        let timeout = self.timeout.unwrap_or_default();
        if self.started {
            metrics::record_running_timeout();
            self.events.fail(Failure::Timeout { timeout });
        } else {
            metrics::record_queue_timeout();
            self.events.fail(Failure::QueueTimeout { timeout });
        }
    }

    /// How many more tokens of requests behind it may be let in before it: in all, as many as it had when it came, so that
    /// it is held up by others no longer than by one more like itself.
    pub(crate) fn patience(&self) -> usize {
        self.request.prompt.len().saturating_sub(self.overtaken_by)
    }

    /// Prompt and output so far, in tokens.
    pub(crate) fn len(&self) -> usize {
        self.request.prompt.len() + self.generated.len()
    }

    /// All that the shards must know to go on with it.
    pub(crate) fn tokens(&self) -> Vec<TokenId> {
        [self.request.prompt.as_slice(), &self.generated].concat()
    }

    /// The same, as the cache looks at it.
    pub(crate) fn prefix(&self) -> Prefix<'_> {
        Prefix {
            namespace: &self.request.cache_namespace,
            prompt: &self.request.prompt,
            generated: &self.generated,
            hashes: &self.hashes,
        }
    }

    /// Hashes of its full blocks.
    pub(crate) fn block_hashes(&self) -> &[u64] {
        self.hashes.as_slice()
    }

    /// Whether log-probabilities of the prompt are still owed.
    pub(crate) fn owes_prompt_logprobs(&self) -> bool {
        self.request.prompt_logprobs && self.prompt_reported + 1 < self.request.prompt.len()
    }

    /// Tells the reader, the first time, that the request left the queue with `cached_tokens` from the cache. Returns what
    /// that costs its account: the prompt that is to be computed, and nothing for computing it again after a preemption.
    pub(crate) fn start(&mut self, now: Instant, cached_tokens: usize, wakes: &mut Wakes) -> u64 {
        if std::mem::replace(&mut self.started, true) {
            return 0;
        }
        let queue_time = now.saturating_duration_since(self.submitted_at);
        let prompt_tokens = self.request.prompt.len();
        metrics::record_request_started(queue_time, prompt_tokens);
        metrics::record_prefix_cache_hit(cached_tokens);
        self.events.send(TokenEvent::Started { queue_time, cached_tokens }, wakes);
        (prompt_tokens - cached_tokens) as u64 * PROMPT_TOKEN
    }

    /// Reports the log-probabilities of the prompt tokens from position `first` on, without those that the reader got
    /// before a preemption.
    pub(crate) fn report_prompt(&mut self, first: usize, mut tokens: Vec<Token>, wakes: &mut Wakes) {
        let end = first + tokens.len();
        tokens.drain(..(self.prompt_reported + 1).saturating_sub(first).min(tokens.len()));
        if !tokens.is_empty() {
            self.prompt_reported = end - 1;
            self.events.send(TokenEvent::Prompt(tokens), wakes);
        }
    }

    /// Reports generated tokens, and why the last of them ends the request, if it does. Returns what they cost its account.
    pub(crate) fn report_tokens(
        &mut self,
        tokens: Vec<Token>,
        end: Option<EndReason>,
        at: Instant,
        wakes: &mut Wakes,
    ) -> u64 {
        let cost = tokens.len() as u64 * GENERATED_TOKEN;
        let last = tokens.len() - 1;
        metrics::record_generated_tokens(tokens.len());
        for (index, token) in tokens.into_iter().enumerate() {
            self.generated.push(token.id);
            self.events.send(TokenEvent::Token { token, end: end.filter(|_| index == last), at }, wakes);
        }
        self.hashes.extend(&self.request.prompt, &self.generated);
        cost
    }
}

/// A request that holds KV blocks.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) entry: Entry,
    pub(crate) sequence: Sequence,
}

/// A sequence as the shards have it once all steps in flight are done. Ends with a preemption.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) table: BlockTable,
    /// Blocks that came from the cache.
    pub(crate) num_acquired: usize,
    /// Of its block hashes, those up to here are announced to others as coming.
    pub(crate) num_announced: usize,
    /// Tokens whose keys and values are in the blocks.
    pub(crate) computed: usize,
    /// Of these, the ones in steps that were answered.
    pub(crate) answered: usize,
    /// Rows in flight that will sample: a token known to the shards and not yet here, or more where they speculate.
    pub(crate) sampling: usize,
    /// Steps in flight that compute some of it.
    pub(crate) steps_in_flight: usize,
    /// Whether the shards report the prompt's log-probabilities.
    pub(crate) prompt_logprobs: bool,
}

impl Running {
    /// Tokens that the shards know, those that steps in flight will sample included.
    pub(crate) fn len(&self) -> usize {
        self.entry.len() + self.sequence.sampling
    }
}
