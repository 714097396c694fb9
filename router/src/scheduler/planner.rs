//! What is computed next: a pure function of who runs, who waits, and what there is to give.

use std::collections::HashMap;

use super::chunks::{Division, divide};
use super::event::RequestId;
use super::limits::Budget;
use super::plan::{Candidate, NextBlock, Plan, Preempt, Row, Rows, Supply};

/// Waiting requests that are looked at for a step. A chunk of a few thousand tokens has no room for more, and it keeps
/// planning short where thousands wait.
const LOOK_AHEAD: usize = 128;

/// Plans one step. `running` is in the order of rank, `waiting` in the order in which they are to be let in.
///
/// Running requests come first: each gets a decode row, or a chunk of its prompt. When blocks run out, those whose readers
/// have stalled give theirs, then the one with the last rank; so the first always proceeds, and with it all. What is left
/// goes to waiting requests, each when the blocks for all its tokens can be had. One that does not fit is overtaken by those
/// behind it which do, as long as it has patience; one whose next block is about to be computed by another is passed over.
/// All prompts divide the prefill budget.
///
/// How many blocks a preempted request gives back depends on who else uses them. So a plan names one, and when it has
/// given its blocks, the rest is planned with what there is.
pub(crate) fn plan(
    running: &[Candidate],
    waiting: impl IntoIterator<Item = Candidate>,
    supply: Supply,
    budget: &Budget,
) -> Plan {
    let ready = running.iter().filter(|candidate| candidate.has_room).collect::<Vec<_>>();
    let busy = ready.iter().filter(|candidate| candidate.remaining() > 0).count();
    let places = if supply.admits { budget.max_sequences.saturating_sub(busy) } else { 0 };
    let prospects = if places > 0 { prospects(waiting) } else { Vec::new() };
    let mut planner = Planner {
        budget,
        available_blocks: supply.blocks,
        prefill_tokens: budget.max_prefill_tokens,
        chunks: chunks(&ready, &prospects, budget.max_prefill_tokens, supply.division),
        stalled: running.iter().filter(|candidate| !candidate.has_room).collect(),
        rows: Vec::new(),
        prompts: Vec::new(),
        overtaken: Vec::new(),
    };
    let mut preempt = planner.advance(&ready).map(Preempt::ForRunning);
    if preempt.is_none() {
        let door = Door { places, headroom: supply.headroom };
        preempt = planner.admit(&ready, &prospects, door).map(Preempt::ForWaiting);
    }
    if let Some(preempt) = preempt {
        return Plan::Preempt(preempt);
    }
    planner.top_up();
    Plan::Compute(planner.finish())
}

/// The waiting requests that a step might let in.
fn prospects(waiting: impl IntoIterator<Item = Candidate>) -> Vec<Candidate> {
    let mut prospects = Vec::new();
    for candidate in waiting.into_iter().take(LOOK_AHEAD) {
        // Without room, it was preempted while its reader stalled. It must not hold up those behind it.
        if !candidate.has_room || candidate.next_block == NextBlock::Coming {
            continue;
        }
        let impatient = candidate.patience == 0;
        prospects.push(candidate);
        if impatient {
            break;
        }
    }
    prospects
}

/// How prompts divide the prefill budget, if all that might be let in are.
fn chunks(
    ready: &[&Candidate],
    prospects: &[Candidate],
    budget: usize,
    division: Division,
) -> HashMap<RequestId, usize> {
    let running = ready.iter().copied().filter(|candidate| candidate.remaining() > 1);
    let first_running = running.clone().next().map(|candidate| candidate.request);
    let num_running = running.clone().count();
    let waiting = prospects.iter().filter(|candidate| candidate.remaining() > 1);
    let mut prompts = running.chain(waiting).collect::<Vec<_>>();
    // Who goes first among all of them: of those who wait, only the first is let in whatever happens.
    if let (Some(running), Some(waiting)) = (prompts.first(), prompts.get(num_running))
        && waiting.rank < running.rank
    {
        prompts[..=num_running].rotate_right(1);
    }
    let remaining = prompts.iter().map(|candidate| candidate.remaining()).collect::<Vec<_>>();
    let mut chunks = divide(division, budget, &remaining);
    // Who waits may not fit, and then the first that runs must proceed without it.
    if let Some(index) = prompts.iter().position(|candidate| Some(candidate.request) == first_running)
        && chunks[index] == 0
        && let Some(longest) = chunks.iter_mut().max()
    {
        *longest -= 1;
        chunks[index] = 1;
    }
    prompts.iter().map(|candidate| candidate.request).zip(chunks).collect()
}

/// What keeps waiting requests out.
#[derive(Debug, Clone, Copy)]
struct Door {
    /// Sequences that a step has places for beside those that run.
    places: usize,
    /// Blocks that are kept for each running sequence.
    headroom: usize,
}

struct Planner<'a> {
    budget: &'a Budget,
    available_blocks: usize,
    /// What is left of the prefill budget.
    prefill_tokens: usize,
    /// The part of it that each prompt has.
    chunks: HashMap<RequestId, usize>,
    /// Running requests whose readers have stalled, in the order of rank: the first to give their blocks.
    stalled: Vec<&'a Candidate>,
    rows: Vec<Row>,
    /// Of the rows, those with chunks: index and request.
    prompts: Vec<(usize, &'a Candidate)>,
    overtaken: Vec<(&'a Candidate, usize)>,
}

impl<'a> Planner<'a> {
    /// Gives rows to running requests. Returns who must give blocks for that.
    fn advance(&mut self, ready: &[&'a Candidate]) -> Option<RequestId> {
        for (index, candidate) in ready.iter().enumerate() {
            if self.rows.len() == self.budget.max_sequences {
                return None;
            }
            let wanted = self.tokens_wanted(candidate);
            let num_tokens = self.tokens_that_fit(candidate, wanted, self.available_blocks);
            if wanted > 0 && num_tokens == 0 {
                let victim = self.stalled.last().or_else(|| ready[index + 1..].last());
                if let Some(victim) = victim {
                    return Some(victim.request);
                }
            }
            self.push(candidate, num_tokens);
        }
        None
    }

    /// Lets up to `places` waiting requests in. Returns who must give blocks for that.
    fn admit(
        &mut self,
        ready: &[&'a Candidate],
        prospects: &'a [Candidate],
        Door { mut places, headroom }: Door,
    ) -> Option<RequestId> {
        // For those that run, since they will soon need more blocks: the watermark below which nobody is let in.
        let mut watermark = ready.len() * headroom;
        // Blocks that prompts which are let in already will need for their next chunks.
        let mut promised = ready.iter().map(|candidate| self.blocks_to_come(candidate)).sum::<usize>();
        promised -= self.rows.iter().map(|row| row.new_blocks).sum::<usize>();
        // What could be had from those whose readers have stalled.
        let stalled = self.stalled.iter().map(|stalled| stalled.num_available).sum::<usize>();
        // First blocks of what those who are let in by this plan compute.
        let mut coming = Vec::new();

        for candidate in prospects {
            if places == 0 {
                break;
            }
            if candidate.next_block.is_coming(&coming) {
                continue;
            }
            let needed = self.blocks_to_come(candidate);
            // Where nothing else can run, the request fits: it would fit an empty cache.
            let least = promised + needed + candidate.num_available + watermark;
            let fits = watermark == 0 || self.available_blocks + stalled >= least;
            let wanted = self.tokens_wanted(candidate);
            if !fits || wanted == 0 || !self.may_overtake(candidate) {
                self.overtaken.push((candidate, 0));
                continue;
            }
            let available = self.available_blocks.saturating_sub(candidate.num_available);
            let num_tokens = self.tokens_that_fit(candidate, wanted, available);
            if num_tokens < wanted
                && let Some(victim) = self.stalled.last()
            {
                return Some(victim.request);
            }
            if num_tokens == 0 {
                break;
            }
            self.available_blocks = available;
            let new_blocks = self.push(candidate, num_tokens);
            promised += needed - new_blocks;
            watermark += headroom;
            places -= 1;
            for (_, tokens) in &mut self.overtaken {
                *tokens += candidate.remaining();
            }
            if let NextBlock::Shared(hash) = candidate.next_block {
                coming.push(hash);
            }
        }
        None
    }

    /// Whether those before it that are not let in have the patience.
    fn may_overtake(&self, candidate: &Candidate) -> bool {
        self.overtaken.iter().all(|(before, tokens)| tokens + candidate.remaining() <= before.patience)
    }

    /// Gives what those who were not let in have left of the prefill budget to those who compute chunks.
    fn top_up(&mut self) {
        for (index, candidate) in std::mem::take(&mut self.prompts) {
            let Row { num_tokens, new_blocks, .. } = self.rows[index];
            let wanted = (candidate.remaining() - num_tokens).min(self.prefill_tokens);
            let fitting =
                self.tokens_that_fit(candidate, num_tokens + wanted, new_blocks + self.available_blocks);
            // Never less than before: those were the blocks for that.
            let blocks = self.blocks_for(candidate, fitting);
            self.prefill_tokens -= fitting - num_tokens;
            self.available_blocks -= blocks - new_blocks;
            self.rows[index] = Row { num_tokens: fitting, new_blocks: blocks, ..self.rows[index] };
        }
    }

    fn finish(mut self) -> Rows {
        // Stable: within each part the order stays. Shards take decode rows first.
        self.rows.sort_by_key(|row| row.num_tokens > 1);
        let overtaken = self.overtaken.into_iter().filter(|(_, tokens)| *tokens > 0);
        let overtaken = overtaken.map(|(candidate, tokens)| (candidate.request, tokens));
        Rows { rows: self.rows, overtaken: overtaken.collect() }
    }

    /// Tokens that the budgets allow it: one for a decode row, else its chunk.
    fn tokens_wanted(&self, candidate: &Candidate) -> usize {
        match candidate.remaining() {
            one @ 0..=1 => one,
            _ => self.chunks.get(&candidate.request).copied().unwrap_or_default(),
        }
    }

    /// Of `wanted` tokens, those for which there are blocks if it gets `available` ones.
    fn tokens_that_fit(&self, candidate: &Candidate, wanted: usize, available: usize) -> usize {
        let slots = (candidate.num_blocks + available) * self.budget.block_size;
        wanted.min(slots - candidate.computed)
    }

    /// Blocks missing for all its tokens.
    fn blocks_to_come(&self, candidate: &Candidate) -> usize {
        candidate.len.div_ceil(self.budget.block_size).saturating_sub(candidate.num_blocks)
    }

    /// Blocks missing for its next `num_tokens` tokens.
    fn blocks_for(&self, candidate: &Candidate, num_tokens: usize) -> usize {
        (candidate.computed + num_tokens).div_ceil(self.budget.block_size) - candidate.num_blocks
    }

    /// Adds a row, if it has tokens. Returns the blocks that it takes.
    fn push(&mut self, candidate: &'a Candidate, num_tokens: usize) -> usize {
        if num_tokens == 0 {
            return 0;
        }
        let new_blocks = self.blocks_for(candidate, num_tokens);
        self.available_blocks -= new_blocks;
        if candidate.remaining() > 1 {
            self.prefill_tokens -= num_tokens;
            self.prompts.push((self.rows.len(), candidate));
        }
        self.rows.push(Row { request: candidate.request, num_tokens, new_blocks });
        new_blocks
    }
}
