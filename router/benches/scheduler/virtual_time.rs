//! A trace played against the scheduler and a machine, without waiting.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use futures::FutureExt;
use proto::units::TokenId;
use router::scheduler::simulation::{Order, SimulatedRequest, Simulation, SimulationLimits};
use router::scheduler::{CacheNamespace, Sampling, Standing, TokenEvent, TokenRequest, TokenStream};

use crate::machine::Machine;
use crate::trace::Session;

const BLOCK_SIZE: usize = 16;

/// What clients set `max_tokens` to: most answers end long before.
const MAX_NEW_TOKENS: u32 = 1024;

/// Which scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// Strictly first come, first served, all alike, nothing kept; prompts in chunks beside the decode rows.
    FirstCome,
    /// Lamplighter's order without its cache.
    WithoutCache,
    /// As Lamplighter serves by default.
    Lamplighter,
}

/// What came of a trace.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) classes: BTreeMap<&'static str, Latencies>,
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) preemptions: usize,
    /// From the first arrival to the last token.
    pub(crate) elapsed: Duration,
}

/// Of the requests of one class.
#[derive(Debug, Default, Clone)]
pub(crate) struct Latencies {
    pub(crate) first_token: Vec<Duration>,
    pub(crate) between_tokens: Vec<Duration>,
    pub(crate) tokens: usize,
    /// When the last of them ended.
    pub(crate) end: Duration,
}

/// Plays all sessions to their ends.
pub(crate) fn play(machine: &Machine, sessions: &[Session], policy: Policy) -> Outcome {
    let mut player = Player::new(machine, sessions, policy);
    while let Some(now) = player.next_event() {
        player.happen(now);
    }
    player.finish()
}

struct Player<'a> {
    machine: &'a Machine,
    sessions: &'a [Session],
    policy: Policy,
    simulation: Simulation,
    /// Questions to come: when, of which session, which turn.
    arrivals: BinaryHeap<Reverse<(Duration, usize, usize)>>,
    /// What each session's next question is written behind.
    contexts: Vec<Vec<TokenId>>,
    readers: Vec<Reader>,
    /// Steps in flight: when each is done, and how long it takes.
    steps: VecDeque<(Duration, Duration)>,
    num_requests: usize,
    outcome: Outcome,
}

struct Reader {
    stream: TokenStream,
    session: usize,
    turn: usize,
    asked: Duration,
    last_token: Option<Duration>,
}

impl<'a> Player<'a> {
    fn new(machine: &'a Machine, sessions: &'a [Session], policy: Policy) -> Self {
        let limits = SimulationLimits {
            num_blocks: (machine.kv_cache_tokens / BLOCK_SIZE) as u32,
            block_size: BLOCK_SIZE,
            max_prefill_tokens: machine.max_prefill_tokens,
            max_sequences: machine.max_sequences,
            steps_in_flight: machine.steps_in_flight,
            prefix_caching: policy == Policy::Lamplighter,
            order: match policy {
                Policy::FirstCome => Order::FirstCome,
                Policy::WithoutCache | Policy::Lamplighter => Order::Served,
            },
        };
        Self {
            machine,
            sessions,
            policy,
            simulation: Simulation::new(limits, sessions.len() as u32),
            arrivals: sessions
                .iter()
                .enumerate()
                .map(|(index, session)| Reverse((session.start, index, 0)))
                .collect(),
            contexts: vec![Vec::new(); sessions.len()],
            readers: Vec::new(),
            steps: VecDeque::new(),
            num_requests: 0,
            outcome: Outcome::default(),
        }
    }

    /// When the next thing happens.
    fn next_event(&self) -> Option<Duration> {
        let arrival = self.arrivals.peek().map(|Reverse((time, ..))| *time);
        let done = self.steps.front().map(|(done, _)| *done);
        [arrival, done].into_iter().flatten().min()
    }

    fn happen(&mut self, now: Duration) {
        while let Some((done, worked)) = self.steps.front().copied()
            && done <= now
        {
            self.steps.pop_front();
            self.simulation.finish_step(now, worked);
            self.read(now);
        }
        while let Some(&Reverse((time, session, turn))) = self.arrivals.peek()
            && time <= now
        {
            self.arrivals.pop();
            self.ask(session, turn, now);
        }
        while let Some(work) = self.simulation.next_step(now) {
            let begin = self.steps.back().map_or(now, |(done, _)| *done);
            let time = self.machine.step_time(&work);
            self.steps.push_back((begin + time, time));
        }
    }

    fn ask(&mut self, session: usize, turn: usize, now: Duration) {
        let Session { standing, turns, .. } = &self.sessions[session];
        self.contexts[session].extend(&turns[turn].tokens);
        let prompt = self.contexts[session].clone();
        let standing = match self.policy {
            Policy::FirstCome => Standing::default(),
            Policy::WithoutCache | Policy::Lamplighter => standing.clone(),
        };
        self.num_requests += 1;
        self.outcome.prompt_tokens += prompt.len();
        let request = TokenRequest {
            prompt,
            sampling: sampling((session << 16 | turn) as u64),
            max_new_tokens: MAX_NEW_TOKENS,
            ignore_eos: false,
            top_n_tokens: 0,
            prompt_logprobs: false,
            grammar: None,
            standing,
            cache_namespace: CacheNamespace::default(),
        };
        let simulated = SimulatedRequest { request, output_tokens: turns[turn].output_tokens };
        let stream = self.simulation.submit(simulated, now);
        self.readers.push(Reader { stream, session, turn, asked: now, last_token: None });
    }

    /// Lets all readers read all that is there.
    fn read(&mut self, now: Duration) {
        let mut index = 0;
        while index < self.readers.len() {
            if self.read_one(index, now) {
                drop(self.readers.swap_remove(index));
            } else {
                index += 1;
            }
        }
    }

    /// Whether the answer is complete.
    fn read_one(&mut self, index: usize, now: Duration) -> bool {
        let reader = &mut self.readers[index];
        let session = &self.sessions[reader.session];
        let latencies = self.outcome.classes.entry(session.class).or_default();
        while let Some(Some(event)) = reader.stream.next().now_or_never() {
            match event {
                TokenEvent::Started { cached_tokens, .. } => self.outcome.cached_tokens += cached_tokens,
                TokenEvent::Prompt(_) => {}
                TokenEvent::Token { token, end, .. } => {
                    match reader.last_token.replace(now) {
                        None => latencies.first_token.push(now.saturating_sub(reader.asked)),
                        Some(last) => latencies.between_tokens.push(now.saturating_sub(last)),
                    }
                    latencies.tokens += 1;
                    latencies.end = now;
                    self.contexts[reader.session].push(token.id);
                    if end.is_some() {
                        if let Some(next) = session.turns.get(reader.turn + 1) {
                            self.arrivals.push(Reverse((now + next.pause, reader.session, reader.turn + 1)));
                        }
                        return true;
                    }
                }
                TokenEvent::Failed(failure) => panic!("a simulated request failed: {failure}"),
            }
        }
        false
    }

    fn finish(mut self) -> Outcome {
        assert!(self.readers.is_empty(), "{} requests never ended", self.readers.len());
        self.simulation.check_empty();
        self.outcome.preemptions = self.simulation.admissions() - self.num_requests;
        let begin = self.sessions.iter().map(|session| session.start).min().unwrap_or_default();
        let end = self.outcome.classes.values().map(|latencies| latencies.end).max().unwrap_or_default();
        self.outcome.elapsed = end.saturating_sub(begin);
        self.outcome
    }
}

pub(crate) fn sampling(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        typical_p: 1.0,
        seed,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        logit_bias: Vec::new(),
    }
}
