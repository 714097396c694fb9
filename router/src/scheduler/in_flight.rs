//! A plan's rows become a step, and what is remembered of it until it is answered.

use std::sync::Arc;
use std::time::Instant;

use proto::units::{BlockId, SequenceId, TokenId};

use super::entry::{Entry, Running, Sequence};
use super::event::RequestId;
use super::pace::Work;
use super::plan::Row;
use super::prefix_cache::{Match, Shared};
use super::state::Scheduler;
use super::step::{NewSequence, Scheduled, Step};
use crate::metrics::{self, StepMethod};

/// A step without an answer.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) id: u64,
    pub(super) rows: Vec<InFlightRow>,
    /// None for a step that only releases: it computes nothing that would be worth a metric.
    pub(super) method: Option<StepMethod>,
    pub(super) work: Work,
    pub(super) sent_at: Instant,
}

#[derive(Debug)]
pub(super) struct InFlightRow {
    pub(super) request: RequestId,
    pub(super) sequence: SequenceId,
    /// Position of the first token that it computes.
    pub(super) first: usize,
    pub(super) num_tokens: usize,
    /// Whether it reaches the last known token, so that the next one is sampled.
    pub(super) samples: bool,
    /// Blocks that others may use since it was sent: where it turns out not to be computed, they may not.
    pub(super) shared: Vec<Shared>,
}

impl Scheduler {
    /// Makes a plan's rows a step, and a step in flight.
    pub(super) fn send(&mut self, rows: &[Row], now: Instant) -> Step {
        let id = self.next_step;
        self.next_step += 1;
        let release = std::mem::take(&mut self.released);
        let mut step = Step { id, release, admit: Vec::new(), schedule: Vec::with_capacity(rows.len()) };
        let mut in_flight = Vec::with_capacity(rows.len());
        // What is found in the cache is taken before anything is evicted.
        for row in rows {
            if let Some(entry) = self.dequeue(row.request) {
                step.admit.push(self.admit(entry, now));
            }
        }
        for row in rows {
            let running =
                self.running.get_mut(&row.request).expect("a planned request is running or was waiting");
            let new_blocks = self.blocks.allocate(&mut running.sequence.table, row.new_blocks);
            let mut sent = InFlightRow::new(running, row);
            step.schedule.push(running.schedule(row.num_tokens, new_blocks));
            let num_shared = running.sequence.table.num_shared();
            self.share(row.request);
            sent.shared = self.blocks.shared_since(&self.running[&row.request].sequence.table, num_shared);
            in_flight.push(sent);
        }
        let work = Work::of(rows);
        let method = record_step(rows.len(), work);
        self.in_flight.push_back(InFlight { id, rows: in_flight, method, work, sent_at: now });
        step
    }

    /// Makes a waiting request a running one, under a new sequence id: shards never see one twice.
    fn admit(&mut self, mut entry: Entry, now: Instant) -> NewSequence {
        let prompt_logprobs = entry.owes_prompt_logprobs();
        let found = if prompt_logprobs { Match::default() } else { entry.found.get() };
        let computed = found.num_blocks * self.limits.budget.block_size;
        let cost = entry.start(now, computed, &mut self.wakes);
        self.fairness.charge(entry.place.account, cost);
        let id = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let sequence = Sequence {
            id,
            table: self.blocks.acquire(found),
            num_acquired: found.num_blocks,
            num_announced: 0,
            computed,
            answered: computed,
            sampling: 0,
            steps_in_flight: 0,
            prompt_logprobs,
        };
        let new = NewSequence {
            id,
            tokens: entry.tokens(),
            request: Arc::clone(&entry.request),
            computed_tokens: sequence.computed,
            block_ids: sequence.table.blocks().to_vec(),
            prompt_logprobs: sequence.prompt_logprobs,
        };
        let request = entry.id;
        self.running.insert(request, Running { entry, sequence });
        self.announce(request);
        new
    }
}

impl InFlightRow {
    /// `row` as it leaves, before it changes `running`.
    fn new(running: &Running, row: &Row) -> Self {
        let first = running.sequence.computed;
        let samples = first + row.num_tokens == running.len();
        Self {
            request: row.request,
            sequence: running.sequence.id,
            first,
            num_tokens: row.num_tokens,
            samples,
            shared: Vec::new(),
        }
    }

    /// The prompt tokens of which this row owes log-probabilities.
    pub(super) fn prompt_tokens<'a>(&self, running: &'a Running) -> &'a [TokenId] {
        if !running.sequence.prompt_logprobs {
            return &[];
        }
        let prompt = &running.entry.request.prompt;
        let end = (self.first + self.num_tokens + 1).min(prompt.len());
        prompt.get(self.first + 1..end).unwrap_or_default()
    }
}

impl Running {
    /// Counts tokens as computed from the moment that the step is on its way.
    fn schedule(&mut self, num_tokens: usize, new_blocks: Vec<BlockId>) -> Scheduled {
        let known = self.len();
        let sequence = &mut self.sequence;
        sequence.computed += num_tokens;
        sequence.steps_in_flight += 1;
        sequence.sampling += usize::from(sequence.computed == known);
        Scheduled { sequence: sequence.id, num_tokens, new_blocks }
    }
}

impl Work {
    fn of(rows: &[Row]) -> Self {
        let decode_rows = rows.iter().filter(|row| row.num_tokens == 1).count();
        let prefill_tokens = rows.iter().map(|row| row.num_tokens).sum::<usize>() - decode_rows;
        Self { decode_rows, prefill_tokens }
    }
}

fn record_step(num_rows: usize, Work { decode_rows, prefill_tokens }: Work) -> Option<StepMethod> {
    let method = match (decode_rows, prefill_tokens) {
        (0, 0) => return None,
        (_, 0) => StepMethod::Decode,
        _ => StepMethod::Prefill,
    };
    metrics::record_step_sent(method, num_rows, decode_rows, prefill_tokens);
    Some(method)
}
