//! The server: all services on one socket, from the start of loading until the end.

use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use kernels::collective::{Local, MeetingPlace, SharedMemory, join_gpus};
use kernels::{Communicator, Context, Place};
use proto::client::MAX_MESSAGE_BYTES;
use proto::v1::shard_server::ShardServer;
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::connection::Connection;
use super::shard::ShardService;
use super::socket::Socket;
use crate::config::{HugePages, ShardConfig, ShardPlacement};
use crate::device;
use crate::engine::{Engine, EngineEvents, EngineHandle, EngineOptions, Loaded, spawn};
use crate::models::{self, LoadOptions};
use crate::weights::Partition;

/// How long ranks wait for each other, when they join and in each operation: longer than ranks differ in mapping and
/// first reading their weights from a slow disk, shorter than a person's patience.
const PEER_TIMEOUT: Duration = Duration::from_mins(2);

/// How long answers on their way may take to be written when the server ends.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Serves one rank until `shutdown` completes, or with an error when the model cannot be loaded or computed. The socket
/// is there while the model is still being loaded, and removed at the end. The process is bound to cores already, or not at all.
pub async fn serve(
    config: ShardConfig,
    placement: ShardPlacement,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    check(&placement)?;
    let (_socket, incoming) = listen(&placement).await?;
    let (engine, events) =
        spawn(move || load(&config, &placement)).context("starting the engine's thread")?;
    let (info_sender, info) = watch::channel(None);
    let (health, router) = services(engine, info).await?;

    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut server = std::pin::pin!(router.serve_with_incoming_shutdown(incoming, async {
        let _ = stopped.await;
    }));
    let outcome = tokio::select! {
        result = &mut server => return result.context("serving the socket"),
        () = shutdown => Ok(()),
        outcome = follow(events, info_sender, &health) => outcome,
    };
    set_health(&health, ServingStatus::NotServing).await;
    let _ = stop.send(());
    // Streams end with the engine's last answer; a client that does not read it must not keep this process.
    let _ = tokio::time::timeout(LAST_WORDS, server).await;
    outcome
}

/// Connections, of whichever kind.
type Incoming = Pin<Box<dyn Stream<Item = std::io::Result<Connection>> + Send>>;

/// Binds the socket (removed when the first of the two is dropped) or the port that the placement names.
async fn listen(placement: &ShardPlacement) -> anyhow::Result<(Option<Socket>, Incoming)> {
    match (placement.listen, &placement.uds_path) {
        (Some(address), _) => {
            let listener = tokio::net::TcpListener::bind(address);
            let listener = listener.await.with_context(|| format!("listening on {address}"))?;
            let incoming = TcpListenerStream::new(listener);
            Ok((None, Box::pin(incoming.map(|stream| stream.and_then(Connection::tcp)))))
        }
        (None, Some(path)) => {
            let (socket, listener) = Socket::bind(path)?;
            let incoming = UnixListenerStream::new(tokio::net::UnixListener::from_std(listener)?);
            Ok((Some(socket), Box::pin(incoming.map(|stream| stream.map(Connection::unix)))))
        }
        (None, None) => {
            bail!("there is nothing to listen on: give --uds-path, or --listen for a router on another host")
        }
    }
}

/// What clap cannot check.
fn check(placement: &ShardPlacement) -> anyhow::Result<()> {
    let ShardPlacement { rank, world_size, rendezvous, master_addr, num_threads, .. } = placement;
    ensure!(rank < world_size, "--rank is {rank} but must be below --world-size, which is {world_size}");
    ensure!(
        *world_size == 1 || rendezvous.is_some() || master_addr.is_some(),
        "--world-size is {world_size}: give all ranks the same --rendezvous file, or on GPUs --master-addr, to meet at"
    );
    ensure!(*num_threads != Some(0), "--num-threads is 0 but must be at least 1");
    Ok(())
}

/// Runs on the engine's thread.
fn load(config: &ShardConfig, placement: &ShardPlacement) -> anyhow::Result<Engine> {
    let ShardPlacement { model_dir, rank, world_size, .. } = placement;
    let num_threads = placement.num_threads.unwrap_or_else(|| default_threads(*world_size));
    let context = device::open(config, placement.local_rank.unwrap_or(*rank), num_threads)?;
    let options = LoadOptions {
        dtype: config.dtype,
        kv_cache_dtype: config.kv_cache_dtype,
        quantize: config.quantize,
        partition: Partition { rank: *rank, world_size: *world_size },
    };
    let model = models::load_with_adapters(&context, model_dir, options, &config.lora_adapters.0)?;
    let communicator = join(&context, placement)?;
    tracing::info!(
        rank,
        world_size,
        device = context.device_name(),
        num_threads = context.num_threads(),
        "model loaded"
    );
    let mut options = EngineOptions {
        memory_fraction: config.cuda_memory_fraction,
        huge_pages: config.huge_pages == HugePages::Auto,
        ..EngineOptions::default()
    };
    if let Some(sizes) = &config.cuda_graphs {
        options.graph_sizes.clone_from(sizes);
    }
    let engine = Engine::new(model, context, communicator).with_options(options);
    let tokenizer_json = model_dir.join("tokenizer.json");
    if !tokenizer_json.exists() {
        return Ok(engine);
    }
    engine.with_grammars(&tokenizer_json).context("starting threads for grammars")
}

/// Meets the other ranks: those of one host in a file, those of several at the first one's address.
fn join(context: &Context, placement: &ShardPlacement) -> anyhow::Result<Box<dyn Communicator>> {
    let ShardPlacement { rank, world_size, rendezvous, master_addr, master_port, .. } = placement;
    if *world_size == 1 {
        return Ok(Box::new(Local));
    }
    let place = match (rendezvous, master_addr) {
        (Some(path), _) => MeetingPlace::File(path.clone()),
        (None, Some(host)) => MeetingPlace::Address { host: host.clone(), port: *master_port },
        (None, None) => {
            bail!("--world-size is {world_size}: give all ranks the same --rendezvous file to meet at")
        }
    };
    match (context.place(), rendezvous) {
        (Place::Device, _) => join_gpus(context, &place, *rank, *world_size, PEER_TIMEOUT)
            .with_context(|| format!("joining {world_size} GPUs at {place:?}")),
        (Place::Host, Some(path)) => SharedMemory::join(path, *rank, *world_size, PEER_TIMEOUT)
            .map(|group| Box::new(group) as _)
            .with_context(|| format!("joining {world_size} ranks at {}", path.display())),
        (Place::Host, None) => {
            bail!("--master-addr is for GPUs: CPUs of one host meet in a --rendezvous file")
        }
    }
}

fn default_threads(world_size: usize) -> usize {
    (kernels::available_cores() / world_size).max(1)
}

/// Reports the engine's progress; returns when it has ended.
async fn follow(
    events: EngineEvents,
    info: watch::Sender<Option<Loaded>>,
    health: &HealthReporter,
) -> anyhow::Result<()> {
    if let Ok(loaded) = events.loaded.await {
        info.send_replace(Some(loaded));
        set_health(health, ServingStatus::Serving).await;
    }
    match events.ended.await {
        Ok(outcome) => outcome,
        Err(_) => bail!("the engine's thread panicked; the log says where"),
    }
}

async fn services(
    engine: EngineHandle,
    info: watch::Receiver<Option<Loaded>>,
) -> anyhow::Result<(HealthReporter, Router)> {
    let (reporter, health) = tonic_health::server::health_reporter();
    set_health(&reporter, ServingStatus::NotServing).await;
    let shard = ShardServer::new(ShardService::new(engine, info))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let router = Server::builder()
        .add_service(shard)
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok((reporter, router))
}

/// Both versions describe all services, themselves included.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
        .include_reflection_service(false)
}

/// Of the process (the empty name) and of the service.
async fn set_health(reporter: &HealthReporter, status: ServingStatus) {
    reporter.set_service_status("", status).await;
    reporter.set_service_status(ShardServer::<ShardService>::NAME, status).await;
}
