//! Attention over paged keys and values against what the machine gives: decode rows at a long context against the rate of
//! reading memory, prompts against that of multiply-adds.
//!
//! `cargo bench --profile release --locked --workspace --bench attention [-- [THREADS] [LEVEL] [SHAPE] [BF16 | F32] [prefill]]`. With one thread the times are CPU
//! times of the process; with more they are those of the wall clock.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![expect(unsafe_code, reason = "the probes read a clock of the system")]

mod probes;

use std::time::Duration;

use kernels::ops::attention::{paged_attention, write_kv};
use kernels::{
    AttentionBatch, AttentionParams, Context, DType, KvLayer, Level, Tensor, View, available_cores,
};
use probes::{Clock, multiply_add_bf16_gflop_per_s, multiply_add_gflop_per_s, read_gb_per_s};

/// How long a figure is repeated; the best counts.
const LEAST: Duration = Duration::from_millis(300);

/// Heads of one layer.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
}

const SHAPES: [Shape; 4] = [
    Shape { name: "SmolLM2-135M", kv_heads: 3, group: 3, head_dim: 64 },
    Shape { name: "Qwen2.5-0.5B", kv_heads: 2, group: 7, head_dim: 64 },
    Shape { name: "TinyLlama-1.1B", kv_heads: 4, group: 8, head_dim: 64 },
    Shape { name: "Llama-3.1-8B", kv_heads: 8, group: 4, head_dim: 128 },
];
const BLOCK_SIZE: usize = 32;
/// Each run takes another layer, so that keys and values come from memory, as in a model.
const LAYERS: usize = 8;

fn main() {
    // cargo adds `--bench`.
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or_else(available_cores);
    let named = Level::ALL.into_iter().find(|level| std::env::args().any(|arg| arg == format!("{level:?}")));
    let level = named.unwrap_or_else(Level::detect);
    let context = Context::cpu_with_level(threads, level);
    let read = read_gb_per_s(&context);
    let peak = multiply_add_gflop_per_s(&context);
    // Products of bf16 are used in tiles only.
    let bf16_peak = if level == Level::Amx { multiply_add_bf16_gflop_per_s(&context) } else { peak };
    println!(
        "{threads} threads, {level:?}; probes: {read:.1} GB/s read, GFLOP/s multiply-add: {peak:.0} f32, {bf16_peak:.0} for bf16"
    );
    let only = std::env::args().skip(1).find(|arg| SHAPES.iter().any(|shape| shape.name == arg));
    let shapes = SHAPES.into_iter().filter(|shape| only.as_deref().is_none_or(|only| only == shape.name));
    let dtypes = [DType::BF16, DType::F32].into_iter().filter(|dtype| {
        let asked = |dtype: &DType| std::env::args().any(|arg| arg == format!("{dtype:?}"));
        asked(dtype) || ![DType::BF16, DType::F32].iter().any(asked)
    });
    for (shape, dtype) in shapes.flat_map(|shape| dtypes.clone().map(move |dtype| (shape, dtype))) {
        for (sequences, len) in
            [(1, 8192), (4, 8192), (8, 512)].into_iter().filter(|_| !std::env::args().any(|a| a == "prefill"))
        {
            let batch = Batch::new(&context, shape, dtype, sequences, len, 1);
            let bytes = 2 * sequences * len * shape.kv_heads * shape.head_dim * dtype.size_in_bytes();
            let rate = bytes as f64 / batch.seconds(&context) / 1e9;
            println!(
                "{:<14} {dtype:?} decode  {sequences} x {len:>4}: {rate:6.1} GB/s ({:3.0} %)",
                shape.name,
                100.0 * rate / read
            );
        }
        for len in [512, 2048] {
            let batch = Batch::new(&context, shape, dtype, 1, len, len);
            // Scores and sums of values, over the pairs that are not masked.
            let pairs = len * (len + 1) / 2;
            let flops = 4 * pairs * shape.kv_heads * shape.group * shape.head_dim;
            let rate = flops as f64 / batch.seconds(&context) / 1e9;
            let peak = if dtype == DType::BF16 { bf16_peak } else { peak };
            println!(
                "{:<14} {dtype:?} prefill 1 x {len:>4}: {rate:6.0} GFLOP/s ({:3.0} %)",
                shape.name,
                100.0 * rate / peak
            );
        }
    }
}

/// Sequences of one length, of each the last few rows.
struct Batch {
    shape: Shape,
    layers: Vec<KvLayer>,
    query: Tensor,
    query_starts: Vec<u32>,
    kv_lens: Vec<u32>,
    block_tables: Vec<u32>,
    max_blocks: usize,
}

impl Batch {
    fn new(context: &Context, shape: Shape, dtype: DType, sequences: usize, len: usize, rows: usize) -> Self {
        let Shape { kv_heads, group, head_dim, .. } = shape;
        let max_blocks = len.div_ceil(BLOCK_SIZE);
        let num_blocks = max_blocks * sequences;
        let values =
            |n: usize| (0..n).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect::<Vec<f32>>();
        let num_slots = num_blocks * BLOCK_SIZE;
        let kv = Tensor::from_slice(&values(num_slots * kv_heads * head_dim), num_slots, kv_heads * head_dim);
        let slots: Vec<u32> = (0..num_slots as u32).collect();
        let slots = View::from_slice(&slots, 1, num_slots);
        let layers = (0..LAYERS).map(|_| {
            let mut layer =
                KvLayer::new(context, num_blocks, kv_heads, BLOCK_SIZE, head_dim, dtype).expect("memory");
            write_kv(context, kv.view(), kv.view(), slots, &mut layer).expect("shapes fit");
            layer
        });
        let (query_rows, query_cols) = (sequences * rows, kv_heads * group * head_dim);
        Self {
            shape,
            layers: layers.collect(),
            query: Tensor::from_slice(&values(query_rows * query_cols), query_rows, query_cols),
            query_starts: (0..=sequences).map(|sequence| (sequence * rows) as u32).collect(),
            kv_lens: vec![len as u32; sequences],
            // A stride that shares no factor with the number: blocks lie apart, as after some time of service.
            block_tables: (0..num_blocks).map(|i| (i * 7 % num_blocks) as u32).collect(),
            max_blocks,
        }
    }

    /// Of one layer.
    fn seconds(&self, context: &Context) -> f64 {
        let batch = AttentionBatch::from_slices(
            &self.query_starts,
            &self.kv_lens,
            &self.block_tables,
            self.max_blocks,
        );
        let mut out = Tensor::zeros(self.query.rows(), self.query.cols(), DType::F32);
        let params = AttentionParams::new((self.shape.head_dim as f32).powf(-0.5));
        let all = Clock::for_threads(context.num_threads()).best_seconds(LEAST, || {
            for layer in &self.layers {
                paged_attention(context, self.query.view(), layer, &batch, params, out.view_mut())
                    .expect("shapes fit");
            }
        });
        all / LAYERS as f64
    }
}
