//! A request and where it stands.

use std::sync::Arc;
use std::time::Instant;

use proto::units::{BlockId, SequenceId, TokenId};

use super::batch::Candidate;
use super::request::{EndReason, Token, TokenEvent, TokenRequest};
use super::state::RequestId;
use super::token_stream::EventSender;
use crate::metrics;

/// Events that one step can cause for one request: log-probabilities of its prompt, and a token.
const EVENTS_PER_STEP: usize = 2;

/// A request with all that survives a preemption.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: RequestId,
    pub(crate) request: Arc<TokenRequest>,
    pub(crate) events: EventSender,
    pub(crate) submitted_at: Instant,
    /// Whether its reader knows that it left the queue.
    pub(crate) started: bool,
    /// Tokens generated so far; the reader has them.
    pub(crate) generated: Vec<TokenId>,
    /// Position of the last prompt token of which the reader has the log-probability. The first token has none.
    pub(crate) prompt_reported: usize,
}

impl Entry {
    /// Prompt and output so far, in tokens.
    pub(crate) fn len(&self) -> usize {
        self.request.prompt.len() + self.generated.len()
    }

    /// All that the shards must know to go on with it.
    pub(crate) fn tokens(&self) -> Vec<TokenId> {
        [self.request.prompt.as_slice(), &self.generated].concat()
    }

    /// Whether log-probabilities of the prompt are still owed.
    pub(crate) fn owes_prompt_logprobs(&self) -> bool {
        self.request.prompt_logprobs && self.prompt_reported + 1 < self.request.prompt.len()
    }

    /// How the planner sees it in the queue.
    pub(crate) fn candidate(&self) -> Candidate {
        Candidate {
            request: self.id,
            len: self.len(),
            computed: 0,
            num_blocks: 0,
            has_room: self.events.has_room(EVENTS_PER_STEP),
        }
    }

    /// Tells the reader, the first time, that the request left the queue.
    pub(crate) fn start(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.started, true) {
            let queue_time = now.saturating_duration_since(self.submitted_at);
            metrics::record_request_started(queue_time, self.request.prompt.len());
            self.events.send(TokenEvent::Started { queue_time, cached_tokens: 0 });
        }
    }

    /// Reports the log-probabilities of the prompt tokens from position `first` on, without those that the reader got
    /// before a preemption.
    pub(crate) fn report_prompt(&mut self, first: usize, mut tokens: Vec<Token>) {
        let end = first + tokens.len();
        tokens.drain(..(self.prompt_reported + 1).saturating_sub(first).min(tokens.len()));
        if !tokens.is_empty() {
            self.prompt_reported = end - 1;
            self.events.send(TokenEvent::Prompt(tokens));
        }
    }

    /// Reports a generated token.
    pub(crate) fn report_token(&mut self, token: Token, end: Option<EndReason>) {
        metrics::record_generated_token();
        self.generated.push(token.id);
        self.events.send(TokenEvent::Token { token, end });
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
    /// The block table.
    pub(crate) blocks: Vec<BlockId>,
    /// Tokens whose keys and values are in the blocks.
    pub(crate) computed: usize,
    /// Tokens that steps in flight will sample: known to the shards, not yet here.
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

    /// How the planner sees it.
    pub(crate) fn candidate(&self) -> Candidate {
        let Self { entry, sequence } = self;
        let last = entry.generated.len() + sequence.sampling >= entry.request.max_new_tokens as usize;
        Candidate {
            request: entry.id,
            // The last token needs no keys and values: nothing is sampled after it.
            len: if last { sequence.computed } else { self.len() },
            computed: sequence.computed,
            num_blocks: sequence.blocks.len(),
            has_room: entry.events.has_room((sequence.steps_in_flight + 1) * EVENTS_PER_STEP),
        }
    }
}
