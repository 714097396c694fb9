//! What is computed next: a pure function of who runs, who waits, and what there is to give.

use std::collections::HashMap;
use std::sync::Arc;

use proto::units::{BlockId, SequenceId, TokenId};

use super::chunks::divide;
use super::rank::Rank;
use super::request::TokenRequest;
use super::state::RequestId;

/// What a step may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Most tokens of prompt chunks, >= 1. Decode rows come on top.
    pub(crate) max_prefill_tokens: usize,
    /// Most sequences, >= 1.
    pub(crate) max_sequences: usize,
    /// Tokens in a KV block, >= 1.
    pub(crate) block_size: usize,
}

/// A request as the planner sees it.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) request: RequestId,
    /// By priority and age; the lowest goes first.
    pub(crate) rank: Rank,
    /// Tokens that can be computed, those that already are included. One more than `computed` is a decode row.
    pub(crate) len: usize,
    /// Tokens whose keys and values are in its blocks, or will be when the steps in flight are done; of a waiting request,
    /// those that it finds in the cache.
    pub(crate) computed: usize,
    /// Blocks that it holds; of a waiting request, those that it finds in the cache.
    pub(crate) num_blocks: usize,
    /// Of these, the ones that count as available: of a waiting request those that nobody uses, and which it takes when it
    /// is let in; of one whose reader has stalled those that it would give back. Of others, 0.
    pub(crate) num_available: usize,
    /// Whether its reader has room for the events of one more step. Without it the request is passed over.
    pub(crate) has_room: bool,
    /// Of a waiting request, what it would do about its next block, if that is one which others can use.
    pub(crate) next_block: NextBlock,
    /// Of a waiting request, how many more tokens of requests behind it may be let in before it.
    pub(crate) patience: usize,
}

/// The first block that a waiting request does not find in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NextBlock {
    /// It computes it, and nobody can tell whether another one would.
    Own,
    /// It computes it if nobody else does: the block's hash.
    Shared(u64),
    /// A running request is about to compute it: better to wait for that.
    Coming,
}

/// What there is to give.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Supply {
    /// Blocks that are free or can be evicted.
    pub(crate) blocks: usize,
    /// Of these, the ones that are kept for each running sequence when others are let in, >= 1.
    pub(crate) headroom: usize,
    /// Whether waiting requests may be let in.
    pub(crate) admits: bool,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// To take a running request's blocks, put it back into the queue, and plan again.
    Preempt(Preempt),
    /// What to compute.
    Compute(Rows),
}

/// What a step computes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Those of one token first. A request that is not running yet is thereby admitted.
    pub(crate) rows: Vec<Row>,
    /// Waiting requests before which others behind them are let in, and how many tokens those have to compute.
    pub(crate) overtaken: Vec<(RequestId, usize)>,
}

/// Who is to give his blocks, and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Preempt {
    /// This one, since a running request needs blocks.
    ForRunning(RequestId),
    /// This one, whose reader has stalled, since a waiting request needs blocks.
    ForWaiting(RequestId),
}

/// A request's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) request: RequestId,
    /// Tokens to compute, >= 1.
    pub(crate) num_tokens: usize,
    /// Blocks that it gets for them.
    pub(crate) new_blocks: usize,
}

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
        chunks: chunks(&ready, &prospects, budget.max_prefill_tokens),
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
fn chunks(ready: &[&Candidate], prospects: &[Candidate], budget: usize) -> HashMap<RequestId, usize> {
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
    let mut chunks = divide(budget, &remaining);
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

impl Candidate {
    /// Whether it would be a row of one token.
    pub(crate) fn decodes(&self) -> bool {
        self.remaining() == 1
    }

    /// Tokens that can be computed and are not yet.
    fn remaining(&self) -> usize {
        self.len - self.computed
    }
}

impl NextBlock {
    /// Whether somebody else computes it: a running request, or one of those that compute `blocks`.
    fn is_coming(self, blocks: &[u64]) -> bool {
        match self {
            Self::Own => false,
            Self::Shared(hash) => blocks.contains(&hash),
            Self::Coming => true,
        }
    }
}

/// What is new since the step before, as the shards are told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    /// Strictly increasing.
    pub(crate) id: u64,
    /// Sequences to forget, before anything else is done.
    pub(crate) release: Vec<SequenceId>,
    /// Sequences that the shards do not know yet.
    pub(crate) admit: Vec<NewSequence>,
    /// What to compute; those of one token first.
    pub(crate) schedule: Vec<Scheduled>,
}

/// A sequence and all that a shard needs to go on with it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NewSequence {
    pub(crate) id: SequenceId,
    /// The prompt, and behind it what was generated before a preemption.
    pub(crate) tokens: Vec<TokenId>,
    /// How tokens are chosen, and when to stop. Its prompt is the beginning of `tokens`.
    pub(crate) request: Arc<TokenRequest>,
    /// Of `tokens`, how many are in `block_ids` already.
    pub(crate) computed_tokens: usize,
    /// The blocks that hold them.
    pub(crate) block_ids: Vec<BlockId>,
    /// Whether to report log-probabilities of the prompt: not again after a preemption.
    pub(crate) prompt_logprobs: bool,
}

/// A sequence's share of a step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scheduled {
    pub(crate) sequence: SequenceId,
    /// Tokens to compute, >= 1.
    pub(crate) num_tokens: usize,
    /// Blocks appended to its block table.
    pub(crate) new_blocks: Vec<BlockId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { max_prefill_tokens: 16, max_sequences: 4, block_size: 4 };

    /// One that has `computed` of `len` tokens, and the blocks for them.
    fn candidate(request: u64, len: usize, computed: usize) -> Candidate {
        let num_blocks = computed.div_ceil(BUDGET.block_size);
        Candidate {
            request: RequestId(request),
            rank: Rank::of_equals(RequestId(request)),
            len,
            computed,
            num_blocks,
            num_available: 0,
            has_room: true,
            next_block: NextBlock::Own,
            patience: len,
        }
    }

    fn stalled(request: u64, len: usize, computed: usize) -> Candidate {
        let candidate = candidate(request, len, computed);
        Candidate { has_room: false, num_available: candidate.num_blocks, ..candidate }
    }

    /// One that finds `cached_blocks` unused blocks in the cache.
    fn cached(request: u64, len: usize, cached_blocks: usize) -> Candidate {
        let candidate = candidate(request, len, cached_blocks * BUDGET.block_size);
        Candidate { num_available: cached_blocks, ..candidate }
    }

    /// Rows as (request, tokens, new blocks), and who is preempted for that.
    fn check(
        running: &[Candidate],
        waiting: &[Candidate],
        blocks: usize,
        rows: &[(u64, usize, usize)],
        preempt: &[u64],
    ) {
        let (mut running, mut supply) = (running.to_vec(), Supply { blocks, headroom: 1, admits: true });
        let mut preempted = Vec::new();
        let planned = loop {
            let request = match plan(&running, waiting.to_vec(), supply, &BUDGET) {
                Plan::Compute(Rows { rows, .. }) => break rows,
                Plan::Preempt(Preempt::ForWaiting(request)) => request,
                Plan::Preempt(Preempt::ForRunning(request)) => {
                    supply.admits = false;
                    request
                }
            };
            preempted.push(request.0);
            let place = running.iter().position(|candidate| candidate.request == request).unwrap();
            supply.blocks += running.remove(place).num_blocks;
        };
        let planned = planned.iter().map(|row| (row.request.0, row.num_tokens, row.new_blocks));
        assert_eq!(planned.collect::<Vec<_>>(), rows);
        assert_eq!(preempted, preempt);
    }

    #[test]
    fn a_decode_row_gets_a_block_when_it_crosses_into_one() {
        check(&[candidate(1, 8, 7), candidate(2, 9, 8)], &[], 10, &[(1, 1, 0), (2, 1, 1)], &[]);
    }

    #[test]
    fn decode_rows_come_first_and_chunks_share_the_prefill_budget() {
        let running = [candidate(1, 12, 0), candidate(2, 9, 8)];
        check(&running, &[candidate(3, 30, 0)], 50, &[(2, 1, 1), (1, 12, 3), (3, 4, 1)], &[]);
    }

    #[test]
    fn a_sequence_that_waits_for_its_last_token_gets_no_row() {
        check(&[candidate(1, 8, 8)], &[], 10, &[], &[]);
    }

    #[test]
    fn a_chunk_shrinks_to_the_free_blocks_before_anyone_is_preempted() {
        check(&[candidate(1, 20, 4), candidate(2, 7, 6)], &[], 1, &[(2, 1, 0), (1, 4, 1)], &[]);
    }

    #[test]
    fn stalled_sequences_give_their_blocks_first_then_the_youngest() {
        let old = candidate(2, 9, 8);
        check(&[stalled(1, 9, 8), old.clone(), candidate(3, 9, 8)], &[], 0, &[(2, 1, 1), (3, 1, 1)], &[1]);
        // Two blocks come back, one is needed: the third sequence goes on.
        check(&[old.clone(), candidate(3, 9, 8), candidate(4, 8, 7)], &[], 0, &[(2, 1, 1), (3, 1, 1)], &[4]);
        check(&[old], &[], 0, &[], &[]);
    }

    #[test]
    fn nobody_is_let_in_by_a_step_that_preempts() {
        let running = [candidate(1, 9, 8), candidate(2, 13, 12)];
        check(&running, &[candidate(3, 2, 0)], 0, &[(1, 1, 1)], &[2]);
    }

    #[test]
    fn a_request_is_let_in_when_blocks_for_all_its_tokens_are_left_over() {
        let running = [candidate(1, 40, 16)];
        // The running prompt still needs six blocks, and each sequence one more to grow.
        check(&running, &[candidate(2, 8, 0)], 8, &[(1, 16, 4)], &[]);
        let decoding = [candidate(1, 8, 7)];
        check(&decoding, &[candidate(2, 8, 0)], 2, &[(1, 1, 0)], &[]);
        check(&decoding, &[candidate(2, 8, 0)], 3, &[(1, 1, 0), (2, 8, 2)], &[]);
    }

    #[test]
    fn who_does_not_fit_is_overtaken_as_long_as_it_has_patience() {
        let running = [candidate(1, 8, 7)];
        let long = |patience| Candidate { patience, ..candidate(2, 100, 0) };
        let decode_row = (1, 1, 0);
        check(&running, &[long(4), candidate(3, 4, 0)], 10, &[decode_row, (3, 4, 1)], &[]);
        check(&running, &[long(3), candidate(3, 4, 0)], 10, &[decode_row], &[]);
        // One that is too long to overtake may be overtaken itself.
        let behind = [long(5), candidate(3, 6, 0), candidate(4, 3, 0), candidate(5, 3, 0)];
        check(&running, &behind, 10, &[decode_row, (4, 3, 1)], &[]);
        check(&running, &[stalled(2, 8, 0), candidate(3, 4, 0)], 10, &[decode_row, (3, 4, 1)], &[]);
    }

    #[test]
    fn patience_is_used_up_by_the_tokens_of_those_who_are_let_in() {
        let running = [candidate(1, 8, 7)];
        let waiting = [candidate(2, 100, 0), candidate(3, 4, 0), candidate(4, 100, 0), candidate(5, 6, 0)];
        let plan = plan(&running, waiting, Supply { blocks: 10, headroom: 1, admits: true }, &BUDGET);
        let Plan::Compute(Rows { overtaken, .. }) = plan else { panic!("{plan:?}") };
        assert_eq!(overtaken, [(RequestId(2), 10), (RequestId(4), 6)]);
    }

    #[test]
    fn a_short_prompt_passes_a_long_one_that_runs_or_waits() {
        check(&[candidate(1, 100, 0)], &[candidate(2, 5, 0)], 50, &[(1, 11, 3), (2, 5, 2)], &[]);
        // The running ones have their chunks in the order of what is left of them, the first half of the budget.
        let running = [candidate(1, 100, 0), candidate(2, 60, 0), candidate(3, 12, 4)];
        check(&running, &[], 90, &[(1, 8, 2), (3, 8, 2)], &[]);
        let waiting = [candidate(1, 100, 0), candidate(2, 60, 0), candidate(3, 5, 0)];
        check(&[], &waiting, 90, &[(1, 8, 2), (2, 3, 1), (3, 5, 2)], &[]);
    }

    #[test]
    fn a_waiting_request_of_a_lower_rank_has_the_first_half_of_the_budget() {
        let running = [candidate(5, 100, 0)];
        check(&running, &[candidate(1, 200, 0)], 90, &[(5, 8, 2), (1, 8, 2)], &[]);
        check(&running, &[candidate(9, 200, 0)], 90, &[(5, 16, 4)], &[]);
    }

    #[test]
    fn the_first_that_runs_proceeds_though_one_before_it_waits_for_blocks() {
        // Both want the only token of the budget, and the waiting one does not fit.
        let budget = Budget { max_prefill_tokens: 1, ..BUDGET };
        let plan = plan(
            &[candidate(5, 30, 0)],
            [candidate(1, 40, 0)],
            Supply { blocks: 10, headroom: 1, admits: true },
            &budget,
        );
        let row = Row { request: RequestId(5), num_tokens: 1, new_blocks: 1 };
        assert_eq!(plan, Plan::Compute(Rows { rows: vec![row], overtaken: Vec::new() }));
    }

    #[test]
    fn what_is_kept_for_those_who_do_not_get_in_is_given_to_the_others() {
        check(&[candidate(1, 60, 0)], &[candidate(2, 20, 0)], 16, &[(1, 16, 4)], &[]);
    }

    #[test]
    fn a_step_has_no_more_sequences_than_its_budget() {
        let running = (1..7).map(|request| candidate(request, 8, 7)).collect::<Vec<_>>();
        check(&running, &[candidate(9, 4, 0)], 50, &[(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 0)], &[]);
    }

    #[test]
    fn the_first_of_an_idle_house_is_let_in_without_a_watermark() {
        check(&[], &[candidate(1, 8, 0)], 2, &[(1, 8, 2)], &[]);
        check(&[stalled(1, 8, 8)], &[candidate(2, 8, 0)], 0, &[(2, 8, 2)], &[1]);
    }
    #[test]
    fn cached_blocks_are_not_given_twice() {
        // Of four blocks, three are taken from the cache; its last tokens need one more.
        check(&[], &[cached(1, 14, 3)], 4, &[(1, 2, 1)], &[]);
        let decoding = [candidate(1, 8, 7)];
        check(&decoding, &[cached(2, 14, 3)], 4, &[(1, 1, 0)], &[]);
        check(&decoding, &[cached(2, 14, 3)], 5, &[(1, 1, 0), (2, 2, 1)], &[]);
    }

    #[test]
    fn of_those_who_need_the_same_block_next_one_computes_it_and_the_others_hold_up_nobody() {
        let next = |next_block, request| Candidate { next_block, ..candidate(request, 4, 0) };
        let shared = |request, hash| next(NextBlock::Shared(hash), request);
        check(&[], &[shared(1, 7), shared(2, 7), shared(3, 8)], 20, &[(1, 4, 1), (3, 4, 1)], &[]);
        check(&[], &[next(NextBlock::Coming, 1), shared(2, 7)], 20, &[(2, 4, 1)], &[]);
        check(&[], &[next(NextBlock::Own, 1), next(NextBlock::Own, 2)], 20, &[(1, 4, 1), (2, 4, 1)], &[]);
    }
}
