//! The matrix product against what the machine gives: a read-bandwidth probe, a multiply-add probe, and candle.
//!
//! `cargo bench --profile release -p kernels --bench linear [-- THREADS]`. All figures of a table come from one run. With
//! one thread the times are CPU times of the process (candle's threads added up), so that other processes
//! disturb them less; with more they are those of the wall clock.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![expect(unsafe_code, reason = "the probes call instructions by name")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor as CandleTensor};
use kernels::ops::linear::{LinearPart, Weight, linear};
use kernels::{Context, DType, Tensor, available_cores};

/// How long a figure is repeated; the best counts.
const LEAST: Duration = Duration::from_millis(300);

fn main() {
    // cargo adds `--bench`.
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or_else(available_cores);
    let context = Context::cpu(threads);
    let read = read_gb_per_s(&context);
    let peak = multiply_add_gflop_per_s(&context);
    println!("{threads} threads; probes: {read:.1} GB/s read, {peak:.0} GFLOP/s multiply-add");
    println!("weight, type, rows: GB/s (of probe), GFLOP/s (of probe), times candle");
    for (n, k) in [(14336, 4096), (2048, 2048)] {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let weights = Weights::new(n, k, dtype);
            for rows in [1, 2, 4, 8, 16, 64, 512] {
                let ours = weights.seconds(&context, rows);
                let bytes = (n * k * dtype.size_in_bytes()) as f64 / ours / 1e9;
                let flops = 2.0 * (n * k * rows) as f64 / ours / 1e9;
                println!(
                    "{n}x{k} {dtype:?} {rows:>3}: {bytes:6.1} GB/s ({:3.0} %) {flops:6.0} GFLOP/s ({:3.0} %) {:6.1}x",
                    100.0 * bytes / read,
                    100.0 * flops / peak,
                    weights.candle_seconds(&context, rows) / ours,
                );
            }
        }
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
}

/// Bytes per second that the threads read together, from memory far larger than the caches.
fn read_gb_per_s(context: &Context) -> f64 {
    let data = vec![1_u64; (512 << 20) / 8];
    let chunks: Vec<&[u64]> = data.chunks(1 << 17).collect();
    let seconds = Clock::for_threads(context.num_threads()).best_seconds(|| {
        context.parallel_for(chunks.len(), |i| {
            let mut sums = [0_u64; 16];
            for values in chunks[i].chunks_exact(16) {
                sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum = sum.wrapping_add(value));
            }
            black_box(sums);
        });
    });
    (512 << 20) as f64 / seconds / 1e9
}

/// Multiply-adds on registers alone, on all threads: the most that this arithmetic can do here.
fn multiply_add_gflop_per_s(context: &Context) -> f64 {
    const REPEATS: usize = 100_000;
    let tasks = context.num_threads();
    let mut flops = 0;
    let seconds = Clock::for_threads(context.num_threads()).best_seconds(|| {
        let done = std::sync::atomic::AtomicUsize::new(0);
        context.parallel_for(tasks, |_| {
            let flops = multiply_adds(black_box(REPEATS));
            done.fetch_add(flops, std::sync::atomic::Ordering::Relaxed);
        });
        flops = done.into_inner();
    });
    flops as f64 / seconds / 1e9
}

/// Returns the floating-point operations done.
fn multiply_adds(repeats: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: asked in the line above.
            return unsafe { multiply_adds_avx512(repeats) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: asked in the line above.
            return unsafe { multiply_adds_avx2(repeats) };
        }
    }
    let mut sums = [1.0_f32; 64];
    for _ in 0..repeats {
        for sum in &mut sums {
            *sum = *sum * 0.5 + 1.0;
        }
    }
    black_box(sums);
    2 * 64 * repeats
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

struct Weights {
    ours: Tensor,
    candle: CandleTensor,
}

impl Weights {
    fn new(n: usize, k: usize, dtype: DType) -> Self {
        let values: Vec<f32> = (0..n * k).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect();
        let candle = CandleTensor::from_slice(&values, (n, k), &Device::Cpu)
            .and_then(|tensor| tensor.to_dtype(dtype))
            .expect("a tensor");
        let ours = Tensor::from_slice(&values, n, k).to_dtype(dtype).expect("a float type");
        Self { ours, candle }
    }

    fn seconds(&self, context: &Context, rows: usize) -> f64 {
        let x = vec![0.5_f32; rows * self.ours.cols()];
        let x = Tensor::from_slice(&x, rows, self.ours.cols());
        let mut out = Tensor::zeros(rows, self.ours.rows(), DType::F32);
        Clock::for_threads(context.num_threads()).best_seconds(|| {
            let part = LinearPart { weight: Weight::Dense(&self.ours), bias: None };
            linear(context, x.view(), &[part], out.view_mut()).expect("shapes fit");
        })
    }

    /// candle multiplies operands of one type only, so the input has the weights' type.
    fn candle_seconds(&self, context: &Context, rows: usize) -> f64 {
        let x = CandleTensor::ones((rows, self.ours.cols()), self.candle.dtype(), &Device::Cpu)
            .expect("a tensor");
        Clock::for_threads(context.num_threads()).best_seconds(|| {
            black_box(x.matmul(&self.candle.t().expect("a matrix")).expect("shapes fit"));
        })
    }
}
