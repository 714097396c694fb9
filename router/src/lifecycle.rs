//! The life of the router's process: load, listen, start, serve, drain.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use proto::client::ShardAddress;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::config::{RouterConfig, RouterPlacement};
use crate::http::{self, App, Server, Serving};
use crate::scheduler::{self, SchedulerHandle, ServingInfo, StartPhase, Status};
use crate::text::chat_template::ChatTemplate;
use crate::text::text_workers::TextWorkers;
use crate::text::tokenizer::Tokenizer;
use crate::validate::{Limits, ModelNames, Validator};
use crate::{metrics, telemetry};

/// Threads that serve connections and schedule; tokenizing has its own. Two, because the shards need the cores.
const MAX_WORKER_THREADS: usize = 2;

/// For answers that are complete, or failed, to be read by their clients.
const CLOSING_GRACE: Duration = Duration::from_secs(5);

/// For requests that are cancelled to leave the scheduler.
const FAILING_GRACE: Duration = Duration::from_secs(2);

/// Between two rounds of the histograms' upkeep: what is recorded meanwhile waits in memory.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Runs the router until it is told to stop by SIGTERM or SIGINT. An error means that it could not start, or that its
/// shards have failed.
pub fn run(config: RouterConfig, placement: RouterPlacement) -> anyhow::Result<()> {
    telemetry::init(&config)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(MAX_WORKER_THREADS))
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    let result = runtime.block_on(live(config, placement));
    // Tokenizing that nobody waits for any more is not waited for either.
    runtime.shutdown_background();
    result
}

async fn live(config: RouterConfig, placement: RouterPlacement) -> anyhow::Result<()> {
    let mut signals = Signals::listen().context("SIGTERM and SIGINT cannot be awaited")?;
    let metrics = metrics::install().context("metrics cannot be set up")?;
    let shard_addresses: Vec<ShardAddress> =
        placement.shard_addresses.iter().map(|address| address.parse()).collect::<Result<_, _>>()?;
    let tokenizer = Arc::new(Tokenizer::load(&placement.model_dir)?);
    let chat_template = ChatTemplate::load(&placement.model_dir)?.map(Arc::new);
    if chat_template.is_none() {
        tracing::warn!(
            model_dir = %placement.model_dir.display(),
            "the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): \
             /v1/chat/completions will refuse its requests"
        );
    }

    let address = SocketAddr::new(config.hostname, config.port);
    let server = Server::bind(address, config.max_concurrent_requests).await.with_context(|| {
        format!("cannot listen on {address}: choose another --hostname or --port, or end the process that listens there")
    })?;
    let address = server.address().context("the bound address is not known")?;
    if let Some(file) = &placement.address_file {
        write_address(file, address)
            .with_context(|| format!("the address cannot be written to {}", file.display()))?;
    }
    tracing::info!(%address, "listening");

    let model_name = model_name(&placement);
    let app = Arc::new(App::new(model_name, config.clone(), Arc::clone(&tokenizer), Some(metrics.clone())));
    let (stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(server.serve(http::routes(Arc::clone(&app)), stopped, CLOSING_GRACE));
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(METRICS_UPKEEP).await;
            metrics.run_upkeep();
        }
    });

    let started = tokio::select! {
        started = start(&config, shard_addresses, &app) => Some(started),
        () = signals.next() => None,
    };
    let result = match started {
        Some(Ok((handle, info))) => {
            let models = ModelNames { base: app.model_name.clone(), adapters: info.adapter_names.clone() };
            let validator = new_validator(&config, &info, &tokenizer, chat_template, models);
            app.serve(Serving { info, validator, backend: Box::new(handle.clone()) });
            tracing::info!("ready");
            serve(&config, &app, &handle, &mut signals).await
        }
        Some(Err(error)) => Err(error),
        None => {
            app.set_draining();
            Ok(())
        }
    };
    // An error means that the server has ended already.
    let _ = stop.send(true);
    serving.await.context("the HTTP server met a defect")?;
    result
}

/// Waits for the shards, and says meanwhile what it waits for.
async fn start(
    config: &RouterConfig,
    shard_addresses: Vec<ShardAddress>,
    app: &App,
) -> anyhow::Result<(SchedulerHandle, ServingInfo)> {
    let (phase, mut phases) = watch::channel(StartPhase::Connecting);
    let report = async {
        loop {
            match *phases.borrow_and_update() {
                StartPhase::Connecting => app.set_starting("waiting for the shards to load the model"),
                StartPhase::WarmingUp => app.set_starting("the shards are warming up"),
                StartPhase::Ready => {}
            }
            if phases.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        started = scheduler::start(config, shard_addresses, &phase) => {
            let (handle, info) = started?;
            anyhow::ensure!(
                !info.adapter_names.contains(&app.model_name),
                "an adapter and the model are both called {:?}: give the adapter another name (--lora-adapters NAME=...)",
                app.model_name
            );
            Ok((handle, info))
        }
        () = report => unreachable!("the report has no end"),
    }
}

fn new_validator(
    config: &RouterConfig,
    info: &ServingInfo,
    tokenizer: &Arc<Tokenizer>,
    chat_template: Option<Arc<ChatTemplate>>,
    models: ModelNames,
) -> Validator {
    let limits = Limits {
        max_input_tokens: info.max_input_tokens,
        max_total_tokens: info.max_total_tokens,
        vocab_size: info.vocab_size,
        max_concurrent_requests: config.max_concurrent_requests,
        request_timeout: config.request_timeout(),
        max_best_of: config.max_best_of,
    };
    let workers = TextWorkers::new(config.max_concurrent_requests);
    Validator { tokenizer: Arc::clone(tokenizer), chat_template, workers, limits, models }
}

/// Serves until a signal comes or the shards fail.
async fn serve(
    config: &RouterConfig,
    app: &App,
    handle: &SchedulerHandle,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let mut status = handle.status_sender().subscribe();
    let failed = async {
        match status.wait_for(|status| matches!(status, Status::Failed(_))).await.as_deref() {
            Ok(Status::Failed(reason)) => reason.clone(),
            _ => "the scheduler has stopped".to_owned(),
        }
    };
    tokio::select! {
        reason = failed => {
            tracing::error!(reason, "the shards have failed");
            anyhow::bail!("the shards have failed: {reason}")
        }
        () = signals.next() => {}
    }
    drain(config, app, handle, signals).await;
    Ok(())
}

/// Lets running requests finish and refuses new ones; after the graceful timeout, or at a second signal, ends them.
async fn drain(config: &RouterConfig, app: &App, handle: &SchedulerHandle, signals: &mut Signals) {
    let timeout = Duration::from_secs(config.graceful_termination_timeout);
    tracing::info!(timeout_s = config.graceful_termination_timeout, "draining: finishing running requests");
    app.set_draining();
    handle.begin_drain();
    tokio::select! {
        () = handle.drained() => {
            tracing::info!("drained");
            return;
        }
        () = tokio::time::sleep(timeout) => {
            tracing::warn!("requests are still running after --graceful-termination-timeout: ending them");
        }
        () = signals.next() => tracing::warn!("told to stop once more: ending running requests"),
    }
    handle.fail_all();
    if tokio::time::timeout(FAILING_GRACE, handle.drained()).await.is_err() {
        tracing::warn!("some clients have not read the end of their answers");
    }
}

/// The model's name: as given, or the directory's.
fn model_name(placement: &RouterPlacement) -> String {
    let of_directory = || {
        let directory = placement.model_dir.canonicalize().unwrap_or_else(|_| placement.model_dir.clone());
        directory.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    };
    placement.model_name.clone().unwrap_or_else(of_directory)
}

/// Whoever sees the file sees the whole address.
fn write_address(file: &Path, address: SocketAddr) -> io::Result<()> {
    let mut unfinished = file.as_os_str().to_owned();
    unfinished.push(".new");
    std::fs::write(&unfinished, format!("{address}\n"))?;
    std::fs::rename(&unfinished, file)
}

/// SIGTERM and SIGINT: a terminal sends the latter to the launcher's whole group, so both mean the same.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
