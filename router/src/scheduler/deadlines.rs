//! Until when requests must have ended.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use super::event::RequestId;

/// The deadlines of the requests in the house that have one.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    by_time: BTreeSet<(Instant, RequestId)>,
    by_request: HashMap<RequestId, Instant>,
}

impl Deadlines {
    /// Sets the deadline of a request that has none yet.
    pub(crate) fn insert(&mut self, request: RequestId, deadline: Instant) {
        let before = self.by_request.insert(request, deadline);
        assert!(before.is_none(), "{request:?} has a deadline already");
        self.by_time.insert((deadline, request));
    }

    /// Forgets a request that has ended.
    pub(crate) fn remove(&mut self, request: RequestId) {
        if let Some(deadline) = self.by_request.remove(&request) {
            self.by_time.remove(&(deadline, request));
        }
    }

    /// Takes out a request whose deadline has come, the earliest first.
    pub(crate) fn pop_expired(&mut self, now: Instant) -> Option<RequestId> {
        let &(deadline, request) = self.by_time.first()?;
        (deadline <= now).then(|| {
            self.remove(request);
            request
        })
    }

    /// When the next one comes.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|&(deadline, _)| deadline)
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.by_time.clear();
        self.by_request.clear();
    }

    /// The deadline of a request, if it has one.
    pub(crate) fn get(&self, request: RequestId) -> Option<Instant> {
        self.by_request.get(&request).copied()
    }

    /// Requests that have one.
    pub(crate) fn len(&self) -> usize {
        self.by_request.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn deadlines_come_in_order_and_once() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut deadlines = Deadlines::default();
        for (request, seconds) in [(1, 5), (2, 3), (3, 9), (4, 3)] {
            deadlines.insert(RequestId(request), at(seconds));
        }
        deadlines.remove(RequestId(4));
        deadlines.remove(RequestId(7));
        assert_eq!(deadlines.next(), Some(at(3)));
        assert_eq!(deadlines.pop_expired(at(2)), None);
        assert_eq!(deadlines.pop_expired(at(5)), Some(RequestId(2)));
        assert_eq!(deadlines.pop_expired(at(5)), Some(RequestId(1)));
        assert_eq!(deadlines.pop_expired(at(5)), None);
        assert_eq!((deadlines.len(), deadlines.get(RequestId(3))), (1, Some(at(9))));
        deadlines.clear();
        assert_eq!((deadlines.len(), deadlines.next()), (0, None));
    }
}
