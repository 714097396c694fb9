//! The engine: from a `StepRequest` to its `StepResponse`.

use std::path::Path;
use std::sync::Arc;

use grammar::Compiler;
use kernels::{Communicator, Context, Place};
use proto::v1::{InfoResponse, StepRequest, StepResponse, WarmupRequest, WarmupResponse};

use super::BLOCK_SIZE_TOKENS;
use super::device::device_limits;
use super::grammars::Grammars;
use super::huge_pages::begin_to_move;
use super::rank::RankModel;
use super::serving::Serving;
use super::validate::{Limits, check_warmup};
use super::warmup::CacheNeeds;
use crate::decoder::KvCache;
use crate::error::Error;
use crate::models::Model;

/// Owner of model, KV cache and sequences of one rank.
pub struct Engine {
    rank: RankModel,
    /// What `Warmup` makes.
    serving: Option<Serving>,
    run: RunState,
    options: EngineOptions,
    /// On rank 0, where the model's tokens are known.
    grammars: Option<Arc<Grammars>>,
}

/// How the machine is used.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// Numbers of rows for which decode steps are recorded as CUDA graphs; none: they are not.
    pub graph_sizes: Vec<usize>,
    /// Share of the memory left beside weights and workspace that the KV cache takes, above 0 and at most 1.
    pub memory_fraction: f64,
    /// Whether weights that a CPU uses as they lie in files move to huge pages after the first `Warmup`, where memory suffices.
    pub huge_pages: bool,
}

impl Default for EngineOptions {
    /// Graphs for up to 256 rows, all memory of a GPU, and huge pages.
    fn default() -> Self {
        Self {
            graph_sizes: [1, 2, 4].into_iter().chain((8..=256).step_by(8)).collect(),
            memory_fraction: 1.0,
            huge_pages: true,
        }
    }
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

impl Engine {
    /// Takes a model and the means to compute it. `communicator` has the rank and the world size that the model was
    /// loaded for.
    pub fn new(model: Model, context: Context, communicator: Box<dyn Communicator>) -> Self {
        let rank = RankModel { model, context, communicator };
        Self {
            rank,
            serving: None,
            run: RunState::default(),
            options: EngineOptions::default(),
            grammars: None,
        }
    }

    /// With other options than the default ones.
    #[must_use]
    pub fn with_options(self, options: EngineOptions) -> Self {
        Self { options, ..self }
    }

    /// With grammars over the tokens of this `tokenizer.json`. It is read later, on another thread; on other ranks than the
    /// first, which choose no tokens, it is not.
    pub fn with_grammars(self, tokenizer_json: &Path) -> std::io::Result<Self> {
        if self.rank.communicator.rank() != 0 {
            return Ok(self);
        }
        let Model { decoder, eos_token_ids, .. } = &self.rank.model;
        let grammars = Grammars::new(tokenizer_json, decoder.spec().vocab_size, eos_token_ids)?;
        Ok(Self { grammars: Some(Arc::new(grammars)), ..self })
    }

    /// What compiles the grammars that sequences are held to; none where there are no grammars.
    pub fn compiler(&self) -> Option<&Arc<Compiler>> {
        self.grammars.as_ref().map(|grammars| grammars.compiler())
    }

    /// What this shard serves.
    pub fn info(&self) -> InfoResponse {
        self.rank.info()
    }

    /// Sizes and allocates KV cache and step buffers, after releasing those of an earlier call with all sequences.
    ///
    /// One small step is computed on all ranks, so that a group that cannot compute does not become ready. A full-size
    /// step would show no more on a CPU: the system gives pages when they are first touched, and the cache was sized
    /// by what it says is available. On a GPU the largest steps come first, and the cache is made of what they leave.
    pub fn warmup(&mut self, request: &WarmupRequest) -> Result<WarmupResponse, Error> {
        check_warmup(request, self.rank.model.decoder.spec().max_position_embeddings)?;
        self.serving = None;
        let warmed_up = match self.rank.context.place() {
            Place::Host => self.warmup_on_cpu(request),
            Place::Device => self.warmup_on_gpu(request).map_err(Error::of_warmup),
        };
        let mut serving = warmed_up?;
        serving.grammars.clone_from(&self.grammars);
        serving.try_out(&mut self.rank)?;
        let workspace_bytes = self.rank.model.decoder.workspace_bytes() + serving.workspace_bytes();
        let response = WarmupResponse {
            num_blocks: serving.limits.num_blocks as u32,
            kv_cache_bytes: serving.cache.size_in_bytes() as u64,
            workspace_bytes: workspace_bytes as u64,
        };
        self.serving = Some(serving);
        if self.options.huge_pages {
            // Whoever warms up again finds nothing left to be moved.
            let mapped = std::mem::take(&mut self.rank.model.mapped);
            begin_to_move(mapped, response.kv_cache_bytes, self.rank.communicator.world_size());
        }
        Ok(response)
    }

    fn warmup_on_cpu(&mut self, request: &WarmupRequest) -> Result<Serving, Error> {
        let num_blocks = self.cache_needs().num_blocks(request)?;
        let limits = self.limits(request, num_blocks);
        let cache = self.prepare(&limits)?;
        Serving::new(limits, cache, &self.rank, &[])
    }

    fn warmup_on_gpu(&mut self, request: &WarmupRequest) -> Result<Serving, Error> {
        // All of the first steps' sequences are in one block, which nobody writes.
        let limits = device_limits(self.limits(request, 1));
        let cache = self.prepare(&limits)?;
        let EngineOptions { graph_sizes, memory_fraction, .. } = &self.options;
        let mut serving = Serving::new(limits, cache, &self.rank, graph_sizes)?;
        serving.try_largest(&mut self.rank)?;
        let memory = self.rank.context.device_memory()?.expect("a GPU has memory");
        let num_graphs = serving.num_graphs();
        let num_blocks =
            self.cache_needs().num_blocks_on_gpu(request, memory, *memory_fraction, num_graphs)?;
        serving.limits.num_blocks = num_blocks;
        serving.cache = self.cache(&serving.limits)?;
        let num_graphs = serving.record_graphs(&mut self.rank)?;
        serving.settle(&self.rank);
        let left = self.rank.context.device_memory()?.map_or(0, |memory| memory.free_bytes);
        let mib = |bytes: usize| bytes >> 20;
        tracing::info!(
            weights_mib = self.rank.model.weight_bytes >> 20,
            workspace_mib = mib(self.rank.model.decoder.workspace_bytes() + serving.workspace_bytes()),
            kv_cache_mib = mib(serving.cache.size_in_bytes()),
            kv_cache_tokens = num_blocks * BLOCK_SIZE_TOKENS,
            num_graphs,
            free_mib = mib(left),
            "memory of the GPU"
        );
        Ok(serving)
    }

    fn limits(&self, request: &WarmupRequest, num_blocks: usize) -> Limits {
        let vocab_size = self.rank.model.decoder.spec().vocab_size;
        Limits {
            vocab_size,
            block_size: BLOCK_SIZE_TOKENS,
            num_blocks,
            max_step_tokens: request.max_step_tokens as usize,
            max_step_sequences: request.max_step_sequences as usize,
            max_total_tokens: request.max_total_tokens as usize,
            max_sequences: usize::MAX,
            max_top_n_tokens: vocab_size,
            max_logit_biases: usize::MAX,
            num_adapters: self.rank.model.adapter_names.len(),
        }
    }

    fn cache_needs(&self) -> CacheNeeds {
        let RankModel { model, communicator, .. } = &self.rank;
        CacheNeeds {
            block_size: BLOCK_SIZE_TOKENS,
            bytes_per_token: model.decoder.kv_bytes_per_token(model.kv_dtype),
            world_size: communicator.world_size(),
        }
    }

    /// Allocates the model's buffers, and a cache.
    fn prepare(&mut self, limits: &Limits) -> Result<KvCache, Error> {
        let RankModel { model, context, .. } = &mut self.rank;
        model.decoder.prepare(context, limits.step_limits())?;
        self.cache(limits)
    }

    fn cache(&self, limits: &Limits) -> Result<KvCache, Error> {
        let RankModel { model, context, .. } = &self.rank;
        Ok(KvCache::new(context, &model.decoder, limits.num_blocks, limits.block_size, model.kv_dtype)?)
    }

    /// Computes one step. A step that is refused ([`Error::is_fatal`] is false) changes nothing.
    ///
    /// # Panics
    /// Where steps are in flight.
    pub fn step(&mut self, request: StepRequest, origin: Origin) -> Result<StepResponse, Error> {
        assert_eq!(self.num_in_flight(), 0, "steps in flight are collected first");
        self.launch(request, origin)?;
        self.collect()
    }

    /// Begins to compute one step, behind those in flight. A step that is refused changes nothing.
    ///
    /// # Panics
    /// Where there is no room for it.
    pub fn launch(&mut self, request: StepRequest, origin: Origin) -> Result<(), Error> {
        assert!(self.has_room(), "a step in flight is collected first");
        if origin == Origin::Unary {
            return self.begin(request, None);
        }
        if self.run.refused {
            return Err(Error::RunRefused);
        }
        let step_id = request.step_id;
        let outcome = self.begin(request, self.run.last_step_id);
        match &outcome {
            Ok(()) => self.run.last_step_id = Some(step_id),
            Err(_) => self.run.refused = true,
        }
        outcome
    }

    /// Waits for the oldest step in flight, and answers it. Any error is fatal.
    ///
    /// # Panics
    /// Where none is in flight.
    pub fn collect(&mut self) -> Result<StepResponse, Error> {
        self.serving.as_mut().expect("launched, so warmed up").collect(&mut self.rank)
    }

    /// Goes on with a step in flight that waited for the tokens of the one before it, which were collected. Any error is
    /// fatal.
    pub fn proceed(&mut self) -> Result<(), Error> {
        self.serving.as_mut().map_or(Ok(()), |serving| serving.proceed(&mut self.rank))
    }

    /// Steps that were launched and not collected.
    pub fn num_in_flight(&self) -> usize {
        self.serving.as_ref().map_or(0, Serving::num_in_flight)
    }

    /// Whether a step may be launched before those in flight are collected.
    pub fn has_room(&self) -> bool {
        self.serving.as_ref().is_none_or(Serving::has_room)
    }

    /// Whether there is a step in flight that can be collected without waiting. Any error is fatal.
    pub fn is_done(&self) -> Result<bool, Error> {
        self.serving.as_ref().map_or(Ok(false), Serving::is_done)
    }

    /// Forgets all sequences: the `Run` stream has ended.
    pub fn end_run(&mut self) {
        self.run = RunState::default();
        if let Some(serving) = &mut self.serving {
            serving.clear();
        }
    }

    /// As if the memory that operations need inside had not been taken by warmup, for tests of what happens where there is none
    /// left.
    #[doc(hidden)]
    pub fn forget_scratch(&self) -> Result<(), Error> {
        Ok(self.rank.context.forget_scratch()?)
    }

    /// From here on a step that takes device memory, or copies to it other than through pinned memory of its own, is computed
    /// without the sequences that it does so for: for tests of what steps do.
    #[doc(hidden)]
    pub fn freeze_steps(&mut self) {
        if let Some(serving) = &mut self.serving {
            serving.freeze_steps();
        }
    }

    /// Bytes that were copied to the device so far, for tests of what a step sends; 0 on the CPU.
    #[doc(hidden)]
    pub fn copied_bytes(&self) -> u64 {
        self.rank.context.copied_bytes()
    }

    /// Of each decode step that was recorded: rows, whether adapters may change them, and how many kernels it launches; for
    /// tests.
    #[doc(hidden)]
    pub fn recorded_launches(&self) -> Vec<(usize, bool, usize)> {
        self.serving.as_ref().map_or_else(Vec::new, Serving::recorded_launches)
    }

    fn begin(&mut self, request: StepRequest, previous_step_id: Option<u64>) -> Result<(), Error> {
        let serving = self.serving.as_mut().ok_or(Error::NotWarmedUp)?;
        serving.validator.check(&request, previous_step_id, &serving.sequences, &serving.limits)?;
        serving.launch(request, &mut self.rank)
    }
}
