//! `--target-itl-ms`, with a machine that takes its time.

use std::time::Duration;

use proptest::prelude::*;

use super::house::{House, LIMITS, request};
use crate::scheduler::limits::{Budget, Limits};
use crate::scheduler::policy::Policy;

/// What a step takes, in microseconds.
#[derive(Debug, Clone, Copy)]
struct Machine {
    step: u64,
    row: u64,
    token: u64,
}

/// A step that was computed.
#[derive(Debug, Clone, Copy)]
struct Computed {
    decode_rows: usize,
    prompt_tokens: usize,
    elapsed: Duration,
}

impl Machine {
    /// Computes the oldest step in flight, which began when the one before was done.
    fn step(self, house: &mut House, noise_percent: u64) -> Computed {
        let rows = house.in_flight[0].schedule.iter().map(|row| row.num_tokens);
        let decode_rows = rows.clone().filter(|tokens| *tokens == 1).count();
        let prompt_tokens = rows.clone().filter(|tokens| *tokens > 1).sum::<usize>();
        let micros = self.step + self.row * rows.count() as u64 + self.token * prompt_tokens as u64;
        let elapsed = Duration::from_micros(micros * noise_percent / 100);
        house.oversleep(elapsed);
        house.answer();
        house.read_all();
        Computed { decode_rows, prompt_tokens, elapsed }
    }
}

fn house(target: Duration, max_prefill_tokens: usize, steps_in_flight: usize) -> House {
    let policy = Policy { target_itl: Some(target), ..Policy::DEFAULT };
    let budget = Budget { max_prefill_tokens, ..LIMITS.budget };
    House::new(Limits { num_blocks: 1500, budget, policy, steps_in_flight, ..LIMITS })
}

#[test]
fn prompts_beside_a_stream_are_computed_in_chunks_that_hold_its_pace() {
    let target = Duration::from_millis(50);
    let mut house = house(target, 400, 1);
    let machine = Machine { step: 10_000, row: 1000, token: 500 };
    let stream = house.submit_one(request(1, 4, 500));
    for _ in 0..5 {
        machine.step(&mut house, 100);
    }
    let prompt = house.submit_one(request(2, 1500, 4));
    let mut steps = Vec::new();
    while house.readers[prompt].transcript.tokens.is_empty() {
        steps.push(machine.step(&mut house, 100));
    }
    assert!(!house.readers[stream].ended, "the stream runs all the time");
    assert!(steps.iter().all(|step| step.elapsed <= target), "{steps:?}");
    // 45 ms are planned for, and 11 or 12 of them are the rows'.
    let chunks = steps.iter().map(|step| step.prompt_tokens).filter(|tokens| *tokens > 0).collect::<Vec<_>>();
    assert!(chunks[10..chunks.len() - 1].iter().all(|tokens| (60..=70).contains(tokens)), "{chunks:?}");
    // When nobody is held up, there is nothing to hold.
    house.cancel(stream);
    house.finish();
    house.submit_one(request(3, 1500, 4));
    assert_eq!(house.in_flight[0].schedule[0].num_tokens, 400);
    house.finish();
    house.check_empty();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever the machine costs, with a tenth of noise both ways, and however many steps are sent ahead of what is known.
    #[test]
    fn streams_keep_their_pace_at_any_number_of_steps_in_flight(
        steps_in_flight in 1..4_usize,
        (step, row, token) in (1000..20_000_u64, 0..300_u64, 5..400_u64),
        num_streams in 1..6_u32,
        prompts in prop::collection::vec(50..1500_usize, 1..4),
        noise in prop::collection::vec(90..110_u64, 50),
    ) {
        let target = Duration::from_millis(60);
        let machine = Machine { step, row, token };
        let mut house = house(target, 4096, steps_in_flight);
        let mut noise = noise.into_iter().cycle();
        let streams = (0..num_streams).map(|stream| house.submit_one(request(10 + stream, 4, 4000)));
        let streams = streams.collect::<Vec<_>>();
        // Until all run: their own prompts are computed in chunks too, and steps in flight know of what came before.
        while streams.iter().any(|stream| house.readers[*stream].transcript.tokens.is_empty()) {
            machine.step(&mut house, noise.next().unwrap_or(100));
        }
        for _ in 0..steps_in_flight {
            machine.step(&mut house, noise.next().unwrap_or(100));
        }
        for (first, prompt) in (100..).zip(prompts) {
            let prompt = house.submit_one(request(first, prompt, 2));
            while house.readers[prompt].transcript.tokens.is_empty() {
                let step = machine.step(&mut house, noise.next().unwrap_or(100));
                prop_assert!(step.decode_rows >= streams.len(), "each stream has its token: {step:?}");
                let floor = step.prompt_tokens <= LIMITS.budget.block_size;
                prop_assert!(floor || step.elapsed <= target.mul_f64(1.25), "{step:?}");
            }
        }
    }
}
