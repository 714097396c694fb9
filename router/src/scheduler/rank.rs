//! Which of two requests goes first, by priority and age.

use std::time::{Duration, Instant};

use super::event::RequestId;

/// A request's place in time; the lowest goes first. It never changes, so that it can be the key of a sorted map.
///
/// A request of priority *p* that has waited *w* has the effective priority *p − w / ageing*. Of two requests the one
/// with the lower effective priority goes first, and which that is does not depend on when one asks: it is the one with
/// the lower *effective arrival*, submission + *p* · ageing. So everybody has a finite number of others before him,
/// namely those who came, or will come, before his effective arrival by theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Rank {
    /// In microseconds since some moment that is the same for all.
    effective_arrival_us: i64,
    /// Among equals, the older one goes first.
    pub(crate) request: RequestId,
}

impl Rank {
    /// The rank of a request where all have the same priority and came at the same time.
    #[cfg(test)]
    pub(crate) fn of_equals(request: RequestId) -> Self {
        Self { effective_arrival_us: 0, request }
    }

    /// The last rank of those that effectively arrive `duration` after this one, or sooner.
    pub(crate) fn later_by(self, duration: Duration) -> Self {
        let effective_arrival_us = self.effective_arrival_us.saturating_add(micros(duration));
        Self { effective_arrival_us, request: RequestId(u64::MAX) }
    }
}

/// Gives requests their ranks.
#[derive(Debug)]
pub(crate) struct Ranking {
    ageing_us: i64,
    /// The first submission: instants have no zero of their own.
    epoch: Option<Instant>,
}

impl Ranking {
    /// Ranks in which waiting for `ageing` is worth one unit of priority.
    pub(crate) fn new(ageing: Duration) -> Self {
        assert!(!ageing.is_zero(), "without ageing, priorities would have no effect");
        Self { ageing_us: micros(ageing).max(1), epoch: None }
    }

    /// The rank of a request. Lower priorities go first.
    pub(crate) fn rank(&mut self, request: RequestId, priority: i32, submitted_at: Instant) -> Rank {
        let epoch = *self.epoch.get_or_insert(submitted_at);
        let arrival_us = micros(submitted_at.saturating_duration_since(epoch))
            - micros(epoch.saturating_duration_since(submitted_at));
        let head_start_us = i64::from(priority).saturating_mul(self.ageing_us);
        Rank { effective_arrival_us: arrival_us.saturating_add(head_start_us), request }
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_of_priority_is_worth_the_ageing_time() {
        let start = Instant::now();
        let mut ranking = Ranking::new(Duration::from_millis(100));
        let first = ranking.rank(RequestId(1), 10, start);
        let at = |millis| start + Duration::from_millis(millis);
        // Priority 0 goes before the one of priority 10 if it came less than a second later.
        let mut check = |priority, millis, goes_first| {
            let other = ranking.rank(RequestId(2), priority, at(millis));
            assert_eq!(other < first, goes_first, "priority {priority} after {millis} ms");
        };
        check(0, 999, true);
        check(0, 1000, false);
        check(9, 99, true);
        check(9, 101, false);
        check(10, 0, false);
        check(-5, 1499, true);
        check(-5, 1501, false);
    }

    #[test]
    fn any_priority_and_any_time_has_a_rank() {
        let before = Instant::now();
        let start = before + Duration::from_hours(1);
        let mut ranking = Ranking::new(Duration::MAX);
        let middle = ranking.rank(RequestId(1), 0, start);
        assert!(ranking.rank(RequestId(2), 0, before) < middle);
        assert!(ranking.rank(RequestId(2), i32::MIN, start + Duration::from_mins(1)) < middle);
        assert!(ranking.rank(RequestId(2), i32::MAX, start) > middle);
        assert!(middle.later_by(Duration::MAX) > middle);
    }

    #[test]
    fn later_by_includes_the_moment_itself() {
        let start = Instant::now();
        let mut ranking = Ranking::new(Duration::from_secs(1));
        let first = ranking.rank(RequestId(1), 0, start);
        let bound = first.later_by(Duration::from_secs(5));
        assert!(ranking.rank(RequestId(9), 5, start) <= bound);
        assert!(ranking.rank(RequestId(9), 5, start + Duration::from_micros(1)) > bound);
    }
}
