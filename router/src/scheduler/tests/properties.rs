//! What holds for any requests, readers, limits and failures.

use proptest::prelude::*;
use proto::units::TokenId;

use super::house::{House, Reader, SAMPLING};
use super::model_shard::{POISON, alone};
use crate::scheduler::event::Event;
use crate::scheduler::limits::{Budget, Limits};
use crate::scheduler::policy::Policy;
use crate::scheduler::request::{CacheNamespace, Failure, Standing, TokenRequest};

#[derive(Debug, Clone)]
enum Op {
    Submit(Vec<TokenRequest>),
    Cancel(prop::sample::Index),
    Read(prop::sample::Index, usize),
    ReadAll,
    Answer(usize),
    /// Memory does not suffice for a step, so often.
    Shortage(usize),
}

fn limits() -> impl Strategy<Value = Limits> {
    let caching = prop::bool::weighted(0.9);
    let max_sampled_tokens = prop_oneof![3 => Just(1_usize), 1 => 2..5_usize];
    let cache = (2..60_u32, 1..9_usize, caching);
    let step = (1..40_usize, 1..7_usize, 1..4_usize, max_sampled_tokens);
    (cache, step).prop_map(|((num_blocks, block_size, prefix_caching), step)| {
        let (max_prefill_tokens, max_sequences, steps_in_flight, max_sampled_tokens) = step;
        Limits {
            num_blocks,
            budget: Budget { max_prefill_tokens, max_sequences, block_size },
            steps_in_flight,
            prefix_caching,
            max_sampled_tokens,
            policy: Policy::DEFAULT,
        }
    })
}

fn token_request() -> impl Strategy<Value = TokenRequest> {
    // One of a few beginnings, cut somewhere, and an end of its own.
    let stem = (0..3_u32, 0..50_u32);
    let end = prop::collection::vec((0..50_u32).prop_map(TokenId), 1..20);
    let prompt = (stem, end).prop_map(|((stem, len), end)| {
        (0..len).map(|position| TokenId(stem * 100 + position)).chain(end).collect::<Vec<_>>()
    });
    let salt = prop_oneof![3 => Just(None), 1 => Just(Some("a")), 1 => Just(Some("b"))];
    let account = prop_oneof![2 => Just(None), 1 => Just(Some("x")), 1 => Just(Some("y"))];
    let standing = (-2..3_i32, account);
    // Longer than the channel to the reader, so that those who do not read stall.
    let max_new_tokens = prop_oneof![3 => 1..20_u32, 1 => 60..160_u32];
    let prompt_logprobs = prop::bool::weighted(0.2);
    let poisoned = prop::bool::weighted(0.05);
    (prompt, max_new_tokens, any::<bool>(), prompt_logprobs, poisoned, salt, standing).prop_map(
        |(mut prompt, max_new_tokens, ignore_eos, prompt_logprobs, poisoned, salt, (priority, account))| {
            if poisoned {
                prompt[0] = POISON;
            }
            TokenRequest {
                prompt,
                sampling: SAMPLING,
                max_new_tokens,
                ignore_eos,
                top_n_tokens: 1,
                prompt_logprobs,
                grammar: None,
                standing: Standing { priority, account: account.map(Into::into), timeout: None },
                cache_namespace: CacheNamespace { adapter: None, salt: salt.map(Into::into) },
            }
        },
    )
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        3 => prop::collection::vec(token_request(), 1..4).prop_map(Op::Submit),
        1 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        2 => (any::<prop::sample::Index>(), 1..80_usize).prop_map(|(reader, events)| Op::Read(reader, events)),
        1 => Just(Op::ReadAll),
        6 => (1..40_usize).prop_map(Op::Answer),
        1 => (1..4_usize).prop_map(Op::Shortage),
    ];
    prop::collection::vec(op, 1..40)
}

/// What validation does: a request fits an empty cache.
fn fitting(mut request: TokenRequest, limits: &Limits) -> TokenRequest {
    let kv_cache_tokens = limits.num_blocks as usize * limits.budget.block_size;
    request.prompt.truncate(kv_cache_tokens - 1);
    request.max_new_tokens = request.max_new_tokens.min((kv_cache_tokens - request.prompt.len()) as u32);
    request
}

fn play(house: &mut House, limits: &Limits, ops: Vec<Op>) {
    for op in ops {
        match op {
            Op::Submit(requests) => {
                let requests = requests.into_iter().map(|request| fitting(request, limits)).collect();
                // Refused where the house is full, which is as it should be.
                let _ = house.submit(requests);
            }
            Op::Cancel(reader) if !house.readers.is_empty() => {
                house.cancel(reader.index(house.readers.len()));
            }
            Op::Read(reader, events) if !house.readers.is_empty() => {
                house.read(reader.index(house.readers.len()), events);
            }
            Op::Cancel(_) | Op::Read(..) => {}
            Op::ReadAll => house.read_all(),
            Op::Answer(steps) => {
                for _ in 0..steps {
                    house.answer();
                }
            }
            Op::Shortage(shortages) => house.shard.shortages = shortages,
        }
    }
}

fn check_begins_as_alone(reader: &Reader) {
    let alone = alone(&reader.request);
    assert!(alone.prompt.starts_with(&reader.transcript.prompt), "{:?}", reader.request);
    assert!(alone.tokens.starts_with(&reader.transcript.tokens), "{:?}", reader.request);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_once_with_what_it_gets_alone(limits in limits(), places in 1..24_u32, ops in ops()) {
        let mut house = House::with_places(limits, places);
        let short = ops.iter().any(|op| matches!(op, Op::Shortage(_)));
        play(&mut house, &limits, ops);
        house.shard.shortages = 0;
        house.finish();
        for reader in &house.readers {
            check_begins_as_alone(reader);
            if reader.stream.is_none() {
                continue;
            }
            assert!(reader.ended, "{:?} never ended", reader.request);
            assert_eq!(reader.starts, 1);
            if reader.failure == Some(Failure::OutOfMemory) {
                assert!(short, "memory did suffice");
            } else if reader.request.prompt[0] == POISON {
                assert_eq!(reader.failure, Some(Failure::InvalidLogits));
            } else {
                assert_eq!(reader.failure, None);
                assert_eq!(reader.transcript, alone(&reader.request));
            }
        }
        house.check_empty();
    }

    #[test]
    fn when_the_shards_fail_every_request_ends_once(limits in limits(), before in ops(), after in ops()) {
        let mut house = House::new(limits);
        play(&mut house, &limits, before);
        house.apply(Event::ShardsFailed("the plug was pulled".to_owned()));
        house.in_flight.clear();
        play(&mut house, &limits, after);
        house.finish();
        assert!(house.in_flight.is_empty(), "nothing is sent to shards that are gone");
        for reader in house.readers.iter().filter(|reader| reader.stream.is_some()) {
            assert!(reader.ended);
            match &reader.failure {
                None => assert_eq!(reader.transcript, alone(&reader.request)),
                Some(Failure::Shards(reason)) => {
                    assert_eq!(reason, "the plug was pulled");
                    check_begins_as_alone(reader);
                }
                Some(failure) => assert!(matches!(failure, Failure::InvalidLogits | Failure::OutOfMemory)),
            }
        }
        let gauges = house.scheduler.gauges();
        assert_eq!((gauges.queued, gauges.running, gauges.blocks_used), (0, 0, 0));
    }
}
