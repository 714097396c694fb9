//! Which request goes first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet, btree_map};
use std::iter::Peekable;
use std::time::Duration;

use super::event::RequestId;
use super::fairness::{AccountId, Fairness};
use super::rank::Rank;

/// How much later a request may (effectively) come than one that it goes before for the sake of fairness. Longer than
/// a house full of requests waits on any machine that is not badly overloaded, so that fairness decides there; and
/// shorter than what clients wait by default (OpenAI's: ten minutes), so that age decides in time.
pub(crate) const FAIRNESS_HORIZON: Duration = Duration::from_mins(5);

/// Where a request stands among others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// By priority and age.
    pub(crate) rank: Rank,
    /// As asked for; lower goes first.
    pub(crate) priority: i32,
    /// To whom it is charged.
    pub(crate) account: AccountId,
    /// What its account is charged when it is let in.
    pub(crate) cost: u64,
}

/// Requests that wait for KV blocks, each with a `T`.
///
/// - Of one account and priority, the older goes first.
/// - Of one priority, the account goes first that has been served least.
/// - Of different priorities, the lower rank goes first, which is priority and age in one.
/// - Nobody goes before a request that effectively came more than `FAIRNESS_HORIZON` earlier.
///
/// The last rule is why nobody starves, however many accounts there are: before a request go only those whose effective
/// arrival is at most that much after its own, and they are finitely many. A request that was preempted comes back to
/// its old place, since its rank is the same.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    requests: BTreeMap<Rank, (Place, T)>,
    ranks: HashMap<RequestId, Rank>,
    /// By priority and account.
    lanes: BTreeMap<i32, HashMap<AccountId, Lane>>,
}

/// Requests of one priority and account, in the order in which they go.
type Lane = BTreeSet<Rank>;

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { requests: BTreeMap::new(), ranks: HashMap::new(), lanes: BTreeMap::new() }
    }
}

impl<T> Queue<T> {
    /// Lets a request wait.
    pub(crate) fn push(&mut self, place: Place, request: T) {
        let before = self.ranks.insert(place.rank.request, place.rank);
        assert!(before.is_none(), "{:?} waits already", place.rank.request);
        self.lanes.entry(place.priority).or_default().entry(place.account).or_default().insert(place.rank);
        self.requests.insert(place.rank, (place, request));
    }

    /// Takes a request out.
    pub(crate) fn remove(&mut self, request: RequestId) -> Option<T> {
        let rank = self.ranks.remove(&request)?;
        let (place, request) = self.requests.remove(&rank).expect("a request that waits has a rank");
        let level = self.lanes.get_mut(&place.priority).expect("a request that waits has a lane");
        let lane = level.get_mut(&place.account).expect("a request that waits has a lane");
        lane.remove(&rank);
        if lane.is_empty() {
            level.remove(&place.account);
        }
        if level.is_empty() {
            self.lanes.remove(&place.priority);
        }
        Some(request)
    }

    /// A request that waits, to be changed in place.
    pub(crate) fn get_mut(&mut self, request: RequestId) -> Option<&mut T> {
        let rank = self.ranks.get(&request)?;
        self.requests.get_mut(rank).map(|(_, request)| request)
    }

    /// Requests that wait.
    pub(crate) fn len(&self) -> usize {
        self.requests.len()
    }

    /// By priority and age alone.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.requests.values().map(|(_, request)| request)
    }

    /// In the order in which they are to be let in, as if each were as soon as it is given. Costs some nanoseconds for
    /// each lane, and some more for each request that is looked at.
    pub(crate) fn order(&self, fairness: &Fairness) -> Order<'_, T> {
        let mut order = Order {
            queue: self,
            levels: BTreeMap::new(),
            first: BinaryHeap::with_capacity(self.lanes.len()),
            by_rank: self.requests.iter().peekable(),
            given: HashSet::new(),
        };
        for (&priority, lanes) in &self.lanes {
            let level = lanes.iter().filter_map(|(&account, lane)| {
                let head = lane.first()?;
                Some(Reverse((fairness.served(account), *head, account)))
            });
            order.levels.insert(priority, level.collect());
            order.show_first(priority);
        }
        order
    }

    /// Empties the queue, in the order of priority and age.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        std::mem::take(self).requests.into_values().map(|(_, request)| request)
    }
}

/// What its account was served, and the first request of a lane; the least of these first.
type Head = Reverse<(u64, Rank, AccountId)>;

/// The waiting requests in the order in which they are to be let in.
pub(crate) struct Order<'a, T> {
    queue: &'a Queue<T>,
    /// By priority, the heads of the lanes; the account that was served least first.
    levels: BTreeMap<i32, BinaryHeap<Head>>,
    /// Of each priority, the one that goes first.
    first: BinaryHeap<Reverse<(Rank, i32)>>,
    /// All of them by rank, those that were given included.
    by_rank: Peekable<btree_map::Iter<'a, Rank, (Place, T)>>,
    given: HashSet<Rank>,
}

impl<'a, T> Iterator for Order<'a, T> {
    type Item = &'a T;

    fn next(&mut self) -> Option<&'a T> {
        while self.by_rank.next_if(|(rank, _)| self.given.contains(rank)).is_some() {}
        let &(&oldest, _) = self.by_rank.peek()?;
        let &Reverse((mut rank, priority)) = self.first.peek().expect("who waits has a lane");
        if rank > oldest.later_by(FAIRNESS_HORIZON) {
            rank = oldest;
            self.given.insert(rank);
        } else {
            self.first.pop();
            self.given.insert(rank);
            self.show_first(priority);
        }
        self.queue.requests.get(&rank).map(|(_, request)| request)
    }
}

impl<T> Order<'_, T> {
    /// Puts a level's first request among those of the other levels.
    fn show_first(&mut self, priority: i32) {
        let (Some(level), Some(lanes)) = (self.levels.get_mut(&priority), self.queue.lanes.get(&priority))
        else {
            return;
        };
        while let Some(&Reverse((served, head, account))) = level.peek() {
            if !self.given.contains(&head) {
                self.first.push(Reverse((head, priority)));
                return;
            }
            // The head was given: its account is seen as if it were served, and the next of its lane stands there.
            level.pop();
            let cost = self.queue.requests.get(&head).map_or(0, |(place, _)| place.cost);
            let rest = lanes.get(&account).into_iter().flat_map(|lane| lane.range(head..));
            if let Some(&next) = rest.into_iter().find(|rank| !self.given.contains(rank)) {
                level.push(Reverse((served.saturating_add(cost), next, account)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::super::fairness::{AccountName, GENERATED_TOKEN, PROMPT_TOKEN};
    use super::super::rank::Ranking;
    use super::*;

    const AGEING: Duration = Duration::from_secs(1);

    /// A server without a machine: requests come at given times and are let in one after another.
    struct Hall {
        start: Instant,
        ranking: Ranking,
        fairness: Fairness,
        queue: Queue<Place>,
        num_requests: u64,
    }

    impl Hall {
        fn new() -> Self {
            Self {
                start: Instant::now(),
                ranking: Ranking::new(AGEING),
                fairness: Fairness::default(),
                queue: Queue::default(),
                num_requests: 0,
            }
        }

        /// Ids are 0, 1, 2, …
        fn submit(&mut self, account: usize, priority: i32, seconds: u64, cost: u64) -> Place {
            let request = RequestId(self.num_requests);
            self.num_requests += 1;
            let name: AccountName = Some(Arc::from(account.to_string()));
            let account = self.fairness.enter(&name);
            let rank = self.ranking.rank(request, priority, self.start + Duration::from_secs(seconds));
            let place = Place { rank, priority, account, cost };
            self.fairness.wait(account);
            self.queue.push(place, place);
            place
        }

        /// Lets the first one in, and charges it for its prompt.
        fn admit(&mut self) -> Option<Place> {
            let request = self.queue.order(&self.fairness).next()?.rank.request;
            let place = self.queue.remove(request).unwrap();
            self.fairness.charge(place.account, place.cost * PROMPT_TOKEN);
            self.fairness.stop_waiting(place.account);
            Some(place)
        }

        fn order(&self) -> Vec<u64> {
            self.queue.order(&self.fairness).map(|place| place.rank.request.0).collect()
        }
    }

    #[test]
    fn of_one_account_the_lower_priority_value_goes_first_then_the_older() {
        let mut hall = Hall::new();
        for (priority, seconds) in [(0, 0), (5, 0), (-5, 3), (0, 1), (5, 1), (-5, 4)] {
            hall.submit(1, priority, seconds, 1);
        }
        assert_eq!(hall.order(), [2, 5, 0, 3, 1, 4]);
    }

    #[test]
    fn waiting_makes_up_for_priority() {
        let mut hall = Hall::new();
        hall.submit(1, 10, 0, 1);
        hall.submit(1, 0, 9, 1);
        hall.submit(1, 0, 11, 1);
        assert_eq!(hall.order(), [1, 0, 2]);
    }

    #[test]
    fn accounts_take_turns_by_tokens_not_by_requests() {
        let mut hall = Hall::new();
        // The first account has long prompts and came first; the second has short ones.
        for _ in 0..3 {
            hall.submit(1, 0, 0, 100);
        }
        for _ in 0..8 {
            hall.submit(2, 0, 1, 30);
        }
        assert_eq!(hall.order(), [0, 3, 4, 5, 6, 1, 7, 8, 9, 2, 10]);
        // The order that is seen at once is the one in which they are let in one by one.
        let admitted = std::iter::from_fn(|| hall.admit()).map(|place| place.rank.request.0);
        assert_eq!(admitted.collect::<Vec<_>>(), [0, 3, 4, 5, 6, 1, 7, 8, 9, 2, 10]);
    }

    #[test]
    fn a_request_that_came_much_earlier_goes_before_fairness() {
        let mut hall = Hall::new();
        let greedy = hall.submit(1, 0, 0, 1);
        let horizon = FAIRNESS_HORIZON.as_secs();
        hall.submit(2, 0, horizon, 1);
        hall.fairness.charge(greedy.account, 1_000_000);
        assert_eq!(hall.order(), [1, 0]);
        hall.queue.remove(RequestId(1));
        hall.submit(2, 0, horizon + 1, 1);
        assert_eq!(hall.order(), [0, 2]);
    }

    #[test]
    fn a_preempted_request_returns_to_its_place() {
        let mut hall = Hall::new();
        for _ in 0..3 {
            hall.submit(1, 0, 0, 1);
        }
        let first = hall.admit().unwrap();
        hall.admit();
        hall.fairness.wait(first.account);
        hall.queue.push(first, first);
        assert_eq!(hall.order(), [0, 2]);
    }

    #[test]
    fn an_empty_queue_has_no_lanes() {
        let mut hall = Hall::new();
        for account in 0..10 {
            hall.submit(account, account as i32 % 3, 0, 1);
        }
        while hall.admit().is_some() {}
        assert!(hall.queue.lanes.is_empty() && hall.queue.ranks.is_empty());
        assert_eq!(hall.queue.remove(RequestId(3)).map(|place| place.rank), None);
    }

    /// Arrivals as (account, priority, second, cost), in order of time.
    fn arrivals() -> impl Strategy<Value = Vec<(usize, i32, u64, u64)>> {
        let arrival = (0..6_usize, -400..400_i32, 0..900_u64, 1..2000_u64);
        prop::collection::vec(arrival, 1..80).prop_map(|mut arrivals| {
            arrivals.sort_by_key(|(_, _, seconds, _)| *seconds);
            arrivals
        })
    }

    proptest! {
        #[test]
        fn nobody_waits_longer_than_the_ageing_bound(arrivals in arrivals(), seconds_each in 1..40_u64) {
            let mut hall = Hall::new();
            let mut places = Vec::new();
            // For each request, how many were let in while it waited.
            let mut passed_by: HashMap<RequestId, usize> = HashMap::new();
            let mut arrivals = arrivals.into_iter().peekable();
            let mut clock = 0;
            while arrivals.peek().is_some() || hall.queue.len() > 0 {
                while let Some((account, priority, seconds, cost)) = arrivals.next_if(|next| next.2 <= clock) {
                    places.push(hall.submit(account, priority, seconds, cost));
                }
                if let Some(admitted) = hall.admit() {
                    for place in hall.queue.iter() {
                        // The bound for one turn …
                        prop_assert!(admitted.rank <= place.rank.later_by(FAIRNESS_HORIZON));
                        *passed_by.entry(place.rank.request).or_default() += 1;
                    }
                }
                clock += seconds_each;
            }
            // … and for all: only those go before it that effectively come at most the horizon after it.
            for place in &places {
                let bound = places.iter().filter(|other| other.rank <= place.rank.later_by(FAIRNESS_HORIZON));
                let passed_by = passed_by.get(&place.rank.request).copied().unwrap_or_default();
                prop_assert!(passed_by < bound.count());
            }
        }

        #[test]
        fn the_order_has_each_request_once(arrivals in arrivals(), charges in prop::collection::vec(0..5000_u64, 6)) {
            let mut hall = Hall::new();
            for &(account, priority, seconds, cost) in &arrivals {
                let place = hall.submit(account, priority, seconds, cost);
                hall.fairness.charge(place.account, charges[account]);
            }
            let mut order = hall.order();
            prop_assert_eq!(order.len(), arrivals.len());
            order.sort_unstable();
            order.dedup();
            prop_assert_eq!(order.len(), arrivals.len());
        }

        /// Sheng et al. 2024, theorem 4.4: what two accounts with requests waiting all the time were served differs by
        /// what they were served beyond their turns, which is what runs at once.
        #[test]
        fn two_backlogged_accounts_are_served_alike(
            slots in 1..8_usize,
            costs in prop::collection::vec((1..400_u64, 1..200_u64, 1..400_u64, 1..200_u64), 60),
        ) {
            let mut hall = Hall::new();
            let mut outputs = HashMap::new();
            for &(prompt, output, other_prompt, other_output) in &costs {
                for (account, prompt, output) in [(1, prompt, output), (2, other_prompt, other_output)] {
                    let place = hall.submit(account, 0, 0, prompt);
                    outputs.insert(place.rank.request, output);
                }
            }
            let most = 400 * PROMPT_TOKEN + 200 * GENERATED_TOKEN;
            let [first, second] = [1, 2].map(|account: usize| {
                hall.fairness.enter(&Some(Arc::from(account.to_string())))
            });
            let mut running = Vec::new();
            // As long as both have requests waiting.
            while hall.queue.lanes[&0].len() == 2 {
                if running.len() < slots {
                    let place = hall.admit().unwrap();
                    running.push((place.account, outputs[&place.rank.request]));
                }
                for (account, output) in &mut running {
                    hall.fairness.charge(*account, GENERATED_TOKEN);
                    *output -= 1;
                }
                running.retain(|(_, output)| *output > 0);
                let difference = hall.fairness.served(first).abs_diff(hall.fairness.served(second));
                prop_assert!(difference <= most * slots as u64, "{difference}");
            }
        }
    }
}
