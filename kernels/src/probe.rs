//! What this machine gives at most: the floors that benchmarks compare with. Not part of the interface.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::simd::{Kernel, LANES, Lanes, Simd};
use crate::{Context, Tensor};

/// How long a probe is repeated; the best counts.
const PROBE_TIME: Duration = Duration::from_millis(300);

/// Memory for [`read_bytes_per_s`]: several times the largest caches.
const READ_BYTES: usize = 1 << 30;
/// What a task of [`read_bytes_per_s`] reads.
const READ_TASK_BYTES: usize = 4 << 20;

/// Bytes per second that the context's threads read together from memory that no cache holds.
pub struct ReadProbe {
    data: Tensor,
}

impl ReadProbe {
    /// Takes 1 GiB, to be kept between measurements.
    pub fn new() -> Self {
        let mut data = Tensor::zeros(1, READ_BYTES / size_of::<f32>(), crate::DType::F32);
        // Pages that were never written are all the same one.
        data.as_mut_slice::<f32>().fill(1.0);
        Self { data }
    }

    /// The best of all repetitions, with and without asking for lines ahead: which is faster depends on the machine.
    pub fn bytes_per_s(&self, context: &Context) -> f64 {
        let tasks: Vec<&[f32]> =
            self.data.as_slice::<f32>().chunks(READ_TASK_BYTES / size_of::<f32>()).collect();
        let seconds = [0, 2 << 10, 8 << 10].map(|prefetch_bytes| {
            best_seconds(|| {
                context.parallel_for(tasks.len(), |task| {
                    context.level().run(Read { data: tasks[task], prefetch_bytes });
                });
            })
        });
        READ_BYTES as f64 / seconds.into_iter().fold(f64::INFINITY, f64::min)
    }
}

impl Default for ReadProbe {
    fn default() -> Self {
        Self::new()
    }
}

/// Floating-point operations per second of multiply-adds on registers alone, on all threads: the most that this
/// arithmetic can do with the context's instruction set.
pub fn multiply_add_flops_per_s(context: &Context) -> f64 {
    const REPEATS: usize = 200_000;
    let flops = AtomicUsize::new(0);
    let seconds = best_seconds(|| {
        flops.store(0, Ordering::Relaxed);
        context.parallel_for(context.num_threads(), |_| {
            context.level().run(MultiplyAdd { repeats: black_box(REPEATS), flops: &flops });
        });
    });
    flops.into_inner() as f64 / seconds
}

/// As [`multiply_add_flops_per_s`], of products of bf16 with sums in f32, by tiles or by vectors, where the context's
/// instruction set has them: what bf16 weights are multiplied with.
pub fn multiply_add_bf16_flops_per_s(context: &Context) -> f64 {
    const REPEATS: usize = 100_000;
    let level = context.level();
    if !level.has_dot_bf16() {
        return multiply_add_flops_per_s(context);
    }
    let flops = AtomicUsize::new(0);
    let seconds = best_seconds(|| {
        flops.store(0, Ordering::Relaxed);
        context.parallel_for(context.num_threads(), |_| {
            let repeats = black_box(REPEATS);
            if let Some(amx) = level.amx() {
                flops.fetch_add(amx.multiply_registers(repeats), Ordering::Relaxed);
                return;
            }
            level.run_with_dots(MultiplyAddBf16 { repeats, flops: &flops });
        });
    });
    flops.into_inner() as f64 / seconds
}

fn best_seconds(mut run: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while best.is_infinite() || begin.elapsed() < PROBE_TIME {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

struct Read<'a> {
    /// A whole number of groups.
    data: &'a [f32],
    /// How far ahead lines are asked for; 0 leaves it to the machine.
    prefetch_bytes: usize,
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        /// Independent sums, so that additions do not wait for each other.
        const SUMS: usize = 8;
        let mut sums = [simd.splat(0.0); SUMS];
        for group in self.data.as_chunks::<{ SUMS * LANES }>().0 {
            for (sum, values) in sums.iter_mut().zip(group.as_chunks::<LANES>().0) {
                if self.prefetch_bytes > 0 {
                    simd.prefetch(values.as_ptr().cast::<u8>().wrapping_add(self.prefetch_bytes));
                }
                // SAFETY: the slice has a vector's worth of elements.
                *sum = simd.add(*sum, unsafe { simd.load(values.as_ptr()) });
            }
        }
        consume(simd, &sums);
    }
}

struct MultiplyAdd<'a> {
    repeats: usize,
    flops: &'a AtomicUsize,
}

impl Kernel for MultiplyAdd<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // Enough to hide the latency of each, few enough to stay in registers.
        if S::WIDE { self.chains::<S, 16>(simd) } else { self.chains::<S, 6>(simd) }
    }
}

impl MultiplyAdd<'_> {
    #[inline(always)]
    fn chains<S: Simd, const N: usize>(&self, simd: S) {
        let half = simd.splat(black_box(0.5));
        let mut sums = [simd.splat(1.0); N];
        for _ in 0..self.repeats {
            for sum in &mut sums {
                *sum = simd.mul_add(*sum, half, half);
            }
        }
        consume(simd, &sums);
        self.flops.fetch_add(2 * LANES * N * self.repeats, Ordering::Relaxed);
    }
}

struct MultiplyAddBf16<'a> {
    repeats: usize,
    flops: &'a AtomicUsize,
}

impl Kernel for MultiplyAddBf16<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        const SUMS: usize = 24;
        // As pairs of bf16, any f32 is finite numbers.
        let pairs = simd.splat(black_box(0.5));
        let mut sums = [simd.splat(1.0); SUMS];
        for _ in 0..self.repeats {
            for sum in &mut sums {
                *sum = simd.dot_bf16(pairs, pairs, *sum);
            }
        }
        consume(simd, &sums);
        self.flops.fetch_add(2 * 2 * LANES * SUMS * self.repeats, Ordering::Relaxed);
    }
}

/// Uses the values, so that they must be computed.
#[inline(always)]
fn consume<S: Simd>(simd: S, values: &[S::Vector]) {
    let mut out = Lanes::ZERO;
    for &value in values {
        // SAFETY: there is room for a vector.
        unsafe { simd.store(out.0.as_mut_ptr(), value) };
        black_box(&out);
    }
}
