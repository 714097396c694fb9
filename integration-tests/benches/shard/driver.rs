//! A shard process, and steps that keep it busy.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use proto::client::{ShardAddress, connect, shard_client};
use proto::v1::shard_client::ShardClient;
use proto::v1::{
    InfoRequest, InfoResponse, NewSequence, SamplingParameters, ScheduledSequence, StepRequest, StepResponse,
    StoppingParameters, WarmupRequest,
};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Steps of a measurement of decoding.
pub(crate) const DECODE_STEPS: usize = 64;
/// Steps before it that do not count.
const WARM_STEPS: usize = 8;
/// How often prompts are computed; the best counts.
const PREFILLS: usize = 4;
/// Loading 16 GB from a cold disk takes a while.
const READY_WITHIN: Duration = Duration::from_mins(5);

/// The largest work that a shard is prepared for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) max_sequences: usize,
    /// Tokens of a sequence.
    pub(crate) max_len: usize,
    pub(crate) max_step_tokens: usize,
    /// Steps sent before the first of them is answered.
    pub(crate) in_flight: usize,
}

/// What a step took on average; where the best of several was taken, that one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// Computed in a step.
    pub(crate) tokens: usize,
    /// From answer to answer.
    pub(crate) step_s: f64,
    /// As the shard says, as is the next.
    pub(crate) forward_s: f64,
    pub(crate) sample_s: f64,
}

/// A shard with the one `Run` stream that it has.
pub(crate) struct Driver {
    process: Child,
    steps: mpsc::Sender<StepRequest>,
    answers: Streaming<StepResponse>,
    load: Load,
    blocks_per_sequence: usize,
    last_step_id: u64,
    pub(crate) num_blocks: usize,
    pub(crate) kv_bytes_per_token: f64,
    pub(crate) weight_bytes: u64,
    /// From the start of the process to when its weights are where it computes.
    pub(crate) loaded_s: f64,
    /// The same to the end of its warmup.
    pub(crate) ready_s: f64,
    /// Holds the socket.
    _directory: tempfile::TempDir,
}

impl Driver {
    /// Starts a shard for `model` and prepares it for `load`.
    pub(crate) async fn start(model: &Path, flags: &[String], load: Load) -> anyhow::Result<Self> {
        let started = Instant::now();
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("shard-0");
        let mut process = Command::new(executable()?)
            .arg("shard")
            .arg("--model-dir")
            .arg(model)
            .arg("--uds-path")
            .arg(&socket)
            .args(flags)
            .kill_on_drop(true)
            .spawn()?;
        let (mut client, info) = reach(&mut process, &socket, started).await?;
        let loaded_s = started.elapsed().as_secs_f64();
        let block_size = info.block_size_tokens as usize;
        let blocks_per_sequence = load.max_len.div_ceil(block_size);
        let warmup = WarmupRequest {
            max_step_tokens: load.max_step_tokens as u32,
            max_step_sequences: load.max_sequences as u32,
            max_total_tokens: load.max_len as u32,
            kv_cache_tokens: Some((load.max_sequences * blocks_per_sequence * block_size) as u64),
        };
        let num_blocks = client.warmup(warmup).await.context("warmup")?.into_inner().num_blocks as usize;
        let (steps, receiver) = mpsc::channel(load.in_flight);
        let answers = client.run(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self {
            process,
            steps,
            answers,
            load,
            blocks_per_sequence,
            last_step_id: 0,
            num_blocks,
            kv_bytes_per_token: info.kv_bytes_per_token as f64,
            weight_bytes: info.weight_bytes,
            loaded_s,
            ready_s: started.elapsed().as_secs_f64(),
            _directory: directory,
        })
    }

    /// Decodes `batch` sequences behind prompts of `context` tokens.
    pub(crate) async fn decode(&mut self, batch: usize, context: usize) -> anyhow::Result<Rate> {
        let mut step = self.admit(batch, context);
        // Prompts in pieces that a step holds, then a token for each sequence.
        let mut left: Vec<_> = std::mem::take(&mut step.schedule);
        while !left.is_empty() {
            let mut budget = self.load.max_step_tokens as u32;
            left.retain_mut(|one| {
                let taken = one.num_tokens.min(budget);
                budget -= taken;
                if taken > 0 {
                    step.schedule.push(ScheduledSequence { num_tokens: taken, ..one.clone() });
                    one.append_block_ids.clear();
                    one.num_tokens -= taken;
                }
                one.num_tokens > 0
            });
            self.send(std::mem::take(&mut step)).await?;
            self.answer().await?;
        }
        let decode = || StepRequest {
            schedule: (0..batch as u64)
                .map(|sequence_id| ScheduledSequence {
                    sequence_id,
                    num_tokens: 1,
                    append_block_ids: Vec::new(),
                })
                .collect(),
            ..StepRequest::default()
        };
        let (mut start, mut forward_us, mut sample_us) = (Instant::now(), 0, 0);
        let mut sent = 0;
        for step in 0..DECODE_STEPS {
            while sent < DECODE_STEPS && sent < step + self.load.in_flight {
                self.send(decode()).await?;
                sent += 1;
            }
            let answer = self.answer().await?;
            anyhow::ensure!(
                answer.outputs.len() == batch,
                "{} of {batch} sequences got a token",
                answer.outputs.len()
            );
            if step + 1 == WARM_STEPS {
                start = Instant::now();
            } else if step >= WARM_STEPS {
                forward_us += answer.forward_us;
                sample_us += answer.sample_us;
            }
        }
        let steps = (DECODE_STEPS - WARM_STEPS) as f64;
        let rate = Rate {
            tokens: batch,
            step_s: start.elapsed().as_secs_f64() / steps,
            forward_s: forward_us as f64 / 1e6 / steps,
            sample_s: sample_us as f64 / 1e6 / steps,
        };
        self.release(batch).await?;
        Ok(rate)
    }

    /// Computes `sequences` prompts of `tokens` in one step.
    pub(crate) async fn prefill(&mut self, sequences: usize, tokens: usize) -> anyhow::Result<Rate> {
        let mut best: Option<Rate> = None;
        for _ in 0..PREFILLS {
            let step = self.admit(sequences, tokens);
            let start = Instant::now();
            self.send(step).await?;
            let answer = self.answer().await?;
            let rate = Rate {
                tokens: sequences * tokens,
                step_s: start.elapsed().as_secs_f64(),
                forward_s: answer.forward_us as f64 / 1e6,
                sample_s: answer.sample_us as f64 / 1e6,
            };
            best = best.filter(|best| best.step_s <= rate.step_s).or(Some(rate));
            self.release(sequences).await?;
        }
        best.context("no prefill was measured")
    }

    /// Ends the shard.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.process.kill().await?;
        Ok(())
    }

    /// A step that admits `sequences` and schedules their prompts whole, with all blocks that they will need.
    fn admit(&self, sequences: usize, tokens: usize) -> StepRequest {
        let new = |sequence_id: usize| NewSequence {
            sequence_id: sequence_id as u64,
            token_ids: (0..tokens)
                .map(|position| (3 + (position * 131 + sequence_id * 977) % 20_000) as u32)
                .collect(),
            prompt_tokens: tokens as u32,
            sampling: Some(SamplingParameters {
                top_p: 1.0,
                typical_p: 1.0,
                repetition_penalty: 1.0,
                ..SamplingParameters::default()
            }),
            stopping: Some(StoppingParameters {
                max_new_tokens: (self.load.max_len - tokens) as u32,
                ignore_eos: true,
            }),
            ..NewSequence::default()
        };
        let blocks = |sequence: usize| {
            // Neighbours in a sequence are not neighbours in memory, as after some time of service.
            let first = sequence * self.blocks_per_sequence;
            let mut ids: Vec<u32> = (first..first + self.blocks_per_sequence).map(|id| id as u32).collect();
            ids.reverse();
            ids
        };
        StepRequest {
            admit: (0..sequences).map(new).collect(),
            schedule: (0..sequences)
                .map(|sequence| ScheduledSequence {
                    sequence_id: sequence as u64,
                    num_tokens: tokens as u32,
                    append_block_ids: blocks(sequence),
                })
                .collect(),
            ..StepRequest::default()
        }
    }

    async fn release(&mut self, sequences: usize) -> anyhow::Result<()> {
        let release_sequence_ids = (0..sequences as u64).collect();
        self.send(StepRequest { release_sequence_ids, ..StepRequest::default() }).await?;
        self.answer().await.map(|_| ())
    }

    async fn send(&mut self, step: StepRequest) -> anyhow::Result<()> {
        self.last_step_id += 1;
        self.steps
            .send(StepRequest { step_id: self.last_step_id, ..step })
            .await
            .context("the shard has gone")
    }

    async fn answer(&mut self) -> anyhow::Result<StepResponse> {
        self.answers.message().await?.context("the shard has closed its stream")
    }
}

/// Waits until the shard has loaded its model.
async fn reach(
    process: &mut Child,
    socket: &Path,
    started: Instant,
) -> anyhow::Result<(ShardClient<Channel>, InfoResponse)> {
    let address = ShardAddress::Unix(socket.to_owned());
    loop {
        if let Ok(channel) = connect(&address, Duration::from_secs(1)).await {
            let mut client = shard_client(channel);
            match client.info(InfoRequest {}).await {
                Ok(info) => return Ok((client, info.into_inner())),
                Err(status) if status.code() == tonic::Code::Unavailable => {}
                Err(status) => return Err(status.into()),
            }
        }
        if let Some(status) = process.try_wait()? {
            anyhow::bail!("the shard ended before it was ready: {status}");
        }
        anyhow::ensure!(started.elapsed() < READY_WITHIN, "the shard is not ready after {READY_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// `target/release/lamplighter`, beside the directory of this benchmark.
fn executable() -> anyhow::Result<std::path::PathBuf> {
    let this = std::env::current_exe()?;
    let path =
        this.ancestors().nth(2).context("a benchmark lies in target/release/deps")?.join("lamplighter");
    anyhow::ensure!(path.is_file(), "{} is missing: run `make bench-shard`, which builds it", path.display());
    Ok(path)
}
