//! The matrix product against what the machine gives: a read-bandwidth probe, multiply-add probes, and candle.
//!
//! `cargo bench --profile release --locked --workspace --bench linear [-- [THREADS] [LEVEL] [PART]...]`: a level is `Portable`,
//! `Avx2`, `Avx512`, ... as [`Level`] has them; without one, the best of this CPU. Parts are `135M`, `0.5B`, `1.1B`, `Bf16`,
//! `F16`, `F32`, `Int8`, `8r` (rows) and `candle`; `cached` leaves weights in the caches where they fit. All figures of a table come from
//! one run.
//! With one thread the times are CPU times of the process, so that other processes disturb them less; with more they are
//! those of the wall clock.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![expect(unsafe_code, reason = "the probes read a clock of the system")]

use std::hint::black_box;
use std::time::Duration;

use candle_core::{Device, Tensor as CandleTensor};
use half::{bf16, f16};
use kernels::ops::linear::{Int8Weight, LinearPart, Weight, linear};
use kernels::{Context, DType, Level, Tensor, available_cores};

mod probes;

use probes::{Clock, multiply_add_bf16_gflop_per_s, multiply_add_gflop_per_s, read_gb_per_s};

/// How long a figure is repeated; the best counts.
const LEAST: Duration = Duration::from_millis(60);
/// Weights that are read in turn, so that none is in a cache when its turn comes.
const COLD_BYTES: usize = 768 << 20;

/// Outputs and inputs of a layer, and whose: gate and up, then down.
const SHAPES: [(&str, usize, usize); 6] = [
    ("135M", 3072, 576),
    ("135M", 576, 1536),
    ("0.5B", 9728, 896),
    ("0.5B", 896, 4864),
    ("1.1B", 11264, 2048),
    ("1.1B", 2048, 5632),
];
const MODELS: [&str; 3] = ["135M", "0.5B", "1.1B"];
const KINDS: [&str; 4] = ["Bf16", "F16", "F32", "Int8"];
/// What can be asked for beside candle.
const PARTS: [&str; 7] = ["135M", "0.5B", "1.1B", "Bf16", "F16", "F32", "Int8"];
const ROW_NAMES: [&str; 7] = ["1r", "2r", "4r", "8r", "16r", "64r", "512r"];
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 512];

fn main() {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or_else(available_cores);
    let named = Level::ALL.into_iter().find(|level| args.contains(&format!("{level:?}")));
    let level = named.unwrap_or_else(Level::detect);
    // All of a list where none of it is named.
    let asks = |list: &[&str], name: &str| {
        args.iter().any(|arg| arg == name) || !args.iter().any(|arg| list.contains(&arg.as_str()))
    };
    let cold_bytes = if args.iter().any(|arg| arg == "cached") { 0 } else { COLD_BYTES };
    let context = Context::cpu_with_level(threads, level);
    let read = read_gb_per_s(&context);
    let peak = multiply_add_gflop_per_s(&context);
    let bf16_peak = multiply_add_bf16_gflop_per_s(&context);
    println!(
        "{threads} threads, {level:?}: {read:.1} GB/s read, GFLOP/s: {peak:.0} f32, {bf16_peak:.0} bf16"
    );
    println!("model, outputs x inputs, weights, then for each number of rows the nearer limit:");
    println!("r: GB/s of weights (of the read probe), f: GFLOP/s (of the type's probe)");
    for (model, n, k) in SHAPES.into_iter().filter(|(model, ..)| asks(&MODELS, model)) {
        for kind in Kind::ALL.into_iter().filter(|kind| asks(&KINDS, &format!("{kind:?}"))) {
            let weights = Weights::new(kind, n, k, cold_bytes);
            print!("{}", format!("{model} {n:>5}x{k:<4} {kind:?}").pad(24));
            let peak = if kind == Kind::Bf16 { bf16_peak } else { peak };
            for rows in ROWS.into_iter().filter(|rows| asks(&ROW_NAMES, &format!("{rows}r"))) {
                let seconds = weights.seconds(&context, rows);
                let bytes = (n * k * kind.size_in_bytes()) as f64 / seconds / 1e9;
                let flops = 2.0 * (n * k * rows) as f64 / seconds / 1e9;
                let (of_read, of_peak) = (100.0 * bytes / read, 100.0 * flops / peak);
                let figure = if of_read > of_peak {
                    format!("{rows}r {bytes:.1} ({of_read:.0} %)")
                } else {
                    format!("{rows}f {flops:.0} ({of_peak:.0} %)")
                };
                print!("{}", figure.pad(18));
            }
            println!();
        }
    }
    let candle = asks(&PARTS, "candle");
    for rows in [1, 8, 512].into_iter().filter(|_| candle) {
        let (ours, candle) = beside_candle(&context, rows);
        println!("2048x2048 Bf16, {rows} rows: {:.1} times as fast as candle", candle / ours);
    }
}

trait Pad {
    fn pad(&self, width: usize) -> String;
}
impl Pad for str {
    fn pad(&self, width: usize) -> String {
        format!("{self:<width$}")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bf16,
    F16,
    F32,
    Int8,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Bf16, Self::F16, Self::F32, Self::Int8];

    fn size_in_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::Int8 => 1,
        }
    }
}

/// Several weights of one shape, read in turn.
struct Weights {
    dense: Vec<Tensor>,
    int8: Vec<Int8Weight>,
    n: usize,
    k: usize,
}

impl Weights {
    /// The values do not matter to the time.
    fn new(kind: Kind, n: usize, k: usize, cold_bytes: usize) -> Self {
        let copies = (cold_bytes / (n * k * kind.size_in_bytes())).max(1);
        let rows = copies * n;
        let (mut dense, mut int8) = (Vec::new(), Vec::new());
        let whole = match kind {
            Kind::Bf16 => filled(rows, k, bf16::from_f32(0.01)),
            Kind::F16 => filled(rows, k, f16::from_f32(0.01)),
            Kind::F32 => filled(rows, k, 0.01_f32),
            Kind::Int8 => {
                let whole = Int8Weight::new(filled(rows, k, 1_u8), filled(1, rows, 0.01_f32));
                let whole = whole.expect("shapes fit");
                int8 = (0..copies).map(|copy| whole.narrow_rows(copy * n, n)).collect();
                return Self { dense, int8, n, k };
            }
        };
        dense.extend((0..copies).map(|copy| whole.narrow_rows(copy * n, n)));
        Self { dense, int8, n, k }
    }

    fn seconds(&self, context: &Context, rows: usize) -> f64 {
        let x = filled(rows, self.k, 0.5_f32);
        let mut out = Tensor::zeros(rows, self.n, DType::F32);
        let weights = self.dense.iter().map(Weight::Dense).chain(self.int8.iter().map(Weight::Int8));
        // With many rows, reading them is a small part.
        let weights: Vec<Weight<'_>> = weights.take(if rows > 16 { 2 } else { usize::MAX }).collect();
        let seconds = Clock::for_threads(context.num_threads()).best_seconds(LEAST, || {
            for &weight in &weights {
                let part = LinearPart { weight, bias: None };
                linear(context, x.view(), &[part], out.view_mut()).expect("shapes fit");
            }
        });
        seconds / weights.len() as f64
    }
}

fn filled<T: kernels::Element>(rows: usize, cols: usize, value: T) -> Tensor {
    let mut tensor = Tensor::zeros(rows, cols, T::DTYPE);
    tensor.as_mut_slice::<T>().fill(value);
    tensor
}

/// Seconds of ours and of candle's product, which wants operands of one type.
fn beside_candle(context: &Context, rows: usize) -> (f64, f64) {
    const SIDE: usize = 2048;
    let clock = Clock::for_threads(context.num_threads());
    let ours = Weights::new(Kind::Bf16, SIDE, SIDE, COLD_BYTES).seconds(context, rows);
    let ones =
        |rows| CandleTensor::ones((rows, SIDE), candle_core::DType::BF16, &Device::Cpu).expect("a tensor");
    let (x, weight) = (ones(rows), ones(SIDE));
    let candle = clock.best_seconds(LEAST, || {
        black_box(x.matmul(&weight.t().expect("a matrix")).expect("shapes fit"));
    });
    (ours, candle)
}
