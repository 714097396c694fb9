//! The planner alone: made-up candidates in, rows out.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use crate::scheduler::chunks::Division;
use crate::scheduler::event::RequestId;
use crate::scheduler::limits::Budget;
use crate::scheduler::plan::{Candidate, NextBlock, Plan, Preempt, Row, Rows, Supply};
use crate::scheduler::planner::plan;
use crate::scheduler::rank::Rank;

const DIVISION: Division = Division::ShortestBesideFirst;
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
    let (mut running, mut supply) =
        (running.to_vec(), Supply { blocks, headroom: 1, admits: true, division: DIVISION });
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
    let plan = plan(
        &running,
        waiting,
        Supply { blocks: 10, headroom: 1, admits: true, division: DIVISION },
        &BUDGET,
    );
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
        Supply { blocks: 10, headroom: 1, admits: true, division: DIVISION },
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

/// Any state that the planner may meet: who runs and who waits, in their orders, and what there is.
#[derive(Debug, Clone)]
struct State {
    running: Vec<Candidate>,
    waiting: Vec<Candidate>,
    supply: Supply,
    budget: Budget,
}

/// Tokens that are computed, tokens that are left, whether its reader has room, and a number for the rest.
type Shape = (usize, usize, bool, usize);

fn shapes(most: usize) -> impl Strategy<Value = Vec<Shape>> {
    let left = prop_oneof![3 => Just(1_usize), 1 => Just(0), 3 => 2..120_usize];
    prop::collection::vec((0..60_usize, left, prop::bool::weighted(0.85), 0..1000_usize), 0..most)
}

fn states() -> impl Strategy<Value = State> {
    let budget = (1..40_usize, 1..9_usize, 1..7_usize);
    let supply = (0..40_usize, 1..4_usize, prop::bool::weighted(0.8), any::<bool>());
    (shapes(10), shapes(12), budget, supply).prop_map(|(running, waiting, budget, supply)| {
        let (max_prefill_tokens, max_sequences, block_size) = budget;
        let (blocks, headroom, admits, in_order) = supply;
        let division = if in_order { Division::InOrder } else { Division::ShortestBesideFirst };
        // Ranks of those who run and those who wait are mixed.
        let rank = |index: usize, number: usize| (number % 7 * 100 + index) as u64;
        let mut ids = (0_u64..).map(|id| id * 10_000);
        let mut candidate = |(computed, left, has_room, number): Shape, index: usize| {
            let request = RequestId(ids.next().unwrap_or_default() + rank(index, number));
            let rank = Rank::of_equals(RequestId(rank(index, number) * 100 + request.0 / 10_000));
            let num_blocks = computed.div_ceil(block_size);
            let len = computed + left;
            Candidate {
                request,
                rank,
                len,
                computed,
                num_blocks,
                num_available: 0,
                has_room,
                next_block: NextBlock::Own,
                patience: 0,
            }
        };
        let mut running = running
            .into_iter()
            .enumerate()
            .map(|(index, shape)| {
                let candidate = candidate(shape, index);
                let num_available = if candidate.has_room { 0 } else { candidate.num_blocks };
                Candidate { num_available, ..candidate }
            })
            .collect::<Vec<_>>();
        running.sort_by_key(|candidate| candidate.rank);
        let waiting = waiting.into_iter().enumerate().map(|(index, (computed, left, has_room, number))| {
            // Whole blocks come from the cache, and something is left to compute.
            let computed = computed / block_size * block_size;
            let candidate = candidate((computed, left.max(1), has_room, number), index);
            let next_block = match number % 8 {
                0 => NextBlock::Coming,
                1 | 2 => NextBlock::Shared(number as u64 % 3),
                _ => NextBlock::Own,
            };
            let num_available = (number % (candidate.num_blocks + 1)).min(blocks);
            let patience = number * 7 % 200;
            Candidate { num_available, next_block, patience, ..candidate }
        });
        State {
            running,
            waiting: waiting.collect(),
            supply: Supply { blocks, headroom, admits, division },
            budget: Budget { max_prefill_tokens, max_sequences, block_size },
        }
    })
}

impl State {
    fn plan(&self) -> Plan {
        plan(&self.running, self.waiting.iter().cloned(), self.supply, &self.budget)
    }

    /// As the scheduler does: who is named gives his blocks, until there are rows. Returns them, and who was preempted.
    fn settle(mut self) -> (Self, Rows, Vec<RequestId>) {
        let mut preempted = Vec::new();
        loop {
            let victim = match self.plan() {
                Plan::Compute(rows) => return (self, rows, preempted),
                Plan::Preempt(Preempt::ForWaiting(victim)) => victim,
                Plan::Preempt(Preempt::ForRunning(victim)) => {
                    self.supply.admits = false;
                    victim
                }
            };
            self.check_victim(victim);
            let at = self.running.iter().position(|candidate| candidate.request == victim);
            let victim = self.running.remove(at.expect("who is preempted runs"));
            self.supply.blocks += victim.num_blocks;
            preempted.push(victim.request);
        }
    }

    /// Whose reader has stalled gives first, then the one with the last rank, and never the first that can go on.
    fn check_victim(&self, victim: RequestId) {
        let stalled = self.running.iter().rev().find(|candidate| !candidate.has_room);
        let last = stalled.or(self.running.last()).map(|candidate| candidate.request);
        assert_eq!(Some(victim), last);
        let first = self.running.iter().find(|candidate| candidate.has_room && candidate.remaining() > 0);
        assert_ne!(first.map(|first| first.request), Some(victim), "the first proceeds");
    }

    fn check(&self, rows: &Rows) {
        let Self { running, waiting, supply, budget } = self;
        let candidates = running.iter().chain(waiting).map(|candidate| (candidate.request, candidate));
        let candidates = candidates.collect::<HashMap<_, _>>();
        let of = |row: &Row| candidates[&row.request];
        let rows_of = rows.rows.iter().map(|row| row.request).collect::<HashSet<_>>();
        let admitted = waiting.iter().filter(|candidate| rows_of.contains(&candidate.request));
        let admitted = admitted.collect::<Vec<_>>();

        // Budgets.
        assert!(rows.rows.len() <= budget.max_sequences);
        assert_eq!(rows_of.len(), rows.rows.len(), "a sequence has one row");
        let chunks = rows.rows.iter().filter(|row| of(row).remaining() > 1);
        assert!(chunks.map(|row| row.num_tokens).sum::<usize>() <= budget.max_prefill_tokens);
        assert!(rows.rows.is_sorted_by_key(|row| row.num_tokens > 1), "decode rows come first");
        for row in &rows.rows {
            assert!(of(row).has_room && (1..=of(row).remaining()).contains(&row.num_tokens), "{row:?}");
            let blocks = (of(row).computed + row.num_tokens).div_ceil(budget.block_size);
            assert_eq!(of(row).num_blocks + row.new_blocks, blocks, "{row:?}");
        }
        // No block is given twice: neither a free one, nor one that another takes from the cache.
        let given = rows.rows.iter().map(|row| row.new_blocks).sum::<usize>();
        let taken = admitted.iter().map(|candidate| candidate.num_available).sum::<usize>();
        assert!(given + taken <= supply.blocks);

        // A decode row waits for a place or a block, never for a prompt that waits.
        let left_out = |candidate: &&Candidate| {
            candidate.has_room && candidate.decodes() && !rows_of.contains(&candidate.request)
        };
        if running.iter().any(|candidate| left_out(&candidate)) {
            assert!(admitted.is_empty() || rows.rows.len() == budget.max_sequences);
            assert!(rows.rows.len() == budget.max_sequences || given == supply.blocks);
        }
        // The first that can go on does.
        let first = running.iter().find(|candidate| candidate.has_room && candidate.remaining() > 0);
        if let Some(first) = first {
            let stuck = supply.blocks == 0 && first.num_blocks * budget.block_size == first.computed;
            assert!(rows_of.contains(&first.request) || stuck, "{first:?} stands still");
        }
        self.check_admitted(rows, &admitted);
    }

    fn check_admitted(&self, rows: &Rows, admitted: &[&Candidate]) {
        assert!(self.supply.admits || admitted.is_empty());
        let mut shared = HashSet::new();
        for candidate in admitted {
            assert!(
                candidate.next_block != NextBlock::Coming,
                "{candidate:?} computes what another one does"
            );
            if let NextBlock::Shared(hash) = candidate.next_block {
                assert!(shared.insert(hash), "two compute the same block");
            }
        }
        // Overtaking is counted, and within the patience of those who are passed.
        let overtaken = rows.overtaken.iter().copied().collect::<HashMap<_, _>>();
        assert_eq!(overtaken.len(), rows.overtaken.len(), "each is counted once");
        for (index, candidate) in self.waiting.iter().enumerate() {
            let is_admitted =
                |other: &&Candidate| admitted.iter().any(|admitted| admitted.request == other.request);
            let behind = self.waiting[index + 1..].iter().filter(is_admitted);
            let tokens = behind.map(Candidate::remaining).sum::<usize>();
            let passed_over = !candidate.has_room
                || candidate.next_block.is_coming(&shared.iter().copied().collect::<Vec<_>>());
            match overtaken.get(&candidate.request) {
                Some(&counted) => {
                    assert_eq!(counted, tokens);
                    assert!(counted <= candidate.patience, "{candidate:?} is overtaken by {counted}");
                }
                None => {
                    assert!(
                        tokens == 0 || passed_over || is_admitted(&candidate),
                        "{candidate:?} is not counted"
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_keeps_to_budgets_blocks_and_the_order(state in states()) {
        prop_assert_eq!(state.plan(), state.plan(), "a plan is a pure function");
        let most = state.running.len();
        let (state, rows, preempted) = state.settle();
        prop_assert!(preempted.len() <= most);
        state.check(&rows);
    }

    /// Without patience nobody is passed: those who are let in are the first of those who wait.
    #[test]
    fn without_patience_nobody_is_overtaken(state in states()) {
        let mut state = state;
        for candidate in &mut state.waiting {
            *candidate = Candidate { patience: 0, has_room: true, next_block: NextBlock::Own, ..candidate.clone() };
        }
        let (state, rows, _) = state.settle();
        state.check(&rows);
        prop_assert_eq!(&rows.overtaken, &[]);
        let rows = rows.rows.iter().map(|row| row.request).collect::<HashSet<_>>();
        prop_assert!(state.waiting.iter().is_sorted_by_key(|candidate| !rows.contains(&candidate.request)));
    }
}
