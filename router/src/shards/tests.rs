//! A group of ranks in this process, behind real sockets: one that works, and ones that fail in every way that is told
//! apart.

use std::collections::HashMap;
use std::time::Duration;

use grammar::{GrammarId, Source};
use proto::client::ShardAddress;
use proto::units::{AdapterIndex, BlockId, SequenceId, TokenId};
use proto::v1;
use proto::v1::shard_server::{Shard, ShardServer};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::{GrammarError, ShardError, ShardGroup, connect};
use crate::config::RouterConfig;
use crate::scheduler::{
    self, CacheNamespace, EndReason, Failure, NewSequence, Outcome, Sampling, Scheduled, SchedulerHandle,
    ServingInfo, Standing, StartError, StartPhase, Step, TokenEvent, TokenRequest,
};

const VOCAB_SIZE: u32 = 100;
const BLOCK_SIZE: u32 = 4;
const NUM_BLOCKS: u32 = 16;
const LONG: Duration = Duration::from_secs(30);

/// What a rank does with a step.
#[derive(Debug, Clone, Copy)]
enum Act {
    Answer,
    /// Closes its stream of answers.
    End,
    Fail,
    /// Answers another step than the one that was asked.
    WrongStep,
    /// Says nothing.
    Hang,
    /// Samples a token that is not in the vocabulary.
    WrongToken,
}

/// A rank that answers `good_steps` steps and does `then` with the next one. Its token at position `p` is `p`.
#[derive(Debug, Clone)]
struct Rank {
    info: v1::InfoResponse,
    num_blocks: u32,
    good_steps: usize,
    then: Act,
}

impl Rank {
    fn new(rank: u32, world_size: u32) -> Self {
        let info = v1::InfoResponse {
            rank,
            world_size,
            device: v1::Device::Cpu.into(),
            data_type: v1::DataType::F32.into(),
            block_size_tokens: BLOCK_SIZE,
            vocab_size: VOCAB_SIZE,
            max_position_embeddings: 48,
            num_layers: 1,
            eos_token_ids: vec![99],
            ..v1::InfoResponse::default()
        };
        Self { info, num_blocks: NUM_BLOCKS, good_steps: usize::MAX, then: Act::Answer }
    }
}

#[tonic::async_trait]
impl Shard for Rank {
    async fn info(&self, _: Request<v1::InfoRequest>) -> Result<Response<v1::InfoResponse>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn warmup(
        &self,
        request: Request<v1::WarmupRequest>,
    ) -> Result<Response<v1::WarmupResponse>, Status> {
        let request = request.into_inner();
        if request.kv_cache_tokens.is_some_and(|tokens| tokens < request.max_total_tokens.into()) {
            return Err(Status::invalid_argument("one sequence does not fit"));
        }
        let wanted = request.kv_cache_tokens.map(|tokens| tokens.div_ceil(BLOCK_SIZE.into()) as u32);
        let num_blocks = wanted.unwrap_or(u32::MAX).min(self.num_blocks);
        Ok(Response::new(v1::WarmupResponse { num_blocks, ..v1::WarmupResponse::default() }))
    }

    type RunStream = ReceiverStream<Result<v1::StepResponse, Status>>;

    async fn run(
        &self,
        steps: Request<Streaming<v1::StepRequest>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let (answers, stream) = mpsc::channel(4);
        tokio::spawn(answer_steps(self.clone(), steps.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn step(&self, _: Request<v1::StepRequest>) -> Result<Response<v1::StepResponse>, Status> {
        Err(Status::unimplemented("the router does not use it"))
    }

    async fn prepare_grammar(
        &self,
        request: Request<v1::PrepareGrammarRequest>,
    ) -> Result<Response<v1::PrepareGrammarResponse>, Status> {
        let text = request.into_inner().text;
        match &*text {
            "invalid" => Err(Status::invalid_argument("why")),
            "busy" => Err(Status::resource_exhausted("why")),
            "none" => Err(Status::failed_precondition("why")),
            "gone" => Err(Status::unavailable("why")),
            _ => Ok(Response::new(v1::PrepareGrammarResponse { grammar_id: text.len() as u64 })),
        }
    }
}

async fn answer_steps(
    rank: Rank,
    mut steps: Streaming<v1::StepRequest>,
    answers: mpsc::Sender<Result<v1::StepResponse, Status>>,
) {
    let mut sequences = HashMap::new();
    let mut answered = 0;
    while let Ok(Some(step)) = steps.message().await {
        let act = if answered < rank.good_steps { Act::Answer } else { rank.then };
        answered += 1;
        let mut answer = compute(&mut sequences, &step);
        if rank.info.rank > 0 {
            answer.outputs.clear();
        }
        let answer = match act {
            Act::Answer => Ok(answer),
            Act::End => return,
            Act::Fail => Err(Status::internal("the cable is loose")),
            Act::WrongStep => Ok(v1::StepResponse { step_id: step.step_id + 7, ..answer }),
            Act::Hang => continue,
            Act::WrongToken => {
                answer
                    .outputs
                    .iter_mut()
                    .flat_map(|output| &mut output.tokens)
                    .for_each(|token| token.token_id = 100);
                Ok(answer)
            }
        };
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}

/// What the mock keeps of a sequence: tokens computed, tokens known, and the length at which it ends.
type Lengths = (usize, usize, usize);

fn compute(sequences: &mut HashMap<u64, Lengths>, step: &v1::StepRequest) -> v1::StepResponse {
    for id in &step.release_sequence_ids {
        sequences.remove(id);
    }
    for new in &step.admit {
        let max_new_tokens = new.stopping.as_ref().expect("stopping is always sent").max_new_tokens;
        let end = new.prompt_tokens + max_new_tokens;
        let computed = new.computed_tokens as usize;
        sequences.insert(new.sequence_id, (computed, new.token_ids.len(), end as usize));
    }
    let mut outputs = Vec::new();
    for scheduled in &step.schedule {
        let (computed, known, end) =
            sequences.get_mut(&scheduled.sequence_id).expect("scheduled after admission");
        *computed += scheduled.num_tokens as usize;
        if computed == known {
            let token = v1::SampledToken { token_id: *known as u32, logprob: -0.5, top: Vec::new() };
            *known += 1;
            let finish_reason =
                if known == end { v1::FinishReason::Length } else { v1::FinishReason::Unspecified };
            outputs.push(v1::SequenceOutput {
                sequence_id: scheduled.sequence_id,
                tokens: vec![token],
                finish_reason: finish_reason.into(),
                ..v1::SequenceOutput::default()
            });
        }
    }
    v1::StepResponse { step_id: step.step_id, outputs, ..v1::StepResponse::default() }
}

/// Serves the ranks on sockets in a directory that lives as long as the test.
fn serve(ranks: Vec<Rank>) -> (TempDir, Vec<ShardAddress>) {
    let directory = tempfile::tempdir().unwrap();
    let addresses = ranks.into_iter().enumerate().map(|(index, rank)| {
        let path = directory.path().join(format!("shard-{index}"));
        let listener = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
        let server = tonic::transport::Server::builder().add_service(ShardServer::new(rank));
        tokio::spawn(server.serve_with_incoming(listener));
        ShardAddress::Unix(path)
    });
    let addresses = addresses.collect();
    (directory, addresses)
}

async fn group(ranks: Vec<Rank>) -> (TempDir, ShardGroup) {
    let (directory, addresses) = serve(ranks);
    let connected = connect(&addresses, LONG).await.unwrap();
    (directory, connected.run(2).await.unwrap())
}

fn config() -> RouterConfig {
    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        config: RouterConfig,
    }
    <Flags as clap::Parser>::parse_from(["router"]).config
}

fn request(prompt_tokens: u32, max_new_tokens: u32) -> TokenRequest {
    TokenRequest {
        prompt: (0..prompt_tokens).map(TokenId).collect(),
        sampling: Sampling {
            temperature: 0.7,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            typical_p: 0.8,
            seed: 5,
            repetition_penalty: 1.1,
            frequency_penalty: 0.2,
            presence_penalty: 0.3,
            logit_bias: vec![(TokenId(4), -1.0)],
        },
        max_new_tokens,
        ignore_eos: true,
        top_n_tokens: 2,
        prompt_logprobs: false,
        grammar: Some(GrammarId(5)),
        standing: Standing::default(),
        cache_namespace: CacheNamespace::default(),
    }
}

/// A step that admits sequence `id` with a prompt of four tokens and computes it.
fn first_step(id: u64) -> Step {
    let mut request = request(4, 3);
    request.cache_namespace.adapter = Some(AdapterIndex(2));
    Step {
        id,
        release: Vec::new(),
        admit: vec![NewSequence {
            id: SequenceId(id),
            tokens: request.prompt.clone(),
            request: request.into(),
            computed_tokens: 0,
            block_ids: Vec::new(),
            prompt_logprobs: true,
        }],
        schedule: vec![Scheduled { sequence: SequenceId(id), num_tokens: 4, new_blocks: vec![BlockId(9)] }],
    }
}

async fn start(
    ranks: Vec<Rank>,
    config: &RouterConfig,
) -> Result<(TempDir, SchedulerHandle, ServingInfo), StartError> {
    let (directory, addresses) = serve(ranks);
    let phase = watch::Sender::new(StartPhase::Connecting);
    let (handle, info) = scheduler::start(config, addresses, &phase).await?;
    assert_eq!(*phase.borrow(), StartPhase::Ready);
    Ok((directory, handle, info))
}

#[tokio::test]
async fn grammars_are_prepared_by_rank_0_and_refusals_are_told_apart() {
    let (_directory, addresses) = serve(vec![Rank::new(0, 1)]);
    let grammars = connect(&addresses, LONG).await.unwrap().grammars();
    assert_eq!(grammars.prepare(Source::regex("four")).await, Ok(GrammarId(4)));
    let why = || "why".to_owned();
    let expected = [
        ("invalid", GrammarError::Invalid(why())),
        ("busy", GrammarError::Busy(why())),
        ("none", GrammarError::Unsupported(why())),
        ("gone", GrammarError::Unavailable(why())),
    ];
    for (text, error) in expected {
        assert_eq!(grammars.prepare(Source::regex(text)).await, Err(error));
    }
    let no_id = grammars.prepare(Source::regex("")).await;
    assert!(matches!(no_id, Err(GrammarError::Unavailable(_))), "{no_id:?}");
}

#[test]
fn a_step_says_on_the_wire_what_it_says_here() {
    let message = super::to_proto::step(&Step { release: vec![SequenceId(3)], ..first_step(8) });
    assert_eq!((message.step_id, message.release_sequence_ids), (8, vec![3]));
    let expected = v1::NewSequence {
        sequence_id: 8,
        token_ids: vec![0, 1, 2, 3],
        prompt_tokens: 4,
        computed_tokens: 0,
        block_ids: Vec::new(),
        sampling: Some(v1::SamplingParameters {
            temperature: 0.7,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            typical_p: 0.8,
            seed: 5,
            repetition_penalty: 1.1,
            frequency_penalty: 0.2,
            presence_penalty: 0.3,
            logit_bias: vec![v1::LogitBias { token_id: 4, bias: -1.0 }],
        }),
        stopping: Some(v1::StoppingParameters { max_new_tokens: 3, ignore_eos: true }),
        top_n_tokens: 2,
        prompt_logprobs: true,
        adapter_index: Some(2),
        grammar_id: 5,
    };
    assert_eq!(message.admit, [expected]);
    let expected = v1::ScheduledSequence { sequence_id: 8, num_tokens: 4, append_block_ids: vec![9] };
    assert_eq!(message.schedule, [expected]);
}

#[tokio::test]
async fn a_step_is_answered_when_all_ranks_have_answered_it() {
    let (_directory, mut group) = group(vec![Rank::new(0, 2), Rank::new(1, 2)]).await;
    group.submit(&first_step(1)).unwrap();
    group.submit(&first_step(2)).unwrap();
    for id in [1, 2] {
        let answer = group.next_answer().await.unwrap();
        assert_eq!(answer.step, id);
        let [output] = answer.outputs.as_slice() else { panic!("{answer:?}") };
        assert_eq!(output.sequence, SequenceId(id));
        assert!(matches!(&output.outcome, Outcome::Sampled(tokens) if tokens[0].id == TokenId(4)));
    }
}

#[tokio::test]
async fn a_rank_that_fails_is_an_error_that_names_it() {
    let check = async |then: Act, part: &str| {
        let failing = Rank { good_steps: 1, then, ..Rank::new(1, 2) };
        let (_directory, mut group) = group(vec![Rank::new(0, 2), failing]).await;
        group.submit(&first_step(1)).unwrap();
        group.next_answer().await.unwrap();
        group.submit(&first_step(2)).unwrap();
        let error = group.next_answer().await.unwrap_err().to_string();
        assert!(error.contains("rank 1") && error.contains(part), "{error}");
    };
    check(Act::End, "ended the stream").await;
    check(Act::Fail, "the cable is loose").await;
    check(Act::WrongStep, "answered step 9 where step 2 was due").await;
}

#[tokio::test]
async fn a_rank_that_hangs_is_noticed_at_the_deadline() {
    let (_directory, mut group) =
        group(vec![Rank { good_steps: 0, then: Act::Hang, ..Rank::new(0, 1) }]).await;
    group.set_step_deadline(Duration::from_millis(20));
    group.submit(&first_step(1)).unwrap();
    let error = group.next_answer().await.unwrap_err();
    assert_eq!(error, ShardError::Deadline { rank: 0, method: "Run", seconds: 0 });
}

#[tokio::test]
async fn a_token_outside_of_the_vocabulary_is_an_error() {
    let wrong = Rank { good_steps: 0, then: Act::WrongToken, ..Rank::new(0, 1) };
    let (_directory, mut group) = group(vec![wrong]).await;
    group.submit(&first_step(1)).unwrap();
    let error = group.next_answer().await.unwrap_err().to_string();
    assert!(error.contains("token 100 from a vocabulary of 100"), "{error}");
}

#[tokio::test]
async fn a_shard_that_is_not_there_yet_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("late");
    let addresses = [ShardAddress::Unix(path.clone())];
    let error = connect(&addresses, Duration::from_millis(1)).await.err().unwrap();
    assert!(matches!(error, ShardError::Unreachable { rank: 0, .. }), "{error}");

    let bind = async {
        let listener = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
        tonic::transport::Server::builder()
            .add_service(ShardServer::new(Rank::new(0, 1)))
            .serve_with_incoming(listener)
            .await
    };
    // The connection is tried first, since `select!` is biased.
    tokio::select! {
        biased;
        connected = connect(&addresses, LONG) => assert_eq!(connected.unwrap().info().num_shards, 1),
        served = bind => panic!("the server ended: {served:?}"),
    }
}

#[tokio::test]
async fn requests_are_served_from_start_to_end() {
    let (_directory, handle, info) = start(vec![Rank::new(0, 2), Rank::new(1, 2)], &config()).await.unwrap();
    assert_eq!((info.kv_cache_tokens, info.max_total_tokens, info.max_input_tokens), (64, 48, 47));
    assert_eq!((info.max_batch_prefill_tokens, info.max_batch_size, info.num_shards), (512, 64, 2));

    let mut streams = handle.submit(vec![request(5, 3), request(30, 18)]).unwrap();
    for (stream, tokens) in streams.iter_mut().zip([5..8, 30..48]) {
        assert!(matches!(stream.next().await, Some(TokenEvent::Started { .. })));
        for position in tokens.clone() {
            let Some(TokenEvent::Token { token, end, .. }) = stream.next().await else {
                panic!("a token is missing")
            };
            assert_eq!(token.id, TokenId(position));
            assert_eq!(end, (position + 1 == tokens.end).then_some(EndReason::Length));
        }
        assert_eq!(stream.next().await, None);
    }
    handle.begin_drain();
    handle.drained().await;
}

#[tokio::test]
async fn when_a_rank_goes_away_requests_fail_and_the_door_closes() {
    let failing = Rank { good_steps: 3, then: Act::End, ..Rank::new(0, 1) };
    let (_directory, handle, _) = start(vec![failing], &config()).await.unwrap();
    let mut stream = handle.submit(vec![request(5, 10)]).unwrap().remove(0);
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    assert_eq!(events.len(), 1 + 3 + 1, "{events:?}");
    let Some(TokenEvent::Failed(Failure::Shards(reason))) = events.pop() else { panic!("it did not fail") };
    assert!(reason.contains("rank 0 ended the stream"), "{reason}");
    // The reader hears of it before the status is set, which happens on the scheduler's task.
    while !matches!(handle.status(), scheduler::Status::Failed(_)) {
        tokio::task::yield_now().await;
    }
    assert_eq!(handle.submit(vec![request(5, 10)]).unwrap_err(), scheduler::SubmitError::Unavailable);
}

#[tokio::test]
async fn limits_that_contradict_each_other_are_refused_at_the_start() {
    let check = async |change: fn(&mut RouterConfig), part: &str| {
        let mut config = config();
        change(&mut config);
        let error = start(vec![Rank::new(0, 1)], &config).await.expect_err("it does not start").to_string();
        assert!(error.contains(part), "{error}");
    };
    check(|config| config.max_total_tokens = Some(49), "the model's positions end at 48").await;
    check(
        |config| (config.max_input_tokens, config.max_total_tokens) = (Some(20), Some(20)),
        "lower --max-input",
    )
    .await;
    check(|config| config.max_input_tokens = Some(48), "--max-input-tokens is 48").await;
    check(|config| config.max_batch_size = Some(usize::MAX), "--max-batch-size is").await;
    check(|config| config.max_concurrent_requests = usize::MAX, "--max-concurrent-requests is").await;
    check(
        |config| (config.max_total_tokens, config.max_batch_total_tokens) = (Some(40), Some(32)),
        "the KV cache holds 32 tokens",
    )
    .await;

    let small = Rank { num_blocks: 5, ..Rank::new(0, 1) };
    let (_directory, _handle, info) = start(vec![small.clone()], &config()).await.unwrap();
    assert_eq!((info.max_total_tokens, info.max_input_tokens), (20, 19), "the cache is the limit");
    let shared = RouterConfig { max_batch_total_tokens: Some(24), ..config() };
    let (_directory, _handle, info) = start(vec![Rank::new(0, 1)], &shared).await.unwrap();
    assert_eq!((info.kv_cache_tokens, info.max_total_tokens), (24, 24), "so is one that was asked for");
    let config = RouterConfig { max_total_tokens: Some(21), ..config() };
    let error = start(vec![small], &config).await.err().unwrap().to_string();
    assert!(error.contains("--max-total-tokens is 21 but the KV cache holds 20 tokens"), "{error}");
    let none = Rank { num_blocks: 0, ..Rank::new(0, 1) };
    let error = start(vec![none], &config).await.err().unwrap().to_string();
    assert!(error.contains("no memory for a single KV block"), "{error}");
}
