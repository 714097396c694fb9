//! Who asks what, and when.

use std::sync::Arc;
use std::time::Duration;

use proto::units::TokenId;
use router::scheduler::Standing;

use crate::random::{Lengths, Random};

/// What a user writes at once. ShareGPT's conversations are about so long.
const USER: Lengths = Lengths { median: 70.0, sigma: 1.1, most: 1500 };

/// What the model answers.
const OUTPUT: Lengths = Lengths { median: 130.0, sigma: 0.9, most: 800 };

/// Instructions before a conversation.
const SYSTEM: Lengths = Lengths { median: 500.0, sigma: 0.6, most: 2000 };

/// Different instructions; the first ones are more popular.
const NUM_SYSTEMS: usize = 20;

/// Of all conversations, those with instructions.
const WITH_SYSTEM: f64 = 0.7;

/// Of all turns, those that another one follows.
const GOES_ON: f64 = 0.6;

/// Seconds from an answer to the next question.
const THINKING_S: f64 = 8.0;

/// Documents that someone wants summarized.
const DOCUMENT: Lengths = Lengths { median: 12_000.0, sigma: 0.3, most: 24_000 };

/// Questions and answers, one after the other.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    /// Of the first question, since the beginning.
    pub(crate) start: Duration,
    /// Row of the report in which it counts.
    pub(crate) class: &'static str,
    pub(crate) standing: Standing,
    pub(crate) turns: Vec<Turn>,
}

/// A question.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    /// From the answer before.
    pub(crate) pause: Duration,
    /// What is new to the model: the first turn's begins with the instructions.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) output_tokens: usize,
}

/// How a trace is described in the report.
pub(crate) fn describe() -> String {
    let lengths = |Lengths { median, sigma, most }| format!("median {median}, σ {sigma}, at most {most}");
    format!(
        "Lengths are log-normal: user turns {}; answers {}; {NUM_SYSTEMS} system prompts {}, chosen by Zipf's law for {} % \
         of conversations; another turn follows with probability {GOES_ON} after {THINKING_S} s on average. Conversations \
         begin as a Poisson process.",
        lengths(USER),
        lengths(OUTPUT),
        lengths(SYSTEM),
        WITH_SYSTEM * 100.0,
    )
}

/// Conversations: `rate` begin in a second, for `seconds`.
pub(crate) fn chat(
    seed: u64,
    rate: f64,
    seconds: f64,
    class: &'static str,
    standing: &Standing,
) -> Vec<Session> {
    let mut systems = Random::new(1);
    let systems = (0..NUM_SYSTEMS).map(|_| tokens(&mut systems, SYSTEM)).collect::<Vec<_>>();
    let mut random = Random::new(seed);
    arrivals(&mut random, rate, seconds)
        .into_iter()
        .map(|start| Session {
            start,
            class,
            standing: standing.clone(),
            turns: turns(&mut random, &systems),
        })
        .collect()
}

/// Requests of one turn, each with a document in it.
pub(crate) fn documents(seed: u64, rate: f64, seconds: f64, class: &'static str) -> Vec<Session> {
    let mut random = Random::new(seed);
    arrivals(&mut random, rate, seconds)
        .into_iter()
        .map(|start| {
            let turn = Turn {
                pause: Duration::ZERO,
                tokens: tokens(&mut random, DOCUMENT),
                output_tokens: random.length(OUTPUT),
            };
            Session { start, class, standing: Standing::default(), turns: vec![turn] }
        })
        .collect()
}

/// `count` requests of one turn, all at once after `start` seconds.
pub(crate) fn flood(
    seed: u64,
    count: usize,
    start: f64,
    class: &'static str,
    standing: &Standing,
) -> Vec<Session> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|_| {
            let turn = Turn {
                pause: Duration::ZERO,
                tokens: tokens(&mut random, SYSTEM),
                output_tokens: random.length(OUTPUT),
            };
            let start = Duration::from_secs_f64(start);
            Session { start, class, standing: standing.clone(), turns: vec![turn] }
        })
        .collect()
}

/// The standing of a tenant.
pub(crate) fn account(name: &str) -> Standing {
    Standing { account: Some(Arc::from(name)), ..Standing::default() }
}

fn arrivals(random: &mut Random, rate: f64, seconds: f64) -> Vec<Duration> {
    let mut time = 0.0;
    let mut arrivals = Vec::new();
    loop {
        time += random.exponential(1.0 / rate);
        if time > seconds {
            return arrivals;
        }
        arrivals.push(Duration::from_secs_f64(time));
    }
}

fn turns(random: &mut Random, systems: &[Vec<TokenId>]) -> Vec<Turn> {
    let mut turns = Vec::new();
    let mut before =
        if random.unit() < WITH_SYSTEM { systems[random.zipf(systems.len())].clone() } else { Vec::new() };
    loop {
        before.extend(tokens(random, USER));
        let pause = Duration::from_secs_f64(random.exponential(THINKING_S));
        turns.push(Turn { pause, tokens: std::mem::take(&mut before), output_tokens: random.length(OUTPUT) });
        if random.unit() > GOES_ON {
            return turns;
        }
    }
}

fn tokens(random: &mut Random, lengths: Lengths) -> Vec<TokenId> {
    (0..random.length(lengths)).map(|_| TokenId((random.bits() >> 40) as u32)).collect()
}
