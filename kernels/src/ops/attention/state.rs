//! What a query knows of the keys seen so far: the greatest score, the sum of the weights relative to it, and the weighted
//! sum of values (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867).

use super::tile::Output;
use crate::simd::{Float, LANES, Lanes, Simd, exp_of_nonpositive, spans};

/// Vectors of one query's state: `depth` of sums, then one with the greatest score, the total weight and
/// the greatest score of the next keys in its first lanes.
pub(super) fn len(depth: usize) -> usize {
    depth + 1
}

/// Of one query.
pub(super) struct State<'a> {
    pub(super) sums: &'a mut [Lanes],
    scalars: &'a mut Lanes,
}

impl<'a> State<'a> {
    /// Of query `query` among states that lie side by side.
    pub(super) fn of(states: &'a mut [Lanes], query: usize, depth: usize) -> Self {
        let (sums, scalars) = states[query * len(depth)..][..len(depth)].split_at_mut(depth);
        Self { sums, scalars: &mut scalars[0] }
    }
    pub(super) fn max(&self) -> f32 {
        self.scalars.0[0]
    }
    fn total(&self) -> f32 {
        self.scalars.0[1]
    }
    fn set(&mut self, max: f32, total: f32) {
        (self.scalars.0[0], self.scalars.0[1]) = (max, total);
    }

    /// Notes the greatest score of the next keys, for [`State::rescale_to_noted`].
    pub(super) fn note_max(&mut self, max: f32) {
        self.scalars.0[2] = max;
    }

    /// Brings sums and total to the greater of the maxima so far and noted. What is NaN stays so in the total.
    #[inline(always)]
    pub(super) fn rescale_to_noted<S: Simd>(&mut self, simd: S) {
        let max = self.max().max(self.scalars.0[2]);
        let total = self.rescale(simd, max);
        self.set(max, total);
    }

    pub(super) fn add_total(&mut self, weight: f32) {
        self.scalars.0[1] += weight;
    }

    /// Brings the sums from the greatest score so far to `max`, which is not less, and returns the total so brought.
    #[inline(always)]
    fn rescale<S: Simd>(&mut self, simd: S, max: f32) -> f32 {
        if max.to_bits() == self.max().to_bits() {
            return self.total();
        }
        let correction = exp_of_nonpositive(simd, simd.splat(self.max() - max));
        for sum in &mut *self.sums {
            // SAFETY: lanes are a vector.
            unsafe { simd.store(sum.0.as_mut_ptr(), simd.mul(simd.load(sum.0.as_ptr()), correction)) }
        }
        self.total() * simd.max_lane(correction)
    }

    /// Adds what another part of the keys gave. The order of merging is that of positions, whoever computed the parts.
    #[inline(always)]
    fn merge<S: Simd>(&mut self, simd: S, other: &State<'_>) {
        if other.is_empty() {
            return;
        }
        if self.is_empty() {
            self.sums.copy_from_slice(other.sums);
            *self.scalars = *other.scalars;
            return;
        }
        // NaN passes through the totals.
        let max = self.max().max(other.max());
        let total = self.rescale(simd, max);
        let factor = exp_of_nonpositive(simd, simd.splat(other.max() - max));
        for (sum, other) in self.sums.iter_mut().zip(&*other.sums) {
            // SAFETY: lanes are a vector.
            unsafe {
                let sum_of_both =
                    simd.mul_add(simd.load(other.0.as_ptr()), factor, simd.load(sum.0.as_ptr()));
                simd.store(sum.0.as_mut_ptr(), sum_of_both);
            }
        }
        self.set(max, total + other.total() * simd.max_lane(factor));
    }

    /// Whether no key has been seen.
    fn is_empty(&self) -> bool {
        self.max() == f32::NEG_INFINITY && self.total() == 0.0
    }
}

/// Forgets all keys.
pub(super) fn reset(states: &mut [Lanes], depth: usize) {
    states.fill(Lanes::ZERO);
    for query in 0..states.len() / len(depth) {
        State::of(states, query, depth).set(f32::NEG_INFINITY, 0.0);
    }
}

/// Merges the states of the same queries.
#[inline(always)]
pub(super) fn merge<S: Simd>(simd: S, into: &mut [Lanes], from: &mut [Lanes], depth: usize) {
    for query in 0..into.len() / len(depth) {
        State::of(into, query, depth).merge(simd, &State::of(from, query, depth));
    }
}

/// Divides by the totals, to which a sink adds its weight, and writes the tile's output.
#[inline(always)]
pub(super) fn finish<S: Simd>(simd: S, states: &mut [Lanes], output: &Output<'_>) {
    let Output { out, out_stride, group, head_dim, sinks } = *output;
    let depth = head_dim.div_ceil(LANES);
    for query in 0..states.len() / len(depth) {
        let (row, head) = (query / group, query % group);
        let mut state = State::of(states, query, depth);
        let mut total = state.total();
        if let Some(sinks) = sinks {
            let max = state.max().max(sinks[head]);
            total = state.rescale(simd, max);
            total += simd.max_lane(exp_of_nonpositive(simd, simd.splat(sinks[head] - max)));
        }
        let total = simd.splat(total);
        for ((start, len), sum) in spans(head_dim).zip(&*state.sums) {
            // SAFETY: the span lies within the output of this row and head, which this task alone writes.
            unsafe {
                let out = out.add(row * out_stride + head * head_dim + start);
                f32::store_part(simd, out, len, simd.div(simd.load(sum.0.as_ptr()), total));
            }
        }
    }
}
