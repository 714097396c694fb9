//! What the prefix cache promises, one by one.

use proto::units::TokenId;

use super::house::{House, LIMITS, request, salted};
use super::model_shard::{POISON, alone};
use crate::scheduler::limits::{Budget, Limits};
use crate::scheduler::request::{Failure, TokenRequest};

/// A system prompt of `shared` tokens, and four more tokens by which `first` differs from others.
fn with_system_prompt(first: u32, shared: usize, max_new_tokens: u32) -> TokenRequest {
    let mut request = request(9, shared, max_new_tokens);
    request.prompt.extend((0..4).map(|position| TokenId(first * 1000 + position)));
    request
}

fn cached_tokens(house: &House) -> Vec<usize> {
    house.readers.iter().map(|reader| reader.cached_tokens).collect()
}

#[test]
fn a_prompt_that_was_computed_before_is_not_computed_again() {
    let mut house = House::new(LIMITS);
    for first in [1, 2] {
        house.submit_one(with_system_prompt(first, 20, 3));
        house.finish();
    }
    assert_eq!(cached_tokens(&house), [0, 20]);
    assert_eq!(house.computed_tokens(), (24 + 2) + (4 + 2));
    assert_eq!(
        house.scheduler.gauges().blocks_cached,
        6 + 1,
        "prompts share five blocks; the last token is not kept"
    );
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn generated_tokens_are_cached_for_the_next_turn() {
    let mut house = House::new(LIMITS);
    let reader = house.submit_one(request(1, 8, 9));
    house.finish();
    let mut next = house.readers[reader].request.clone();
    next.prompt.extend(house.readers[reader].transcript.tokens.iter().map(|token| token.id));
    next.prompt.extend([TokenId(7), TokenId(8)]);
    house.submit_one(next);
    house.finish();
    // Of the 17 tokens, the last one was sampled and never computed.
    assert_eq!(cached_tokens(&house), [0, 16]);
    house.check_all_as_alone();
}

#[test]
fn two_requests_with_one_system_prompt_compute_it_once() {
    for steps_in_flight in 1..=3 {
        let mut house = House::new(Limits { steps_in_flight, ..LIMITS });
        house.submit(vec![with_system_prompt(1, 40, 1), with_system_prompt(2, 40, 1)]).unwrap();
        house.finish();
        assert_eq!(house.computed_tokens(), 44 + 4, "with {steps_in_flight} steps in flight");
        assert_eq!(cached_tokens(&house), [0, 40]);
        house.check_all_as_alone();
    }
}

#[test]
fn a_request_that_comes_during_a_prefill_waits_for_its_blocks() {
    let mut house = House::new(LIMITS);
    house.submit_one(with_system_prompt(1, 60, 1));
    house.answer();
    house.submit_one(with_system_prompt(2, 60, 1));
    house.finish();
    assert_eq!(house.computed_tokens(), 64 + 4);
    house.check_all_as_alone();
}

#[test]
fn choices_of_one_prompt_share_one_prefill() {
    let mut house = House::new(LIMITS);
    house.submit((0..4).map(|_| request(1, 42, 5)).collect()).unwrap();
    house.finish();
    assert_eq!(cached_tokens(&house), [0, 40, 40, 40]);
    assert_eq!(house.computed_tokens(), 42 + 3 * 2 + 4 * 4);
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn who_waits_for_a_block_does_not_hold_up_those_behind() {
    let mut house = House::new(LIMITS);
    house.submit(vec![with_system_prompt(1, 12, 1), with_system_prompt(2, 12, 1), request(3, 2, 1)]).unwrap();
    // The first step has the first and the one that needs nothing of it, the second step all the others.
    house.submit_one(request(4, 2, 1));
    let admitted =
        |step: usize, house: &House| house.sent[step].admit.iter().map(|new| new.id.0).collect::<Vec<_>>();
    assert_eq!(admitted(0, &house), [1, 2]);
    house.finish();
    assert_eq!(house.sent[1].admit.len(), 2);
    house.check_all_as_alone();

    let budget = Budget { max_prefill_tokens: 20, ..LIMITS.budget };
    let mut house = House::new(Limits { budget, ..LIMITS });
    house.submit(vec![with_system_prompt(1, 12, 1), with_system_prompt(2, 12, 1), request(3, 2, 1)]).unwrap();
    let prompts = house.sent[0].admit.iter().map(|new| new.request.prompt.len());
    assert_eq!(prompts.collect::<Vec<_>>(), [16, 2], "the third one overtakes the second");
}

#[test]
fn who_waits_for_a_block_goes_on_alone_when_the_other_is_cancelled() {
    let mut house = House::new(LIMITS);
    let readers = house.submit(vec![with_system_prompt(1, 60, 1), with_system_prompt(2, 60, 1)]).unwrap();
    house.cancel(readers);
    house.finish();
    let second = &house.readers[readers + 1];
    assert_eq!(second.cached_tokens, 16, "what was sent is computed, though its request is gone");
    assert_eq!(second.transcript, alone(&second.request));
    house.check_empty();
}

#[test]
fn who_waits_for_a_block_goes_on_alone_when_the_other_has_stalled() {
    // The first prompt reports log-probabilities to a reader that does not read: it stops in the middle.
    let budget = Budget { max_prefill_tokens: 1, block_size: 64, ..LIMITS.budget };
    let mut house = House::new(Limits { budget, num_blocks: 16, ..LIMITS });
    house.submit_one(TokenRequest { prompt_logprobs: true, ..request(1, 200, 1) });
    let second = house.submit_one(request(1, 200, 1));
    while house.answer() {
        house.read(second, usize::MAX);
    }
    assert_eq!(house.readers[second].transcript, alone(&house.readers[second].request));
    assert!(!house.readers[0].ended);
    house.finish();
    house.check_all_as_alone();
}

#[test]
fn a_salt_keeps_tenants_apart() {
    let mut house = House::new(LIMITS);
    for salt in ["a", "b", "a"] {
        house.submit_one(salted(salt, request(1, 21, 2)));
        house.finish();
    }
    house.submit_one(request(1, 21, 2));
    house.finish();
    assert_eq!(cached_tokens(&house), [0, 0, 20, 0]);
    house.check_all_as_alone();
}

#[test]
fn eviction_takes_the_least_recently_used_leaf_and_only_when_blocks_are_needed() {
    // Three prompts of 4 blocks in 12 blocks.
    let mut house = House::new(Limits { num_blocks: 12, ..LIMITS });
    let serve = |house: &mut House, first: u32| {
        let reader = house.submit_one(request(first, 15, 1));
        house.finish();
        house.readers[reader].cached_tokens
    };
    assert_eq!([1, 2, 3].map(|first| serve(&mut house, first)), [0, 0, 0]);
    assert_eq!(serve(&mut house, 1), 12, "all of them are kept, and the first is the youngest now");
    assert_eq!(serve(&mut house, 4), 0);
    // The free blocks and one of the second prompt went to the fourth: its end, not its beginning.
    assert_eq!(serve(&mut house, 2), 8);
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn log_probabilities_of_a_prompt_are_computed_though_it_is_cached() {
    let mut house = House::new(LIMITS);
    house.submit_one(request(1, 20, 2));
    house.finish();
    house.submit_one(TokenRequest { prompt_logprobs: true, ..request(1, 20, 2) });
    house.finish();
    assert_eq!(cached_tokens(&house), [0, 0]);
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn a_whole_prompt_in_the_cache_leaves_its_last_token_to_compute() {
    let mut house = House::new(LIMITS);
    for _ in 0..3 {
        house.submit_one(request(1, 16, 6));
        house.finish();
    }
    assert_eq!(cached_tokens(&house), [0, 12, 12]);
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn a_request_that_needs_all_blocks_runs_whatever_is_cached() {
    // The last block of the prompt is computed again, beside its copy in the cache.
    let mut house = House::new(Limits { num_blocks: 8, ..LIMITS });
    for _ in 0..3 {
        house.submit_one(request(1, 16, 16));
        house.finish();
    }
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn a_preempted_sequence_comes_back_through_the_cache() {
    // Each request needs 15 of 24 blocks in the end. The second one is preempted for good reason, and when it comes back,
    // some of its blocks are still there.
    let mut house = House::new(Limits { num_blocks: 24, ..LIMITS });
    house.submit(vec![request(1, 8, 50), request(2, 8, 50)]).unwrap();
    house.finish();
    let again = house.sent.iter().flat_map(|step| &step.admit).filter(|new| new.tokens.len() > 8);
    let again = again.map(|new| new.computed_tokens).collect::<Vec<_>>();
    assert!(!again.is_empty() && again.iter().all(|computed| *computed > 0), "{again:?}");
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn what_logits_that_are_not_finite_came_from_is_not_used_again() {
    let poisoned = || {
        let mut poisoned = request(1, 20, 4);
        poisoned.prompt[0] = POISON;
        poisoned
    };
    let mut house = House::new(LIMITS);
    for _ in 0..2 {
        house.submit_one(poisoned());
        house.finish();
    }
    assert_eq!(cached_tokens(&house), [0, 0]);
    assert!(house.readers.iter().all(|reader| reader.failure == Some(Failure::InvalidLogits)));
    house.check_empty();
}

#[test]
fn who_was_let_in_over_blocks_that_memory_did_not_suffice_for_is_let_in_again() {
    let mut house = House::new(Limits { steps_in_flight: 2, ..LIMITS });
    let old = house.submit_one(request(9, 4, 12));
    house.answer();
    let new = house.submit_one(request(1, 16, 4));
    // Is told that the blocks are coming, and is let in over them while the step that was to compute them is in flight.
    let mut longer = request(1, 16, 4);
    longer.prompt.extend([TokenId(7), TokenId(8)]);
    let waiting = house.submit_one(longer);
    let admitted = |house: &House, reader: usize| {
        let request = &house.readers[reader].request;
        house.sent.iter().flat_map(|step| &step.admit).filter(|new| *new.request == *request).count()
    };
    while admitted(&house, new) == 0 || house.in_flight[0].admit.is_empty() {
        house.answer();
    }
    assert_eq!((house.in_flight.len(), admitted(&house, waiting)), (2, 1));
    assert_eq!(house.in_flight[1].admit[0].computed_tokens, 16);

    house.shard.shortages = 1;
    house.finish();
    assert_eq!(house.readers[new].failure, Some(Failure::OutOfMemory));
    assert_eq!(admitted(&house, waiting), 2);
    for reader in [old, waiting] {
        assert_eq!(house.readers[reader].failure, None);
        assert_eq!(house.readers[reader].transcript, alone(&house.readers[reader].request));
    }
    house.check_empty();
}

#[test]
fn what_a_dropped_request_was_to_compute_and_memory_did_not_suffice_for_is_not_shared() {
    let mut house = House::new(LIMITS);
    let dropped = house.submit_one(request(1, 16, 4));
    assert_eq!(house.in_flight.len(), 1);
    // Its blocks stay in the cache, where nobody knows yet that they are not computed.
    house.cancel(dropped);
    house.shard.shortages = 1;
    house.answer();
    let again = house.submit_one(request(1, 18, 4));
    house.finish();
    assert_eq!(house.readers[again].cached_tokens, 0);
    assert_eq!(house.readers[again].transcript, alone(&house.readers[again].request));
    house.check_empty();
}

#[test]
fn what_a_request_computed_before_memory_did_not_suffice_for_it_is_used_again() {
    let mut house = House::new(LIMITS);
    let first = house.submit_one(request(1, 40, 2));
    // Two chunks of 16 are computed, the third is not.
    house.answer();
    house.answer();
    house.shard.shortages = 1;
    house.answer();
    house.read_all();
    assert_eq!(house.readers[first].failure, Some(Failure::OutOfMemory));
    let again = house.submit_one(request(1, 40, 2));
    house.finish();
    assert_eq!(house.readers[again].cached_tokens, 32);
    assert_eq!(house.readers[again].transcript, alone(&house.readers[again].request));
    house.check_empty();
}

#[test]
fn without_prefix_caching_all_is_computed_and_nothing_kept() {
    let mut house = House::new(Limits { prefix_caching: false, ..LIMITS });
    house.submit(vec![request(1, 20, 2), request(1, 20, 2)]).unwrap();
    house.finish();
    assert_eq!(cached_tokens(&house), [0, 0]);
    assert_eq!((house.computed_tokens(), house.scheduler.gauges().blocks_cached), (2 * 21, 0));
    house.check_all_as_alone();
}

#[test]
fn a_block_of_a_dropped_request_stays_for_others() {
    let mut house = House::new(LIMITS);
    let dropped = house.submit_one(request(1, 16, 30));
    house.answer();
    house.answer();
    house.cancel(dropped);
    house.submit_one(request(1, 18, 2));
    house.finish();
    assert_eq!(house.readers[1].cached_tokens, 16);
    assert_eq!(house.readers[1].transcript, alone(&house.readers[1].request));
    house.check_empty();
}
