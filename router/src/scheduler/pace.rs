//! How many prompt tokens a step may compute so that streams keep their pace: the budget that holds an inter-token
//! latency.
//!
//! The time of a step is taken as *decode(rows) + cost · prompt tokens*, both learnt from the steps that were measured.
//! Where that is not quite true (attention over long prompts, kernels with a fixed cost), the cost follows: the budget
//! settles where measured time and target agree, whatever was put down to which part.

use std::time::Duration;

/// The part of the target that is planned for; the rest is for what differs from step to step.
const AIM: f64 = 0.9;

/// How fast the cost of a token follows measurements that are above it, and below it: what is too slow is noticed at
/// once, what could be faster is found out with care.
const RISE: f64 = 0.8;
const FALL: f64 = 0.4;

/// A step counts as at most so many times as long as was expected: one in which the machine did something else says little
/// about the next.
const OUTLIER: f64 = 2.0;

/// How much more than the largest of late a step's prompt tokens may be: a line is trusted near where it was measured.
const GROWTH: f64 = 2.0;

/// Weight of a measurement after one more: some twenty steps are remembered.
const MEMORY: f64 = 0.95;

/// What a step computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Work {
    /// Sequences that got a token.
    pub(crate) decode_rows: usize,
    /// Tokens of chunks.
    pub(crate) prefill_tokens: usize,
}

/// The budget for prompts, as it follows from measured steps.
#[derive(Debug)]
pub(crate) struct Pace {
    /// In seconds.
    target: f64,
    /// Least tokens that prompts get, so that they always proceed.
    floor: usize,
    decode: DecodeTime,
    /// Seconds for a token of a prompt, once that was measured.
    token_time: Option<f64>,
    /// Most prompt tokens of a step of late.
    largest: f64,
}

impl Pace {
    /// A pace that leaves running streams a token at least every `target`. However slow the machine, prompts get
    /// `floor` tokens.
    pub(crate) fn new(target: Duration, floor: usize) -> Self {
        Self {
            target: target.as_secs_f64(),
            floor,
            decode: DecodeTime::default(),
            token_time: None,
            largest: 0.0,
        }
    }

    /// Most prompt tokens of a step with so many decode rows; never more than `most`.
    pub(crate) fn budget(&self, decode_rows: usize, most: usize) -> usize {
        if decode_rows == 0 {
            return most;
        }
        let floor = self.floor.min(most);
        let Some(token_time) = self.token_time else { return floor };
        let room = self.target * AIM - self.decode.predict(decode_rows).unwrap_or_default();
        // A float becomes the nearest number that there is, and 0 if negative.
        let tokens = (room / token_time).min(self.largest * GROWTH) as usize;
        tokens.clamp(floor, most)
    }

    /// Learns from a step that was answered.
    pub(crate) fn observe(&mut self, work: Work, elapsed: Duration) {
        let Work { decode_rows, prefill_tokens } = work;
        if decode_rows + prefill_tokens == 0 {
            return;
        }
        let tokens = prefill_tokens as f64;
        let decode = self.decode.predict(decode_rows);
        let expected = match prefill_tokens {
            0 => decode,
            _ => self.token_time.map(|time| decode.unwrap_or_default() + time * tokens),
        };
        let elapsed =
            elapsed.as_secs_f64().min(expected.map_or(f64::INFINITY, |expected| expected * OUTLIER));
        // In a step with a prompt too, decode rows take no more than all of it.
        if decode_rows > 0 && (prefill_tokens == 0 || decode.is_some_and(|decode| elapsed < decode)) {
            self.decode.observe(decode_rows, elapsed);
        }
        if prefill_tokens > 0 {
            self.observe_prompt(tokens, (elapsed - decode.unwrap_or_default()).max(0.0) / tokens);
        }
    }

    fn observe_prompt(&mut self, tokens: f64, token_time: f64) {
        self.largest = tokens.max(self.largest * MEMORY);
        let token_time = match self.token_time {
            None => token_time,
            Some(before) => {
                // A short chunk is lost in the noise of the rest of its step.
                let weight = tokens / self.largest;
                before + (token_time - before) * weight * if token_time > before { RISE } else { FALL }
            }
        };
        // Not 0, which would be no bound at all.
        self.token_time = Some(token_time.max(1e-9));
    }
}

/// Seconds of a step without prompts by its number of rows: a line through what was measured, newer steps with more weight.
#[derive(Debug, Default)]
struct DecodeTime {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_squared: f64,
    rows_seconds: f64,
}

impl DecodeTime {
    fn observe(&mut self, rows: usize, seconds: f64) {
        let rows = rows as f64;
        let sums = [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.seconds, seconds),
            (&mut self.rows_squared, rows * rows),
            (&mut self.rows_seconds, rows * seconds),
        ];
        for (sum, value) in sums {
            *sum = *sum * MEMORY + value;
        }
    }

    fn predict(&self, rows: usize) -> Option<f64> {
        if self.weight == 0.0 {
            return None;
        }
        let (mean_rows, mean_seconds) = (self.rows / self.weight, self.seconds / self.weight);
        let variance = self.rows_squared / self.weight - mean_rows * mean_rows;
        let covariance = self.rows_seconds / self.weight - mean_rows * mean_seconds;
        // Without different numbers of rows nothing is known of what one costs. More rows never take less time, and no
        // row takes more than its share.
        let slope = if variance > 0.01 { covariance / variance } else { 0.0 };
        let slope = slope.clamp(0.0, mean_seconds / mean_rows);
        Some(mean_seconds + slope * (rows as f64 - mean_rows))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a step takes on a made-up machine, in microseconds. Attention over 32 000 tokens takes as long as the rest of
    /// a prompt's token, which is about so for a model of eight billion parameters.
    #[derive(Debug, Clone)]
    struct Machine {
        step: u64,
        row: u64,
        token: u64,
    }

    impl Machine {
        fn run(&self, work: Work, position: usize, noise_percent: u64) -> Duration {
            let pairs = (work.prefill_tokens * position) as u64;
            let micros = self.step
                + self.row * work.decode_rows as u64
                + self.token * work.prefill_tokens as u64
                + self.token * pairs / 32_000;
            Duration::from_micros(micros * noise_percent / 100)
        }
    }

    const FLOOR: usize = 16;
    const MOST: usize = 4096;

    /// Computes a prompt beside `rows` streams. Returns the steps that it takes.
    fn prefill(
        pace: &mut Pace,
        machine: &Machine,
        rows: usize,
        prompt: usize,
        noise: &mut impl Iterator<Item = u64>,
    ) -> Vec<(Work, Duration)> {
        let mut steps = Vec::new();
        let mut position = 0;
        while position < prompt {
            let prefill_tokens = pace.budget(rows, MOST).min(prompt - position);
            assert!(prefill_tokens > 0, "prompts always proceed");
            let work = Work { decode_rows: rows, prefill_tokens };
            let elapsed = machine.run(work, position, noise.next().unwrap_or(100));
            pace.observe(work, elapsed);
            position += prefill_tokens;
            steps.push((work, elapsed));
        }
        steps
    }

    fn decode(pace: &mut Pace, machine: &Machine, rows: usize, noise: &mut impl Iterator<Item = u64>) {
        let work = Work { decode_rows: rows, prefill_tokens: 0 };
        pace.observe(work, machine.run(work, 0, noise.next().unwrap_or(100)));
    }

    #[test]
    fn without_streams_a_prompt_gets_all_there_is() {
        let pace = Pace::new(Duration::from_millis(1), FLOOR);
        assert_eq!(pace.budget(0, MOST), MOST);
    }

    #[test]
    fn before_anything_is_known_and_when_nothing_is_left_prompts_get_the_floor() {
        let mut pace = Pace::new(Duration::from_millis(20), FLOOR);
        assert_eq!(pace.budget(1, MOST), FLOOR);
        assert_eq!(pace.budget(1, 5), 5);
        // Decode rows alone take longer than the target.
        let machine = Machine { step: 30_000, row: 100, token: 50 };
        for _ in 0..20 {
            decode(&mut pace, &machine, 8, &mut std::iter::empty());
        }
        let steps = prefill(&mut pace, &machine, 8, 1000, &mut std::iter::empty());
        assert!(steps.iter().all(|(work, _)| work.prefill_tokens <= FLOOR));
    }

    #[test]
    fn the_budget_uses_the_time_that_the_target_leaves() {
        let machine = Machine { step: 8000, row: 100, token: 50 };
        let mut pace = Pace::new(Duration::from_millis(50), FLOOR);
        for rows in [4, 8, 16, 8, 4] {
            decode(&mut pace, &machine, rows, &mut std::iter::empty());
        }
        for _ in 0..20 {
            prefill(&mut pace, &machine, 10, 720, &mut std::iter::empty());
        }
        // 45 ms less 9 ms for the rows: 720 tokens of 50 us.
        let budget = pace.budget(10, MOST);
        assert!((680..=740).contains(&budget), "{budget}");
    }

    #[test]
    fn a_step_in_which_the_machine_slept_is_forgotten_soon() {
        let machine = Machine { step: 8000, row: 100, token: 50 };
        let mut pace = Pace::new(Duration::from_millis(50), FLOOR);
        for _ in 0..20 {
            prefill(&mut pace, &machine, 10, 1000, &mut std::iter::empty());
        }
        let before = pace.budget(10, MOST);
        pace.observe(Work { decode_rows: 10, prefill_tokens: before }, Duration::from_secs(5));
        assert!(pace.budget(10, MOST) >= before / 3);
        for _ in 0..20 {
            prefill(&mut pace, &machine, 10, 1000, &mut std::iter::empty());
        }
        assert!(pace.budget(10, MOST) >= before * 9 / 10);
    }

    proptest! {
        /// A quarter: what the noise of the machine (10 % here, both ways) and the growth of a prompt's attention from one
        /// chunk to the next add to the part of the target that is planned for.
        #[test]
        fn no_step_exceeds_the_target_by_more_than_the_tolerance(
            machine in (1000..20_000_u64, 0..300_u64, 5..400_u64).prop_map(
                |(step, row, token)| Machine { step, row, token }
            ),
            warm in prop::bool::ANY,
            rows in prop::collection::vec(1..64_usize, 1..6),
            noise in prop::collection::vec(90..110_u64, 50),
        ) {
            let target = Duration::from_millis(60);
            let mut pace = Pace::new(target, FLOOR);
            let mut noise = noise.into_iter().cycle();
            if warm {
                for rows in [1, 3, 10, 30, 64] {
                    decode(&mut pace, &machine, rows, &mut noise);
                }
            }
            for rows in rows {
                for _ in 0..3 {
                    decode(&mut pace, &machine, rows, &mut noise);
                }
                for (work, elapsed) in prefill(&mut pace, &machine, rows, 30_000, &mut noise) {
                    let within = elapsed <= target.mul_f64(1.25);
                    prop_assert!(within || work.prefill_tokens <= FLOOR, "{work:?} took {elapsed:?}");
                }
            }
        }

        /// What is put down to rows that were measured under other circumstances does not keep the budget from
        /// settling at the target.
        #[test]
        fn the_budget_settles_near_the_target_though_the_machine_changes(
            before in 1000..30_000_u64,
            after in 1000..30_000_u64,
            token in 20..200_u64,
        ) {
            let target = Duration::from_millis(60);
            let mut pace = Pace::new(target, FLOOR);
            let machine = |step| Machine { step, row: 0, token };
            for _ in 0..30 {
                decode(&mut pace, &machine(before), 8, &mut std::iter::empty());
            }
            let steps = prefill(&mut pace, &machine(after), 8, 80_000, &mut std::iter::empty());
            let settled = steps.iter().rev().skip(1).take(10);
            for (work, elapsed) in settled {
                let full = *elapsed >= target.mul_f64(0.8) || work.prefill_tokens == MOST;
                prop_assert!(full && *elapsed <= target.mul_f64(1.1), "{work:?} took {elapsed:?}");
            }
        }
    }
}
