//! What the machine gives: rates to compare kernels with, measured in the same run.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kernels::Context;

/// How long a figure is repeated; the best counts.
const LEAST: Duration = Duration::from_millis(300);

/// What the time of a run is read from.
#[derive(Clone, Copy)]
pub(crate) enum Clock {
    Wall,
    Cpu,
}

impl Clock {
    pub(crate) fn for_threads(threads: usize) -> Self {
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
    pub(crate) fn best_seconds(self, mut run: impl FnMut()) -> f64 {
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
pub(crate) fn read_gb_per_s(context: &Context) -> f64 {
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
pub(crate) fn multiply_add_gflop_per_s(context: &Context) -> f64 {
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
