//! A rank that the tests drive step by step, and the goldens that they compare with.

use std::path::{Path, PathBuf};

use kernels::collective::Local;
use kernels::ops::lora::NO_ADAPTER;
use kernels::{Communicator, Context, KvLayer, Place, Staging};
use shard::LoraAdapter;
use shard::decoder::{ForwardInput, KvCache, StepLimits};
use shard::models::{self, LoadError, LoadOptions, Model};
use shard::weights::Partition;

/// All of `integration-tests/goldens`.
pub(crate) const GOLDENS: &[&str] = &[
    "llama",
    "llama3",
    "llama_bf16",
    "llama_bias",
    "llama_f16",
    "llama_sharded",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
];

const MAX_SEQUENCES: usize = 2;
const MAX_POSITION: usize = 96;

/// Small on the CPU, so that sequences end within blocks and cross many borders.
fn block_size(context: &Context) -> usize {
    match context.place() {
        Place::Host => 4,
        Place::Device => KvLayer::DEVICE_BLOCK_SIZE,
    }
}

pub(crate) fn golden_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/goldens").join(name)
}

/// Loads on two threads.
pub(crate) fn load(dir: &Path, options: LoadOptions) -> Result<Model, LoadError> {
    models::load(&context(), dir, options)
}

/// As [`load`], with the adapters in these directories.
pub(crate) fn load_with_adapters(
    dir: &Path,
    options: LoadOptions,
    adapters: &[PathBuf],
) -> Result<Model, LoadError> {
    models::load_with_adapters(&context(), dir, options, &lora_adapters(adapters))
}

/// Called by their directories.
pub(crate) fn lora_adapters(dirs: &[PathBuf]) -> Vec<LoraAdapter> {
    dirs.iter().map(|path| LoraAdapter { name: path.display().to_string(), path: path.clone() }).collect()
}

/// The goldens were computed in f32, activations too.
fn context() -> Context {
    Context::cpu_with_f32_activations(2)
}

/// The share of one of several ranks.
pub(crate) fn of_rank(rank: usize, world_size: usize) -> LoadOptions {
    LoadOptions { partition: Partition { rank, world_size }, ..LoadOptions::default() }
}

/// What transformers computed for one prompt.
#[derive(serde::Deserialize)]
pub(crate) struct Prompt {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<Option<f32>>,
    pub(crate) greedy: Vec<u32>,
}

/// The prompts of a golden, with the logits of the last positions of each.
pub(crate) fn golden(name: &str) -> Vec<(Prompt, Vec<Vec<f32>>)> {
    #[derive(serde::Deserialize)]
    struct Golden {
        prompts: Vec<Prompt>,
    }
    let dir = golden_dir(name);
    let text = std::fs::read(dir.join("golden.json")).unwrap();
    let golden: Golden = serde_json::from_slice(&text).unwrap();
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = |prompt: usize| {
        let tensor = tensors.tensor(&format!("logits.{prompt}")).unwrap();
        let values: Vec<f32> =
            tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        values.chunks(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
    };
    golden.prompts.into_iter().enumerate().map(|(index, prompt)| (prompt, logits(index))).collect()
}

/// Tokens of one sequence that a step computes.
pub(crate) struct Chunk<'a> {
    /// `0 .. MAX_SEQUENCES`.
    pub(crate) sequence: usize,
    /// Tokens computed before.
    pub(crate) start: usize,
    pub(crate) token_ids: &'a [u32],
}

/// One rank with room for two sequences.
pub(crate) struct Rank {
    pub(crate) model: Model,
    context: Context,
    communicator: Box<dyn Communicator>,
    cache: KvCache,
    staging: Staging,
    /// Of each sequence.
    pub(crate) adapters: [Option<u32>; MAX_SEQUENCES],
}

impl Rank {
    pub(crate) fn alone(dir: &Path) -> Self {
        Self::loaded(dir, LoadOptions::default())
    }

    /// A group of its own.
    pub(crate) fn loaded(dir: &Path, options: LoadOptions) -> Self {
        Self::new(load(dir, options).unwrap(), Box::new(Local))
    }

    /// A group of its own, with adapters.
    pub(crate) fn adapted(dir: &Path, adapters: &[PathBuf]) -> Self {
        Self::new(load_with_adapters(dir, LoadOptions::default(), adapters).unwrap(), Box::new(Local))
    }

    pub(crate) fn new(model: Model, communicator: Box<dyn Communicator>) -> Self {
        Self::on(context(), model, communicator)
    }

    /// On a device; the model has been loaded for it.
    pub(crate) fn on(context: Context, mut model: Model, communicator: Box<dyn Communicator>) -> Self {
        let max_step_tokens = MAX_SEQUENCES * MAX_POSITION;
        let limits = StepLimits {
            max_step_tokens,
            max_step_sequences: MAX_SEQUENCES,
            max_logit_rows: max_step_tokens,
            max_position: MAX_POSITION,
            block_size: block_size(&context),
        };
        model.decoder.prepare(&context, limits).unwrap();
        let (num_blocks, block_size) = (MAX_SEQUENCES * limits.max_blocks(), limits.block_size);
        let cache =
            KvCache::new(&context, &model.decoder, num_blocks, block_size, kernels::DType::F32).unwrap();
        let staging = ForwardInput::staging(&context, &limits).unwrap();
        Self { model, context, communicator, cache, staging, adapters: [None; MAX_SEQUENCES] }
    }

    /// Computes as a server does that was not told a type: with products of bf16 where the CPU has them.
    pub(crate) fn with_products_of_its_cpu(mut self) -> Self {
        self.context = Context::cpu(2);
        self
    }

    /// Computes one step; the logits of all its rows.
    pub(crate) fn step(&mut self, chunks: &[Chunk<'_>]) -> Vec<Vec<f32>> {
        let mut input = flat_batch(chunks, self.cache.block_size());
        for &Chunk { sequence, token_ids, .. } in chunks {
            let adapter = self.adapters[sequence].unwrap_or(NO_ADAPTER);
            input.adapters.extend(token_ids.iter().map(|_| adapter));
        }
        let decoder = &mut self.model.decoder;
        let step = input.send(&self.context, &mut self.staging).unwrap();
        decoder.forward(&self.context, &mut *self.communicator, &step, &mut self.cache).unwrap();
        let logits = decoder.logits(&self.context, &mut *self.communicator, step.logit_rows).unwrap();
        let mut values = vec![0.0; logits.rows() * logits.cols()];
        self.context.download(logits, &mut values).unwrap();
        values.chunks(logits.cols()).map(<[f32]>::to_vec).collect()
    }

    /// The logits of a whole prompt in one step.
    pub(crate) fn prompt(&mut self, token_ids: &[u32]) -> Vec<Vec<f32>> {
        self.step(&[Chunk { sequence: 0, start: 0, token_ids }])
    }

    /// The prompt in one step, then `num_tokens` tokens one by one, always the likeliest.
    pub(crate) fn greedy(&mut self, prompt: &[u32], num_tokens: usize) -> Vec<u32> {
        let mut logits = self.prompt(prompt);
        let mut tokens = vec![argmax(logits.last().unwrap())];
        while tokens.len() < num_tokens {
            let start = prompt.len() + tokens.len() - 1;
            logits = self.step(&[Chunk { sequence: 0, start, token_ids: &tokens[tokens.len() - 1..] }]);
            tokens.push(argmax(&logits[0]));
        }
        tokens
    }
}

fn flat_batch(chunks: &[Chunk<'_>], block_size: usize) -> ForwardInput {
    let max_blocks = MAX_POSITION / block_size;
    // Blocks of the sequences lie between each other and backwards, as after some time of service.
    let block_id =
        |sequence: usize, index: usize| (MAX_SEQUENCES * (max_blocks - 1 - index) + sequence) as u32;
    let mut input = ForwardInput { query_starts: vec![0], max_blocks, ..ForwardInput::default() };
    for &Chunk { sequence, start, token_ids } in chunks {
        let positions = start..start + token_ids.len();
        input.token_ids.extend(token_ids);
        input.positions.extend(positions.clone().map(|position| position as u32));
        input.slot_mapping.extend(positions.clone().map(|position| {
            block_id(sequence, position / block_size) * block_size as u32 + (position % block_size) as u32
        }));
        input.query_starts.push(input.token_ids.len() as u32);
        input.kv_lens.push(positions.end as u32);
        input.block_tables.extend((0..max_blocks).map(|index| block_id(sequence, index)));
    }
    input.logit_rows = (0..input.token_ids.len() as u32).collect();
    input
}

fn argmax(logits: &[f32]) -> u32 {
    let best = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(best).unwrap() as u32
}

/// Asserts that two lists of logits differ by no more than `tolerance` anywhere.
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &[Vec<f32>], expected: &[Vec<f32>], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: rows");
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "{what}: columns");
        for (id, (found, expected)) in found.iter().zip(expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(difference <= tolerance, "{what}, row {row}, id {id}: {found} is not {expected}");
        }
    }
}
