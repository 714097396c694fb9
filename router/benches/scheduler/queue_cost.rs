//! What a long queue costs: processor time of the scheduler alone, with many requests waiting beside those that run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::units::TokenId;
use router::scheduler::simulation::{Order, SimulatedRequest, Simulation, SimulationLimits};
use router::scheduler::{CacheNamespace, Standing, TokenRequest, TokenStream};

use crate::virtual_time::sampling;

/// Sequences that run.
const NUM_RUNNING: usize = 200;

/// Tokens of their prompts: 15 steps fit into the last block, so that no step needs another one.
const RUNNING_TOKENS: usize = 65;
const NUM_STEPS: u32 = 12;

/// Tokens of the prompts that wait: for those, blocks are never enough, though a step has places. So each step looks for
/// somebody who fits.
const WAITING_TOKENS: usize = 2000;

const LIMITS: SimulationLimits = SimulationLimits {
    num_blocks: 1250,
    block_size: 16,
    max_prefill_tokens: 20_000,
    max_sequences: 256,
    steps_in_flight: 1,
    prefix_caching: true,
    order: Order::Served,
};

/// As many as clients can ask for.
const PRIORITIES: usize = 2001;

/// How those who wait differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Difference {
    None,
    Accounts,
    AccountsAndPriorities,
}

/// Measures and prints it.
pub(crate) fn run() {
    println!(
        "\n## The queue\n\n{NUM_RUNNING} sequences decode; requests of {WAITING_TOKENS} tokens wait and do not fit.\n"
    );
    println!(
        "| waiting | accounts | priorities | a submission | a step, planned and applied | a cancellation |"
    );
    println!("|---|---|---|---|---|---|");
    for (waiting, difference) in [
        (0, Difference::None),
        (1000, Difference::None),
        (10_000, Difference::None),
        (1000, Difference::Accounts),
        (10_000, Difference::Accounts),
        (10_000, Difference::AccountsAndPriorities),
    ] {
        measure(waiting, difference);
    }
}

fn measure(waiting: usize, difference: Difference) {
    let mut simulation = Simulation::new(LIMITS, (NUM_RUNNING + waiting) as u32);
    let running = (0..NUM_RUNNING)
        .map(|index| simulation.submit(request(index, RUNNING_TOKENS, Standing::default()), Duration::ZERO));
    let running = running.collect::<Vec<_>>();
    while simulation.admissions() < NUM_RUNNING {
        step(&mut simulation);
    }

    let standings = (0..waiting).map(|index| standing(index, difference));
    let requests =
        standings.enumerate().map(|(index, standing)| request(NUM_RUNNING + index, WAITING_TOKENS, standing));
    let requests = requests.collect::<Vec<_>>();
    let begin = Instant::now();
    let streams = requests.into_iter().map(|request| simulation.submit(request, Duration::ZERO));
    let streams = streams.collect::<Vec<TokenStream>>();
    let submission = begin.elapsed();

    // Each is looked up in the cache when it is looked at first.
    step(&mut simulation);
    let begin = Instant::now();
    for _ in 1..NUM_STEPS {
        step(&mut simulation);
    }
    let steps = begin.elapsed();

    let begin = Instant::now();
    drop(streams);
    simulation.take_events(Duration::ZERO);
    let cancellation = begin.elapsed();
    assert_eq!(simulation.admissions(), NUM_RUNNING, "nobody else is let in");
    drop(running);

    let each = |time: Duration| match waiting {
        0 => "–".to_owned(),
        _ => format!("{:.1} µs", time.as_secs_f64() * 1e6 / waiting as f64),
    };
    let (accounts, priorities) = match difference {
        Difference::None => (1, 1),
        Difference::Accounts => (waiting, 1),
        Difference::AccountsAndPriorities => (waiting, PRIORITIES),
    };
    println!(
        "| {waiting} | {accounts} | {priorities} | {} | {:.0} µs | {} |",
        each(submission),
        steps.as_secs_f64() * 1e6 / f64::from(NUM_STEPS - 1),
        each(cancellation),
    );
}

fn step(simulation: &mut Simulation) {
    simulation.next_step(Duration::ZERO).expect("sequences decode");
    simulation.finish_step(Duration::ZERO, Duration::ZERO);
}

fn standing(index: usize, difference: Difference) -> Standing {
    let account = || Some(Arc::from(format!("account {index}")));
    match difference {
        Difference::None => Standing::default(),
        Difference::Accounts => Standing { account: account(), ..Standing::default() },
        Difference::AccountsAndPriorities => Standing {
            account: account(),
            priority: (index % PRIORITIES) as i32 - 1000,
            ..Standing::default()
        },
    }
}

fn request(index: usize, prompt_tokens: usize, standing: Standing) -> SimulatedRequest {
    let request = TokenRequest {
        prompt: (0..prompt_tokens).map(|position| TokenId((index * 7919 + position) as u32)).collect(),
        sampling: sampling(index as u64),
        max_new_tokens: 1000,
        ignore_eos: true,
        top_n_tokens: 0,
        prompt_logprobs: false,
        grammar: None,
        standing,
        cache_namespace: CacheNamespace::default(),
    };
    SimulatedRequest { request, output_tokens: 1000 }
}
