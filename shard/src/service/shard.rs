//! `lamplighter.shard.v1.Shard`: messages to the engine, answers back.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use grammar::{GrammarId, Source};
use proto::v1::shard_server::Shard;
use proto::v1::{
    GrammarKind, InfoRequest, InfoResponse, PrepareGrammarRequest, PrepareGrammarResponse, StepRequest,
    StepResponse, WarmupRequest, WarmupResponse,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::status::loading;
use crate::engine::{Answer, EngineGone, EngineHandle, Loaded, Origin};

/// Steps of a `Run` stream that may wait for the engine or for their answer to be read; then the stream is not read on.
const MAX_STEPS_AHEAD: usize = 8;

/// The service of one rank.
pub(super) struct ShardService {
    engine: EngineHandle,
    /// None while the model is being loaded.
    info: watch::Receiver<Option<Loaded>>,
    run_open: Arc<AtomicBool>,
}

impl ShardService {
    pub(super) fn new(engine: EngineHandle, info: watch::Receiver<Option<Loaded>>) -> Self {
        Self { engine, info, run_open: Arc::default() }
    }

    fn loaded(&self) -> Result<Loaded, Status> {
        self.info.borrow().clone().ok_or_else(loading)
    }
}

#[tonic::async_trait]
impl Shard for ShardService {
    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        self.loaded().map(|loaded| Response::new(loaded.info))
    }

    async fn warmup(&self, request: Request<WarmupRequest>) -> Result<Response<WarmupResponse>, Status> {
        self.loaded()?;
        let answer = self.engine.warmup(request.into_inner()).await?;
        answered(answer).await.map(Response::new)
    }

    type RunStream = Pin<Box<dyn Stream<Item = Result<StepResponse, Status>> + Send>>;

    async fn run(
        &self,
        request: Request<Streaming<StepRequest>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        self.loaded()?;
        if self.run_open.swap(true, Ordering::AcqRel) {
            return Err(Status::failed_precondition("a Run stream is open already: there is one at a time"));
        }
        let (answers, queued) = mpsc::channel(MAX_STEPS_AHEAD);
        let (engine, run_open) = (self.engine.clone(), Arc::clone(&self.run_open));
        tokio::spawn(async move {
            queue_steps(request.into_inner(), &engine, &answers).await;
            // In this order: the next stream's steps must come behind the end of this one.
            let _ = engine.end_run().await;
            run_open.store(false, Ordering::Release);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queued).then(answered))))
    }

    async fn step(&self, request: Request<StepRequest>) -> Result<Response<StepResponse>, Status> {
        self.loaded()?;
        if self.run_open.load(Ordering::Acquire) {
            return Err(Status::failed_precondition("a Run stream is open: its steps are the only ones"));
        }
        let answer = self.engine.step(request.into_inner(), Origin::Unary).await?;
        answered(answer).await.map(Response::new)
    }

    async fn prepare_grammar(
        &self,
        request: Request<PrepareGrammarRequest>,
    ) -> Result<Response<PrepareGrammarResponse>, Status> {
        let compiler = self.loaded()?.compiler.ok_or_else(|| {
            Status::failed_precondition(
                "there are no grammars here: the model directory of rank 0 needs a tokenizer.json",
            )
        })?;
        let source = source(request.into_inner())?;
        let (sender, outcome) = oneshot::channel();
        let done = Box::new(move |outcome| {
            // Who has stopped waiting finds the grammar compiled the next time.
            let _ = sender.send(outcome);
        });
        compiler.compile(source, done).map_err(|busy| Status::resource_exhausted(busy.to_string()))?;
        let outcome =
            outcome.await.map_err(|_| Status::internal("a thread that compiles grammars has ended"))?;
        let GrammarId(grammar_id) = outcome.map_err(|error| match error {
            grammar::Error::Grammar(message) => Status::invalid_argument(message),
            model @ grammar::Error::Model(_) => Status::failed_precondition(model.to_string()),
        })?;
        Ok(Response::new(PrepareGrammarResponse { grammar_id }))
    }
}

fn source(request: PrepareGrammarRequest) -> Result<Source, Status> {
    let kind = match request.kind() {
        GrammarKind::JsonSchema => grammar::Kind::JsonSchema,
        GrammarKind::Regex => grammar::Kind::Regex,
        GrammarKind::Unspecified => {
            return Err(Status::invalid_argument("kind must be set: a JSON schema or a regex"));
        }
    };
    Ok(Source { kind, text: request.text.into() })
}

/// Hands steps to the engine, and the answers to come to whoever writes them, until one of the two streams ends.
async fn queue_steps(
    mut steps: Streaming<StepRequest>,
    engine: &EngineHandle,
    answers: &mpsc::Sender<Answer<StepResponse>>,
) {
    loop {
        let step = tokio::select! {
            step = steps.message() => step,
            // The client has gone, or got an error, which ends a stream.
            () = answers.closed() => return,
        };
        let Ok(Some(step)) = step else { return };
        let Ok(place) = answers.reserve().await else { return };
        let Ok(answer) = engine.step(step, Origin::Run).await else { return };
        place.send(answer);
    }
}

async fn answered<T>(answer: Answer<T>) -> Result<T, Status> {
    // The engine drops an answer only when it ends.
    Ok(answer.await.map_err(|_| EngineGone)??)
}
