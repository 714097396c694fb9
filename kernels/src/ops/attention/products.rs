//! The innermost loops: a few queries times one block of keys, or their weights times one block of values, sums in
//! registers.
//!
//! Each sum is one chain of multiply-adds in order of its index, so how many queries or vectors go together changes no
//! bit.

use std::ops::Range;

use crate::simd::{Float, Kernel, LANES, Simd};

/// Memory that comes next, to be asked for while this block is in use: blocks lie anywhere, so the CPU does not guess it.
///
/// A CPU may drop such a request while others are under way, so each line is asked for twice.
#[derive(Clone, Copy)]
pub(super) struct Prefetch {
    /// The next block, for the L1 cache. An address is all that is made of it.
    pub(super) near: *const u8,
    /// A block of the next unit, for the L2 cache.
    pub(super) far: *const u8,
    /// Asked for in each step of a loop, which is one element of keys or one place of values.
    pub(super) bytes_per_step: usize,
}

/// Of all current CPUs but a few.
const LINE_BYTES: usize = 64;

impl Prefetch {
    pub(super) const NONE: Self = Self { near: std::ptr::null(), far: std::ptr::null(), bytes_per_step: 0 };

    #[inline(always)]
    pub(super) fn step<S: Simd>(self, simd: S, step: usize) {
        for line in 0..self.bytes_per_step.div_ceil(LINE_BYTES) {
            let offset = step * self.bytes_per_step + line * LINE_BYTES;
            simd.prefetch(self.near.wrapping_add(offset));
            simd.prefetch_far(self.far.wrapping_add(offset));
        }
    }
}

/// Scores of some queries with the keys of one block.
pub(super) struct Scores<E> {
    /// `[head_dim, query_stride]`, scaled: what is multiplied with one element of a key lies side by side.
    pub(super) queries: *const f32,
    pub(super) query_stride: usize,
    pub(super) num_queries: usize,
    /// `[head_dim, block_size]`.
    pub(super) keys: *const E,
    pub(super) head_dim: usize,
    pub(super) block_size: usize,
    /// `[queries, score_stride]`; whole vectors are written.
    pub(super) out: *mut f32,
    pub(super) score_stride: usize,
    pub(super) prefetch: Prefetch,
}

impl<E: Float> Kernel for Scores<E> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut query = 0;
        while query < self.num_queries {
            let left = self.num_queries - query;
            let done = if S::WIDE {
                match left {
                    8.. => self.queries_from::<S, 8>(simd, query),
                    4.. => self.queries_from::<S, 4>(simd, query),
                    3 => self.queries_from::<S, 3>(simd, query),
                    2 => self.queries_from::<S, 2>(simd, query),
                    _ => self.queries_from::<S, 1>(simd, query),
                }
            } else {
                match left {
                    3.. => self.queries_from::<S, 3>(simd, query),
                    2 => self.queries_from::<S, 2>(simd, query),
                    _ => self.queries_from::<S, 1>(simd, query),
                }
            };
            // The block has been asked for.
            self.prefetch = Prefetch::NONE;
            query += done;
        }
    }
}

impl<E: Float> Scores<E> {
    /// `N` queries, two vectors of positions at a time. Returns `N`.
    #[inline(always)]
    fn queries_from<S: Simd, const N: usize>(&self, simd: S, query: usize) -> usize {
        let mut start = 0;
        while start + 2 * LANES <= self.block_size {
            simd.call(ScoreVectors::<E, N, 2> { block: self, query, start });
            start += 2 * LANES;
        }
        while start < self.block_size {
            simd.call(ScoreVectors::<E, N, 1> { block: self, query, start });
            start += LANES;
        }
        N
    }
}

/// `N` queries times `P` vectors of positions, all full or, where `P` is 1, perhaps the block's last.
struct ScoreVectors<'a, E, const N: usize, const P: usize> {
    block: &'a Scores<E>,
    query: usize,
    start: usize,
}

impl<E: Float, const N: usize, const P: usize> Kernel for ScoreVectors<'_, E, N, P> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, query, start } = self;
        let Scores { query_stride, head_dim, block_size, score_stride, .. } = *block;
        let len = LANES.min(block_size - start);
        let prefetch = if start == 0 { block.prefetch } else { Prefetch::NONE };
        let mut sums = [[simd.splat(0.0); P]; N];
        // SAFETY: queries `query .. query + N` have `head_dim` elements, each of which has `P` vectors of keys from
        // `start` in the block, the last of `len` elements.
        unsafe {
            let mut queries = block.queries.add(query);
            let mut keys = block.keys.add(start);
            for element in 0..head_dim {
                prefetch.step(simd, element);
                let mut key = [simd.splat(0.0); P];
                for (i, key) in key.iter_mut().enumerate() {
                    *key = if P > 1 {
                        E::load(simd, keys.add(i * LANES))
                    } else {
                        E::load_part(simd, keys, len)
                    };
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let query = simd.splat(*queries.add(i));
                    for (sum, key) in sums.iter_mut().zip(key) {
                        *sum = simd.mul_add(query, key, *sum);
                    }
                }
                queries = queries.wrapping_add(query_stride);
                keys = keys.wrapping_add(block_size);
            }
            for (i, sums) in sums.iter().enumerate() {
                let scores = block.out.add((query + i) * score_stride + start);
                for (j, &sum) in sums.iter().enumerate() {
                    simd.store(scores.add(j * LANES), sum);
                }
            }
        }
    }
}

/// Adds the weighted values of places of one block to the sums of some queries.
pub(super) struct Values<E> {
    /// `[queries, weight_stride]`, from the block's first place.
    pub(super) weights: *const f32,
    pub(super) weight_stride: usize,
    /// `[block_size, head_dim]`.
    pub(super) cached: *const E,
    pub(super) head_dim: usize,
    /// `[queries, sum_stride]`.
    pub(super) sums: *mut f32,
    pub(super) sum_stride: usize,
    pub(super) prefetch: Prefetch,
}

/// How many queries [`Values`] takes at once where so many are left.
#[inline(always)]
pub(super) fn values_together<S: Simd>(left: usize) -> usize {
    match left {
        8.. if S::WIDE => 8,
        4.. if S::WIDE => 4,
        _ => left.min(3),
    }
}

/// Some queries that see the same places: as many as [`values_together`] says.
pub(super) struct SumValues<'a, E> {
    pub(super) block: &'a Values<E>,
    pub(super) query: usize,
    pub(super) num_queries: usize,
    pub(super) places: Range<usize>,
    pub(super) prefetch: bool,
}

impl<E: Float> Kernel for SumValues<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.num_queries {
            8 if S::WIDE => self.all_vectors::<S, 8>(simd),
            4 if S::WIDE => self.all_vectors::<S, 4>(simd),
            3 => self.all_vectors::<S, 3>(simd),
            2 => self.all_vectors::<S, 2>(simd),
            1 => self.all_vectors::<S, 1>(simd),
            _ => unreachable!("at most as many as go together"),
        }
    }
}

impl<E: Float> SumValues<'_, E> {
    #[inline(always)]
    fn all_vectors<S: Simd, const N: usize>(self, simd: S) {
        let Self { block, query, prefetch, .. } = self;
        // A vector of values is widened once for all queries, a weight read once for all vectors.
        let most = if S::WIDE && N <= 4 { 4 } else { 2 };
        let mut start = 0;
        while start < block.head_dim {
            let (places, prefetch) = (self.places.clone(), prefetch && start == 0);
            let vectors = if block.head_dim - start >= most * LANES { most } else { 1 };
            match vectors {
                4 if S::WIDE && N <= 4 => {
                    simd.call(SumVectors::<E, N, 4> { block, query, places, start, prefetch });
                }
                2 if !S::WIDE || N > 4 => {
                    simd.call(SumVectors::<E, N, 2> { block, query, places, start, prefetch });
                }
                _ => simd.call(SumVectors::<E, N, 1> { block, query, places, start, prefetch }),
            }
            start += vectors * LANES;
        }
    }
}

/// `N` queries times `D` vectors of a head, all full or, where `D` is 1, perhaps the head's last.
struct SumVectors<'a, E, const N: usize, const D: usize> {
    block: &'a Values<E>,
    query: usize,
    places: Range<usize>,
    start: usize,
    prefetch: bool,
}

impl<E: Float, const N: usize, const D: usize> Kernel for SumVectors<'_, E, N, D> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, query, places, start, .. } = self;
        let prefetch = if self.prefetch { block.prefetch } else { Prefetch::NONE };
        let Values { weight_stride, head_dim, sum_stride, .. } = *block;
        let len = LANES.min(head_dim - start);
        // SAFETY: queries `query .. query + N` have sums of whole vectors and weights of the block's places, and the
        // places are in the block; the last vector of a value has `len` elements.
        unsafe {
            let at = block.sums.add(query * sum_stride + start);
            let mut sums = [[simd.splat(0.0); D]; N];
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.load(at.add(i * sum_stride + j * LANES));
                }
            }
            let weights: [*const f32; N] =
                std::array::from_fn(|i| block.weights.add((query + i) * weight_stride + places.start));
            let mut values = block.cached.add(places.start * head_dim + start);
            for step in 0..places.len() {
                prefetch.step(simd, step);
                let mut value = [simd.splat(0.0); D];
                for (j, value) in value.iter_mut().enumerate() {
                    *value = if D > 1 {
                        E::load(simd, values.add(j * LANES))
                    } else {
                        E::load_part(simd, values, len)
                    };
                }
                for (sums, weights) in sums.iter_mut().zip(&weights) {
                    let weight = simd.splat(*weights.add(step));
                    for (sum, value) in sums.iter_mut().zip(value) {
                        *sum = simd.mul_add(weight, value, *sum);
                    }
                }
                values = values.wrapping_add(head_dim);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    simd.store(at.add(i * sum_stride + j * LANES), sum);
                }
            }
        }
    }
}
