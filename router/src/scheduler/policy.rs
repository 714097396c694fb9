//! What the operator may say about who goes first, and how long anything may take.

use std::time::Duration;

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Discipline {
    /// By priority, age and fair shares; who does not fit is overtaken for a while, and prompts share a step.
    Fair,
    /// Strictly as they come: nobody is overtaken, and prompts are computed one after the other. Not served: what
    /// benchmarks compare with.
    FirstCome,
}

/// Settings of the order, the deadlines and the pace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Who goes first.
    pub(crate) discipline: Discipline,
    /// Waiting that is worth one unit of priority, > 0.
    pub(crate) ageing: Duration,
    /// Longest time of any request from submission to its end.
    pub(crate) request_timeout: Option<Duration>,
    /// Time between two tokens of a stream that prompts of others must leave it.
    pub(crate) target_itl: Option<Duration>,
}

impl Policy {
    /// What holds where nothing is said. The named priorities are 100 apart, so that a class is worth a minute: long
    /// beside the time in which a person notices a wait, short beside the time after which clients hang up.
    pub(crate) const DEFAULT: Self = Self {
        discipline: Discipline::Fair,
        ageing: Duration::from_millis(600),
        request_timeout: None,
        target_itl: None,
    };
}
