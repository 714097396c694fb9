//! Which computed blocks a sequence takes from others, and which it gives to them.

use super::entry::{Entry, Running};
use super::event::RequestId;
use super::in_flight::InFlightRow;
use super::plan::{Candidate, NextBlock};
use super::policy::Discipline;
use super::state::{Coming, Scheduler};

/// Steps for which a waiting request is held, as long as no block comes that it waits for. Each step computes a chunk of
/// the prompt that is waited for, unless older prompts take the budget; so the bound is there for those, and for the
/// promise that nobody waits without one.
const MAX_HOLD_STEPS: u64 = 8;

/// A wait for a block that another request computes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hold {
    /// Blocks that were there when it began.
    num_blocks: usize,
    /// The step that it did not take part in first.
    since_step: u64,
}

impl Scheduler {
    /// How the planner sees a running request.
    pub(super) fn running_candidate(&self, running: &Running) -> Candidate {
        let Running { entry, sequence } = running;
        let last = entry.generated.len() + sequence.sampling >= entry.request.max_new_tokens as usize;
        // How far the shards are with a row that speculates is known when it is answered.
        let unknown = sequence.sampling > 0 && self.limits.max_sampled_tokens > 1;
        let has_room = self.has_room(running);
        Candidate {
            request: entry.id,
            rank: entry.place.rank,
            // The last token needs no keys and values: nothing is sampled after it.
            len: if last || unknown { sequence.computed } else { running.len() },
            computed: sequence.computed,
            num_blocks: sequence.table.blocks().len(),
            num_available: if has_room { 0 } else { self.blocks.num_returned_by(&sequence.table) },
            has_room,
            next_block: NextBlock::Own,
            patience: 0,
        }
    }

    /// How the planner sees a request in the queue.
    pub(super) fn waiting_candidate(&self, entry: &Entry) -> Candidate {
        let candidate = Candidate {
            request: entry.id,
            rank: entry.place.rank,
            len: entry.len(),
            computed: 0,
            num_blocks: 0,
            num_available: 0,
            has_room: entry.events.has_room(self.limits.events_per_step()),
            next_block: NextBlock::Own,
            patience: match self.limits.policy.discipline {
                Discipline::Fair => entry.patience(),
                Discipline::FirstCome => 0,
            },
        };
        // Log-probabilities need the logits of each position, so all is computed again.
        if entry.owes_prompt_logprobs() {
            return candidate;
        }
        let found = self.blocks.lookup(&entry.prefix(), entry.found.get());
        entry.found.set(found);
        Candidate {
            computed: found.num_blocks * self.limits.budget.block_size,
            num_blocks: found.num_blocks,
            num_available: self.blocks.num_available_of(found),
            next_block: self.next_block(entry, found.num_blocks),
            ..candidate
        }
    }

    /// What a waiting request of which `num_blocks` are there does about its next block.
    fn next_block(&self, entry: &Entry, num_blocks: usize) -> NextBlock {
        if num_blocks == entry.prefix().usable_blocks() {
            return NextBlock::Own;
        }
        let hash = entry.block_hashes()[num_blocks];
        if !self.is_coming(hash) {
            entry.hold.set(None);
            return NextBlock::Shared(hash);
        }
        let hold = entry.hold.get().filter(|hold| hold.num_blocks == num_blocks);
        let hold = hold.unwrap_or(Hold { num_blocks, since_step: self.next_step });
        entry.hold.set(Some(hold));
        if self.next_step - hold.since_step < MAX_HOLD_STEPS { NextBlock::Coming } else { NextBlock::Own }
    }

    /// Whether a running request is about to compute the block with this hash. One whose reader has stalled is not.
    fn is_coming(&self, hash: u64) -> bool {
        let computing = self.coming.get(&hash).and_then(|request| self.running.get(request));
        computing.is_some_and(|running| self.has_room(running))
    }

    /// Whether its reader has room for the events of the steps in flight and of one more.
    fn has_room(&self, Running { entry, sequence }: &Running) -> bool {
        entry.events.has_room((sequence.steps_in_flight + 1) * self.limits.events_per_step())
    }

    /// Lets others wait for the blocks that a request which was just let in will compute.
    pub(super) fn announce(&mut self, request: RequestId) {
        let Some(Running { entry, sequence }) = self.running.get_mut(&request) else { return };
        sequence.num_announced = entry.block_hashes().len();
        for &hash in &entry.block_hashes()[sequence.table.num_shared()..] {
            self.coming.entry(hash).or_insert(request);
        }
    }

    /// Lets others use the blocks of a request that are full and computed, or will be before the next step begins.
    pub(super) fn share(&mut self, request: RequestId) {
        let Some(running) = self.running.get_mut(&request) else { return };
        let Running { entry, sequence } = running;
        // Prompt log-probabilities can show logits that are not finite, and the shards compute no later chunk then: its
        // blocks count when the answer is there. Otherwise a chunk that was sent is computed.
        let computed = if sequence.prompt_logprobs { sequence.answered } else { sequence.computed };
        let known = computed.min(entry.len());
        let num_blocks = (known / self.limits.budget.block_size).min(entry.block_hashes().len());
        let before = sequence.table.num_shared();
        if num_blocks <= before || sequence.table.is_closed() {
            return;
        }
        let open = self.blocks.share(&mut sequence.table, &entry.prefix(), num_blocks);
        let after = if open { sequence.table.num_shared() } else { sequence.num_announced };
        for hash in &entry.block_hashes()[before..after.clamp(before, entry.block_hashes().len())] {
            withdraw(&mut self.coming, *hash, request);
        }
    }

    /// Takes back what a request that no longer runs has announced.
    pub(super) fn withdraw_announced(&mut self, Running { entry, sequence }: &Running) {
        let announced = sequence.num_announced.max(sequence.table.num_shared());
        for hash in &entry.block_hashes()[sequence.table.num_shared()..announced] {
            withdraw(&mut self.coming, *hash, entry.id);
        }
    }

    /// Lets nobody use what a request has computed whose logits were not finite.
    pub(super) fn forget_computed(&mut self, request: RequestId) {
        if let Some(Running { sequence, .. }) = self.running.get(&request) {
            self.blocks.forget(&sequence.table, sequence.num_acquired);
        }
    }

    /// Lets nobody use what a row was to compute and has not, nor what later ones were to: also where its request has gone
    /// meanwhile, whose blocks stay in the cache.
    pub(super) fn forget_uncomputed(&mut self, row: &InFlightRow) {
        let later = self.in_flight.iter().flat_map(|step| &step.rows);
        let later = later.filter(|later| later.sequence == row.sequence);
        for row in std::iter::once(row).chain(later) {
            self.blocks.forget_shared(&row.shared);
        }
    }

    /// Panics where what is announced is not what runs.
    pub(super) fn check_announced(&self) {
        for (hash, request) in &self.coming {
            let Running { entry, sequence } =
                self.running.get(request).expect("what is announced is computed by a running request");
            let announced = &entry.block_hashes()[..sequence.num_announced];
            let place = announced.iter().position(|announced| announced == hash);
            assert!(
                place.is_some_and(|place| place >= sequence.table.num_shared()),
                "{request:?} announces too much"
            );
        }
    }
}

fn withdraw(coming: &mut Coming, hash: u64, request: RequestId) {
    if coming.get(&hash) == Some(&request) {
        coming.remove(&hash);
    }
}
