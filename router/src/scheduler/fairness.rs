//! Who has had how much: the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models",
//! arXiv:2401.00588.
//!
//! Each account has a counter of the tokens that it was served. Among those who wait, the one with the lowest goes first.
//! An account that begins to wait is lifted to the lowest of those who are waiting, so that nobody saves up a claim while
//! he has no use for it, and nobody is made to pay for what he used while nobody else wanted it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// What computing a token of a prompt costs.
pub(crate) const PROMPT_TOKEN: u64 = 1;

/// What generating a token costs: a decode row shares a pass over the weights with fewer tokens than a chunk's token does.
/// The paper's weight, which is about what providers charge.
pub(crate) const GENERATED_TOKEN: u64 = 2;

/// Accounts without a request of which the counter is remembered. More than that are forgotten, those with the smallest
/// claims against them first, so that invented names cost a bounded amount of memory: about 100 bytes each.
const MAX_REMEMBERED: usize = 10_000;

/// An account with a request in the house. Its number is used again when it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AccountId(usize);

/// A name that tokens are charged to. Requests without one share an account.
pub(crate) type AccountName = Option<Arc<str>>;

/// The counters of all accounts.
#[derive(Debug, Default)]
pub(crate) struct Fairness {
    accounts: Vec<Account>,
    names: HashMap<AccountName, AccountId>,
    /// Numbers of accounts that were forgotten.
    vacant: Vec<AccountId>,
    /// Those with waiting requests, by counter.
    waiting: BTreeSet<(u64, AccountId)>,
    /// Those without any request, by counter.
    idle: BTreeSet<(u64, AccountId)>,
    /// What the next account that begins to wait is lifted to. Never sinks.
    floor: u64,
}

#[derive(Debug)]
struct Account {
    name: AccountName,
    /// The virtual counter.
    served: u64,
    num_waiting: usize,
    /// Requests in the house, waiting or running.
    num_requests: usize,
}

impl Fairness {
    /// A request of `name` comes into the house. It has to `leave` again.
    pub(crate) fn enter(&mut self, name: &AccountName) -> AccountId {
        let id = match self.names.get(name) {
            Some(id) => *id,
            None => self.open(name),
        };
        let account = &mut self.accounts[id.0];
        account.num_requests += 1;
        if account.num_requests == 1 {
            self.idle.remove(&(account.served, id));
        }
        id
    }

    /// A request of the account leaves the house, for good.
    pub(crate) fn leave(&mut self, id: AccountId) {
        let account = &mut self.accounts[id.0];
        account.num_requests -= 1;
        if account.num_requests == 0 {
            assert_eq!(account.num_waiting, 0, "an account without requests has none that wait");
            self.idle.insert((account.served, id));
            self.forget();
        }
    }

    /// A request of the account begins to wait.
    pub(crate) fn wait(&mut self, id: AccountId) {
        let account = &mut self.accounts[id.0];
        account.num_waiting += 1;
        if account.num_waiting == 1 {
            account.served = account.served.max(self.floor);
            self.waiting.insert((account.served, id));
            self.raise_floor();
        }
    }

    /// A request of the account waits no longer.
    pub(crate) fn stop_waiting(&mut self, id: AccountId) {
        let account = &mut self.accounts[id.0];
        account.num_waiting -= 1;
        if account.num_waiting == 0 {
            let served = account.served;
            self.waiting.remove(&(served, id));
            if self.waiting.is_empty() {
                self.floor = self.floor.max(served);
            }
            self.raise_floor();
        }
    }

    /// The account is served something of this cost.
    pub(crate) fn charge(&mut self, id: AccountId, cost: u64) {
        let account = &mut self.accounts[id.0];
        let before = account.served;
        account.served = before.saturating_add(cost);
        if account.num_waiting > 0 {
            self.waiting.remove(&(before, id));
            self.waiting.insert((account.served, id));
            self.raise_floor();
        }
    }

    /// The account's counter.
    pub(crate) fn served(&self, id: AccountId) -> u64 {
        self.accounts[id.0].served
    }

    /// Panics unless there are as many requests as are in the house, and as many of them waiting.
    pub(crate) fn check_invariants(&self, num_waiting: usize, num_running: usize) {
        let waiting = self.accounts.iter().map(|account| account.num_waiting).sum::<usize>();
        let requests = self.accounts.iter().map(|account| account.num_requests).sum::<usize>();
        assert_eq!((waiting, requests - waiting), (num_waiting, num_running), "accounts miscount requests");
        assert!(self.idle.len() <= MAX_REMEMBERED, "too many accounts are remembered");
    }

    fn open(&mut self, name: &AccountName) -> AccountId {
        let account = Account { name: name.clone(), served: 0, num_waiting: 0, num_requests: 0 };
        let id = if let Some(id) = self.vacant.pop() {
            self.accounts[id.0] = account;
            id
        } else {
            self.accounts.push(account);
            AccountId(self.accounts.len() - 1)
        };
        self.names.insert(name.clone(), id);
        id
    }

    fn raise_floor(&mut self) {
        if let Some(&(lowest, _)) = self.waiting.first()
            && lowest > self.floor
        {
            self.floor = lowest;
        }
        self.forget();
    }

    /// Forgets accounts without requests whose counters mean nothing any more, and those beyond the bound.
    fn forget(&mut self) {
        while let Some(&(served, id)) = self.idle.first()
            && (served <= self.floor || self.idle.len() > MAX_REMEMBERED)
        {
            self.idle.pop_first();
            let name = self.accounts[id.0].name.take();
            self.names.remove(&name);
            self.vacant.push(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(fairness: &mut Fairness, account: usize) -> AccountId {
        fairness.enter(&Some(Arc::from(account.to_string())))
    }

    #[test]
    fn who_comes_late_is_lifted_to_the_lowest_of_those_who_wait() {
        let mut fairness = Fairness::default();
        let [first, second] = [1, 2].map(|account| enter(&mut fairness, account));
        fairness.wait(first);
        fairness.wait(second);
        fairness.charge(first, 100);
        fairness.charge(second, 70);
        let late = enter(&mut fairness, 3);
        fairness.wait(late);
        assert_eq!(fairness.served(late), 70);
        fairness.charge(late, 5);
        assert_eq!(fairness.served(late), 75);
    }

    #[test]
    fn nobody_pays_for_what_nobody_else_wanted() {
        let mut fairness = Fairness::default();
        let busy = fairness.enter(&None);
        fairness.wait(busy);
        fairness.charge(busy, 1_000_000);
        fairness.stop_waiting(busy);
        // Nobody waits: the next one begins where the last one stood.
        let next = enter(&mut fairness, 1);
        fairness.wait(next);
        assert_eq!(fairness.served(next), fairness.served(busy));
    }

    #[test]
    fn leaving_and_coming_back_does_not_wipe_the_slate_while_others_wait() {
        let mut fairness = Fairness::default();
        let patient = enter(&mut fairness, 1);
        fairness.wait(patient);
        let greedy = enter(&mut fairness, 2);
        fairness.wait(greedy);
        fairness.charge(greedy, 500);
        fairness.stop_waiting(greedy);
        fairness.leave(greedy);
        let greedy = enter(&mut fairness, 2);
        fairness.wait(greedy);
        assert_eq!((fairness.served(patient), fairness.served(greedy)), (0, 500));
    }

    #[test]
    fn an_account_is_forgotten_when_its_counter_means_nothing_any_more() {
        let mut fairness = Fairness::default();
        let patient = enter(&mut fairness, 1);
        fairness.wait(patient);
        let greedy = enter(&mut fairness, 2);
        fairness.charge(greedy, 500);
        fairness.leave(greedy);
        assert_eq!(fairness.names.len(), 2);
        fairness.charge(patient, 500);
        assert_eq!(fairness.names.len(), 1);
        assert_eq!(fairness.vacant, [greedy]);
        fairness.check_invariants(1, 0);
    }

    #[test]
    fn invented_names_take_a_bounded_amount_of_memory() {
        let mut fairness = Fairness::default();
        // Somebody waits without being served, so that the floor stays and every counter above it means something.
        let patient = fairness.enter(&None);
        fairness.wait(patient);
        for account in 0..3 * MAX_REMEMBERED {
            let id = enter(&mut fairness, account);
            fairness.charge(id, 10 + account as u64);
            fairness.leave(id);
        }
        fairness.check_invariants(1, 0);
        assert!(fairness.accounts.len() <= MAX_REMEMBERED + 2);
        assert_eq!(fairness.names.len(), MAX_REMEMBERED + 1);
        let last = Some(Arc::from((3 * MAX_REMEMBERED - 1).to_string()));
        assert!(fairness.names.contains_key(&last), "the largest claims are kept");
    }
}
