//! The engine: from a `StepRequest` to its `StepResponse`.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kernels::{Communicator, Context, DType};
use proto::v1::{
    DataType, Device, FinishReason, InfoResponse, SampledToken, SequenceOutput, StepRequest, StepResponse,
    WarmupRequest, WarmupResponse,
};

use super::BLOCK_SIZE_TOKENS;
use super::batch::{Batch, LogitUse};
use super::sequence::{Sequence, Sequences};
use super::validate::{Limits, StepValidator, check_warmup};
use super::warmup::CacheNeeds;
use crate::decoder::{Decoder, ForwardInput, KvCache, StepLimits};
use crate::error::Error;
use crate::models::Model;
use crate::sampling::{LogSoftmax, NotFinite, Scratch};

/// Owner of model, KV cache and sequences of one rank.
pub struct Engine {
    rank: RankModel,
    /// What `Warmup` makes.
    serving: Option<Serving>,
    run: RunState,
}

/// This rank's part of the model, and what it is computed on.
struct RankModel {
    model: Model,
    context: Context,
    communicator: Box<dyn Communicator>,
}

/// What has been promised to one `Run` stream.
#[derive(Debug, Default)]
struct RunState {
    last_step_id: Option<u64>,
    refused: bool,
}

/// Where a step comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The one open `Run` stream: step ids increase, and nothing follows a refused step.
    Run,
    /// A `Step` of its own.
    Unary,
}

struct Serving {
    limits: Limits,
    cache: KvCache,
    sequences: Sequences,
    validator: StepValidator,
    batch: Batch,
    chooser: Chooser,
    /// Rank 0's verdicts, one for each entry of the batch, behind a head of two words: see `share_verdicts`.
    shared: Vec<u32>,
}

/// Chooses tokens, rows spread over the threads.
struct Chooser {
    /// One for each thread.
    workers: Vec<Mutex<Worker>>,
    /// Of the batch, by logit row.
    results: Vec<Result<SampledToken, NotFinite>>,
}

#[derive(Default)]
struct Worker {
    scratch: Scratch,
    results: Vec<(usize, Result<SampledToken, NotFinite>)>,
}

/// What rank 0 says about an entry where it is not a token id.
const NO_TOKEN: u32 = u32::MAX - 1;
const INVALID_LOGITS: u32 = u32::MAX;
/// Step id (its lower half) and number of entries, by which ranks notice that they compute different steps.
const SHARED_HEAD_LEN: usize = 2;

impl Engine {
    /// Takes a model and the means to compute it. `communicator` has the rank and the world size that the model was
    /// loaded for.
    pub fn new(model: Model, context: Context, communicator: Box<dyn Communicator>) -> Self {
        Self { rank: RankModel { model, context, communicator }, serving: None, run: RunState::default() }
    }

    /// What this shard serves.
    pub fn info(&self) -> InfoResponse {
        let Model { decoder, eos_token_ids, num_parameters, weight_bytes, dtype, kv_dtype } =
            &self.rank.model;
        let spec = decoder.spec();
        // A window is a property of the model only where all layers have the same.
        let window = spec.layers.first().and_then(|layer| layer.window);
        let everywhere = spec.layers.iter().all(|layer| layer.window == window);
        InfoResponse {
            rank: self.rank.communicator.rank() as u32,
            world_size: self.rank.communicator.world_size() as u32,
            device: Device::Cpu.into(),
            data_type: data_type(*dtype).into(),
            block_size_tokens: BLOCK_SIZE_TOKENS as u32,
            vocab_size: spec.vocab_size as u32,
            max_position_embeddings: spec.max_position_embeddings as u32,
            sliding_window_tokens: window.filter(|_| everywhere).map(|window| window as u32),
            eos_token_ids: eos_token_ids.clone(),
            num_layers: spec.layers.len() as u32,
            num_parameters: *num_parameters,
            kv_bytes_per_token: decoder.kv_bytes_per_token(*kv_dtype) as u64,
            weight_bytes: *weight_bytes,
        }
    }

    /// Sizes and allocates KV cache and step buffers, after releasing those of an earlier call with all sequences.
    ///
    /// One small step is computed on all ranks, so that a group that cannot compute does not become ready. A full-size
    /// step would show no more on a CPU: the system gives pages when they are first touched, and the cache was sized
    /// by what it says is available.
    pub fn warmup(&mut self, request: &WarmupRequest) -> Result<WarmupResponse, Error> {
        let spec = self.rank.model.decoder.spec();
        let (vocab_size, max_position_embeddings) = (spec.vocab_size, spec.max_position_embeddings);
        check_warmup(request, max_position_embeddings)?;
        self.serving = None;
        let bytes_per_token = self.rank.model.decoder.kv_bytes_per_token(self.rank.model.kv_dtype);
        let world_size = self.rank.communicator.world_size();
        let needs = CacheNeeds { block_size: BLOCK_SIZE_TOKENS, bytes_per_token, world_size };
        let limits = Limits {
            vocab_size,
            block_size: BLOCK_SIZE_TOKENS,
            num_blocks: needs.num_blocks(request)?,
            max_step_tokens: request.max_step_tokens as usize,
            max_step_sequences: request.max_step_sequences as usize,
            max_total_tokens: request.max_total_tokens as usize,
        };
        let mut serving = Serving::new(limits, &mut self.rank);
        serving.try_out(&mut self.rank)?;
        let response = WarmupResponse {
            num_blocks: limits.num_blocks as u32,
            kv_cache_bytes: serving.cache.size_in_bytes() as u64,
            workspace_bytes: self.rank.model.decoder.workspace_bytes() as u64,
        };
        self.serving = Some(serving);
        Ok(response)
    }

    /// Computes one step. A step that is refused ([`Error::is_fatal`] is false) changes nothing.
    pub fn step(&mut self, request: StepRequest, origin: Origin) -> Result<StepResponse, Error> {
        if origin == Origin::Unary {
            return self.compute(request, None);
        }
        if self.run.refused {
            return Err(Error::RunRefused);
        }
        let step_id = request.step_id;
        let outcome = self.compute(request, self.run.last_step_id);
        match &outcome {
            Ok(_) => self.run.last_step_id = Some(step_id),
            Err(_) => self.run.refused = true,
        }
        outcome
    }

    /// Forgets all sequences: the `Run` stream has ended.
    pub fn end_run(&mut self) {
        self.run = RunState::default();
        if let Some(serving) = &mut self.serving {
            serving.sequences.clear();
        }
    }

    fn compute(
        &mut self,
        request: StepRequest,
        previous_step_id: Option<u64>,
    ) -> Result<StepResponse, Error> {
        let serving = self.serving.as_mut().ok_or(Error::NotWarmedUp)?;
        serving.validator.check(&request, previous_step_id, &serving.sequences, &serving.limits)?;
        serving.step(request, &mut self.rank)
    }
}

impl Serving {
    fn new(limits: Limits, rank: &mut RankModel) -> Self {
        rank.model.decoder.prepare(StepLimits {
            max_step_tokens: limits.max_step_tokens,
            max_logit_rows: limits.max_logit_rows(),
            max_position: limits.max_total_tokens,
        });
        let Model { decoder, kv_dtype, .. } = &rank.model;
        Self {
            limits,
            cache: KvCache::new(decoder, limits.num_blocks, limits.block_size, *kv_dtype),
            sequences: Sequences::new(),
            validator: StepValidator::default(),
            batch: Batch::default(),
            chooser: Chooser::new(rank.context.num_threads()),
            shared: vec![0; SHARED_HEAD_LEN + limits.max_step_sequences],
        }
    }

    /// Computes a few tokens in the first blocks. Whoever gets these blocks later writes them before reading.
    fn try_out(&mut self, rank: &mut RankModel) -> Result<(), Error> {
        let num_tokens =
            self.limits.max_step_tokens.min(self.limits.max_total_tokens).min(self.limits.block_size) as u32;
        let input = ForwardInput {
            token_ids: (0..num_tokens).map(|index| index % self.limits.vocab_size as u32).collect(),
            positions: (0..num_tokens).collect(),
            slot_mapping: (0..num_tokens).collect(),
            query_starts: vec![0, num_tokens],
            kv_lens: vec![num_tokens],
            block_tables: vec![0],
            max_blocks: 1,
        };
        rank.forward(&input, &mut self.cache)?;
        let RankModel { model, context, communicator } = rank;
        let logits = model.decoder.logits(context, communicator.as_mut(), &[num_tokens - 1])?;
        if LogSoftmax::of(logits.row::<f32>(0)).is_err() {
            tracing::warn!(
                "the logits of a test step are not finite: is the checkpoint or the chosen dtype broken?"
            );
        }
        communicator.broadcast(&mut self.shared)?;
        Ok(())
    }

    /// Computes a step that has been validated.
    fn step(&mut self, request: StepRequest, rank: &mut RankModel) -> Result<StepResponse, Error> {
        let started = Instant::now();
        for sequence_id in &request.release_sequence_ids {
            self.sequences.remove(sequence_id);
        }
        self.sequences.extend(request.admit.into_iter().map(|new| (new.sequence_id, Sequence::new(new))));
        for scheduled in &request.schedule {
            let sequence = self.sequences.get_mut(&scheduled.sequence_id).expect("validated: it is known");
            sequence.block_ids.extend_from_slice(&scheduled.append_block_ids);
        }
        self.batch.fill(&request.schedule, &self.sequences, self.limits.block_size);
        let mut times = Times::default();
        let outputs = match self.batch.entries.len() {
            0 => Vec::new(),
            _ => self.compute_batch(request.step_id, rank, &mut times)?,
        };
        let step_us = started.elapsed().as_micros() as u64;
        tracing::trace!(
            step_id = request.step_id,
            num_sequences = self.batch.entries.len(),
            num_tokens = self.batch.input.token_ids.len(),
            step_us,
            "step"
        );
        Ok(StepResponse {
            step_id: request.step_id,
            outputs,
            skipped_sequence_ids: self.batch.skipped.clone(),
            step_us,
            forward_us: times.forward.as_micros() as u64,
            sample_us: times.sample.as_micros() as u64,
        })
    }

    fn compute_batch(
        &mut self,
        step_id: u64,
        rank: &mut RankModel,
        times: &mut Times,
    ) -> Result<Vec<SequenceOutput>, Error> {
        let started = Instant::now();
        rank.forward(&self.batch.input, &mut self.cache)?;
        times.forward += started.elapsed();
        // Pieces bound the memory of logits, whatever number of prompt tokens wants theirs.
        self.chooser.results.clear();
        let piece_len = self.limits.max_logit_rows();
        let pieces = self.batch.logit_rows.chunks(piece_len).zip(self.batch.uses.chunks(piece_len));
        for (rows, uses) in pieces {
            let started = Instant::now();
            let RankModel { model, context, communicator } = &mut *rank;
            let logits = model.decoder.logits(context, communicator.as_mut(), rows)?;
            times.forward += started.elapsed();
            if communicator.rank() == 0 {
                let started = Instant::now();
                self.chooser.choose(context, logits, uses, &self.batch, &self.sequences);
                times.sample += started.elapsed();
            }
        }
        let mut outputs = self.collect_outputs();
        self.share_verdicts(step_id, rank)?;
        self.advance(&mut outputs, &rank.model.eos_token_ids);
        outputs.retain(|output| {
            !output.tokens.is_empty() || !output.prompt_tokens.is_empty() || output.finish_reason != 0
        });
        if rank.communicator.rank() != 0 {
            outputs.clear();
        }
        Ok(outputs)
    }

    /// Gathers by entry what was chosen by row, and notes the verdict on each entry in `shared`.
    fn collect_outputs(&mut self) -> Vec<SequenceOutput> {
        let entries = &self.batch.entries;
        let mut outputs: Vec<SequenceOutput> = entries
            .iter()
            .map(|entry| SequenceOutput { sequence_id: entry.sequence_id, ..SequenceOutput::default() })
            .collect();
        let verdicts = &mut self.shared[SHARED_HEAD_LEN..];
        verdicts.fill(NO_TOKEN);
        for (result, logit_use) in self.chooser.results.drain(..).zip(&self.batch.uses) {
            match (result, *logit_use) {
                (Ok(token), LogitUse::Sample { entry }) => {
                    if verdicts[entry] != INVALID_LOGITS {
                        verdicts[entry] = token.token_id;
                        outputs[entry].tokens.push(token);
                    }
                }
                (Ok(token), LogitUse::PromptToken { entry, .. }) => outputs[entry].prompt_tokens.push(token),
                (Err(NotFinite), LogitUse::Sample { entry } | LogitUse::PromptToken { entry, .. }) => {
                    verdicts[entry] = INVALID_LOGITS;
                }
            }
        }
        outputs
    }

    /// Gives rank 0's verdicts to all ranks, in one message of fixed length.
    fn share_verdicts(&mut self, step_id: u64, rank: &mut RankModel) -> Result<(), Error> {
        let head = [step_id as u32, self.batch.entries.len() as u32];
        self.shared[..SHARED_HEAD_LEN].copy_from_slice(&head);
        rank.communicator.broadcast(&mut self.shared)?;
        if self.shared[..SHARED_HEAD_LEN] == head {
            return Ok(());
        }
        Err(Error::RanksDisagree {
            rank: rank.communicator.rank(),
            step_id,
            num_entries: self.batch.entries.len(),
        })
    }

    /// Moves all sequences of the batch on by the verdicts, the same way on all ranks.
    fn advance(&mut self, outputs: &mut [SequenceOutput], eos_token_ids: &[u32]) {
        let verdicts = &self.shared[SHARED_HEAD_LEN..];
        for ((entry, verdict), output) in self.batch.entries.iter().zip(verdicts).zip(outputs) {
            let sequence = self.sequences.get_mut(&entry.sequence_id).expect("it was in the batch");
            sequence.computed_len += entry.num_tokens;
            let reason = match *verdict {
                NO_TOKEN => FinishReason::Unspecified,
                INVALID_LOGITS => {
                    sequence.finished = true;
                    FinishReason::InvalidLogits
                }
                token_id => sequence.push(token_id, eos_token_ids),
            };
            output.finish_reason = reason.into();
        }
    }
}

/// Time spent in the parts of a step.
#[derive(Debug, Default)]
struct Times {
    forward: Duration,
    sample: Duration,
}

impl RankModel {
    fn forward(&mut self, input: &ForwardInput, cache: &mut KvCache) -> Result<(), Error> {
        let Self { model, context, communicator } = self;
        Ok(Decoder::forward(&mut model.decoder, context, communicator.as_mut(), input, cache)?)
    }
}

impl Limits {
    /// Rows of one logits computation: enough for all sequences of a step to choose a token.
    fn max_logit_rows(&self) -> usize {
        self.max_step_sequences.min(self.max_step_tokens)
    }
}

impl Chooser {
    fn new(num_threads: usize) -> Self {
        Self { workers: (0..num_threads).map(|_| Mutex::default()).collect(), results: Vec::new() }
    }

    /// Appends to `results` one for each row of `logits`.
    fn choose(
        &mut self,
        context: &Context,
        logits: kernels::View<'_>,
        uses: &[LogitUse],
        batch: &Batch,
        sequences: &Sequences,
    ) {
        let workers = &self.workers;
        let num_workers = workers.len().min(uses.len());
        context.parallel_for(num_workers, |index| {
            // Only this task locks this worker: the lock is there for the compiler.
            let mut worker = workers[index].lock().unwrap_or_else(PoisonError::into_inner);
            let Worker { scratch, results } = &mut *worker;
            for row in (index..uses.len()).step_by(num_workers) {
                let result = token_of(uses[row], logits.row::<f32>(row), batch, sequences, scratch);
                results.push((row, result));
            }
        });
        let first = self.results.len();
        self.results.resize(first + uses.len(), Err(NotFinite));
        for worker in &mut self.workers {
            let worker = worker.get_mut().unwrap_or_else(PoisonError::into_inner);
            for (row, result) in worker.results.drain(..) {
                self.results[first + row] = result;
            }
        }
    }
}

/// The token that a row of logits is for: chosen, or known and looked up.
fn token_of(
    logit_use: LogitUse,
    logits: &[f32],
    batch: &Batch,
    sequences: &Sequences,
    scratch: &mut Scratch,
) -> Result<SampledToken, NotFinite> {
    let sequence = |entry: usize| &sequences[&batch.entries[entry].sequence_id];
    match logit_use {
        LogitUse::Sample { entry } => {
            let Sequence { sampler, token_ids, top_n_tokens, .. } = sequence(entry);
            sampler.sample(logits, token_ids.len() as u64, *top_n_tokens, scratch)
        }
        LogitUse::PromptToken { entry, position } => {
            let Sequence { token_ids, top_n_tokens, .. } = sequence(entry);
            let softmax = LogSoftmax::of(logits)?;
            let token_id = token_ids[position];
            Ok(SampledToken {
                token_id,
                logprob: softmax.logprob(logits[token_id as usize]),
                top: softmax.most_likely(logits, *top_n_tokens),
            })
        }
    }
}

fn data_type(dtype: DType) -> DataType {
    match dtype {
        DType::F32 => DataType::F32,
        DType::F16 => DataType::F16,
        DType::BF16 => DataType::Bf16,
        _ => DataType::Unspecified,
    }
}
