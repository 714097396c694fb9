//! A row of logits seen as a distribution, on the calling thread: rows are dealt out to threads by whoever has them.

use crate::Level;
use crate::simd::{Float, Kernel, LANES, Lanes, Simd, exp, spans};

/// Elements whose exponentials are added in f32 before the sum goes on in f64.
const CHUNK: usize = 1024;

/// The greatest logit and where it is first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Greatest {
    /// NaN is passed over; -infinity where there is nothing else.
    pub logit: f32,
    /// 0 where there is nothing greater than -infinity.
    pub index: usize,
}

/// The greatest of a row of logits.
pub fn greatest(logits: &[f32]) -> Greatest {
    let mut result = Greatest { logit: f32::NEG_INFINITY, index: 0 };
    let level = Level::detect();
    for (chunk, start) in logits.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
        let mut max = f32::NEG_INFINITY;
        level.run(MaxOf { values: chunk, max: &mut max });
        if max > result.logit {
            let place = chunk.iter().position(|&logit| logit >= max).unwrap_or(0);
            result = Greatest { logit: max, index: start + place };
        }
    }
    result
}

/// Sum of `e^(logit - max)` of a row of logits; NaN where one is NaN.
pub fn sum_of_exp(logits: &[f32], max: f32) -> f64 {
    let level = Level::detect();
    let mut total = 0.0;
    for chunk in logits.chunks(CHUNK) {
        let mut sum = 0.0;
        level.run(SumOfExp { logits: chunk, max, sum: &mut sum });
        total += f64::from(sum);
    }
    total
}

/// `weights[i] = e^(logits[i] - max)`: probabilities relative to that of a logit of `max`; exactly 0 for -infinity.
///
/// # Panics
/// Where the slices differ in length.
pub fn weights(logits: &[f32], max: f32, weights: &mut [f32]) {
    assert_eq!(logits.len(), weights.len(), "a weight for each logit");
    Level::detect().run(Weights { logits, max, out: weights });
}

struct MaxOf<'a> {
    values: &'a [f32],
    max: &'a mut f32,
}

impl Kernel for MaxOf<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut max = [simd.splat(f32::NEG_INFINITY); 2];
        let (pairs, rest) = self.values.as_chunks::<{ 2 * LANES }>();
        for pair in pairs {
            // SAFETY: two vectors. NaN is passed over, being the first operand.
            unsafe {
                max[0] = simd.max(simd.load(pair.as_ptr()), max[0]);
                max[1] = simd.max(simd.load(pair.as_ptr().add(LANES)), max[1]);
            }
        }
        let greatest = simd.max_lane(simd.max(max[0], max[1]));
        *self.max = rest.iter().fold(greatest, |max, &value| if value > max { value } else { max });
    }
}

struct SumOfExp<'a> {
    logits: &'a [f32],
    max: f32,
    sum: &'a mut f32,
}

impl Kernel for SumOfExp<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let max = simd.splat(self.max);
        let mut sum = simd.splat(0.0);
        for (start, len) in spans(self.logits.len()) {
            // Behind the end nothing is added.
            let mut lanes = Lanes([f32::NEG_INFINITY; LANES]);
            // SAFETY: a span lies within the logits; lanes are a vector.
            let logits = unsafe {
                if len == LANES {
                    simd.load(self.logits.as_ptr().add(start))
                } else {
                    lanes.0[..len].copy_from_slice(&self.logits[start..start + len]);
                    simd.load(lanes.0.as_ptr())
                }
            };
            sum = simd.add(sum, exp(simd, simd.sub(logits, max)));
        }
        *self.sum = simd.sum(sum);
    }
}

struct Weights<'a> {
    logits: &'a [f32],
    max: f32,
    out: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let max = simd.splat(self.max);
        for (start, len) in spans(self.logits.len()) {
            // SAFETY: a span lies within both, which have one length.
            unsafe {
                let logits = f32::load_part(simd, self.logits.as_ptr().add(start), len);
                let weight = exp(simd, simd.sub(logits, max));
                f32::store_part(simd, self.out.as_mut_ptr().add(start), len, weight);
            }
        }
    }
}
