//! What the planner is given, and what it makes of it.

use super::chunks::Division;
use super::event::RequestId;
use super::rank::Rank;

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

impl Candidate {
    /// Whether it would be a row of one token.
    pub(crate) fn decodes(&self) -> bool {
        self.remaining() == 1
    }

    /// Tokens that can be computed and are not yet.
    pub(crate) fn remaining(&self) -> usize {
        self.len - self.computed
    }
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

impl NextBlock {
    /// Whether somebody else computes it: a running request, or one of those that compute `blocks`.
    pub(crate) fn is_coming(self, blocks: &[u64]) -> bool {
        match self {
            Self::Own => false,
            Self::Shared(hash) => blocks.contains(&hash),
            Self::Coming => true,
        }
    }
}

/// What there is to give, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Supply {
    /// Blocks that are free or can be evicted.
    pub(crate) blocks: usize,
    /// Of these, the ones that are kept for each running sequence when others are let in, >= 1.
    pub(crate) headroom: usize,
    /// Whether waiting requests may be let in.
    pub(crate) admits: bool,
    /// How prompts divide the prefill budget.
    pub(crate) division: Division,
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

/// A request's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) request: RequestId,
    /// Tokens to compute, >= 1.
    pub(crate) num_tokens: usize,
    /// Blocks that it gets for them.
    pub(crate) new_blocks: usize,
}

/// Who is to give his blocks, and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Preempt {
    /// This one, since a running request needs blocks.
    ForRunning(RequestId),
    /// This one, whose reader has stalled, since a waiting request needs blocks.
    ForWaiting(RequestId),
}
