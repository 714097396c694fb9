//! The one thread that the engine lives on, and how the service talks to it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use grammar::Compiler;
use proto::v1::{InfoResponse, StepRequest, StepResponse, WarmupRequest, WarmupResponse};
use tokio::sync::{mpsc, oneshot};

use super::step::{Engine, Origin};
use crate::error::Error;

/// Commands that wait for the engine. Steps of a `Run` stream are bounded before they come here; this bounds people
/// with gRPC clients.
const MAX_QUEUED_COMMANDS: usize = 32;

/// Sends commands to the engine thread. Commands are executed in the order in which they are sent.
#[derive(Debug, Clone)]
pub(crate) struct EngineHandle {
    commands: mpsc::Sender<Command>,
}

/// The engine thread is gone.
#[derive(Debug)]
pub(crate) struct EngineGone;

/// An engine's answer.
pub(crate) type Answer<T> = oneshot::Receiver<Result<T, Error>>;

/// What there is once the model is loaded.
#[derive(Clone)]
pub(crate) struct Loaded {
    /// What is served.
    pub(crate) info: InfoResponse,
    /// What compiles grammars, on rank 0.
    pub(crate) compiler: Option<Arc<Compiler>>,
}

/// What becomes of an engine thread.
pub(crate) struct EngineEvents {
    /// Comes when the model is loaded.
    pub(crate) loaded: oneshot::Receiver<Loaded>,
    /// Comes when the thread ends; dropped where it panics.
    pub(crate) ended: oneshot::Receiver<anyhow::Result<()>>,
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

#[derive(Debug)]
enum Command {
    Warmup(WarmupRequest, Reply<WarmupResponse>),
    Step(StepRequest, Origin, Reply<StepResponse>),
    EndRun,
}

/// Starts the thread; it loads the model first.
pub(crate) fn spawn(
    load: impl FnOnce() -> anyhow::Result<Engine> + Send + 'static,
) -> std::io::Result<(EngineHandle, EngineEvents)> {
    let (commands, receiver) = mpsc::channel(MAX_QUEUED_COMMANDS);
    let (loaded_sender, loaded) = oneshot::channel();
    let (ended_sender, ended) = oneshot::channel();
    std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        let outcome = load().and_then(|engine| {
            // Whoever waited may have given up; the engine serves nevertheless.
            let _ = loaded_sender.send(Loaded { info: engine.info(), compiler: engine.compiler().cloned() });
            serve(engine, receiver)
        });
        let _ = ended_sender.send(outcome);
    })?;
    Ok((EngineHandle { commands }, EngineEvents { loaded, ended }))
}

impl EngineHandle {
    pub(crate) async fn warmup(&self, request: WarmupRequest) -> Result<Answer<WarmupResponse>, EngineGone> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Warmup(request, reply)).await.map(|()| answer)
    }

    /// Queues a step; the answer comes when its turn has come and it is computed.
    pub(crate) async fn step(
        &self,
        request: StepRequest,
        origin: Origin,
    ) -> Result<Answer<StepResponse>, EngineGone> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Step(request, origin, reply)).await.map(|()| answer)
    }

    pub(crate) async fn end_run(&self) -> Result<(), EngineGone> {
        self.send(Command::EndRun).await
    }

    async fn send(&self, command: Command) -> Result<(), EngineGone> {
        self.commands.send(command).await.map_err(|_| EngineGone)
    }
}

/// How long to look away where the device computes and no command has come: little beside a step, and not all of a core.
const PAUSE: Duration = Duration::from_micros(20);

/// Executes commands until all handles are dropped, or until the engine can no longer keep its promises.
///
/// A step that has come is launched as soon as the engine has room for it; answers are given in order.
fn serve(mut engine: Engine, mut commands: mpsc::Receiver<Command>) -> anyhow::Result<()> {
    let mut replies = VecDeque::new();
    loop {
        let command = match (replies.is_empty(), engine.has_room()) {
            (true, _) => match commands.blocking_recv() {
                Some(command) => Some(command),
                None => return Ok(()),
            },
            (false, true) => commands.try_recv().ok(),
            (false, false) => None,
        };
        match command {
            Some(Command::Step(request, origin, reply)) => match engine.launch(request, origin) {
                Ok(()) => replies.push_back(reply),
                Err(error) => answer(reply, Err(error))?,
            },
            Some(command) => {
                while let Some(reply) = replies.pop_front() {
                    answer(reply, engine.collect())?;
                }
                match command {
                    Command::Warmup(request, reply) => answer(reply, engine.warmup(&request))?,
                    Command::EndRun => engine.end_run(),
                    Command::Step(..) => unreachable!("matched above"),
                }
            }
            None if !engine.has_room() || engine.is_done()? => {
                if let Some(reply) = replies.pop_front() {
                    answer(reply, engine.collect())?;
                    engine.proceed()?;
                }
            }
            None => std::thread::sleep(PAUSE),
        }
    }
}

/// Sends the outcome; a fatal error goes both to the caller and up.
fn answer<T>(reply: Reply<T>, outcome: Result<T, Error>) -> anyhow::Result<()> {
    let fatal = outcome.as_ref().err().filter(|error| error.is_fatal()).map(ToString::to_string);
    // A caller that has gone needs no answer.
    let _ = reply.send(outcome);
    match fatal {
        Some(message) => Err(anyhow::anyhow!(message)),
        None => Ok(()),
    }
}
