//! The state of all requests, and what an event does to it. Synchronous, without IO and without a clock of its own, so
//! that tests drive it with events that are made up.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

use proto::units::SequenceId;

use super::blocks::BlockPool;
use super::chunks::Division;
use super::deadlines::Deadlines;
use super::entry::{Entry, Running};
use super::event::{Event, RequestId, Submission};
use super::fairness::{Fairness, PROMPT_TOKEN};
use super::headroom::Headroom;
use super::in_flight::InFlight;
use super::limits::{Budget, Limits};
use super::pace::Pace;
use super::plan::{Candidate, Plan, Preempt, Row, Rows, Supply};
use super::planner;
use super::policy::Discipline;
use super::queue::{Place, Queue};
use super::rank::Ranking;
use super::request::Failure;
use super::step::Step;
use super::token_stream::Wakes;
use crate::metrics::{self, SchedulerGauges};

/// By hash, blocks that a running request is about to compute. Of several that do, the first.
pub(crate) type Coming = HashMap<u64, RequestId>;

/// The owner of all requests.
#[derive(Debug)]
pub(crate) struct Scheduler {
    pub(super) limits: Limits,
    pub(super) queue: Queue<Entry>,
    ranking: Ranking,
    pub(super) fairness: Fairness,
    pub(super) deadlines: Deadlines,
    /// Where an inter-token latency is to be held.
    pub(super) pace: Option<Pace>,
    /// Requests that hold blocks, oldest first.
    pub(super) running: BTreeMap<RequestId, Running>,
    pub(super) blocks: BlockPool,
    pub(super) coming: Coming,
    pub(super) headroom: Headroom,
    /// Sequences that the shards are to forget with the next step.
    pub(super) released: Vec<SequenceId>,
    /// Steps without an answer, oldest first.
    pub(super) in_flight: VecDeque<InFlight>,
    /// When the last answer came.
    pub(super) answered_at: Option<Instant>,
    pub(super) next_step: u64,
    pub(super) next_sequence: u64,
    /// Why nothing runs any more.
    pub(super) failure: Option<Failure>,
    /// Readers that do not know yet of what they were given.
    pub(super) wakes: Wakes,
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
            wakes: Wakes::default(),
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

    /// Wakes the readers of all that was given since this was called last. To be called when steps are sent: the shards
    /// wait for those.
    pub(crate) fn wake_readers(&mut self) {
        self.wakes.wake();
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
            let division = match self.limits.policy.discipline {
                Discipline::Fair => Division::ShortestBesideFirst,
                Discipline::FirstCome => Division::InOrder,
            };
            let supply = Supply { blocks: self.blocks.num_available(), headroom, admits, division };
            match planner::plan(&running, waiting, supply, &self.budget(&running)) {
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

    pub(super) fn dequeue(&mut self, request: RequestId) -> Option<Entry> {
        let entry = self.queue.remove(request)?;
        self.fairness.stop_waiting(entry.place.account);
        Some(entry)
    }

    /// Takes a request out for good.
    pub(super) fn end(&mut self, request: RequestId) -> Option<Entry> {
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
    pub(super) fn preempt(&mut self, request: RequestId) {
        let entry = self.remove(request).expect("who is preempted is running");
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
}
