//! What the endpoints share: the way from a request to its streams, and whether there is one.

use std::sync::{Arc, OnceLock, RwLock};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, try_join_all};
use grammar::{GrammarId, Source};
use metrics_exporter_prometheus::PrometheusHandle;

use crate::config::RouterConfig;
use crate::error::RequestError;
use crate::metrics;
use crate::scheduler::{SchedulerHandle, ServingInfo, Status, SubmitError, TokenRequest};
use crate::shards::GrammarError;
use crate::stream::{Generated, GenerationStream, StreamInput, TokenEvents};
use crate::text::tokenizer::Tokenizer;
use crate::validate::{GenerationRequest, RequestedGrammar, Validator};

/// State of all endpoints.
pub(crate) struct App {
    /// Name under which the model is served.
    pub(crate) model_name: String,
    /// The router's settings, for `/info`.
    pub(crate) config: RouterConfig,
    /// The model's tokenizer.
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// What `/metrics` renders; absent in tests.
    pub(crate) metrics: Option<PrometheusHandle>,
    /// When the process started, in seconds since 1970.
    pub(crate) started_at: u64,
    serving: OnceLock<Serving>,
    /// Written some times in the process's life, read by probes.
    readiness: RwLock<Readiness>,
}

/// What is there once the shards are ready.
pub(crate) struct Serving {
    /// Limits and facts.
    pub(crate) info: ServingInfo,
    /// Makes valid requests.
    pub(crate) validator: Validator,
    /// Takes them.
    pub(crate) backend: Box<dyn Backend>,
}

/// Takes requests for tokens: the scheduler, or a script in tests.
pub(crate) trait Backend: Send + Sync + 'static {
    /// Takes all of `requests` or none. A stream ends with a `Token` with an `end`, or `Failed`.
    fn submit(&self, requests: Vec<TokenRequest>) -> Result<Vec<Box<dyn TokenEvents>>, SubmitError>;

    /// Whether requests are taken.
    fn status(&self) -> Status;

    /// Has a grammar checked and compiled, for requests that are submitted later.
    fn prepare(&self, source: Source) -> BoxFuture<'static, Result<GrammarId, GrammarError>>;
}

impl Backend for SchedulerHandle {
    fn submit(&self, requests: Vec<TokenRequest>) -> Result<Vec<Box<dyn TokenEvents>>, SubmitError> {
        let streams = SchedulerHandle::submit(self, requests)?;
        Ok(streams.into_iter().map(|stream| Box::new(stream) as Box<dyn TokenEvents>).collect())
    }

    fn status(&self) -> Status {
        SchedulerHandle::status(self)
    }

    fn prepare(&self, source: Source) -> BoxFuture<'static, Result<GrammarId, GrammarError>> {
        let grammars = self.grammars().cloned();
        Box::pin(async move {
            match grammars {
                Some(grammars) => grammars.prepare(source).await,
                None => Err(GrammarError::Unavailable("there are no shards".to_owned())),
            }
        })
    }
}

/// A request's grammar, compiled before the request is queued: whoever sends a wrong one learns it at once, and no step waits for it.
async fn prepare(serving: &Serving, grammar: &RequestedGrammar) -> Result<GrammarId, RequestError> {
    let RequestedGrammar { source, param } = grammar;
    let since = Instant::now();
    let prepared = serving.backend.prepare(source.clone()).await;
    metrics::record_grammar(since.elapsed());
    prepared.map_err(|error| match error {
        GrammarError::Invalid(_) | GrammarError::TooComplex => {
            RequestError::invalid(param, format!("`{param}`: {error}"))
        }
        GrammarError::Unsupported(_) => RequestError::unsupported(param, format!("`{param}`: {error}")),
        GrammarError::Busy(message) => RequestError::GrammarsBusy(message),
        GrammarError::Unavailable(reason) => {
            tracing::warn!(reason, "a grammar could not be compiled");
            SubmitError::Unavailable.into()
        }
    })
}

/// Whether requests are served, for people and probes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Not yet, for this reason.
    Starting(&'static str),
    /// Yes.
    Ready,
    /// Not any more: shutting down.
    Draining,
    /// Not any more: the shards are gone.
    Failed(String),
}

/// A request that is being generated.
pub(crate) struct Generation {
    /// Each prompt's choices, one after the other.
    pub(crate) streams: Vec<GenerationStream>,
    /// The requests as they were submitted, without their prompts' ids where nobody needs them.
    pub(crate) sequences: Vec<TokenRequest>,
    /// Tokens of the prompts, each counted once.
    pub(crate) prompt_tokens: usize,
    /// How many of `streams` continue the same prompt.
    pub(crate) choices_per_prompt: usize,
    /// Those of them that are told.
    pub(crate) answers_per_prompt: usize,
    /// The model's name, or that of its adapter.
    pub(crate) model_name: String,
    /// When the request arrived.
    pub(crate) arrived: Instant,
    /// Time spent on checking, templating and tokenizing.
    pub(crate) validation_time: Duration,
}

impl App {
    /// Nothing is served yet.
    pub(crate) fn new(
        model_name: String,
        config: RouterConfig,
        tokenizer: Arc<Tokenizer>,
        metrics: Option<PrometheusHandle>,
    ) -> Self {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            model_name,
            config,
            tokenizer,
            metrics,
            started_at: since_1970.map_or(0, |since| since.as_secs()),
            serving: OnceLock::new(),
            readiness: RwLock::new(Readiness::Starting("the router is starting")),
        }
    }

    /// The shards are ready. Once only.
    pub(crate) fn serve(&self, serving: Serving) {
        assert!(self.serving.set(serving).is_ok(), "serving begins once");
        self.set_starting_or_ready(Readiness::Ready);
    }

    /// Where the start is, for probes.
    pub(crate) fn set_starting(&self, reason: &'static str) {
        self.set_starting_or_ready(Readiness::Starting(reason));
    }

    /// The router shuts down, whether it has been ready or not.
    pub(crate) fn set_draining(&self) {
        *self.readiness.write().expect("no holder of the lock panics") = Readiness::Draining;
    }

    fn set_starting_or_ready(&self, to: Readiness) {
        let mut readiness = self.readiness.write().expect("no holder of the lock panics");
        if matches!(*readiness, Readiness::Starting(_)) {
            *readiness = to;
        }
    }

    /// Whether requests are served.
    pub(crate) fn readiness(&self) -> Readiness {
        let known = self.readiness.read().expect("no holder of the lock panics").clone();
        match (known, self.serving.get().map(|serving| serving.backend.status())) {
            (Readiness::Ready, Some(Status::Draining)) => Readiness::Draining,
            (Readiness::Ready, Some(Status::Failed(reason))) => Readiness::Failed(reason),
            (known, _) => known,
        }
    }

    /// What is served; refused until it is.
    pub(crate) fn serving(&self) -> Result<&Serving, RequestError> {
        if self.readiness() == Readiness::Draining {
            return Err(SubmitError::Draining.into());
        }
        self.serving.get().ok_or(SubmitError::Unavailable.into())
    }

    /// What is or was served, for facts about it.
    pub(crate) fn serving_info(&self) -> Option<&ServingInfo> {
        self.serving.get().map(|serving| &serving.info)
    }

    /// Checks a request and submits it. To let go of it, drop it.
    pub(crate) async fn generate(
        &self,
        request: GenerationRequest,
        arrived: Instant,
    ) -> Result<Generation, RequestError> {
        let serving = self.serving()?;
        let grammar = match &request.grammar {
            Some(grammar) => Some(prepare(serving, grammar).await?),
            None => None,
        };
        let valid = serving.validator.validate(request, grammar).await?;
        let validation_time = arrived.elapsed();
        metrics::record_validation(validation_time);
        let events = serving.backend.submit(valid.sequences.clone())?;
        let streams = events
            .into_iter()
            .zip(&valid.sequences)
            .map(|(events, sequence)| {
                metrics::record_sequence_submitted(sequence.prompt.len(), sequence.max_new_tokens);
                let input = StreamInput {
                    events,
                    prompt: sequence.prompt.clone(),
                    stop: valid.stop.clone(),
                    arrived,
                };
                GenerationStream::new(Arc::clone(&self.tokenizer), input)
            })
            .collect();
        Ok(Generation {
            streams,
            sequences: valid.sequences,
            prompt_tokens: valid.prompt_tokens,
            choices_per_prompt: valid.choices_per_prompt,
            answers_per_prompt: valid.answers_per_prompt,
            model_name: serving.validator.models.name(valid.adapter).to_owned(),
            arrived,
            validation_time,
        })
    }
}

impl Generation {
    /// Waits for all sequences. If one fails, the others are cancelled.
    pub(crate) async fn collect(self) -> Result<Vec<Generated>, RequestError> {
        Ok(try_join_all(self.streams.into_iter().map(GenerationStream::collect)).await?)
    }
}
