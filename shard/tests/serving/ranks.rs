//! Two ranks in two threads.

use std::path::Path;
use std::time::Duration;

use kernels::Context;
use kernels::collective::{Local, SharedMemory};
use proto::v1::{NewSequence, StepRequest};
use shard::Error;
use shard::engine::{Engine, Origin};
use shard::models::{self, LoadOptions};
use shard::weights::Partition;

use crate::checkpoints::llama;
use crate::driver::{
    Outcome, Plan, WARMUP, WHOLE_PROMPTS, constrained, generate, prepared, request, schema, unequal_requests,
};
use crate::grammars;

/// Messages do not depend on answers, so that each rank gets the same from its own driver.
const BLIND: Plan = Plan { blind: true, ..WHOLE_PROMPTS };

fn rank(rendezvous: &Path, rank: usize) -> Engine {
    let communicator = SharedMemory::join(rendezvous, rank, 2, Duration::from_mins(1)).unwrap();
    let options = LoadOptions { partition: Partition { rank, world_size: 2 }, ..LoadOptions::default() };
    let context = Context::cpu(1);
    let model = models::load(&context, &llama(), options).unwrap();
    let mut engine = Engine::new(model, context, Box::new(communicator));
    engine.warmup(&WARMUP).unwrap();
    engine
}

/// Does the same on two ranks at once.
fn on_both<T: Send>(work: impl Fn(usize, Engine) -> T + Sync) -> [T; 2] {
    let dir = tempfile::tempdir().unwrap();
    let rendezvous = dir.path().join("ranks");
    std::thread::scope(|scope| {
        let (work, rendezvous) = (&work, &rendezvous);
        [0, 1]
            .map(|index| scope.spawn(move || work(index, rank(rendezvous, index))))
            .map(|thread| thread.join().unwrap())
    })
}

fn tokens(engine: &mut Engine, requests: &[NewSequence]) -> Vec<Outcome> {
    generate(requests, BLIND, |request| engine.step(request, Origin::Run).unwrap())
}

#[test]
fn two_ranks_choose_the_same_tokens_as_one_and_rank_0_reports_them() {
    let context = Context::cpu(2);
    let model = models::load(&context, &llama(), LoadOptions::default()).unwrap();
    let mut alone = Engine::new(model, context, Box::new(Local));
    alone.warmup(&WARMUP).unwrap();
    let expected = tokens(&mut alone, &unequal_requests());
    let [first, second] = on_both(|_, mut engine| tokens(&mut engine, &unequal_requests()));
    for (outcome, expected) in first.iter().zip(&expected) {
        assert_eq!(outcome.token_ids(), expected.token_ids());
        assert_eq!(outcome.finish_reason, expected.finish_reason);
        // Sums over ranks are added in another order than within one.
        for (token, expected) in outcome.tokens.iter().zip(&expected.tokens) {
            assert!((token.logprob - expected.logprob).abs() < 1e-4);
        }
    }
    assert!(second.iter().all(|outcome| outcome.tokens.is_empty() && outcome.prompt_tokens.is_empty()));
}

#[test]
fn rank_0_follows_grammars_and_the_others_follow_rank_0() {
    let requests = |id| [constrained(1, id, 60), constrained(2, id, 60), request(3, &[5, 6, 7])];
    let mut alone = grammars::engine();
    let id = prepared(alone.compiler().unwrap(), schema());
    let expected = tokens(&mut alone, &requests(id));
    let [first, second] = on_both(|rank, engine| {
        let mut engine = engine.with_grammars(&llama().join("tokenizer.json")).unwrap();
        engine.warmup(&WARMUP).unwrap();
        assert_eq!(engine.compiler().is_some(), rank == 0);
        let id = engine.compiler().map_or(1, |compiler| prepared(compiler, schema()));
        tokens(&mut engine, &requests(id))
    });
    for (outcome, expected) in first.iter().zip(&expected) {
        assert_eq!(outcome.token_ids(), expected.token_ids());
        assert_eq!(outcome.finish_reason, expected.finish_reason);
    }
    // The others end sequences in the same steps.
    let skipped = |outcomes: &[Outcome]| outcomes.iter().map(|one| one.num_skipped).collect::<Vec<_>>();
    assert_eq!(skipped(&second), skipped(&first));
    assert!(first.iter().any(|outcome| outcome.num_skipped > 0));
}

#[test]
fn ranks_that_compute_different_steps_notice() {
    let [first, second] = on_both(|rank, mut engine| {
        let new = request(1, &[5, 6, 7]);
        let schedule =
            vec![proto::v1::ScheduledSequence { sequence_id: 1, num_tokens: 3, append_block_ids: vec![0] }];
        engine.step(
            StepRequest { step_id: 1 + rank as u64, admit: vec![new], schedule, ..StepRequest::default() },
            Origin::Run,
        )
    });
    assert!(first.is_ok());
    let error = second.unwrap_err();
    assert!(matches!(error, Error::RanksDisagree { rank: 1, step_id: 2, num_entries: 1 }), "{error}");
    assert!(error.is_fatal());
}
