//! A shard that keeps count and computes nothing.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::v1;
use proto::v1::shard_server::{Shard, ShardServer};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

const VOCAB_SIZE: u32 = 2048;
const BLOCK_SIZE: u32 = 16;
const NUM_BLOCKS: u32 = 1 << 18;

/// A shard and what it saw.
#[derive(Debug, Clone, Default)]
pub(crate) struct NullShard {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    steps: AtomicU64,
    rows: AtomicU64,
    step_us: AtomicU64,
}

/// Steps and their rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) steps: u64,
    pub(crate) rows: u64,
}

impl NullShard {
    /// Serves on a socket for as long as the runtime lives.
    pub(crate) fn listen(&self, socket: &Path) -> anyhow::Result<()> {
        let listener = UnixListenerStream::new(UnixListener::bind(socket)?);
        let server = ShardServer::new(self.clone()).max_decoding_message_size(16 << 20);
        tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(listener));
        Ok(())
    }

    /// How long each step takes from now on; zero: no time at all.
    pub(crate) fn set_step_time(&self, time: Duration) {
        self.shared.step_us.store(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// Since the beginning.
    pub(crate) fn counts(&self) -> Counts {
        let Shared { steps, rows, .. } = &*self.shared;
        Counts { steps: steps.load(Ordering::Relaxed), rows: rows.load(Ordering::Relaxed) }
    }
}

#[tonic::async_trait]
impl Shard for NullShard {
    async fn info(&self, _: Request<v1::InfoRequest>) -> Result<Response<v1::InfoResponse>, Status> {
        Ok(Response::new(v1::InfoResponse {
            rank: 0,
            world_size: 1,
            device: v1::Device::Cpu.into(),
            data_type: v1::DataType::Bf16.into(),
            block_size_tokens: BLOCK_SIZE,
            vocab_size: VOCAB_SIZE,
            max_position_embeddings: 1 << 17,
            num_layers: 1,
            eos_token_ids: vec![2],
            ..v1::InfoResponse::default()
        }))
    }

    async fn warmup(&self, _: Request<v1::WarmupRequest>) -> Result<Response<v1::WarmupResponse>, Status> {
        Ok(Response::new(v1::WarmupResponse { num_blocks: NUM_BLOCKS, ..v1::WarmupResponse::default() }))
    }

    type RunStream = ReceiverStream<Result<v1::StepResponse, Status>>;

    async fn run(
        &self,
        steps: Request<Streaming<v1::StepRequest>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let (answers, stream) = mpsc::channel(4);
        tokio::spawn(answer_steps(Arc::clone(&self.shared), steps.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn step(&self, _: Request<v1::StepRequest>) -> Result<Response<v1::StepResponse>, Status> {
        Err(Status::unimplemented("the router does not use it"))
    }

    async fn prepare_grammar(
        &self,
        _: Request<v1::PrepareGrammarRequest>,
    ) -> Result<Response<v1::PrepareGrammarResponse>, Status> {
        Err(Status::failed_precondition("there are no grammars here"))
    }
}

async fn answer_steps(
    shared: Arc<Shared>,
    mut steps: Streaming<v1::StepRequest>,
    answers: mpsc::Sender<Result<v1::StepResponse, Status>>,
) {
    let mut sequences = HashMap::new();
    while let Ok(Some(step)) = steps.message().await {
        let step_us = shared.step_us.load(Ordering::Relaxed);
        if step_us > 0 {
            tokio::time::sleep(Duration::from_micros(step_us)).await;
        }
        shared.steps.fetch_add(1, Ordering::Relaxed);
        shared.rows.fetch_add(step.schedule.len() as u64, Ordering::Relaxed);
        let answer = v1::StepResponse { step_us, forward_us: step_us, ..count(&mut sequences, &step) };
        if answers.send(Ok(answer)).await.is_err() {
            return;
        }
    }
}

struct Lengths {
    known: u32,
    computed: u32,
    end: u32,
}

fn count(sequences: &mut HashMap<u64, Lengths>, step: &v1::StepRequest) -> v1::StepResponse {
    for id in &step.release_sequence_ids {
        sequences.remove(id);
    }
    for new in &step.admit {
        let max_new_tokens = new.stopping.as_ref().map_or(1, |stopping| stopping.max_new_tokens);
        let known = new.token_ids.len() as u32;
        let end = new.prompt_tokens + max_new_tokens;
        sequences.insert(new.sequence_id, Lengths { known, computed: new.computed_tokens, end });
    }
    let mut answer = v1::StepResponse { step_id: step.step_id, ..v1::StepResponse::default() };
    for scheduled in &step.schedule {
        let id = scheduled.sequence_id;
        let sequence = sequences.get_mut(&id).expect("a scheduled sequence was admitted");
        if sequence.known == sequence.end {
            answer.skipped_sequence_ids.push(id);
            continue;
        }
        sequence.computed += scheduled.num_tokens;
        if sequence.computed < sequence.known {
            continue;
        }
        // Ids of words, so that each token is text.
        let token_id = 400 + (sequence.known * 37 + id as u32 * 101) % 1600;
        sequence.known += 1;
        let ended = sequence.known == sequence.end;
        let finish_reason = if ended { v1::FinishReason::Length } else { v1::FinishReason::Unspecified };
        answer.outputs.push(v1::SequenceOutput {
            sequence_id: id,
            tokens: vec![v1::SampledToken { token_id, logprob: -0.5, top: Vec::new() }],
            finish_reason: finish_reason.into(),
            prompt_tokens: Vec::new(),
            ..v1::SequenceOutput::default()
        });
    }
    answer
}
