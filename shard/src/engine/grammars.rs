//! Sequences on their way through grammars: on rank 0, which chooses tokens, on threads beside the engine's.
//!
//! As soon as a token is known, a thread takes it up and computes the mask of the next one, while the engine and the router
//! prepare the next step and the model computes it: the mask is needed when its logits are there. A sequence stays with one
//! thread, and each thread has its own copy of each grammar, since sequences of one copy wait for each other.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use grammar::{Compiled, Compiler, Engine, Error, GrammarId, Matching, Progress};

/// Threads that compute masks. A mask takes 0.05 ms and there is a step's time for all of them.
const MAX_THREADS: usize = 8;

/// How long a mask is waited for. What it may cost is limited, to some ten milliseconds; this is for defects.
const DEADLINE: Duration = Duration::from_secs(10);

/// Compiles grammars, and follows sequences through them.
pub(super) struct Grammars {
    compiler: Arc<Compiler>,
    /// Each of a thread. There are at most two jobs of a sequence on the way, and one more at its end.
    threads: Vec<Sender<Job>>,
    next_sequence: AtomicU64,
}

/// One sequence's grammar. Dropping it lets the sequence go.
pub(super) struct Constraint {
    shared: Arc<Shared>,
    thread: Sender<Job>,
    sequence: u64,
    /// Tokens that were given to the thread.
    num_tokens: usize,
}

/// How a sequence stands in its grammar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// Something may come.
    Open,
    /// The text is complete and nothing can follow.
    Complete,
    /// The grammar cannot be enforced any longer, for this reason.
    Failed(String),
}

/// A mask, for as long as it is read.
pub(super) struct Mask<'a>(MutexGuard<'a, State>);

/// What a mask cost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MaskTimes {
    pub(super) num_masks: u32,
    /// To compute them.
    pub(super) computing: Duration,
    /// Of the step, for them.
    pub(super) waiting: Duration,
}

impl MaskTimes {
    /// One more mask.
    pub(super) fn add(&mut self, computing: Duration) {
        self.num_masks += 1;
        self.computing += computing;
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Tokens that were taken up; none until the thread has begun.
    num_taken: Option<usize>,
    standing: Standing,
    mask: Vec<u32>,
    /// How many tokens the mask comes behind.
    mask_of: Option<usize>,
    mask_time: Duration,
}

enum Job {
    Begin {
        sequence: u64,
        shared: Weak<Shared>,
        grammar: GrammarId,
        compiled: Arc<Compiled>,
        generated: Vec<u32>,
    },
    Advance {
        sequence: u64,
        token: u32,
        wants_mask: bool,
    },
    End {
        sequence: u64,
    },
}

impl Grammars {
    /// For a model with this tokenizer, so many logits, and tokens that end a sequence. The tokenizer is read later, on a thread.
    pub(super) fn new(tokenizer_json: &Path, vocab_size: usize, eos_token_ids: &[u32]) -> io::Result<Self> {
        let (path, eos) = (tokenizer_json.to_owned(), eos_token_ids.to_vec());
        let load = move || {
            let began = Instant::now();
            let json = std::fs::read_to_string(&path)
                .map_err(|error| Error::Model(format!("{} cannot be read: {error}", path.display())))?;
            let engine = Engine::new(&json, vocab_size, &eos);
            match &engine {
                Ok(_) => tracing::info!(seconds = began.elapsed().as_secs_f64(), "ready for grammars"),
                Err(error) => tracing::warn!(%error, "grammars are refused"),
            }
            engine
        };
        let compiler = Arc::new(Compiler::start(Compiler::default_num_threads(), load)?);
        let num_threads = Compiler::default_num_threads().min(MAX_THREADS);
        let threads = (0..num_threads).map(|_| {
            let (sender, jobs) = mpsc::channel();
            let thread = std::thread::Builder::new().name("masks".to_owned());
            thread.spawn(move || Thread::new(jobs).work()).map(|_| sender)
        });
        Ok(Self { compiler, threads: threads.collect::<io::Result<_>>()?, next_sequence: AtomicU64::new(0) })
    }

    /// What compiles.
    pub(super) fn compiler(&self) -> &Arc<Compiler> {
        &self.compiler
    }

    /// Begins to follow a sequence that has generated these tokens already.
    pub(super) fn follow(&self, grammar: GrammarId, generated: &[u32]) -> Constraint {
        let sequence = self.next_sequence.fetch_add(1, Ordering::Relaxed);
        let thread = self.threads[sequence as usize % self.threads.len()].clone();
        let shared = Arc::new(Shared { state: Mutex::new(State::new()), changed: Condvar::new() });
        let constraint = Constraint { shared, thread, sequence, num_tokens: 0 };
        match self.compiler.find(grammar) {
            Some(compiled) => constraint.send(Job::Begin {
                sequence,
                shared: Arc::downgrade(&constraint.shared),
                grammar,
                compiled,
                generated: generated.to_vec(),
            }),
            None => constraint.shared.fail(
                "the grammar was forgotten before the request was begun, because too many others came; send it again"
                    .to_owned(),
            ),
        }
        constraint
    }
}

impl Constraint {
    /// One that cannot be enforced, for this reason.
    pub(super) fn failed(reason: String) -> Self {
        let (thread, _) = mpsc::channel();
        let shared = Arc::new(Shared { state: Mutex::new(State::new()), changed: Condvar::new() });
        shared.fail(reason);
        Self { shared, thread, sequence: 0, num_tokens: 0 }
    }

    /// Gives a token that was chosen to the thread. `wants_mask`: whether another one is to be chosen behind it.
    pub(super) fn advance(&mut self, token: u32, wants_mask: bool) {
        self.num_tokens += 1;
        self.send(Job::Advance { sequence: self.sequence, token, wants_mask });
    }

    /// How it stands behind all tokens.
    pub(super) fn standing(&self) -> Standing {
        let num_tokens = self.num_tokens;
        self.shared.wait(|state| state.num_taken == Some(num_tokens)).standing.clone()
    }

    /// Which tokens may come next.
    pub(super) fn mask(&self) -> Result<Mask<'_>, String> {
        let num_tokens = self.num_tokens;
        let is_there =
            |state: &State| state.mask_of == Some(num_tokens) || state.standing == Standing::Complete;
        let state = self.shared.wait(is_there);
        match &state.standing {
            Standing::Open => Ok(Mask(state)),
            Standing::Complete => Err("nothing can follow".to_owned()),
            Standing::Failed(reason) => Err(reason.clone()),
        }
    }

    fn send(&self, job: Job) {
        if self.thread.send(job).is_err() {
            self.shared.fail("the thread that follows it has ended".to_owned());
        }
    }
}

impl Drop for Constraint {
    fn drop(&mut self) {
        // Where the thread has ended, there is nothing to let go.
        let _ = self.thread.send(Job::End { sequence: self.sequence });
    }
}

impl Mask<'_> {
    /// A bit for each token, from the lowest on.
    pub(super) fn words(&self) -> &[u32] {
        &self.0.mask
    }

    /// How long it took to compute.
    pub(super) fn time(&self) -> Duration {
        self.0.mask_time
    }
}

impl State {
    fn new() -> Self {
        Self {
            num_taken: None,
            standing: Standing::Open,
            mask: Vec::new(),
            mask_of: None,
            mask_time: Duration::ZERO,
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until `is_there` holds, or it has failed.
    fn wait(&self, is_there: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let is_failed = |state: &State| matches!(state.standing, Standing::Failed(_));
        let (mut state, timeout) = self
            .changed
            .wait_timeout_while(self.lock(), DEADLINE, |state| !is_there(state) && !is_failed(state))
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            state.standing = Standing::Failed(format!("no answer came within {} s", DEADLINE.as_secs()));
        }
        state
    }

    fn fail(&self, reason: String) {
        self.lock().standing = Standing::Failed(reason);
        self.changed.notify_all();
    }

    fn taken(&self, outcome: Result<Progress, Error>) -> bool {
        let mut state = self.lock();
        state.num_taken = Some(state.num_taken.map_or(0, |taken| taken + 1));
        state.standing = match outcome {
            Ok(Progress::Open) => Standing::Open,
            Ok(Progress::Complete) => Standing::Complete,
            Err(error) => Standing::Failed(error.to_string()),
        };
        let is_open = state.standing == Standing::Open;
        drop(state);
        self.changed.notify_all();
        is_open
    }
}

/// One of the threads.
struct Thread {
    jobs: Receiver<Job>,
    followed: HashMap<u64, Followed>,
    /// This thread's copies, as long as the compiler or a sequence has the original.
    grammars: HashMap<u64, (Weak<Compiled>, Compiled)>,
    /// Sequences whose masks are to be computed, oldest first.
    wanted: VecDeque<u64>,
    mask: Vec<u32>,
}

struct Followed {
    shared: Weak<Shared>,
    matching: Matching,
    /// Keeps the original, which the compiler may forget.
    _compiled: Arc<Compiled>,
}

impl Thread {
    fn new(jobs: Receiver<Job>) -> Self {
        Self {
            jobs,
            followed: HashMap::new(),
            grammars: HashMap::new(),
            wanted: VecDeque::new(),
            mask: Vec::new(),
        }
    }

    /// Until nobody can send jobs any more.
    fn work(mut self) {
        loop {
            // Tokens first: whether they end their sequences is waited for. Masks have the time of a step.
            let job = if self.wanted.is_empty() {
                self.jobs.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.jobs.try_recv()
            };
            match job {
                Ok(job) => self.take(job),
                Err(TryRecvError::Empty) => self.compute_oldest(),
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }

    fn take(&mut self, job: Job) {
        match job {
            Job::Begin { sequence, shared, grammar, compiled, generated } => {
                let Some(there) = shared.upgrade() else { return };
                let mut matching = self.copy_of(grammar, &compiled).begin();
                let outcome = matching.advance(&generated);
                self.followed.insert(sequence, Followed { shared, matching, _compiled: compiled });
                if there.taken(outcome) {
                    self.wanted.push_back(sequence);
                }
            }
            Job::Advance { sequence, token, wants_mask } => {
                let Some(followed) = self.followed.get_mut(&sequence) else { return };
                let Some(shared) = followed.shared.upgrade() else { return };
                let outcome = followed.matching.advance(&[token]);
                if shared.taken(outcome) && wants_mask {
                    self.wanted.push_back(sequence);
                }
            }
            Job::End { sequence } => {
                self.followed.remove(&sequence);
            }
        }
    }

    fn copy_of(&mut self, GrammarId(id): GrammarId, compiled: &Arc<Compiled>) -> &Compiled {
        if !self.grammars.contains_key(&id) {
            self.grammars.retain(|_, (original, _)| original.strong_count() > 0);
        }
        let (_, copy) =
            self.grammars.entry(id).or_insert_with(|| (Arc::downgrade(compiled), compiled.separate()));
        copy
    }

    fn compute_oldest(&mut self) {
        let Some(sequence) = self.wanted.pop_front() else { return };
        let Some(followed) = self.followed.get_mut(&sequence) else { return };
        let Some(shared) = followed.shared.upgrade() else { return };
        let began = Instant::now();
        self.mask.resize(followed.matching.mask_words(), 0);
        let outcome = followed.matching.write_mask(&mut self.mask);
        let took = began.elapsed();
        let mut state = shared.lock();
        match outcome {
            Ok(()) => {
                state.mask.clone_from(&self.mask);
                state.mask_of = state.num_taken;
                state.mask_time = took;
            }
            Err(error) => state.standing = Standing::Failed(error.to_string()),
        }
        drop(state);
        shared.changed.notify_all();
    }
}
