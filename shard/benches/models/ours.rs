//! Our decoder, driven as the engine drives it.

use std::path::Path;
use std::time::{Duration, Instant};

use kernels::collective::Local;
use kernels::ops::attention::write_kv;
use kernels::{Context, Staging, Tensor, View};
use shard::Quantization;
use shard::decoder::{ForwardInput, KvCache, StepLimits};
use shard::models::{LoadOptions, Model, load};

use crate::workload::{LONG_CONTEXT, ModelBytes, Workload};

/// As the engine's.
const BLOCK_SIZE: usize = 32;
/// Steps between two looks at the clock; as many as llama.cpp is asked for.
pub(crate) const DECODE_STEPS: usize = 16;
/// The largest batch with a long context.
const LONG_BATCH: usize = 4;
/// Room for the steps of decoding.
const MAX_POSITION: usize = LONG_CONTEXT + 2 * BLOCK_SIZE;
const BLOCKS_PER_SEQUENCE: usize = MAX_POSITION / BLOCK_SIZE;
const NUM_BLOCKS: usize = LONG_BATCH * BLOCKS_PER_SEQUENCE;
const MAX_ROWS: usize = 512;
/// The largest batch.
const MAX_SEQUENCES: usize = 16;
/// How long a figure is repeated; the best counts.
const LEAST: Duration = Duration::from_millis(700);

pub(crate) struct Ours {
    model: Model,
    cache: KvCache,
    staging: Staging,
}

impl Ours {
    pub(crate) fn load(context: &Context, directory: &Path, int8: bool) -> anyhow::Result<Self> {
        let quantize = int8.then_some(Quantization::Eetq);
        let mut model = load(context, directory, LoadOptions { quantize, ..LoadOptions::default() })?;
        let limits = StepLimits {
            max_step_tokens: MAX_ROWS,
            max_step_sequences: MAX_SEQUENCES,
            max_logit_rows: MAX_SEQUENCES,
            max_position: MAX_POSITION,
            block_size: BLOCK_SIZE,
        };
        std::mem::take(&mut model.mapped).move_to_huge_pages()?;
        model.decoder.prepare(context, limits)?;
        let mut cache = KvCache::new(context, &model.decoder, NUM_BLOCKS, BLOCK_SIZE, model.kv_dtype)?;
        fill(context, &model, &mut cache)?;
        let staging = ForwardInput::staging(context, &limits)?;
        Ok(Self { model, cache, staging })
    }

    /// The best of several steps (prefill) or runs of steps (decode).
    pub(crate) fn tokens_per_s(&mut self, context: &Context, workload: Workload) -> anyhow::Result<f64> {
        let inputs: Vec<ForwardInput> = match workload {
            Workload::Prefill(tokens) => vec![input(1, 0, tokens)],
            Workload::Decode { batch, context } => {
                (0..DECODE_STEPS).map(|step| input(batch, context + step, 1)).collect()
            }
        };
        self.compute(context, &inputs[0])?;
        let (begin, mut best) = (Instant::now(), f64::INFINITY);
        while best.is_infinite() || begin.elapsed() < LEAST {
            let start = Instant::now();
            for input in &inputs {
                self.compute(context, input)?;
            }
            best = best.min(start.elapsed().as_secs_f64() / inputs.len() as f64);
        }
        Ok(workload.tokens() as f64 / best)
    }

    pub(crate) fn bytes(&self) -> ModelBytes {
        let Model { decoder, weight_bytes, kv_dtype, .. } = &self.model;
        let spec = decoder.spec();
        // Of an untied embedding single rows are read.
        let embedding = spec.vocab_size * spec.hidden_size * decoder.dtype().size_in_bytes();
        let unread = if spec.tied_head { 0 } else { embedding };
        ModelBytes {
            weights_per_step: *weight_bytes as usize - unread,
            kv_per_token: decoder.kv_bytes_per_token(*kv_dtype),
        }
    }

    /// A step, and the logits of each sequence's last token.
    fn compute(&mut self, context: &Context, input: &ForwardInput) -> anyhow::Result<()> {
        let step = input.send(context, &mut self.staging)?;
        self.model.decoder.forward(context, &mut Local, &step, &mut self.cache)?;
        self.model.decoder.logits(context, &mut Local, step.logit_rows)?;
        Ok(())
    }
}

/// A step of `batch` sequences with `tokens` tokens each behind `start`.
fn input(batch: usize, start: usize, tokens: usize) -> ForwardInput {
    // Long contexts have blocks of their own; the many short ones lie in the first blocks.
    let stride = if batch <= LONG_BATCH { BLOCKS_PER_SEQUENCE } else { MAX_ROWS / BLOCK_SIZE };
    let mut input = ForwardInput { query_starts: vec![0], max_blocks: stride, ..ForwardInput::default() };
    for sequence in 0..batch {
        // Neighbours in a sequence are not neighbours in memory, as after some time of service.
        let block = |index: usize| (sequence * stride + (index * 5) % stride) as u32;
        for position in start..start + tokens {
            let slot = block(position / BLOCK_SIZE) as usize * BLOCK_SIZE + position % BLOCK_SIZE;
            input.token_ids.push(((sequence * 131 + position * 17) % 30_000) as u32);
            input.positions.push(position as u32);
            input.slot_mapping.push(slot as u32);
        }
        input.query_starts.push(input.token_ids.len() as u32);
        input.kv_lens.push((start + tokens) as u32);
        input.block_tables.extend((0..stride).map(block));
    }
    input.logit_rows = input.query_starts[1..].iter().map(|end| end - 1).collect();
    input
}

/// Gives each slot a key and a value: memory that was never written would not be read from memory.
fn fill(context: &Context, model: &Model, cache: &mut KvCache) -> anyhow::Result<()> {
    let width = model.decoder.kv_heads() * model.decoder.spec().head_dim;
    let values: Vec<f32> = (0..MAX_ROWS * width).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect();
    let rows = Tensor::from_slice(&values, MAX_ROWS, width);
    let slots: Vec<u32> = (0..(NUM_BLOCKS * BLOCK_SIZE) as u32).collect();
    for layer in cache.layers_mut() {
        for slots in slots.chunks(MAX_ROWS) {
            let rows = rows.view().narrow_rows(0, slots.len());
            write_kv(context, rows, rows, View::from_slice(slots, 1, slots.len()), layer)?;
        }
    }
    Ok(())
}
