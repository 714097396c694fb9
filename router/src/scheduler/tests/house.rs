//! Door, scheduler, shard and readers, moved on one event at a time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures::FutureExt;
use proto::units::TokenId;
use tokio::sync::mpsc;

use super::model_shard::{ModelShard, Transcript, alone};
use crate::scheduler::event::Event;
use crate::scheduler::handle::SchedulerHandle;
use crate::scheduler::limits::{Budget, Limits};
use crate::scheduler::policy::Policy;
use crate::scheduler::request::{
    CacheNamespace, Failure, Sampling, Standing, SubmitError, TokenEvent, TokenRequest,
};
use crate::scheduler::state::Scheduler;
use crate::scheduler::step::Step;
use crate::scheduler::token_stream::TokenStream;

pub(super) const SAMPLING: Sampling = Sampling {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    typical_p: 1.0,
    seed: 0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
    presence_penalty: 0.0,
    logit_bias: Vec::new(),
};

/// Blocks of 4 tokens, 64 of them; chunks of 16 tokens; 8 sequences in a step; one step in flight.
pub(super) const LIMITS: Limits = Limits {
    num_blocks: 64,
    budget: Budget { max_prefill_tokens: 16, max_sequences: 8, block_size: 4 },
    steps_in_flight: 1,
    prefix_caching: true,
    policy: Policy::DEFAULT,
    max_sampled_tokens: 1,
};

/// A request for `max_new_tokens`, whatever is sampled. Its prompt is made from `first`, which makes it unlike others.
pub(super) fn request(first: u32, prompt_tokens: usize, max_new_tokens: u32) -> TokenRequest {
    TokenRequest {
        prompt: (0..prompt_tokens as u32).map(|position| TokenId(first * 1000 + position)).collect(),
        sampling: SAMPLING,
        max_new_tokens,
        ignore_eos: true,
        top_n_tokens: 1,
        prompt_logprobs: false,
        grammar: None,
        standing: Standing::default(),
        cache_namespace: CacheNamespace::default(),
    }
}

/// The same, for a tenant of its own.
pub(super) fn salted(salt: &str, request: TokenRequest) -> TokenRequest {
    let cache_namespace = CacheNamespace { adapter: None, salt: Some(salt.into()) };
    TokenRequest { cache_namespace, ..request }
}

pub(super) struct House {
    pub(super) handle: SchedulerHandle,
    pub(super) scheduler: Scheduler,
    pub(super) shard: ModelShard,
    /// All that ever came through the door.
    pub(super) readers: Vec<Reader>,
    /// Sent and not answered, oldest first.
    pub(super) in_flight: VecDeque<Step>,
    /// Every step that was ever sent.
    pub(super) sent: Vec<Step>,
    events: mpsc::UnboundedReceiver<Event>,
    /// What time it is: it passes in `advance` only.
    now: Instant,
    /// Whether something happened since steps were last asked for. Without an event, the scheduler's task sleeps.
    awake: bool,
}

/// A reader and what it has read.
pub(super) struct Reader {
    pub(super) request: TokenRequest,
    /// Absent once it has gone away.
    pub(super) stream: Option<TokenStream>,
    pub(super) transcript: Transcript,
    pub(super) starts: usize,
    /// Tokens of its prompt that came from the cache.
    pub(super) cached_tokens: usize,
    pub(super) failure: Option<Failure>,
    /// Whether the stream has ended.
    pub(super) ended: bool,
}

impl House {
    /// A house for 64 requests.
    pub(super) fn new(limits: Limits) -> Self {
        Self::with_places(limits, 64)
    }

    pub(super) fn with_places(limits: Limits, places: u32) -> Self {
        let kv_cache_tokens = limits.num_blocks as usize * limits.budget.block_size;
        let (handle, events) = SchedulerHandle::new(places, kv_cache_tokens);
        Self {
            handle,
            scheduler: Scheduler::new(limits),
            shard: ModelShard::new(limits),
            readers: Vec::new(),
            in_flight: VecDeque::new(),
            sent: Vec::new(),
            events,
            now: Instant::now(),
            awake: false,
        }
    }

    /// Submits and lets the scheduler see it. Returns the index of the first of the readers.
    pub(super) fn submit(&mut self, requests: Vec<TokenRequest>) -> Result<usize, SubmitError> {
        let first = self.readers.len();
        let streams = self.handle.submit(requests.clone())?;
        self.readers.extend(requests.into_iter().zip(streams).map(|(request, stream)| Reader {
            request,
            stream: Some(stream),
            transcript: Transcript::default(),
            starts: 0,
            cached_tokens: 0,
            failure: None,
            ended: false,
        }));
        self.pump();
        Ok(first)
    }

    /// Submits one request, which must be taken.
    pub(super) fn submit_one(&mut self, request: TokenRequest) -> usize {
        self.submit(vec![request]).expect("there is room in the house")
    }

    /// Drops a reader's stream.
    pub(super) fn cancel(&mut self, reader: usize) {
        self.readers[reader].stream = None;
        self.pump();
    }

    /// Lets a reader read up to `num_events` of the events that are there.
    pub(super) fn read(&mut self, reader: usize, num_events: usize) {
        self.readers[reader].read(num_events);
        self.pump();
    }

    /// Lets all readers read all that is there.
    pub(super) fn read_all(&mut self) {
        for reader in &mut self.readers {
            reader.read(usize::MAX);
        }
        self.pump();
    }

    /// Answers the oldest step in flight, and sends what follows. Returns whether there was one.
    pub(super) fn answer(&mut self) -> bool {
        let Some(step) = self.in_flight.pop_front() else { return false };
        let answer = self.shard.run(&step);
        self.apply(Event::StepDone(answer));
        self.pump();
        true
    }

    /// Lets time pass, and the scheduler see that if a deadline has come, as its task does.
    pub(super) fn advance(&mut self, duration: Duration) {
        self.now += duration;
        if self.scheduler.next_deadline().is_some_and(|deadline| deadline <= self.now) {
            self.apply(Event::Tick);
            self.pump();
        }
    }

    /// Lets time pass without that the scheduler sees it before something else happens.
    pub(super) fn oversleep(&mut self, duration: Duration) {
        self.now += duration;
    }

    pub(super) fn apply(&mut self, event: Event) {
        self.awake = true;
        self.scheduler.apply(event, self.now);
        self.scheduler.check_invariants();
    }

    /// Lets the scheduler see what readers have done, and sends the steps that are due.
    pub(super) fn pump(&mut self) {
        while let Ok(mut event) = self.events.try_recv() {
            if let Event::Submit(submission) = &mut event {
                submission.submitted_at = self.now;
            }
            self.apply(event);
        }
        if !std::mem::take(&mut self.awake) {
            return;
        }
        while let Some(step) = self.scheduler.next_step(self.now) {
            self.scheduler.check_invariants();
            self.sent.push(step.clone());
            self.in_flight.push_back(step);
        }
        self.scheduler.wake_readers();
    }

    /// Answers and reads until nothing moves. Panics if that does not come to an end.
    pub(super) fn finish(&mut self) {
        // Each step computes at least one token or releases a sequence, and preemption repeats some of them.
        for _ in 0..100_000 {
            self.read_all();
            if !self.answer() {
                return;
            }
        }
        panic!("requests do not come to an end");
    }

    /// Tokens that were computed by all steps so far.
    pub(super) fn computed_tokens(&self) -> usize {
        self.sent.iter().flat_map(|step| &step.schedule).map(|row| row.num_tokens).sum()
    }

    /// Panics unless each reader got what it gets alone.
    pub(super) fn check_all_as_alone(&self) {
        for reader in &self.readers {
            assert_eq!(reader.transcript, alone(&reader.request), "{:?}", reader.request);
        }
    }

    /// Panics unless everything was given back.
    pub(super) fn check_empty(&self) {
        let gauges = self.scheduler.gauges();
        assert_eq!((gauges.queued, gauges.running, gauges.blocks_used), (0, 0, 0));
        assert_eq!(self.shard.num_sequences(), 0, "the shard forgets ended sequences");
        assert!(self.handle.drained().now_or_never().is_some(), "all places in the house are free");
    }
}

impl Reader {
    fn read(&mut self, num_events: usize) {
        for _ in 0..num_events {
            let Some(stream) = &mut self.stream else { return };
            let Some(event) = stream.next().now_or_never() else { return };
            let Some(event) = event else {
                assert!(self.ended, "a stream ends after its last event");
                return;
            };
            self.take(event);
        }
    }

    fn take(&mut self, event: TokenEvent) {
        assert!(!self.ended, "nothing follows the last event");
        match event {
            TokenEvent::Started { cached_tokens, .. } => {
                self.cached_tokens = cached_tokens;
                assert!(self.transcript == Transcript::default(), "a request starts before all else");
                self.starts += 1;
            }
            TokenEvent::Prompt(tokens) => {
                assert!(self.transcript.tokens.is_empty(), "the prompt comes before the tokens");
                self.transcript.prompt.extend(tokens);
            }
            TokenEvent::Token { token, end, .. } => {
                self.transcript.tokens.push(token);
                self.transcript.end = end;
                self.ended = end.is_some();
            }
            TokenEvent::Failed(failure) => {
                self.failure = Some(failure);
                self.ended = true;
            }
        }
    }
}
