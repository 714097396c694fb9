//! What the scheduler promises, one by one.

use futures::FutureExt;
use proto::units::{SequenceId, TokenId};

use super::house::{House, LIMITS, request};
use super::model_shard::{POISON, alone};
use crate::scheduler::answer::{Outcome, SequenceOutput, StepAnswer, StepTimes};
use crate::scheduler::event::Event;
use crate::scheduler::handle::Status;
use crate::scheduler::limits::{Budget, Limits};
use crate::scheduler::request::{EndReason, Failure, SubmitError, Token, TokenEvent, TokenRequest};
use crate::scheduler::token_stream::CAPACITY;

#[test]
fn a_request_gets_its_start_then_its_prompt_then_its_tokens() {
    let mut house = House::new(LIMITS);
    let reader = house.submit_one(TokenRequest { prompt_logprobs: true, ..request(1, 40, 5) });
    house.finish();
    let reader = &house.readers[reader];
    assert_eq!((reader.starts, reader.transcript.prompt.len(), reader.transcript.tokens.len()), (1, 39, 5));
    assert_eq!(reader.transcript, alone(&reader.request));
    house.check_empty();
}

#[test]
fn a_prompt_is_computed_in_chunks_of_the_prefill_budget() {
    let mut house = House::new(LIMITS);
    house.submit_one(request(1, 40, 1));
    house.finish();
    let chunks = house.sent.iter().flat_map(|step| &step.schedule).map(|row| row.num_tokens);
    assert_eq!(chunks.collect::<Vec<_>>(), [16, 16, 8]);
}

#[test]
fn requests_that_come_together_are_computed_together() {
    let mut house = House::new(LIMITS);
    house.submit(vec![request(1, 4, 10), request(2, 4, 10), request(3, 4, 10)]).unwrap();
    house.finish();
    assert!(house.sent[..10].iter().all(|step| step.schedule.len() == 3));
}

#[test]
fn a_long_prompt_does_not_stop_decode_rows() {
    let mut house = House::new(LIMITS);
    house.submit_one(request(1, 4, 30));
    house.answer();
    house.submit_one(request(2, 100, 1));
    house.answer();
    while house.sent.last().is_some_and(|step| step.schedule.len() == 2) {
        let rows = &house.sent.last().unwrap().schedule;
        assert_eq!(rows[0].num_tokens, 1, "the first request gets a token in each step");
        assert!(rows[1].num_tokens <= LIMITS.budget.max_prefill_tokens);
        house.answer();
    }
    let steps_with_both = house.sent.iter().filter(|step| step.schedule.len() == 2).count();
    assert_eq!(steps_with_both, 100_usize.div_ceil(16));
}

#[test]
fn a_dropped_stream_frees_its_blocks_at_once_and_its_sequence_with_the_next_step() {
    let mut house = House::new(LIMITS);
    let dropped = house.submit_one(request(1, 20, 50));
    house.submit_one(request(2, 4, 50));
    for _ in 0..5 {
        house.answer();
    }
    let with_both = house.scheduler.gauges().blocks_used;
    house.cancel(dropped);
    assert!(house.scheduler.gauges().blocks_used < with_both - 4);
    // The step that was in flight, and the one that tells the shard.
    house.answer();
    assert_eq!(house.in_flight[0].release, [SequenceId(1)]);
    house.answer();
    assert_eq!(house.shard.num_sequences(), 1);
}

#[test]
fn a_stream_dropped_when_nothing_else_runs_is_released_too() {
    let mut house = House::new(LIMITS);
    let dropped = house.submit_one(request(1, 20, 50));
    house.answer();
    house.cancel(dropped);
    house.answer();
    assert_eq!(house.in_flight[0].release, [SequenceId(1)]);
    assert!(house.in_flight[0].schedule.is_empty());
    house.answer();
    house.check_empty();
    assert!(house.in_flight.is_empty());
}

#[test]
fn a_request_dropped_in_the_queue_never_runs() {
    let mut house = House::new(Limits { num_blocks: 8, ..LIMITS });
    house.submit_one(request(1, 16, 16));
    let dropped = house.submit_one(request(2, 16, 16));
    assert_eq!(house.scheduler.gauges().queued, 1);
    house.cancel(dropped);
    assert_eq!(house.scheduler.gauges().queued, 0);
    house.finish();
    assert!(house.sent.iter().all(|step| step.admit.iter().all(|new| new.id == SequenceId(1))));
    house.check_empty();
}

#[test]
fn a_slow_reader_stalls_only_itself_and_loses_nothing() {
    let mut house = House::new(LIMITS);
    let slow = house.submit_one(request(1, 4, 100));
    let fast = house.submit_one(request(2, 4, 100));
    while house.answer() {
        house.read(fast, usize::MAX);
    }
    assert_eq!(house.readers[fast].transcript, alone(&house.readers[fast].request));
    // One event is the start; room for another prompt report is kept, though here none comes.
    assert!(!house.readers[slow].ended);
    assert_eq!(house.scheduler.gauges().running, 1);
    house.read(slow, usize::MAX);
    let got = house.readers[slow].transcript.tokens.len();
    assert!(got < CAPACITY && got > CAPACITY - 4, "{got} tokens were waiting");
    house.finish();
    assert_eq!(house.readers[slow].transcript, alone(&house.readers[slow].request));
    house.check_empty();
}

#[test]
fn a_stalled_reader_gives_its_blocks_when_others_need_them() {
    // 30 blocks of 4: the first request alone takes up to 28 of them.
    let mut house = House::new(Limits { num_blocks: 30, ..LIMITS });
    let slow = house.submit_one(request(1, 12, 100));
    while house.answer() {}
    assert_eq!(house.scheduler.gauges().running, 1, "it has stalled");
    let young = house.submit_one(request(2, 80, 10));
    while house.answer() {
        house.read(young, usize::MAX);
    }
    assert_eq!(house.readers[young].transcript, alone(&house.readers[young].request));
    assert_eq!(house.scheduler.gauges().queued, 1, "the slow one waits for its reader, not for blocks");
    house.finish();
    assert_eq!(house.readers[slow].transcript, alone(&house.readers[slow].request));
    house.check_empty();
}

#[test]
fn a_preempted_sequence_goes_on_unchanged() {
    // Each request needs 15 of 20 blocks in the end.
    let mut house = House::new(Limits { num_blocks: 20, ..LIMITS });
    let first = house.submit(vec![request(1, 8, 50), request(2, 8, 50)]).unwrap();
    house.finish();
    let again = house.sent.iter().flat_map(|step| &step.admit).filter(|new| new.tokens.len() > 8);
    let again = again.map(|new| new.request.prompt[0]).collect::<Vec<_>>();
    assert_eq!(again, [TokenId(2000)], "the younger one is preempted, once");
    for reader in &house.readers[first..] {
        assert_eq!(reader.transcript, alone(&reader.request));
        assert_eq!(reader.starts, 1);
    }
    house.check_empty();
}

#[test]
fn log_probabilities_of_a_prompt_are_given_once_though_it_is_computed_twice() {
    // The younger prompt takes 20 steps, in which the older sequence grows by more blocks than are kept for it.
    let budget = Budget { max_prefill_tokens: 2, ..LIMITS.budget };
    let mut house = House::new(Limits { num_blocks: 18, budget, ..LIMITS });
    let first = house.submit_one(request(1, 8, 60));
    while house.readers[first].transcript.tokens.len() < 16 {
        house.answer();
        house.read_all();
    }
    let second = house.submit_one(TokenRequest { prompt_logprobs: true, ..request(2, 40, 20) });
    house.finish();
    let admitted = house.sent.iter().flat_map(|step| &step.admit).filter(|new| new.tokens.len() == 40);
    assert!(admitted.filter(|new| new.prompt_logprobs).count() > 1, "the prompt is computed more than once");
    for reader in [first, second] {
        assert_eq!(house.readers[reader].transcript, alone(&house.readers[reader].request));
    }
    house.check_empty();
}

#[test]
fn a_request_that_does_not_fit_is_overtaken_by_one_that_does() {
    let mut house = House::new(Limits { num_blocks: 12, ..LIMITS });
    // The second one does not fit beside the first; the third one does.
    for request in [request(1, 20, 8), request(2, 36, 8), request(3, 4, 2)] {
        house.submit_one(request);
    }
    house.finish();
    let order = house.sent.iter().flat_map(|step| &step.admit).map(|new| new.request.prompt[0].0 / 1000);
    assert_eq!(order.collect::<Vec<_>>(), [1, 3, 2]);
}

#[test]
fn the_next_decode_row_is_sent_before_the_token_is_known() {
    let mut house = House::new(Limits { steps_in_flight: 2, ..LIMITS });
    let reader = house.submit_one(request(1, 4, 10));
    assert_eq!(house.in_flight.len(), 2);
    assert_eq!(house.in_flight[1].schedule[0].num_tokens, 1);
    house.finish();
    assert_eq!(house.readers[reader].transcript, alone(&house.readers[reader].request));
    let computed = house.sent.iter().flat_map(|step| &step.schedule).map(|row| row.num_tokens).sum::<usize>();
    assert_eq!(computed, 4 + 9, "nothing is computed after a length that is known");
    house.check_empty();
}

#[test]
fn a_step_that_was_sent_before_an_end_was_known_skips_that_sequence() {
    let until_eos = |first| TokenRequest { ignore_eos: false, ..request(first, 4, 100) };
    for steps_in_flight in [2, 3] {
        let mut house = House::new(Limits { steps_in_flight, ..LIMITS });
        house.submit((1..5).map(until_eos).collect()).unwrap();
        house.finish();
        assert!(house.readers.iter().any(|reader| reader.transcript.end == Some(EndReason::Eos)));
        let rows = house.sent.iter().map(|step| step.schedule.len()).sum::<usize>();
        let tokens = house.readers.iter().map(|reader| reader.transcript.tokens.len()).sum::<usize>();
        assert!(rows > tokens && rows <= tokens + 4 * (steps_in_flight - 1), "{rows} rows, {tokens} tokens");
        house.check_all_as_alone();
        house.check_empty();
    }
}

#[test]
fn blocks_of_a_stream_that_is_dropped_with_two_steps_in_flight_serve_others_at_once() {
    // The second request needs all blocks.
    let mut house = House::new(Limits { num_blocks: 12, steps_in_flight: 2, ..LIMITS });
    let dropped = house.submit_one(request(1, 20, 20));
    let second = house.submit_one(request(2, 40, 8));
    house.answer();
    house.answer();
    assert_eq!((house.in_flight.len(), house.scheduler.gauges().queued), (2, 1));
    house.cancel(dropped);
    assert_eq!(house.scheduler.gauges().blocks_used, 0);
    house.finish();
    assert_eq!(house.readers[second].transcript, alone(&house.readers[second].request));
    house.check_empty();
}

#[test]
fn a_slow_reader_loses_nothing_with_two_steps_in_flight() {
    let mut house = House::new(Limits { steps_in_flight: 2, ..LIMITS });
    let slow = house.submit_one(request(1, 4, 100));
    while house.answer() {}
    assert!(!house.readers[slow].ended);
    house.finish();
    house.check_all_as_alone();
    house.check_empty();
}

#[test]
fn logits_that_are_not_finite_end_only_their_request() {
    let mut house = House::new(LIMITS);
    let mut poisoned = request(1, 4, 10);
    poisoned.prompt[0] = POISON;
    house.submit(vec![poisoned, request(2, 4, 10)]).unwrap();
    house.finish();
    assert_eq!(house.readers[0].failure, Some(Failure::InvalidLogits));
    assert_eq!(house.readers[1].transcript, alone(&house.readers[1].request));
    house.check_empty();
}

#[test]
fn overload_is_refused_at_the_door_all_or_nothing() {
    let mut house = House::with_places(LIMITS, 3);
    let first = house.submit(vec![request(1, 4, 4), request(2, 4, 4)]).unwrap();
    let refused = house.submit(vec![request(3, 4, 4), request(4, 4, 4)]);
    assert_eq!(refused.unwrap_err(), SubmitError::Overloaded { limit: 3 });
    house.submit_one(request(5, 4, 4));
    assert_eq!(house.submit(vec![request(6, 4, 4)]).unwrap_err(), SubmitError::Overloaded { limit: 3 });
    house.cancel(first);
    house.submit_one(request(7, 4, 4));
    house.finish();
    house.submit(vec![request(8, 4, 4), request(9, 4, 4), request(10, 4, 4)]).unwrap();
}

#[test]
fn draining_takes_no_new_requests_and_finishes_the_others() {
    let mut house = House::new(LIMITS);
    let reader = house.submit_one(request(1, 4, 10));
    house.handle.begin_drain();
    assert_eq!(house.handle.status(), Status::Draining);
    assert_eq!(house.submit(vec![request(2, 4, 4)]).unwrap_err(), SubmitError::Draining);
    assert!(house.handle.drained().now_or_never().is_none());
    house.finish();
    assert_eq!(house.readers[reader].transcript, alone(&house.readers[reader].request));
    assert!(house.handle.drained().now_or_never().is_some());
}

#[test]
fn at_the_end_of_the_graceful_timeout_all_requests_end() {
    let mut house = House::new(Limits { num_blocks: 8, ..LIMITS });
    house.submit(vec![request(1, 16, 16), request(2, 16, 16)]).unwrap();
    house.answer();
    house.handle.fail_all();
    house.finish();
    for reader in &house.readers {
        assert_eq!(reader.failure, Some(Failure::ShuttingDown));
    }
    assert!(house.handle.drained().now_or_never().is_some());
}

#[test]
fn when_the_shards_fail_running_and_waiting_requests_end_after_what_they_have() {
    let mut house = House::new(Limits { num_blocks: 8, ..LIMITS });
    house.submit(vec![request(1, 16, 16), request(2, 16, 16)]).unwrap();
    for _ in 0..4 {
        house.answer();
    }
    house.apply(Event::ShardsFailed("rank 0 is gone".to_owned()));
    house.read_all();
    for reader in &house.readers {
        assert_eq!(reader.failure, Some(Failure::Shards("rank 0 is gone".to_owned())));
    }
    assert_eq!(house.readers[0].transcript.tokens.len(), 4, "tokens that were given before are not lost");
}

#[test]
fn streams_and_places_outlive_a_scheduler_that_is_gone() {
    let mut house = House::with_places(LIMITS, 2);
    let mut streams = house.handle.submit(vec![request(1, 4, 10), request(2, 4, 10)]).unwrap();
    house.pump();
    let handle = house.handle.clone();
    drop(house);
    let events = std::iter::from_fn(|| streams[0].next().now_or_never().expect("nothing is waited for"));
    let events = events.collect::<Vec<_>>();
    assert!(matches!(
        events.as_slice(),
        [TokenEvent::Started { .. }, TokenEvent::Failed(Failure::Shards(_))]
    ));
    assert!(handle.drained().now_or_never().is_none());
    drop(streams);
    assert!(handle.drained().now_or_never().is_some());
}

#[test]
fn an_answer_that_does_not_fit_the_step_fails_the_shards_and_says_why() {
    let token = || Token { id: TokenId(1), logprob: 0.0, top: Vec::new() };
    let output = |sequence: u64, outcome: Outcome| SequenceOutput {
        sequence: SequenceId(sequence),
        prompt: Vec::new(),
        outcome,
    };
    let check = |max_new_tokens: u32,
                 step: u64,
                 outputs: Vec<SequenceOutput>,
                 skipped: Vec<SequenceId>,
                 part: &str| {
        let mut house = House::new(LIMITS);
        // A whole prompt, and a chunk of one.
        house.submit(vec![request(1, 4, max_new_tokens), request(2, 40, 4)]).unwrap();
        house.apply(Event::StepDone(StepAnswer { step, outputs, skipped, times: StepTimes::default() }));
        house.read_all();
        for reader in &house.readers {
            let Some(Failure::Shards(reason)) = &reader.failure else {
                panic!("{part}: {:?}", reader.failure)
            };
            assert!(reason.contains(part), "{reason}");
        }
    };
    let sampled = || output(1, Outcome::Sampled(vec![token()]));
    check(4, 9, vec![], vec![], "step 9 was answered where the answer to Some(1) was due");
    check(4, 1, vec![], vec![], "up to its last token and sampled none");
    check(4, 1, vec![sampled(), sampled()], vec![], "two outputs");
    check(4, 1, vec![sampled(), output(3, Outcome::Nothing)], vec![], "for sequence 3");
    check(
        4,
        1,
        vec![sampled(), output(2, Outcome::Sampled(vec![token()]))],
        vec![],
        "computed a part of sequence 2",
    );
    check(
        4,
        1,
        vec![SequenceOutput { prompt: vec![token()], ..sampled() }],
        vec![],
        "owes 0 prompt log-prob",
    );
    check(4, 1, vec![], vec![SequenceId(1)], "skipped sequence 1");
    check(1, 1, vec![sampled()], vec![], "did not end it");
    check(
        4,
        1,
        vec![output(1, Outcome::Sampled(vec![token(), token()]))],
        vec![],
        "sampled 2 tokens of sequence 1, where 1",
    );
}

#[test]
fn a_row_may_sample_several_tokens() {
    let mut house = House::new(Limits { max_sampled_tokens: 4, steps_in_flight: 2, ..LIMITS });
    house.submit(vec![request(1, 10, 40), request(2, 10, 40)]).unwrap();
    house.finish();
    let rows = house.sent.iter().map(|step| step.schedule.len()).sum::<usize>();
    assert!(rows < 60, "{rows} rows for 80 tokens");
    house.check_all_as_alone();
    // What was computed for more than one token is in the cache too.
    let mut next = house.readers[0].request.clone();
    next.prompt.extend(house.readers[0].transcript.tokens.iter().map(|token| token.id));
    let next = house.submit_one(next);
    house.finish();
    assert_eq!(house.readers[next].cached_tokens, 48);
    house.check_empty();
}

#[test]
fn what_is_computed_in_vain_stays_small_when_blocks_are_short() {
    // Six of forty sequences fit in the end; all outputs are far longer than the prompts.
    let budget = Budget { max_sequences: 40, max_prefill_tokens: 64, ..LIMITS.budget };
    for prefix_caching in [true, false] {
        let mut house = House::new(Limits { num_blocks: 6 * 52, budget, prefix_caching, ..LIMITS });
        house.submit((0..40).map(|first| request(first, 8, 200)).collect()).unwrap();
        house.finish();
        let useful = 40 * (8 + 199);
        let vain = house.computed_tokens() - useful;
        assert!(vain < useful, "{vain} tokens in vain, {useful} of use");
        house.check_all_as_alone();
        house.check_empty();
    }
}

#[test]
fn sequences_beyond_the_batch_size_wait_and_take_turns_by_age() {
    let budget = Budget { max_sequences: 2, ..LIMITS.budget };
    let mut house = House::new(Limits { budget, ..LIMITS });
    house.submit((1..6).map(|first| request(first, 4, 6)).collect()).unwrap();
    assert_eq!(house.scheduler.gauges().queued, 3);
    house.finish();
    for reader in &house.readers {
        assert_eq!(reader.transcript, alone(&reader.request));
    }
    house.check_empty();
}
