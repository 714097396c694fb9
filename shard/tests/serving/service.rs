//! The service over a real Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::client::{ShardAddress, connect, shard_client};
use proto::v1::shard_client::ShardClient;
use proto::v1::{
    GrammarKind, InfoRequest, PrepareGrammarRequest, ScheduledSequence, StepRequest, StepResponse,
};
use shard::{ShardConfig, ShardPlacement, service};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::checkpoints::{llama, llama_with_broken_token};
use crate::driver::{WARMUP, prompt, request};

const PATIENCE: Duration = Duration::from_secs(30);

/// A service in this process, with its socket in a directory of its own.
struct Served {
    dir: TempDir,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<anyhow::Result<()>>,
}

fn placement(dir: &Path, rank: usize, world_size: usize) -> ShardPlacement {
    ShardPlacement {
        model_dir: llama(),
        uds_path: Some(dir.join(format!("shard-{rank}"))),
        listen: None,
        rank,
        world_size,
        rendezvous: (world_size > 1).then(|| dir.join("ranks")),
        master_addr: None,
        master_port: 0,
        local_rank: None,
        cores: None,
        num_threads: Some(1),
        json_output: false,
        log_level: "info".to_owned(),
        supervised: false,
    }
}

fn start(placement: ShardPlacement) -> (oneshot::Sender<()>, JoinHandle<anyhow::Result<()>>) {
    let (stop, stopped) = oneshot::channel();
    let serve = service::serve(ShardConfig::default(), placement, async {
        let _ = stopped.await;
    });
    (stop, tokio::spawn(serve))
}

async fn channel(socket: &Path) -> Channel {
    channel_to(&ShardAddress::Unix(socket.to_owned())).await
}

async fn channel_to(address: &ShardAddress) -> Channel {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match connect(address, PATIENCE).await {
            Ok(channel) => return channel,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until the health service says so of the process and of the service.
async fn wait_for(channel: &Channel, expected: ServingStatus) {
    for service in ["", "lamplighter.shard.v1.Shard"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut statuses = HealthClient::new(channel.clone()).watch(request).await.unwrap().into_inner();
        let reached = async { while statuses.message().await.unwrap().unwrap().status() != expected {} };
        tokio::time::timeout(PATIENCE, reached).await.unwrap();
    }
}

impl Served {
    async fn start() -> (Self, ShardClient<Channel>) {
        let dir = tempfile::tempdir().unwrap();
        let (stop, ended) = start(placement(dir.path(), 0, 1));
        let channel = channel(&dir.path().join("shard-0")).await;
        wait_for(&channel, ServingStatus::Serving).await;
        (Self { dir, stop, ended }, shard_client(channel))
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("shard-0")
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        tokio::time::timeout(PATIENCE, self.ended).await.unwrap().unwrap().unwrap();
    }
}

fn first_step(step_id: u64, sequence_id: u64) -> StepRequest {
    let scheduled = ScheduledSequence { sequence_id, num_tokens: 5, append_block_ids: vec![0] };
    StepRequest {
        step_id,
        admit: vec![request(sequence_id, &prompt(0, 5))],
        schedule: vec![scheduled],
        ..StepRequest::default()
    }
}

fn decode_step(step_id: u64, sequence_id: u64) -> StepRequest {
    let scheduled = ScheduledSequence { sequence_id, num_tokens: 1, append_block_ids: vec![] };
    StepRequest { step_id, schedule: vec![scheduled], ..StepRequest::default() }
}

async fn open_run(client: &mut ShardClient<Channel>) -> (mpsc::Sender<StepRequest>, Streaming<StepResponse>) {
    let (steps, queued) = mpsc::channel(16);
    let answers = client.run(ReceiverStream::new(queued)).await.unwrap().into_inner();
    (steps, answers)
}

/// Asks until the end of the stream has come to the other side.
async fn step_when_free(
    client: &mut ShardClient<Channel>,
    step: &StepRequest,
) -> Result<StepResponse, tonic::Status> {
    loop {
        match client.step(step.clone()).await {
            Err(status) if status.code() == Code::FailedPrecondition => tokio::task::yield_now().await,
            outcome => return outcome.map(tonic::Response::into_inner),
        }
    }
}

#[tokio::test]
async fn a_router_on_another_host_reaches_a_shard_at_a_port() {
    let dir = tempfile::tempdir().unwrap();
    // Free as far as one can know.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let at_port = ShardPlacement { uds_path: None, listen: Some(free), ..placement(dir.path(), 0, 1) };
    let (stop, ended) = start(at_port);
    let channel = channel_to(&format!("http://{free}").parse().unwrap()).await;
    wait_for(&channel, ServingStatus::Serving).await;
    let mut client = shard_client(channel);
    client.warmup(WARMUP).await.unwrap();
    let (steps, mut answers) = open_run(&mut client).await;
    steps.send(first_step(1, 1)).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!((answer.step_id, answer.outputs.len()), (1, 1));

    let (_stop, second) =
        start(ShardPlacement { uds_path: None, listen: Some(free), ..placement(dir.path(), 0, 1) });
    let error = second.await.unwrap().unwrap_err().to_string();
    assert_eq!(error, format!("listening on {free}"));
    stop.send(()).unwrap();
    tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_person_can_drive_a_shard_step_by_step() {
    let (served, mut client) = Served::start().await;
    let info = client.info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.vocab_size, 384);

    let early = client.step(first_step(1, 1)).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition);
    let warm = client.warmup(WARMUP).await.unwrap().into_inner();
    assert_eq!(warm.num_blocks, 40);

    let answer = client.step(first_step(1, 1)).await.unwrap().into_inner();
    assert_eq!(answer.outputs[0].tokens.len(), 1);
    assert!(answer.step_us >= answer.forward_us + answer.sample_us);
    let answer = client.step(decode_step(2, 1)).await.unwrap().into_inner();
    assert_eq!(answer.outputs[0].tokens.len(), 1);
    let wrong = client.step(decode_step(3, 9)).await.unwrap_err();
    assert_eq!(
        (wrong.code(), wrong.message()),
        (Code::InvalidArgument, "schedule[0].sequence_id 9 is not known: admit it, in this step or before",)
    );
    let wrong =
        client.warmup(proto::v1::WarmupRequest { max_total_tokens: 1025, ..WARMUP }).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    served.stop().await;
}

#[tokio::test]
async fn steps_of_a_stream_may_be_queued_ahead_and_are_answered_in_order() {
    let (served, mut client) = Served::start().await;
    client.warmup(WARMUP).await.unwrap();
    let (steps, mut answers) = open_run(&mut client).await;
    // More than wait for the engine at once; the client does not read before all are sent.
    steps.send(first_step(1, 1)).await.unwrap();
    for step_id in 2..=16 {
        steps.send(decode_step(step_id, 1)).await.unwrap();
    }
    drop(steps);
    for step_id in 1..=16 {
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(answer.step_id, step_id);
        assert_eq!(answer.outputs[0].tokens.len(), 1);
    }
    assert!(answers.message().await.unwrap().is_none());
    served.stop().await;
}

#[tokio::test]
async fn there_is_one_stream_at_a_time_and_its_end_releases_all_sequences() {
    let (served, mut client) = Served::start().await;
    client.warmup(WARMUP).await.unwrap();
    let (steps, mut answers) = open_run(&mut client).await;
    steps.send(first_step(1, 1)).await.unwrap();
    answers.message().await.unwrap().unwrap();

    let second = client.run(tokio_stream::pending::<StepRequest>()).await.unwrap_err();
    assert_eq!(second.code(), Code::FailedPrecondition);
    let step = client.step(decode_step(2, 1)).await.unwrap_err();
    assert_eq!(step.code(), Code::FailedPrecondition);

    // The client goes away without a word.
    drop((steps, answers));
    let released = step_when_free(&mut client, &decode_step(2, 1)).await.unwrap_err();
    assert_eq!(released.code(), Code::InvalidArgument);
    let (steps, mut answers) = open_run(&mut client).await;
    steps.send(first_step(1, 1)).await.unwrap();
    assert_eq!(answers.next().await.unwrap().unwrap().step_id, 1);
    served.stop().await;
}

#[tokio::test]
async fn a_wrong_step_ends_its_stream_and_nothing_else() {
    let (served, mut client) = Served::start().await;
    client.warmup(WARMUP).await.unwrap();
    let (steps, mut answers) = open_run(&mut client).await;
    for step in [first_step(1, 1), decode_step(2, 7), decode_step(3, 1)] {
        steps.send(step).await.unwrap();
    }
    assert_eq!(answers.message().await.unwrap().unwrap().step_id, 1);
    assert_eq!(answers.message().await.unwrap_err().code(), Code::InvalidArgument);
    assert!(answers.message().await.unwrap().is_none());
    step_when_free(&mut client, &first_step(1, 1)).await.unwrap();
    served.stop().await;
}

#[tokio::test]
async fn a_shard_answers_before_its_model_is_loaded_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (_stop_0, _ended_0) = start(placement(dir.path(), 0, 2));
    // Rank 0 has not joined its group as long as rank 1 is not there.
    let channel_0 = channel(&dir.path().join("shard-0")).await;
    wait_for(&channel_0, ServingStatus::NotServing).await;
    let status = shard_client(channel_0.clone()).info(InfoRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);

    let (_stop_1, _ended_1) = start(placement(dir.path(), 1, 2));
    let channel_1 = channel(&dir.path().join("shard-1")).await;
    wait_for(&channel_0, ServingStatus::Serving).await;
    wait_for(&channel_1, ServingStatus::Serving).await;
    let info = shard_client(channel_1).info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.rank, info.world_size), (1, 2));
}

#[tokio::test]
async fn a_rank_that_computes_another_step_than_rank_0_says_so_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (_stop_0, _ended_0) = start(placement(dir.path(), 0, 2));
    let (_stop_1, ended_1) = start(placement(dir.path(), 1, 2));
    let mut clients = Vec::new();
    for rank in 0..2 {
        let channel = channel(&dir.path().join(format!("shard-{rank}"))).await;
        wait_for(&channel, ServingStatus::Serving).await;
        clients.push(shard_client(channel));
    }
    let (mut client_1, mut client_0) = (clients.pop().unwrap(), clients.pop().unwrap());
    let (warm_0, warm_1) = tokio::join!(client_0.warmup(WARMUP), client_1.warmup(WARMUP));
    assert_eq!(warm_0.unwrap().into_inner(), warm_1.unwrap().into_inner());

    let (right, wrong) = tokio::join!(client_0.step(first_step(1, 1)), client_1.step(first_step(2, 1)));
    right.unwrap();
    let status = wrong.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().contains("all ranks must get the same messages"), "{status}");
    let error = tokio::time::timeout(PATIENCE, ended_1).await.unwrap().unwrap().unwrap_err();
    assert!(error.to_string().starts_with("rank 1 computes step 2"), "{error}");
}

#[tokio::test]
async fn the_socket_is_private_and_goes_with_the_shard() {
    use std::os::unix::fs::PermissionsExt;
    let (served, mut client) = Served::start().await;
    client.warmup(WARMUP).await.unwrap();
    let mode = std::fs::metadata(served.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // A client that keeps its stream open does not hold the shard back.
    let (_steps, _answers) = open_run(&mut client).await;
    let (socket, dir) = (served.socket(), served.dir.path().to_owned());
    let Served { dir: _guard, stop, ended } = served;
    stop.send(()).unwrap();
    tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap().unwrap();
    assert!(!socket.exists());
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
}

#[tokio::test]
async fn a_shard_that_cannot_load_its_model_ends_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let check = async |change: fn(&mut ShardPlacement), expected: &str| {
        let mut placement = placement(dir.path(), 0, 1);
        change(&mut placement);
        let (_stop, ended) = start(placement);
        let error = tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap().unwrap_err();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    };
    check(|placement| placement.model_dir = "/nowhere".into(), "/nowhere/config.json").await;
    check(|placement| placement.rank = 1, "--rank is 1").await;
    check(|placement| placement.world_size = 2, "--rendezvous").await;
    check(|placement| placement.num_threads = Some(0), "--num-threads").await;
}

#[tokio::test]
async fn both_versions_of_reflection_list_all_services() {
    use tonic_reflection::pb::{v1, v1alpha};
    let expected = [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "lamplighter.shard.v1.Shard",
    ];
    let (served, _client) = Served::start().await;
    let channel = channel(&served.socket()).await;
    macro_rules! listed_by {
        ($version:ident) => {{
            use $version::server_reflection_request::MessageRequest;
            use $version::server_reflection_response::MessageResponse;
            let message_request = Some(MessageRequest::ListServices(String::new()));
            let request = $version::ServerReflectionRequest { host: String::new(), message_request };
            let mut client = $version::server_reflection_client::ServerReflectionClient::new(channel.clone());
            let mut answers =
                client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
            match answers.message().await.unwrap().unwrap().message_response {
                Some(MessageResponse::ListServicesResponse(list)) => {
                    let mut names: Vec<String> =
                        list.service.into_iter().map(|service| service.name).collect();
                    names.sort();
                    names
                }
                other => panic!("{other:?}"),
            }
        }};
    }
    assert_eq!(listed_by!(v1), expected);
    assert_eq!(listed_by!(v1alpha), expected);
    served.stop().await;
}

#[tokio::test]
async fn a_grammar_is_prepared_beside_an_open_stream_and_a_wrong_one_is_refused_with_its_reason() {
    let (served, mut client) = Served::start().await;
    client.warmup(WARMUP).await.unwrap();
    let (_steps, requests) = mpsc::channel::<StepRequest>(1);
    let _answers = client.run(ReceiverStream::new(requests)).await.unwrap();
    let prepare = |kind: GrammarKind, text: &str| {
        let mut client = client.clone();
        let request = PrepareGrammarRequest { kind: kind.into(), text: text.to_owned() };
        async move { client.prepare_grammar(request).await.map(|response| response.into_inner().grammar_id) }
    };
    let id = prepare(GrammarKind::Regex, "[a-z]+").await.unwrap();
    assert_ne!(id, 0);
    assert_eq!(prepare(GrammarKind::Regex, "[a-z]+").await.unwrap(), id);
    assert_ne!(prepare(GrammarKind::JsonSchema, "{}").await.unwrap(), id);
    let refused = [
        (GrammarKind::Unspecified, "{}", "kind"),
        (GrammarKind::JsonSchema, "{", "not JSON"),
        (GrammarKind::JsonSchema, r#"{"properties": {"a": {"not": {}}}}"#, "`not` at /properties/a"),
        (GrammarKind::Regex, "", "empty"),
    ];
    for (kind, text, part) in refused {
        let status = prepare(kind, text).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(part), "{part:?} is not in {status}");
    }
    served.stop().await;
}

#[tokio::test]
async fn a_model_directory_without_a_tokenizer_has_no_grammars() {
    let model = llama_with_broken_token(300);
    let dir = tempfile::tempdir().unwrap();
    let placement = ShardPlacement { model_dir: model.path().to_owned(), ..placement(dir.path(), 0, 1) };
    let (stop, ended) = start(placement);
    let channel = channel(&dir.path().join("shard-0")).await;
    wait_for(&channel, ServingStatus::Serving).await;
    let request = PrepareGrammarRequest { kind: GrammarKind::Regex.into(), text: "a".to_owned() };
    let status = shard_client(channel).prepare_grammar(request).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("tokenizer.json"), "{status}");
    stop.send(()).unwrap();
    ended.await.unwrap().unwrap();
}
