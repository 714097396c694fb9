//! Operations on a GPU by themselves, recorded and replayed so that launches cost nothing: sampling, what lies between the
//! matrix products, and attention of decode rows over a long context.
//!
//! `cargo bench --profile release --locked --workspace --features cuda --bench device [-- copy=4300] [small]`. `copy=4300` compares
//! with that many GB/s, which the machine's copies reach; `small` is for seeing that it runs.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::time::Instant;

use kernels::ops::activation::{Activation, add, gated};
use kernels::ops::attention::{RotaryAndPages, paged_attention, rotary_write_kv};
use kernels::ops::embedding::{embedding, gather_rows};
use kernels::ops::moe::{Routing, TopK};
use kernels::ops::rotary::{RotaryPairs, RotaryTables};
use kernels::ops::sampling::{Sampled, SamplingBuffers, SamplingInput, SamplingRow, TokenCounts, sample};
use kernels::{AttentionBatch, AttentionParams, Context, DType, Error, KvLayer, Result, Tensor, View};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

struct Bench {
    context: Context,
    random: SmallRng,
    copy_gb_per_s: Option<f64>,
    small: bool,
}

fn main() {
    let argument = |name: &str| std::env::args().find_map(|arg| arg.strip_prefix(name).map(str::to_owned));
    let context = Context::cuda(0, 4).expect("a GPU");
    println!("{}\n", context.device_name());
    println!("| operation | us | GB/s | of copies |\n|---|---|---|---|");
    let mut bench = Bench {
        context,
        random: SmallRng::seed_from_u64(1),
        copy_gb_per_s: argument("copy=").and_then(|rate| rate.parse().ok()),
        small: argument("small").is_some(),
    };
    bench.sampling().expect("it fits");
    bench.rowwise().expect("it fits");
    bench.decode().expect("it fits");
}

/// Repeated in one recording.
const CALLS: usize = 20;
const DTYPE: DType = DType::BF16;

impl Bench {
    /// Of one call.
    fn seconds(&self, mut run: impl FnMut(&Context) -> Result<()>) -> Result<f64> {
        let context = &self.context;
        run(context)?;
        context.synchronize()?;
        let calls = if self.small { 1 } else { CALLS };
        let graph = context.capture(|| (0..calls).try_for_each(|_| run(context)))?;
        let mut best = f64::INFINITY;
        for _ in 0..if self.small { 1 } else { 6 } {
            let start = Instant::now();
            graph.launch()?;
            context.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best / calls as f64)
    }

    /// `bytes`: read and written.
    fn report(&self, what: &str, bytes: usize, run: impl FnMut(&Context) -> Result<()>) -> Result<()> {
        let seconds = self.seconds(run)?;
        let rate = bytes as f64 / seconds / 1e9;
        let share =
            self.copy_gb_per_s.map_or_else(|| "-".to_owned(), |copy| format!("{:.0} %", 100.0 * rate / copy));
        println!("| {what} | {:.1} | {rate:.0} | {share} |", 1e6 * seconds);
        Ok(())
    }

    fn tensor(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor> {
        let values: Vec<f32> = (0..rows * cols).map(|_| self.random.random_range(-1.0..1.0)).collect();
        self.context.upload(&Tensor::from_slice(&values, rows, cols).to_dtype(dtype)?)
    }

    fn words(&self, words: &[u32], rows: usize) -> Result<Tensor> {
        self.context.upload(&Tensor::from_slice(words, rows, words.len() / rows))
    }

    /// 64 rows of a vocabulary of 128k: of a language model's shape, a few hundred tokens far above the others, and flat.
    fn sampling(&mut self) -> Result<()> {
        let (rows, vocab_size) = if self.small { (2, 5000) } else { (64, 128_256) };
        let plain = SamplingRow::default();
        let all = SamplingRow {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.95,
            min_p: 0.02,
            typical_p: 0.95,
            repetition_penalty: 1.1,
            slot: 0,
            ..plain
        };
        let mixtures = [
            ("greedy", SamplingRow { temperature: 0.0, ..plain }),
            ("temperature", SamplingRow { temperature: 0.8, ..plain }),
            ("top-k 50", SamplingRow { top_k: 50, ..plain }),
            ("top-p 0.95", SamplingRow { top_p: 0.95, ..plain }),
            ("all processors and a penalty", all),
            ("greedy, 20 log-probabilities", SamplingRow { temperature: 0.0, top_n: 20, ..plain }),
        ];
        let mut buffers = SamplingBuffers::new(&self.context, rows, vocab_size)?;
        let counts = TokenCounts::new(&self.context, 1, vocab_size)?;
        let mut out = self.context.zeros(rows, Sampled::WORDS, DType::U32)?;
        let biases = self.context.zeros(1, 0, DType::U32)?;
        for (shape, likely) in [("peaked", 400), ("flat", 0)] {
            // Sums of uniform numbers are nearly normal.
            let random = &mut self.random;
            let mut logit = || 2.0 * (0..6).map(|_| random.random_range(-1.0..1.0)).sum::<f32>();
            let mut logits: Vec<f32> = (0..rows * vocab_size).map(|_| logit()).collect();
            for i in 0..likely * rows {
                logits[i * 7919 % (rows * vocab_size)] += 14.0;
            }
            let logits = self.context.upload(&Tensor::from_slice(&logits, rows, vocab_size))?;
            for (what, row) in mixtures {
                let parameters = |i: usize| SamplingRow { position: i as u64, ..row }.to_words();
                let parameters = self.words(&(0..rows).flat_map(parameters).collect::<Vec<_>>(), rows)?;
                let input = SamplingInput {
                    logits: logits.view(),
                    rows: parameters.view(),
                    biases: biases.view(),
                    masks: None,
                };
                let what = format!("sampling {rows} x {vocab_size}, {shape}: {what}");
                self.report(&what, logits.size_in_bytes(), |context| {
                    sample(context, &mut buffers, &input, Some(&counts), out.view_mut())
                })?;
            }
        }
        Ok(())
    }

    /// A chunk of prompts of the shape of Llama-3.1-8B, and experts of that of Qwen3-30B-A3B.
    fn rowwise(&mut self) -> Result<()> {
        let (rows, hidden, intermediate) = if self.small { (3, 64, 128) } else { (8192, 4096, 14_336) };
        let bytes = |elements: usize, dtype: DType| elements * dtype.size_in_bytes();
        let gate_up = self.tensor(rows, 2 * intermediate, DTYPE)?;
        let mut activated = self.context.zeros(rows, intermediate, DTYPE)?;
        self.report(&format!("silu * up, {rows} rows"), bytes(3 * rows * intermediate, DTYPE), |context| {
            gated(context, Activation::Silu, gate_up.view(), activated.view_mut())
        })?;
        let x = self.tensor(rows, hidden, DTYPE)?;
        let mut residual = self.context.zeros(rows, hidden, DType::F32)?;
        let moved = bytes(rows * hidden, DTYPE) + bytes(2 * rows * hidden, DType::F32);
        self.report(&format!("add, {rows} rows"), moved, |context| {
            add(context, residual.view_mut(), x.view())
        })?;
        let ids: Vec<u32> = (0..rows).map(|i| (i * 7919 % rows) as u32).collect();
        let ids = self.words(&ids, 1)?;
        let moved = bytes(rows * hidden, DTYPE) + bytes(rows * hidden, DType::F32);
        self.report(&format!("embedding, {rows} rows"), moved, |context| {
            embedding(context, ids.view(), &x, 0, residual.view_mut())
        })?;
        let mut gathered = self.context.zeros(rows, hidden, DTYPE)?;
        self.report(&format!("gather, {rows} rows"), bytes(2 * rows * hidden, DTYPE), |context| {
            gather_rows(context, x.view(), ids.view(), gathered.view_mut())
        })?;

        let (experts, experts_per_row) = if self.small { (8, 2) } else { (128, 8) };
        let logits = self.tensor(rows, experts, DType::F32)?;
        let mut routing = Routing::default();
        let top_k = TopK { experts_per_row, renormalize: true };
        let moved = bytes(rows * experts, DType::F32);
        let what = format!("routing, {rows} rows to {experts_per_row} of {experts}");
        self.report(&what, moved, |context| routing.route(context, logits.view(), top_k))?;
        let expert_out = self.tensor(rows * experts_per_row, hidden / 2, DTYPE)?;
        let mut combined = self.context.zeros(rows, hidden / 2, DTYPE)?;
        let moved = bytes(rows * (experts_per_row + 1) * hidden / 2, DTYPE);
        self.report(&format!("combine, {rows} rows of {experts_per_row}"), moved, |context| {
            routing.combine(context, expert_out.view(), combined.view_mut())
        })
    }

    /// 32 sequences of 8k tokens, and of all lengths up to that; heads of Llama-3.1-8B.
    fn decode(&mut self) -> Result<()> {
        let (sequences, len, kv_heads, group, head_dim) =
            if self.small { (2, 64, 1, 2, 64) } else { (32, 8192, 8, 4, 128) };
        let max_blocks = len / KvLayer::DEVICE_BLOCK_SIZE;
        let (block_size, num_blocks) = (KvLayer::DEVICE_BLOCK_SIZE, sequences * max_blocks);
        let half = head_dim / 2;
        let cols = (group + 2) * kv_heads * head_dim;
        let (cos, sin) = (self.tensor(len, half, DType::F32)?, self.tensor(len, half, DType::F32)?);
        let mut qkv = self.tensor(sequences, cols, DTYPE)?;
        let mut out = self.context.zeros(sequences, group * kv_heads * head_dim, DTYPE)?;
        let positions = self.words(&vec![len as u32 - 1; sequences], 1)?;
        // A stride that shares no factor with the number: blocks lie apart, as after some time of service.
        let tables: Vec<u32> = (0..num_blocks).map(|i| (i * 7 % num_blocks) as u32).collect();
        let last = |sequence: usize| tables[(sequence + 1) * max_blocks - 1] * block_size as u32 + 31;
        let slots = self.words(&(0..sequences).map(last).collect::<Vec<_>>(), 1)?;
        let starts = self.words(&(0..=sequences as u32).collect::<Vec<_>>(), 1)?;
        let lens = self.words(&vec![len as u32; sequences], 1)?;
        let unequal: Vec<_> = (1..=sequences).map(|sequence| (sequence * len / sequences) as u32).collect();
        let unequal_lens = self.words(&unequal, 1)?;
        let tables = self.words(&tables, 1)?;
        for dtype in [DTYPE, DType::F8E4M3] {
            let mut layer = KvLayer::new(&self.context, num_blocks, kv_heads, block_size, head_dim, dtype)?;
            let pages = RotaryAndPages {
                positions: positions.view(),
                tables: RotaryTables { cos: &cos, sin: &sin, pairs: RotaryPairs::HalfApart },
                slots: slots.view(),
            };
            let what = format!("rotary and KV write, {sequences} decode rows, {dtype:?}");
            self.report(&what, 2 * qkv.size_in_bytes(), |context| {
                rotary_write_kv(context, qkv.view_mut(), None, pages, &mut layer)
            })?;
            let batch = AttentionBatch {
                query_starts: starts.view(),
                kv_lens: lens.view(),
                block_tables: tables.view(),
                table_rows: None,
                max_blocks,
                num_decodes: sequences,
                max_query_len: 1,
            };
            let params = AttentionParams::new((head_dim as f32).powf(-0.5));
            let what = format!("attention, {sequences} decode rows over {len} tokens, {dtype:?}");
            let queries: View<'_> = qkv.view().narrow_cols(0, group * kv_heads * head_dim);
            self.report(&what, layer.size_in_bytes(), |context| {
                paged_attention(context, queries, &layer, &batch, params, out.view_mut())
            })?;
            let batch = AttentionBatch { kv_lens: unequal_lens.view(), ..batch };
            let what =
                format!("attention, {sequences} decode rows over {} .. {len} tokens, {dtype:?}", unequal[0]);
            let moved = layer.size_in_bytes() * (sequences + 1) / (2 * sequences);
            self.report(&what, moved, |context| {
                paged_attention(context, queries, &layer, &batch, params, out.view_mut())
            })?;
        }
        Ok::<(), Error>(())
    }
}
