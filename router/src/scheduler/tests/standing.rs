//! Who goes first, who is passed, and whose time is over.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::house::{House, LIMITS, request};
use super::model_shard::{Transcript, alone};
use crate::scheduler::limits::{Budget, Limits};
use crate::scheduler::policy::Policy;
use crate::scheduler::request::{Failure, Standing, TokenRequest};

const SECOND: Duration = Duration::from_secs(1);

/// One sequence at a time.
fn one_by_one() -> Limits {
    Limits { budget: Budget { max_sequences: 1, ..LIMITS.budget }, ..LIMITS }
}

fn with_priority(priority: i32, request: TokenRequest) -> TokenRequest {
    TokenRequest { standing: Standing { priority, ..request.standing }, ..request }
}

fn of_account(account: &str, request: TokenRequest) -> TokenRequest {
    TokenRequest { standing: Standing { account: Some(Arc::from(account)), ..request.standing }, ..request }
}

fn within(timeout: Duration, request: TokenRequest) -> TokenRequest {
    TokenRequest { standing: Standing { timeout: Some(timeout), ..request.standing }, ..request }
}

/// The `first` of each request that was let in, in that order; again for each preemption.
fn admissions(house: &House) -> Vec<u32> {
    let admitted = house.sent.iter().flat_map(|step| &step.admit);
    admitted.map(|new| new.request.prompt[0].0 / 1000).collect()
}

#[test]
fn a_lower_priority_value_goes_first_and_equals_by_age() {
    let mut house = House::new(one_by_one());
    house.submit_one(request(1, 4, 4));
    for (first, priority) in [
        (2, Standing::PRIORITY_BATCH),
        (3, Standing::PRIORITY_DEFAULT),
        (4, Standing::PRIORITY_INTERACTIVE),
        (5, Standing::PRIORITY_DEFAULT),
        (6, Standing::PRIORITY_INTERACTIVE),
    ] {
        house.submit_one(with_priority(priority, request(first, 4, 4)));
    }
    house.finish();
    assert_eq!(admissions(&house), [1, 4, 6, 3, 5, 2]);
}

#[test]
fn a_request_that_waits_catches_up_with_better_priorities() {
    let mut house = House::new(one_by_one());
    house.submit_one(request(1, 4, 4));
    house.submit_one(with_priority(Standing::PRIORITY_BATCH, request(2, 4, 4)));
    house.advance(59 * SECOND);
    house.submit_one(request(3, 4, 4));
    house.advance(2 * SECOND);
    house.submit_one(request(4, 4, 4));
    house.finish();
    assert_eq!(admissions(&house), [1, 3, 2, 4]);
}

#[test]
fn accounts_take_turns_by_what_they_were_served() {
    let mut house = House::new(one_by_one());
    house.submit_one(of_account("busy", request(1, 4, 4)));
    for first in 2..6 {
        house.submit_one(of_account("busy", request(first, 4, 4)));
    }
    for first in 6..9 {
        house.submit_one(of_account("quiet", request(first, 4, 4)));
    }
    house.finish();
    // The quiet one begins with what the busy one has had until then: its first prompt.
    assert_eq!(admissions(&house), [1, 6, 2, 7, 3, 8, 4, 5]);
}

#[test]
fn tokens_from_the_cache_cost_nothing() {
    let mut house = House::new(one_by_one());
    let prompt = |account, first: u32| of_account(account, request(first, 41, 1));
    house.submit_one(prompt("warm", 1));
    for (account, first) in [("warm", 1), ("warm", 1), ("warm", 2), ("cold", 3), ("cold", 4), ("cold", 5)] {
        house.submit_one(prompt(account, first));
    }
    house.finish();
    // The warm account pays a token for each prompt that it repeats, and so its third comes before the second cold one.
    assert_eq!(admissions(&house), [1, 3, 1, 1, 2, 4, 5]);
}

#[test]
fn when_blocks_run_out_the_lowest_priority_gives_its_own() {
    let mut house = House::new(Limits { num_blocks: 12, ..LIMITS });
    let batch = house.submit_one(with_priority(Standing::PRIORITY_BATCH, request(1, 8, 24)));
    let interactive = house.submit_one(with_priority(Standing::PRIORITY_INTERACTIVE, request(2, 8, 24)));
    house.finish();
    assert_eq!(admissions(&house), [1, 2, 1]);
    for reader in [batch, interactive] {
        assert_eq!(house.readers[reader].transcript, alone(&house.readers[reader].request));
    }
    house.check_empty();
}

#[test]
fn whoever_does_not_fit_is_overtaken_by_no_more_tokens_than_its_own_prompt_has() {
    let mut house = House::new(Limits { num_blocks: 20, ..LIMITS });
    house.submit_one(request(1, 8, 60));
    // Its 18 blocks are not there as long as the first one runs.
    let long = house.submit_one(request(2, 72, 4));
    for first in 3..40 {
        house.submit_one(request(first, 5, 3));
    }
    while house.readers[long].starts == 0 {
        house.read_all();
        assert!(house.answer(), "the long one is let in");
    }
    let overtaken_by = admissions(&house).iter().filter(|first| **first >= 3).count();
    // 14 of 5 tokens fit into 72.
    assert_eq!(overtaken_by, 14);
    house.finish();
    house.check_empty();
}

#[test]
fn a_short_prompt_gets_its_first_token_while_a_long_one_is_computed() {
    let mut house = House::new(LIMITS);
    let long = house.submit_one(request(1, 200, 4));
    house.answer();
    let short = house.submit_one(request(2, 8, 4));
    // A step was on its way.
    for _ in 0..2 {
        house.answer();
    }
    house.read_all();
    assert_eq!(house.readers[short].transcript.tokens.len(), 1);
    assert!(house.readers[long].transcript.tokens.is_empty());
    house.finish();
    let steps = house.sent.iter().filter(|step| step.schedule.iter().any(|row| row.num_tokens > 1)).count();
    assert_eq!(steps, 13, "nothing of the budget is wasted");
}

#[test]
fn a_request_whose_time_is_over_in_the_queue_costs_no_step() {
    let mut house = House::new(one_by_one());
    let running = house.submit_one(request(1, 4, 8));
    let waiting = house.submit_one(within(SECOND, request(2, 4, 8)));
    house.advance(SECOND / 2);
    house.answer();
    assert!(!house.readers[waiting].ended);
    house.advance(SECOND / 2);
    house.read_all();
    assert_eq!(house.readers[waiting].failure, Some(Failure::QueueTimeout { timeout: SECOND }));
    assert_eq!(house.readers[waiting].starts, 0);
    house.finish();
    assert_eq!(admissions(&house), [1]);
    assert_eq!(house.readers[running].transcript, alone(&house.readers[running].request));
    house.check_empty();
}

#[test]
fn a_deadline_that_nobody_woke_for_is_seen_before_a_step_is_planned() {
    let mut house = House::new(one_by_one());
    let first = house.submit_one(request(1, 4, 8));
    let waiting = house.submit_one(within(SECOND, request(2, 4, 8)));
    house.oversleep(2 * SECOND);
    house.cancel(first);
    house.finish();
    assert_eq!(house.readers[waiting].failure, Some(Failure::QueueTimeout { timeout: SECOND }));
    assert_eq!(admissions(&house), [1]);
    house.check_empty();
}

#[test]
fn a_running_request_whose_time_is_over_keeps_what_it_has_and_frees_its_blocks() {
    for steps_in_flight in 1..3 {
        let mut house = House::new(Limits { steps_in_flight, ..LIMITS });
        let reader = house.submit_one(within(SECOND, request(1, 4, 20)));
        for _ in 0..3 {
            house.answer();
        }
        assert!(house.scheduler.gauges().blocks_used > 0);
        house.advance(SECOND);
        assert_eq!(house.scheduler.gauges().blocks_used, 0);
        house.finish();
        let reader = &house.readers[reader];
        assert_eq!(reader.failure, Some(Failure::Timeout { timeout: SECOND }));
        assert_eq!(reader.transcript.tokens, alone(&reader.request).tokens[..3]);
        house.check_empty();
    }
}

#[test]
fn what_ends_in_time_does_not_fail() {
    let mut house = House::new(LIMITS);
    let reader = house.submit_one(within(SECOND, request(1, 4, 1)));
    house.oversleep(SECOND);
    house.finish();
    assert_eq!(house.readers[reader].failure, None);
    assert_eq!(house.readers[reader].transcript, alone(&house.readers[reader].request));
    house.check_empty();
}

#[test]
fn the_shorter_of_the_two_timeouts_counts() {
    let policy = Policy { request_timeout: Some(2 * SECOND), ..Policy::DEFAULT };
    let check = |own: Option<u32>, expected: u32| {
        let timeout = expected * SECOND;
        let mut house = House::new(Limits { policy, ..LIMITS });
        let mut request = request(1, 4, 20);
        request.standing.timeout = own.map(|seconds| seconds * SECOND);
        let reader = house.submit_one(request);
        house.advance(timeout / 2);
        house.answer();
        assert!(house.scheduler.next_deadline().is_some());
        house.advance(timeout / 2);
        house.finish();
        assert_eq!(house.readers[reader].failure, Some(Failure::Timeout { timeout }));
        assert_eq!(house.scheduler.next_deadline(), None);
        house.check_empty();
    };
    check(None, 2);
    check(Some(1), 1);
    check(Some(5), 2);
}

#[derive(Debug, Clone)]
enum Op {
    Submit(TokenRequest),
    Cancel(prop::sample::Index),
    Advance(u64),
    ReadAll,
    Answer(usize),
}

fn standing() -> impl Strategy<Value = Standing> {
    let timeout = prop::option::weighted(0.4, (1..20_u64).prop_map(Duration::from_secs));
    (-20..20_i32, prop::option::of(0..3_u32), timeout).prop_map(|(priority, account, timeout)| Standing {
        priority,
        account: account.map(|account| Arc::from(account.to_string())),
        timeout,
    })
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let submit =
        (0..6_u32, 1..60_usize, 1..40_u32, standing()).prop_map(|(first, prompt, output, standing)| {
            TokenRequest { standing, ..request(first, prompt, output) }
        });
    let op = prop_oneof![
        4 => submit.prop_map(Op::Submit),
        1 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        2 => (1..5000_u64).prop_map(Op::Advance),
        2 => Just(Op::ReadAll),
        6 => (1..20_usize).prop_map(Op::Answer),
    ];
    prop::collection::vec(op, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn with_priorities_accounts_and_deadlines_every_request_ends_once(
        ops in ops(),
        num_blocks in 25..60_u32,
        max_sequences in 1..6_usize,
        steps_in_flight in 1..3_usize,
        longest in prop::option::of(5..60_u64),
        target_itl in prop::option::of(1..2000_u64),
    ) {
        let policy = Policy {
            request_timeout: longest.map(Duration::from_secs),
            target_itl: target_itl.map(Duration::from_millis),
            ..Policy::DEFAULT
        };
        let budget = Budget { max_sequences, ..LIMITS.budget };
        let mut house = House::new(Limits { num_blocks, budget, steps_in_flight, policy, ..LIMITS });
        for op in ops {
            match op {
                Op::Submit(request) => {
                    house.submit_one(request);
                }
                Op::Cancel(reader) if !house.readers.is_empty() => {
                    house.cancel(reader.index(house.readers.len()));
                }
                Op::Cancel(_) => {}
                Op::Advance(millis) => house.advance(Duration::from_millis(millis)),
                Op::ReadAll => house.read_all(),
                Op::Answer(steps) => {
                    for _ in 0..steps {
                        house.answer();
                    }
                }
            }
        }
        house.finish();
        for reader in house.readers.iter().filter(|reader| reader.stream.is_some()) {
            prop_assert!(reader.ended);
            let alone = alone(&reader.request);
            let own = reader.request.standing.timeout;
            let shortest = own.into_iter().chain(policy.request_timeout).min();
            match &reader.failure {
                None => prop_assert_eq!(&reader.transcript, &alone),
                Some(Failure::QueueTimeout { timeout }) => {
                    prop_assert_eq!(Some(*timeout), shortest);
                    prop_assert_eq!(reader.starts, 0);
                    prop_assert_eq!(&reader.transcript, &Transcript::default());
                }
                Some(Failure::Timeout { timeout }) => {
                    prop_assert_eq!(Some(*timeout), shortest);
                    prop_assert_eq!(reader.starts, 1);
                    prop_assert!(alone.tokens.starts_with(&reader.transcript.tokens));
                }
                Some(failure) => prop_assert!(false, "{failure:?}"),
            }
        }
        house.check_empty();
    }
}
