//! Threads that compile grammars, and what they have compiled.
//!
//! The stack of a thread that compiles is large, because llguidance goes through a grammar by recursion. Equal grammars
//! are compiled once, also when they are asked for at the same time.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::engine::{Compiled, Engine};
use crate::error::Error;
use crate::limits::{MAX_KEPT, MAX_KEPT_BYTES, MAX_WAITING, STACK_BYTES};
use crate::source::Source;

/// What a compiled grammar is called, as long as it is kept. Not 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GrammarId(pub u64);

/// A grammar that was compiled, or why there is none.
pub type Outcome = Result<GrammarId, Error>;

/// Called with the outcome, on whatever thread has it.
pub type Done = Box<dyn FnOnce(Outcome) + Send>;

/// Too many grammars wait to be compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WAITING} grammars wait to be compiled; try again later")]
pub struct Busy;

/// What compiles, or why nothing does.
type Loaded = Result<Arc<Engine>, Error>;

/// Compiles grammars on threads of its own, which end when it is dropped.
pub struct Compiler {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// There is work, an engine, or an end.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// None until it is loaded.
    engine: Option<Loaded>,
    known: HashMap<Arc<Source>, Known>,
    compiled: HashMap<GrammarId, (Arc<Source>, Arc<Compiled>)>,
    waiting: VecDeque<Arc<Source>>,
    /// Grows with each use of what is known, and is the id of what comes to be known.
    clock: u64,
    closed: bool,
}

enum Known {
    /// It is being compiled, and these wait for it.
    Pending(Vec<Done>),
    Ready {
        outcome: Outcome,
        last_use: u64,
    },
}

impl Compiler {
    /// Starts the threads. `load` makes the engine, on one of them; until it is there, grammars wait.
    pub fn start(
        num_threads: usize,
        load: impl FnOnce() -> Result<Engine, Error> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let compiler = Self { shared: Arc::clone(&shared) };
        let mut load = Some(load);
        for _ in 0..num_threads.max(1) {
            let (shared, load) = (Arc::clone(&shared), load.take());
            let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
            thread.spawn(move || {
                if let Some(load) = load {
                    let engine = load().map(Arc::new);
                    shared.lock().engine = Some(engine);
                    shared.changed.notify_all();
                }
                shared.work();
            })?;
        }
        Ok(compiler)
    }

    /// A quarter of the cores given to this process, and at least one.
    pub fn default_num_threads() -> usize {
        std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).max(1))
    }

    /// A grammar that was compiled, unless it was forgotten: those that were not used for longest are.
    pub fn find(&self, id: GrammarId) -> Option<Arc<Compiled>> {
        let mut state = self.shared.lock();
        state.clock += 1;
        let State { clock, known, compiled, .. } = &mut *state;
        let (source, compiled) = compiled.get(&id)?;
        if let Some(Known::Ready { last_use, .. }) = known.get_mut(source) {
            *last_use = *clock;
        }
        Some(Arc::clone(compiled))
    }

    /// Compiles a grammar, unless it is known, and calls `done`: at once or later, exactly once, unless this is dropped before.
    pub fn compile(&self, source: Source, done: Done) -> Result<(), Busy> {
        let source = Arc::new(source);
        let mut state = self.shared.lock();
        state.clock += 1;
        let State { clock, known, waiting: queue, .. } = &mut *state;
        match known.get_mut(&source) {
            Some(Known::Pending(waiting)) => {
                waiting.push(done);
                Ok(())
            }
            Some(Known::Ready { outcome, last_use }) => {
                *last_use = *clock;
                let outcome = outcome.clone();
                drop(state);
                done(outcome);
                Ok(())
            }
            None if queue.len() >= MAX_WAITING => Err(Busy),
            None => {
                known.insert(Arc::clone(&source), Known::Pending(vec![done]));
                queue.push_back(source);
                drop(state);
                self.shared.changed.notify_all();
                Ok(())
            }
        }
    }
}

impl Drop for Compiler {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some((engine, source)) = self.next() {
            let compiled = engine.and_then(|engine| engine.compile(&source));
            let (outcome, waiting) = self.lock().finish(&source, compiled);
            for done in waiting {
                done(outcome.clone());
            }
        }
    }

    /// Waits for a grammar to compile; none at the end.
    fn next(&self) -> Option<(Loaded, Arc<Source>)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(engine) = state.engine.clone()
                && let Some(source) = state.waiting.pop_front()
            {
                return Some((engine, source));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl State {
    /// Keeps what came of a grammar, and returns who waits for it.
    fn finish(&mut self, source: &Arc<Source>, compiled: Result<Compiled, Error>) -> (Outcome, Vec<Done>) {
        self.clock += 1;
        let outcome = compiled.map(|compiled| {
            let id = GrammarId(self.clock);
            self.compiled.insert(id, (Arc::clone(source), Arc::new(compiled)));
            id
        });
        let ready = Known::Ready { outcome: outcome.clone(), last_use: self.clock };
        let before = self.known.insert(Arc::clone(source), ready);
        self.forget_oldest();
        match before {
            Some(Known::Pending(waiting)) => (outcome, waiting),
            Some(Known::Ready { .. }) | None => (outcome, Vec::new()),
        }
    }

    fn forget_oldest(&mut self) {
        let mut bytes: usize = self.known.keys().map(|source| estimated_bytes(source)).sum();
        while self.known.len() > MAX_KEPT || bytes > MAX_KEPT_BYTES {
            let ready = self.known.iter().filter_map(|(source, known)| match known {
                Known::Ready { outcome, last_use } => Some((*last_use, outcome, source)),
                Known::Pending(_) => None,
            });
            let Some((_, outcome, source)) = ready.min_by_key(|(last_use, ..)| *last_use) else { return };
            if let Ok(id) = outcome {
                self.compiled.remove(id);
            }
            bytes -= estimated_bytes(source);
            let source = Arc::clone(source);
            self.known.remove(&source);
        }
    }
}

/// Of a compiled grammar. Measured on real schemas: 0.05 to 5 MB.
fn estimated_bytes(source: &Source) -> usize {
    (256 << 10) + 8 * source.text.len()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::source::Kind;

    fn refusing() -> Compiler {
        Compiler::start(1, || Err(Error::Model("no tokens".to_owned()))).expect("a thread can be started")
    }

    fn asked(compiler: &Compiler, text: &str) -> mpsc::Receiver<Outcome> {
        let (sender, receiver) = mpsc::channel();
        let done = Box::new(move |outcome| sender.send(outcome).expect("somebody waits"));
        compiler.compile(Source { kind: Kind::Regex, text: text.into() }, done).expect("there is room");
        receiver
    }

    #[test]
    fn without_an_engine_each_grammar_gets_its_reason() {
        let compiler = refusing();
        for text in ["a", "b", "a"] {
            let outcome = asked(&compiler, text).recv().expect("an outcome comes");
            assert_eq!(outcome.err(), Some(Error::Model("no tokens".to_owned())));
        }
    }

    #[test]
    fn grammars_beyond_the_queue_are_refused_and_equal_ones_wait_together() {
        let (release, released) = mpsc::channel::<()>();
        let compiler = Compiler::start(1, move || {
            released.recv().ok();
            Err(Error::Model("late".to_owned()))
        })
        .expect("a thread can be started");
        let waiting: Vec<_> = (0..MAX_WAITING).map(|index| asked(&compiler, &index.to_string())).collect();
        let one_more = Source { kind: Kind::Regex, text: "one more".into() };
        assert_eq!(compiler.compile(one_more, Box::new(|_| {})), Err(Busy));
        let again = asked(&compiler, "7");
        release.send(()).expect("it waits");
        for receiver in waiting.into_iter().chain([again]) {
            assert!(receiver.recv().expect("an outcome comes").is_err());
        }
    }

    #[test]
    fn what_was_not_used_for_longest_is_forgotten_first() {
        let mut state = State::default();
        let source = |index: usize| Arc::new(Source { kind: Kind::Regex, text: index.to_string().into() });
        let refused = || Err(Error::Model(String::new()));
        for index in 0..MAX_KEPT {
            assert!(state.finish(&source(index), refused()).0.is_err());
        }
        state.clock += 1;
        let now = state.clock;
        if let Some(Known::Ready { last_use, .. }) = state.known.get_mut(&source(0)) {
            *last_use = now;
        }
        assert!(state.finish(&source(MAX_KEPT), refused()).0.is_err());
        assert_eq!(state.known.len(), MAX_KEPT);
        assert!(state.known.contains_key(&source(0)) && !state.known.contains_key(&source(1)));
    }
}
