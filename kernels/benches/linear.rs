//! The matrix product against what the machine gives: a read-bandwidth probe, multiply-add probes, and candle.
//!
//! `cargo bench --profile release --locked --workspace --bench linear [-- [THREADS] [LEVEL]]`: a level is `Portable`, `Avx2`,
//! `Avx512`, ... as [`Level`] has them; without one, the best of this CPU. All figures of a table come from one run.
//! With one thread the times are CPU times of the process, so that other processes disturb them less; with more they are
//! those of the wall clock.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![expect(unsafe_code, reason = "the probes call instructions by name")]

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor as CandleTensor};
use half::{bf16, f16};
use kernels::ops::linear::{Int8Weight, LinearPart, Weight, linear};
use kernels::{Context, DType, Level, Tensor, available_cores};

/// How long a figure is repeated; the best counts.
const LEAST: Duration = Duration::from_millis(60);
/// Weights that are read in turn, so that none is in a cache when its turn comes.
const COLD_BYTES: usize = 256 << 20;

/// Outputs and inputs of a layer, and whose: gate and up, then down.
const SHAPES: [(&str, usize, usize); 6] = [
    ("135M", 3072, 576),
    ("135M", 576, 1536),
    ("0.5B", 9728, 896),
    ("0.5B", 896, 4864),
    ("1.1B", 11264, 2048),
    ("1.1B", 2048, 5632),
];
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 512];

fn main() {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or_else(available_cores);
    let named = Level::ALL.into_iter().find(|level| args.contains(&format!("{level:?}")));
    let level = named.unwrap_or_else(Level::detect);
    let context = Context::cpu_with_level(threads, level);
    let clock = Clock::for_threads(threads);
    let read = read_gb_per_s(&context);
    let peak = clock.gflop_per_s(&context, |repeats| multiply_adds(level, repeats));
    let dots_peak = if level == Level::Avx512Bf16 { clock.gflop_per_s(&context, dots) } else { peak };
    println!(
        "{threads} threads, {level:?}: {read:.1} GB/s read, GFLOP/s: {peak:.0} f32, {dots_peak:.0} bf16"
    );
    println!("model, outputs x inputs, weights, then for each number of rows the nearer limit:");
    println!("r: GB/s of weights (of the read probe), f: GFLOP/s (of the type's probe)");
    for (model, n, k) in SHAPES {
        for kind in [Kind::Bf16, Kind::F16, Kind::F32, Kind::Int8] {
            let weights = Weights::new(kind, n, k);
            print!("{}", format!("{model} {n:>5}x{k:<4} {kind:?}").pad(24));
            let peak = if kind == Kind::Bf16 { dots_peak } else { peak };
            for rows in ROWS {
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
    for rows in [1, 8, 512] {
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

/// What the time of a run is read from.
#[derive(Clone, Copy)]
enum Clock {
    Wall,
    Cpu,
}

impl Clock {
    fn for_threads(threads: usize) -> Self {
        if threads == 1 { Self::Cpu } else { Self::Wall }
    }

    fn now_seconds(self) -> f64 {
        let clock = match self {
            Self::Wall => libc::CLOCK_MONOTONIC,
            Self::Cpu => libc::CLOCK_PROCESS_CPUTIME_ID,
        };
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes to a `timespec`.
        assert_eq!(unsafe { libc::clock_gettime(clock, &raw mut time) }, 0, "these clocks exist");
        time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
    }

    /// The best of several runs, in seconds.
    fn best_seconds(self, mut run: impl FnMut()) -> f64 {
        let (begin, mut best) = (Instant::now(), f64::INFINITY);
        while best.is_infinite() || begin.elapsed() < LEAST {
            let start = self.now_seconds();
            run();
            best = best.min(self.now_seconds() - start);
        }
        best
    }

    /// Arithmetic on registers alone, on all threads: the most that it can do here. `run`: returns the operations done.
    fn gflop_per_s(self, context: &Context, run: impl Fn(usize) -> usize + Sync) -> f64 {
        const REPEATS: usize = 300_000;
        let mut operations = 0;
        let seconds = self.best_seconds(|| {
            let done = AtomicUsize::new(0);
            context.parallel_for(context.num_threads(), |_| {
                done.fetch_add(run(black_box(REPEATS)), Ordering::Relaxed);
            });
            operations = done.into_inner();
        });
        operations as f64 / seconds / 1e9
    }
}

/// Bytes per second that the threads read together, from memory far larger than the caches.
fn read_gb_per_s(context: &Context) -> f64 {
    let data = vec![1_u64; (512 << 20) / 8];
    let chunks: Vec<&[u64]> = data.chunks(1 << 17).collect();
    let pass = || {
        Clock::for_threads(context.num_threads()).best_seconds(|| {
            context.parallel_for(chunks.len(), |i| {
                let mut sums = [0_u64; 16];
                for values in chunks[i].chunks_exact(16) {
                    sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum = sum.wrapping_add(value));
                }
                black_box(sums);
            });
        })
    };
    // A neighbour's noise lasts longer than one figure.
    let seconds = (0..5).map(|_| pass()).fold(f64::INFINITY, f64::min);
    (512 << 20) as f64 / seconds / 1e9
}

/// Returns the floating-point operations done.
fn multiply_adds(level: Level, repeats: usize) -> usize {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the context asked for the level.
        Level::Avx512 | Level::Avx512Bf16 => unsafe { multiply_adds_avx512(repeats) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { multiply_adds_avx2(repeats) },
        _ => {
            let mut sums = [1.0_f32; 64];
            for _ in 0..repeats {
                for sum in &mut sums {
                    *sum = *sum * 0.5 + 1.0;
                }
            }
            black_box(sums);
            2 * 64 * repeats
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_adds_avx512(repeats: usize) -> usize {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let half = black_box(_mm512_set1_ps(0.5));
    let mut sums = [_mm512_set1_ps(1.0); 16];
    for _ in 0..repeats {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, half, half);
        }
    }
    black_box(sums);
    2 * 16 * 16 * repeats
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_adds_avx2(repeats: usize) -> usize {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let half = black_box(_mm256_set1_ps(0.5));
    let mut sums = [_mm256_set1_ps(1.0); 12];
    for _ in 0..repeats {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, half, half);
        }
    }
    black_box(sums);
    2 * 8 * 12 * repeats
}

/// Products of bf16 pairs; only on CPUs that have them.
fn dots(repeats: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dots_avx512(repeats: usize) -> usize {
        use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps, _mm512_set1_ps};
        // SAFETY: of one size, and any bits are valid.
        let half: __m512bh =
            black_box(unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(0.5)) });
        let mut sums = [_mm512_set1_ps(1.0); 24];
        for _ in 0..repeats {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, half, half);
            }
        }
        black_box(sums);
        2 * 32 * 24 * repeats
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: called only where the level has them.
    return unsafe { dots_avx512(repeats) };
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no such level: {repeats}")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bf16,
    F16,
    F32,
    Int8,
}

impl Kind {
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
    fn new(kind: Kind, n: usize, k: usize) -> Self {
        let copies = (COLD_BYTES / (n * k * kind.size_in_bytes())).max(2);
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
        let seconds = Clock::for_threads(context.num_threads()).best_seconds(|| {
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
    let ours = Weights::new(Kind::Bf16, SIDE, SIDE).seconds(context, rows);
    let ones =
        |rows| CandleTensor::ones((rows, SIDE), candle_core::DType::BF16, &Device::Cpu).expect("a tensor");
    let (x, weight) = (ones(rows), ones(SIDE));
    let candle = clock.best_seconds(|| {
        black_box(x.matmul(&weight.t().expect("a matrix")).expect("shapes fit"));
    });
    (ours, candle)
}
