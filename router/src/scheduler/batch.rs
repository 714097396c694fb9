//! What is computed next: a pure function of who runs, who waits, and what there is to give.

use std::collections::VecDeque;
use std::sync::Arc;

use proto::units::{BlockId, SequenceId, TokenId};

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
    /// Its id; the lower, the older.
    pub(crate) request: RequestId,
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
    /// What to compute; rows of one token first. A request that is not running yet is thereby admitted.
    Compute(Vec<Row>),
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

/// Plans one step. `running` and `waiting` are oldest first.
///
/// Running requests come first, by age: each gets a decode row, or a chunk of its prompt as long as the prefill budget
/// lasts. When blocks run out, those whose readers have stalled give theirs, then the youngest; so the oldest always
/// proceeds, and with it all. What is left goes to waiting requests in strict order, each when the blocks for all its
/// tokens can be had; only those whose next block is about to be computed by another are passed over.
///
/// How many blocks a preempted request gives back depends on who else uses them. So a plan names one, and when it has
/// given its blocks, the rest is planned with what there is.
pub(crate) fn plan(
    running: &[Candidate],
    waiting: impl IntoIterator<Item = Candidate>,
    supply: Supply,
    budget: &Budget,
) -> Plan {
    let mut planner = Planner {
        budget,
        available_blocks: supply.blocks,
        prefill_tokens: budget.max_prefill_tokens,
        stalled: running.iter().filter(|candidate| !candidate.has_room).collect(),
        rows: Vec::new(),
    };
    let ready = running.iter().filter(|candidate| candidate.has_room).collect();
    let mut preempt = planner.advance(ready).map(Preempt::ForRunning);
    if preempt.is_none() && supply.admits {
        preempt = planner.admit(running, waiting, supply.headroom).map(Preempt::ForWaiting);
    }
    if let Some(preempt) = preempt {
        return Plan::Preempt(preempt);
    }
    // Stable: within each part the order stays that of age. Shards take decode rows first.
    planner.rows.sort_by_key(|row| row.num_tokens > 1);
    Plan::Compute(planner.rows)
}

struct Planner<'a> {
    budget: &'a Budget,
    available_blocks: usize,
    /// What is left of the prefill budget.
    prefill_tokens: usize,
    /// Running requests whose readers have stalled, oldest first: the first to give their blocks.
    stalled: Vec<&'a Candidate>,
    rows: Vec<Row>,
}

impl<'a> Planner<'a> {
    /// Gives rows to running requests. Returns who must give blocks for that.
    fn advance(&mut self, mut ready: VecDeque<&'a Candidate>) -> Option<RequestId> {
        while let Some(candidate) = ready.pop_front() {
            if self.is_full() {
                return None;
            }
            let wanted = self.tokens_wanted(candidate);
            let num_tokens = self.tokens_that_fit(candidate, wanted);
            if wanted > 0 && num_tokens == 0 {
                let victim = self.stalled.pop().or_else(|| ready.pop_back());
                if let Some(victim) = victim {
                    return Some(victim.request);
                }
            }
            self.push(candidate, num_tokens);
        }
        None
    }

    /// Lets waiting requests in. Returns who must give blocks for that.
    fn admit(
        &mut self,
        running: &[Candidate],
        waiting: impl IntoIterator<Item = Candidate>,
        headroom: usize,
    ) -> Option<RequestId> {
        let ready = running.iter().filter(|candidate| candidate.has_room);
        // For those that run, since they will soon need more blocks: the watermark below which nobody is let in.
        let mut watermark = ready.clone().count() * headroom;
        // Blocks that prompts which are let in already will need for their next chunks.
        let mut promised = ready.map(|candidate| self.blocks_to_come(candidate)).sum::<usize>();
        promised -= self.rows.iter().map(|row| row.new_blocks).sum::<usize>();
        // What could be had from those whose readers have stalled.
        let stalled = self.stalled.iter().map(|stalled| stalled.num_available).sum::<usize>();
        // First blocks of what those who are let in by this plan compute.
        let mut coming = Vec::new();

        for candidate in waiting {
            if self.is_full() || self.prefill_tokens == 0 {
                return None;
            }
            // Without room, it was preempted while its reader stalled. It must not hold up those behind it.
            if !candidate.has_room || candidate.next_block.is_coming(&coming) {
                continue;
            }
            let needed = self.blocks_to_come(&candidate);
            // Where nothing else can run, the request fits: it would fit an empty cache.
            let least = promised + needed + candidate.num_available + watermark;
            if watermark > 0 && self.available_blocks + stalled < least {
                return None;
            }
            let wanted = self.tokens_wanted(&candidate);
            self.available_blocks = self.available_blocks.saturating_sub(candidate.num_available);
            let num_tokens = self.tokens_that_fit(&candidate, wanted);
            if num_tokens < wanted
                && let Some(victim) = self.stalled.pop()
            {
                return Some(victim.request);
            }
            if num_tokens == 0 {
                return None;
            }
            let new_blocks = self.push(&candidate, num_tokens);
            promised += needed - new_blocks;
            watermark += headroom;
            if let NextBlock::Shared(hash) = candidate.next_block {
                coming.push(hash);
            }
        }
        None
    }

    fn is_full(&self) -> bool {
        self.rows.len() == self.budget.max_sequences
    }

    /// Tokens that the budgets allow it: one for a decode row, else a chunk.
    fn tokens_wanted(&self, candidate: &Candidate) -> usize {
        match candidate.len - candidate.computed {
            1 => 1,
            remaining => remaining.min(self.prefill_tokens),
        }
    }

    /// Of `wanted` tokens, those for which there are blocks.
    fn tokens_that_fit(&self, candidate: &Candidate, wanted: usize) -> usize {
        let slots = (candidate.num_blocks + self.available_blocks) * self.budget.block_size;
        wanted.min(slots - candidate.computed)
    }

    /// Blocks missing for all its tokens.
    fn blocks_to_come(&self, candidate: &Candidate) -> usize {
        candidate.len.div_ceil(self.budget.block_size).saturating_sub(candidate.num_blocks)
    }

    /// Adds a row, if it has tokens. Returns the blocks that it takes.
    fn push(&mut self, candidate: &Candidate, num_tokens: usize) -> usize {
        if num_tokens == 0 {
            return 0;
        }
        let blocks = (candidate.computed + num_tokens).div_ceil(self.budget.block_size);
        let new_blocks = blocks - candidate.num_blocks;
        self.available_blocks -= new_blocks;
        if candidate.len - candidate.computed > 1 {
            self.prefill_tokens -= num_tokens;
        }
        self.rows.push(Row { request: candidate.request, num_tokens, new_blocks });
        new_blocks
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
            len,
            computed,
            num_blocks,
            num_available: 0,
            has_room: true,
            next_block: NextBlock::Own,
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
                Plan::Compute(rows) => break rows,
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
    fn who_does_not_fit_holds_up_those_behind_but_a_stalled_reader_does_not() {
        let running = [candidate(1, 8, 7)];
        check(&running, &[candidate(2, 100, 0), candidate(3, 4, 0)], 10, &[(1, 1, 0)], &[]);
        check(&running, &[stalled(2, 8, 0), candidate(3, 4, 0)], 10, &[(1, 1, 0), (3, 4, 1)], &[]);
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
