//! The state of all requests, and what an event does to it. Synchronous, without IO and without a clock of its own, so
//! that tests drive it with events that are made up.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use proto::units::{BlockId, SequenceId, TokenId};
use tokio::sync::OwnedSemaphorePermit;

use super::answer::{Outcome, SequenceOutput, StepAnswer, StepTimes, WrongAnswer};
use super::batch::{self, Budget, Candidate, NewSequence, Plan, Preempt, Row, Rows, Scheduled, Step, Supply};
use super::blocks::BlockPool;
use super::deadlines::Deadlines;
use super::entry::{Entry, Running, Sequence};
use super::fairness::{Fairness, PROMPT_TOKEN};
use super::headroom::Headroom;
use super::pace::{Pace, Work};
use super::policy::Policy;
use super::prefix_cache::Match;
use super::queue::{Place, Queue};
use super::rank::Ranking;
use super::request::{EndReason, Failure, Token, TokenRequest};
use super::token_stream::EventSender;
use crate::metrics::{self, SchedulerGauges, StepDurations, StepMethod};

/// A request as the scheduler names it; the lower, the older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RequestId(pub(crate) u64);

/// What can happen.
#[derive(Debug)]
pub(crate) enum Event {
    /// A request came through the door.
    Submit(Submission),
    /// Its reader is gone. Handling it, or dropping it, frees the request's place in the house.
    Cancel { request: RequestId, permit: Option<OwnedSemaphorePermit> },
    /// A reader that had stalled has room again.
    ReaderReady,
    /// The oldest step in flight was answered.
    StepDone(StepAnswer),
    /// Nothing but time has passed: a deadline has come.
    Tick,
    /// There are no shards any more, for this reason.
    ShardsFailed(String),
    /// All requests are to end now.
    Shutdown,
}

/// A request at the door.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) id: RequestId,
    pub(crate) request: TokenRequest,
    pub(crate) events: EventSender,
    pub(crate) submitted_at: Instant,
}

/// What the scheduler may give.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// KV blocks, >= 1. Each request fits in them alone.
    pub(crate) num_blocks: u32,
    /// What one step may use.
    pub(crate) budget: Budget,
    /// Steps that are sent before the first of them is answered, >= 1. With 2, the shards have the next step when they
    /// finish one.
    pub(crate) steps_in_flight: usize,
    /// Whether computed blocks are kept and shared.
    pub(crate) prefix_caching: bool,
    /// Most tokens that a row may sample, >= 1. With more than 1, where shards speculate, nothing is run ahead behind a
    /// row that samples.
    pub(crate) max_sampled_tokens: usize,
    /// Who goes first, and how long anything may take.
    pub(crate) policy: Policy,
}

impl Limits {
    /// Events that one step can cause for one request: log-probabilities of its prompt, and tokens.
    pub(super) fn events_per_step(&self) -> usize {
        1 + self.max_sampled_tokens
    }
}

/// By hash, blocks that a running request is about to compute. Of several that do, the first.
pub(crate) type Coming = HashMap<u64, RequestId>;

/// The owner of all requests.
#[derive(Debug)]
pub(crate) struct Scheduler {
    pub(super) limits: Limits,
    queue: Queue<Entry>,
    ranking: Ranking,
    fairness: Fairness,
    deadlines: Deadlines,
    /// Where an inter-token latency is to be held.
    pace: Option<Pace>,
    /// Requests that hold blocks, oldest first.
    pub(super) running: BTreeMap<RequestId, Running>,
    pub(super) blocks: BlockPool,
    pub(super) coming: Coming,
    headroom: Headroom,
    /// Sequences that the shards are to forget with the next step.
    released: Vec<SequenceId>,
    /// Steps without an answer, oldest first.
    in_flight: VecDeque<InFlight>,
    /// When the last answer came.
    answered_at: Option<Instant>,
    pub(super) next_step: u64,
    next_sequence: u64,
    /// Why nothing runs any more.
    failure: Option<Failure>,
}

/// A step without an answer.
#[derive(Debug)]
struct InFlight {
    id: u64,
    rows: Vec<InFlightRow>,
    /// None for a step that only releases: it computes nothing that would be worth a metric.
    method: Option<StepMethod>,
    work: Work,
    sent_at: Instant,
}

#[derive(Debug)]
struct InFlightRow {
    request: RequestId,
    sequence: SequenceId,
    /// Position of the first token that it computes.
    first: usize,
    num_tokens: usize,
    /// Whether it reaches the last known token, so that the next one is sampled.
    samples: bool,
}

impl Scheduler {
    /// A scheduler without requests.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            queue: Queue::default(),
            ranking: Ranking::new(limits.policy.ageing),
            fairness: Fairness::default(),
            deadlines: Deadlines::default(),
            // A prompt proceeds by a block at least: less would not even fill what its step reserves.
            pace: limits.policy.target_itl.map(|target| Pace::new(target, limits.budget.block_size)),
            running: BTreeMap::new(),
            blocks: BlockPool::new(limits.num_blocks),
            coming: Coming::new(),
            headroom: Headroom::new(),
            released: Vec::new(),
            in_flight: VecDeque::new(),
            answered_at: None,
            next_step: 1,
            next_sequence: 1,
            failure: None,
        }
    }

    /// Makes of an event what follows from it. What is to be computed then: `next_step`.
    pub(crate) fn apply(&mut self, event: Event, now: Instant) {
        match event {
            Event::Submit(submission) => self.submit(submission),
            Event::Cancel { request, permit } => {
                drop(self.end(request));
                drop(permit);
            }
            // Who has room is looked at whenever a step is planned, and what time it is after each event; these are there
            // to wake the planner.
            Event::ReaderReady | Event::Tick => {}
            Event::StepDone(answer) => {
                if let Err(wrong) = self.step_done(answer, now) {
                    self.fail_all(&Failure::Shards(wrong.to_string()));
                }
            }
            Event::ShardsFailed(reason) => self.fail_all(&Failure::Shards(reason)),
            Event::Shutdown => self.fail_all(&Failure::ShuttingDown),
        }
        // After the event: what was done in time counts.
        self.expire(now);
        if cfg!(debug_assertions) {
            self.check_invariants();
        }
    }

    /// The next step to send, as long as one is due.
    pub(crate) fn next_step(&mut self, now: Instant) -> Option<Step> {
        self.expire(now);
        if self.failure.is_some() || self.in_flight.len() >= self.limits.steps_in_flight {
            return None;
        }
        let rows = self.plan();
        // A step without rows still tells the shards what to forget.
        if rows.is_empty() && self.released.is_empty() {
            return None;
        }
        Some(self.send(&rows, now))
    }

    /// What to compute next, after preempting those who must give their blocks for it.
    fn plan(&mut self) -> Vec<Row> {
        let mut admits = true;
        loop {
            let running = self.running.values().map(|running| self.running_candidate(running));
            let mut running = running.collect::<Vec<_>>();
            running.sort_unstable_by_key(|candidate| candidate.rank);
            // Lazily: where the running ones leave no place, the order of those who wait is not asked for.
            let order = std::iter::once(()).flat_map(|()| self.queue.order(&self.fairness));
            let waiting = order.map(|entry| self.waiting_candidate(entry));
            let headroom = self.headroom.blocks();
            let supply = Supply { blocks: self.blocks.num_available(), headroom, admits };
            match batch::plan(&running, waiting, supply, &self.budget(&running)) {
                Plan::Compute(Rows { rows, overtaken }) => {
                    for (request, tokens) in overtaken {
                        let entry = self.queue.get_mut(request).expect("who is overtaken waits");
                        entry.overtaken_by += tokens;
                    }
                    return rows;
                }
                Plan::Preempt(Preempt::ForWaiting(request)) => self.preempt(request),
                Plan::Preempt(Preempt::ForRunning(request)) => {
                    // Letting another in would be to take his place.
                    admits = false;
                    self.headroom.preempted();
                    self.preempt(request);
                }
            }
        }
    }

    /// What the next step may use.
    fn budget(&self, running: &[Candidate]) -> Budget {
        let Some(pace) = &self.pace else { return self.limits.budget };
        let decode_rows =
            running.iter().filter(|candidate| candidate.has_room && candidate.decodes()).count();
        let max_prefill_tokens = pace.budget(decode_rows, self.limits.budget.max_prefill_tokens);
        metrics::set_prefill_budget(max_prefill_tokens);
        Budget { max_prefill_tokens, ..self.limits.budget }
    }

    /// When to send [`Event::Tick`] if nothing else happens before.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Why nothing runs any more, if so.
    pub(crate) fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// Its size in numbers.
    pub(crate) fn gauges(&self) -> SchedulerGauges {
        SchedulerGauges {
            queued: self.queue.len(),
            running: self.running.len(),
            blocks_used: self.blocks.num_blocks() - self.blocks.num_available(),
            blocks_cached: self.blocks.num_cached(),
            blocks_total: self.blocks.num_blocks(),
        }
    }

    /// Whether the shards have nothing to compute.
    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Panics where the state contradicts itself. To be called between events.
    pub(crate) fn check_invariants(&self) {
        self.blocks.check_invariants(self.running.values().map(|running| &running.sequence.table));
        self.check_announced();
        for Running { entry, sequence } in self.running.values() {
            let known = entry.len() + sequence.sampling;
            assert!(sequence.computed <= known, "{:?} is computed beyond its end", entry.id);
            let blocks = sequence.computed.div_ceil(self.limits.budget.block_size);
            assert_eq!(
                sequence.table.blocks().len(),
                blocks,
                "{:?} holds other blocks than it needs",
                entry.id
            );
            let rows = self.in_flight.iter().flat_map(|step| &step.rows);
            let rows = rows.filter(|row| row.sequence == sequence.id);
            assert_eq!(sequence.steps_in_flight, rows.clone().count(), "{:?} miscounts its steps", entry.id);
            assert_eq!(
                sequence.sampling,
                rows.filter(|row| row.samples).count(),
                "{:?} miscounts tokens",
                entry.id
            );
        }
        let both = self.queue.iter().find(|entry| self.running.contains_key(&entry.id));
        assert!(both.is_none(), "{both:?} is waiting and running");
        self.fairness.check_invariants(self.queue.len(), self.running.len());
        for entry in self.queue.iter().chain(self.running.values().map(|running| &running.entry)) {
            let prompt_tokens = entry.request.prompt.len();
            assert!(entry.overtaken_by <= prompt_tokens, "{:?} is overtaken by too many", entry.id);
            assert_eq!(self.deadlines.get(entry.id), entry.deadline(), "{:?} has another deadline", entry.id);
        }
        assert!(
            self.deadlines.len() <= self.queue.len() + self.running.len(),
            "a deadline outlives its request"
        );
        assert!(self.in_flight.len() <= self.limits.steps_in_flight, "too many steps in flight");
    }

    fn submit(&mut self, submission: Submission) {
        if let Some(failure) = &self.failure {
            submission.events.fail(failure.clone());
            return;
        }
        let Submission { id, request, submitted_at, .. } = &submission;
        let place = Place {
            rank: self.ranking.rank(*id, request.standing.priority, *submitted_at),
            priority: request.standing.priority,
            account: self.fairness.enter(&request.standing.account),
            cost: request.prompt.len() as u64 * PROMPT_TOKEN,
        };
        let Limits { prefix_caching, budget, policy, .. } = &self.limits;
        let block_size = if *prefix_caching { budget.block_size } else { usize::MAX };
        let entry = Entry::new(submission, block_size, place, policy.request_timeout);
        if let Some(deadline) = entry.deadline() {
            self.deadlines.insert(entry.id, deadline);
        }
        self.enqueue(entry);
    }

    /// Ends the requests whose deadlines have come. One that waits has cost no step; the blocks of one that runs are free.
    fn expire(&mut self, now: Instant) {
        while let Some(request) = self.deadlines.pop_expired(now) {
            let entry = self.end(request).expect("who has a deadline is in the house");
            entry.time_out();
        }
    }

    fn enqueue(&mut self, entry: Entry) {
        self.fairness.wait(entry.place.account);
        self.queue.push(entry.place, entry);
    }

    fn dequeue(&mut self, request: RequestId) -> Option<Entry> {
        let entry = self.queue.remove(request)?;
        self.fairness.stop_waiting(entry.place.account);
        Some(entry)
    }

    /// Takes a request out for good.
    fn end(&mut self, request: RequestId) -> Option<Entry> {
        let entry = self.remove(request)?;
        self.fairness.leave(entry.place.account);
        self.deadlines.remove(request);
        Some(entry)
    }

    /// Takes a request out, wherever it is. Its blocks are free and its sequence is released with the next step.
    fn remove(&mut self, request: RequestId) -> Option<Entry> {
        let Some(running) = self.running.remove(&request) else { return self.dequeue(request) };
        self.withdraw_announced(&running);
        let Running { entry, sequence } = running;
        self.released.push(sequence.id);
        self.blocks.release(&sequence.table);
        Some(entry)
    }

    /// Sends a running request back to the queue. What steps in flight will say about it is ignored: it is computed
    /// again from the tokens that its reader has, with the same result, since nothing random depends on when.
    fn preempt(&mut self, request: RequestId) {
        let entry = self.remove(request).expect("a plan preempts requests that are running");
        metrics::record_preemption();
        self.enqueue(entry);
    }

    fn fail_all(&mut self, failure: &Failure) {
        if self.failure.is_some() {
            return;
        }
        self.failure = Some(failure.clone());
        for method in self.in_flight.drain(..).filter_map(|step| step.method) {
            metrics::record_step_failed(method);
        }
        self.coming.clear();
        self.deadlines.clear();
        self.fairness = Fairness::default();
        for Running { entry, sequence } in std::mem::take(&mut self.running).into_values() {
            self.blocks.release(&sequence.table);
            entry.events.fail(failure.clone());
        }
        for entry in self.queue.drain() {
            entry.events.fail(failure.clone());
        }
    }

    /// Makes a plan's rows a step, and a step in flight.
    fn send(&mut self, rows: &[Row], now: Instant) -> Step {
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
            in_flight.push(InFlightRow::new(running, row));
            step.schedule.push(running.schedule(row.num_tokens, new_blocks));
            self.share(row.request);
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
        let cost = entry.start(now, computed);
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

    fn step_done(&mut self, answer: StepAnswer, now: Instant) -> Result<(), WrongAnswer> {
        if self.failure.is_some() {
            return Ok(());
        }
        let step = self.in_flight.pop_front();
        let step = step.ok_or(WrongAnswer::Step { expected: None, got: answer.step })?;
        if answer.step != step.id {
            return Err(WrongAnswer::Step { expected: Some(step.id), got: answer.step });
        }
        if let Some(method) = step.method {
            let total = now.saturating_duration_since(step.sent_at);
            let StepTimes { forward, sampling } = answer.times;
            metrics::record_step_done(method, &StepDurations { total, forward, sampling });
        }
        // The shards begin a step when it is there and the one before is done.
        let answered_at = self.answered_at.replace(now);
        let begun_at = answered_at.map_or(step.sent_at, |answered_at| answered_at.max(step.sent_at));
        if let Some(pace) = &mut self.pace {
            pace.observe(step.work, now.saturating_duration_since(begun_at));
        }

        let unknown = |sequence| WrongAnswer::UnknownSequence { step: step.id, sequence };
        let mut outputs = HashMap::with_capacity(answer.outputs.len());
        for output in answer.outputs {
            let sequence = output.sequence;
            if outputs.insert(sequence, output).is_some() {
                return Err(unknown(sequence));
            }
        }
        for row in &step.rows {
            let output = outputs.remove(&row.sequence);
            let skipped = answer.skipped.contains(&row.sequence);
            self.row_done(step.id, row, output, skipped)?;
        }
        outputs.into_keys().next().map_or(Ok(()), |sequence| Err(unknown(sequence)))
    }

    /// Moves one sequence on by what a step gave for it.
    fn row_done(
        &mut self,
        step: u64,
        row: &InFlightRow,
        output: Option<SequenceOutput>,
        skipped: bool,
    ) -> Result<(), WrongAnswer> {
        let sequence = row.sequence;
        let running = self.running.get_mut(&row.request).filter(|running| running.sequence.id == sequence);
        // Cancelled, preempted, or ended in an earlier step while this one was on its way.
        let Some(running) = running else { return Ok(()) };
        if skipped {
            return Err(WrongAnswer::Skipped { step, sequence });
        }
        running.sequence.steps_in_flight -= 1;
        running.sequence.sampling -= usize::from(row.samples);
        running.sequence.answered = row.first + row.num_tokens;
        let (prompt, outcome) =
            output.map_or((Vec::new(), Outcome::Nothing), |output| (output.prompt, output.outcome));
        if outcome == Outcome::InvalidLogits {
            self.forget_computed(row.request);
            if let Some(entry) = self.end(row.request) {
                entry.events.fail(Failure::InvalidLogits);
            }
            return Ok(());
        }

        let expected = row.prompt_tokens(running);
        let got = prompt.len();
        if !prompt.iter().map(|token| token.id).eq(expected.iter().copied()) {
            return Err(WrongAnswer::Prompt { step, sequence, expected: expected.len(), got });
        }
        running.entry.report_prompt(row.first + 1, prompt);

        let ended = matches!(outcome, Outcome::Ended(..));
        match (outcome, row.samples) {
            (Outcome::Nothing | Outcome::InvalidLogits, false) => {}
            (Outcome::Nothing | Outcome::InvalidLogits, true) => {
                return Err(WrongAnswer::NoToken { step, sequence });
            }
            (Outcome::Sampled(_) | Outcome::Ended(..), false) => {
                return Err(WrongAnswer::EarlyToken { step, sequence });
            }
            (Outcome::Sampled(tokens), true) => self.sampled(step, row, tokens, None)?,
            (Outcome::Ended(tokens, end), true) => self.sampled(step, row, tokens, Some(end))?,
        }
        self.share(row.request);
        if ended {
            self.headroom.ended();
            self.end(row.request);
        }
        Ok(())
    }

    /// Takes the tokens that a row has sampled. Keys and values of all of them but the last are computed too.
    fn sampled(
        &mut self,
        step: u64,
        row: &InFlightRow,
        tokens: Vec<Token>,
        end: Option<EndReason>,
    ) -> Result<(), WrongAnswer> {
        let running = self.running.get_mut(&row.request).expect("a row that is done is of a running request");
        let Running { entry, sequence } = running;
        let slots = sequence.table.blocks().len() * self.limits.budget.block_size;
        let remaining = entry.request.max_new_tokens as usize - entry.generated.len();
        let limit = self.limits.max_sampled_tokens.min(slots - sequence.answered + 1).min(remaining);
        let got = tokens.len();
        if !(1..=limit).contains(&got) {
            return Err(WrongAnswer::TooManyTokens { step, sequence: row.sequence, got, limit });
        }
        if got == remaining && end.is_none() {
            return Err(WrongAnswer::NotEnded { step, sequence: row.sequence });
        }
        let cost = entry.report_tokens(tokens, end);
        self.fairness.charge(entry.place.account, cost);
        sequence.answered += got - 1;
        sequence.computed = sequence.computed.max(sequence.answered);
        if end.is_some() {
            // A step in flight that was to go on skips it.
            sequence.computed = sequence.answered;
        }
        Ok(())
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
        }
    }

    /// The prompt tokens of which this row owes log-probabilities.
    fn prompt_tokens<'a>(&self, running: &'a Running) -> &'a [TokenId] {
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
