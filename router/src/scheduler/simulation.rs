//! The scheduler in virtual time, for `make bench-scheduler`: the very state machine that serves, with a shard that only
//! counts. Not a part of the public interface.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use proto::units::{SequenceId, TokenId};
use tokio::sync::mpsc;

use super::answer::{Outcome, SequenceOutput, StepAnswer, StepTimes};
use super::event::Event;
use super::handle::SchedulerHandle;
use super::limits::{Budget, Limits};
use super::policy::{Discipline, Policy};
use super::request::{EndReason, Token, TokenRequest};
use super::state::Scheduler;
use super::step::{NewSequence, Scheduled, Step};
use super::token_stream::TokenStream;

/// What is simulated. Units as in the flags of the same names.
#[derive(Debug, Clone, Copy)]
pub struct SimulationLimits {
    /// KV blocks of the cache.
    pub num_blocks: u32,
    /// Tokens in a block.
    pub block_size: usize,
    /// `--max-batch-prefill-tokens`
    pub max_prefill_tokens: usize,
    /// `--max-batch-size`
    pub max_sequences: usize,
    /// `--steps-in-flight`
    pub steps_in_flight: usize,
    /// `--prefix-caching`
    pub prefix_caching: bool,
    /// Who goes first.
    pub order: Order,
}

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As Lamplighter serves.
    Served,
    /// Strictly first come, first served: prompts are computed one after the other in chunks beside the decode rows, nobody
    /// is overtaken, and priorities and accounts count for nothing.
    FirstCome,
}

/// A request and what the simulated model makes of it.
#[derive(Debug, Clone)]
pub struct SimulatedRequest {
    /// As submitted. Its `sampling.seed` is its own: it names the request here.
    pub request: TokenRequest,
    /// Tokens after which the model ends it, >= 1; `max_new_tokens` may end it before.
    pub output_tokens: usize,
}

/// What a step computes, as far as its time depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Rows of one token.
    pub decode_rows: usize,
    /// Tokens whose keys and values these rows read.
    pub decode_kv_tokens: usize,
    /// Tokens of prompt chunks.
    pub prefill_tokens: usize,
    /// Pairs of a chunk's token and one that it attends to.
    pub prefill_pairs: usize,
}

/// Scheduler and shard.
#[derive(Debug)]
pub struct Simulation {
    scheduler: Scheduler,
    handle: SchedulerHandle,
    events: mpsc::UnboundedReceiver<Event>,
    epoch: Instant,
    outputs: HashMap<u64, usize>,
    sequences: HashMap<SequenceId, Sequence>,
    answers: VecDeque<StepAnswer>,
    admissions: usize,
}

/// What the shard keeps of a sequence.
#[derive(Debug)]
struct Sequence {
    seed: u64,
    known: usize,
    computed: usize,
    /// Length at which it ends, and why.
    end: (usize, EndReason),
    ended: bool,
}

impl Simulation {
    /// A scheduler for up to `places` requests at once.
    pub fn new(limits: SimulationLimits, places: u32) -> Self {
        let kv_cache_tokens = limits.num_blocks as usize * limits.block_size;
        let (handle, events) = SchedulerHandle::new(places, kv_cache_tokens);
        Self {
            scheduler: Scheduler::new(Limits {
                num_blocks: limits.num_blocks,
                budget: Budget {
                    max_prefill_tokens: limits.max_prefill_tokens,
                    max_sequences: limits.max_sequences,
                    block_size: limits.block_size,
                },
                steps_in_flight: limits.steps_in_flight,
                prefix_caching: limits.prefix_caching,
                policy: Policy { discipline: limits.order.discipline(), ..Policy::DEFAULT },
                max_sampled_tokens: 1,
            }),
            handle,
            events,
            epoch: Instant::now(),
            outputs: HashMap::new(),
            sequences: HashMap::new(),
            answers: VecDeque::new(),
            admissions: 0,
        }
    }

    /// Submits a request; panics where the house is full. `now`: since the beginning of the simulation.
    pub fn submit(&mut self, simulated: SimulatedRequest, now: Duration) -> TokenStream {
        let SimulatedRequest { request, output_tokens } = simulated;
        let known = self.outputs.insert(request.sampling.seed, output_tokens);
        assert_eq!(known, None, "a seed names one request");
        let streams = self.handle.submit(vec![request]).expect("the house has room for the whole trace");
        self.take_events(now);
        streams.into_iter().next().expect("a stream for each request")
    }

    /// Sends the next step, if one is due, and tells what it computes.
    pub fn next_step(&mut self, now: Duration) -> Option<Work> {
        self.take_events(now);
        let step = self.scheduler.next_step(self.epoch + now)?;
        Some(self.compute(&step))
    }

    /// Answers the oldest step in flight, which the shard worked on for `worked`.
    pub fn finish_step(&mut self, now: Duration, worked: Duration) {
        let mut answer = self.answers.pop_front().expect("a step is in flight");
        answer.times = StepTimes { forward: worked, ..answer.times };
        self.scheduler.apply(Event::StepDone(answer), self.epoch + now);
        assert!(self.scheduler.failure().is_none(), "{:?}", self.scheduler.failure());
        self.scheduler.wake_readers();
    }

    /// Sequences that were sent to the shard: requests that ran, and one more for each preemption.
    pub fn admissions(&self) -> usize {
        self.admissions
    }

    /// Panics unless all blocks, places and sequences were given back.
    pub fn check_empty(&self) {
        let gauges = self.scheduler.gauges();
        assert_eq!((gauges.queued, gauges.running), (0, 0), "requests are left");
        self.scheduler.check_invariants();
    }

    /// Lets the scheduler see what came through the door, at the virtual time.
    pub fn take_events(&mut self, now: Duration) {
        let now = self.epoch + now;
        while let Ok(mut event) = self.events.try_recv() {
            if let Event::Submit(submission) = &mut event {
                submission.submitted_at = now;
            }
            self.scheduler.apply(event, now);
        }
    }

    fn compute(&mut self, step: &Step) -> Work {
        for sequence in &step.release {
            self.sequences.remove(sequence);
        }
        for new in &step.admit {
            self.admissions += 1;
            let sequence = Sequence::new(new, self.outputs[&new.request.sampling.seed]);
            self.sequences.insert(new.id, sequence);
        }
        let mut work = Work::default();
        let mut answer = StepAnswer {
            step: step.id,
            outputs: Vec::with_capacity(step.schedule.len()),
            skipped: Vec::new(),
            times: StepTimes::default(),
        };
        for scheduled in &step.schedule {
            let sequence =
                self.sequences.get_mut(&scheduled.sequence).expect("a scheduled sequence is there");
            if sequence.ended {
                answer.skipped.push(scheduled.sequence);
                continue;
            }
            work.add(sequence.computed, scheduled.num_tokens);
            answer.outputs.extend(sequence.advance(scheduled));
        }
        self.answers.push_back(answer);
        work
    }
}

impl Order {
    fn discipline(self) -> Discipline {
        match self {
            Self::Served => Discipline::Fair,
            Self::FirstCome => Discipline::FirstCome,
        }
    }
}

impl Work {
    /// A row of `num_tokens` tokens behind `computed` ones.
    fn add(&mut self, computed: usize, num_tokens: usize) {
        if num_tokens == 1 {
            self.decode_rows += 1;
            self.decode_kv_tokens += computed + 1;
        } else {
            self.prefill_tokens += num_tokens;
            self.prefill_pairs += num_tokens * computed + num_tokens * (num_tokens + 1) / 2;
        }
    }
}

impl Sequence {
    fn new(new: &NewSequence, output_tokens: usize) -> Self {
        let max_new_tokens = new.request.max_new_tokens as usize;
        let reason = if output_tokens < max_new_tokens { EndReason::Eos } else { EndReason::Length };
        let end = new.request.prompt.len() + output_tokens.min(max_new_tokens);
        Self {
            seed: new.request.sampling.seed,
            known: new.tokens.len(),
            computed: new.computed_tokens,
            end: (end, reason),
            ended: false,
        }
    }

    fn advance(&mut self, scheduled: &Scheduled) -> Option<SequenceOutput> {
        self.computed += scheduled.num_tokens;
        assert!(self.computed <= self.known, "there are no more tokens to compute");
        if self.computed < self.known {
            return None;
        }
        let token = Token { id: self.next_token(), logprob: 0.0, top: Vec::new() };
        self.known += 1;
        let (end, reason) = self.end;
        self.ended = self.known == end;
        let tokens = vec![token];
        let outcome = if self.ended { Outcome::Ended(tokens, reason) } else { Outcome::Sampled(tokens) };
        Some(SequenceOutput { sequence: scheduled.sequence, prompt: Vec::new(), outcome })
    }

    /// Depends on request and position only, as with real seeds.
    fn next_token(&self) -> TokenId {
        let mixed = ((self.seed << 20) ^ self.known as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        TokenId((mixed >> 40) as u32)
    }
}
