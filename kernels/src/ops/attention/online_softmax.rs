//! One pass over the blocks of a sequence with a running maximum and sum (Milakov & Gimelshein 2018, "Online normalizer
//! calculation for softmax", arXiv:1805.02867), for the queries of some rows that share a kv head.
//!
//! Each query's arithmetic is its own: positions in order within a block, blocks in order from the one that holds its
//! first visible position. Queries are taken together only to read a key or value once for several of them.

use std::cell::RefCell;
use std::ops::Range;

use super::AttentionParams;
use crate::View;
use crate::simd::{Float, Kernel, LANES, Lanes, Simd, exp, spans};

/// Queries (rows times heads of the group) of a tile, unless a group alone has more. Their queries, sums and scores
/// stay in the L1 and L2 caches.
pub(super) const MAX_QUERIES: usize = 32;
/// Queries that are multiplied with a key or value while it is in a register.
const TOGETHER: usize = 4;

pub(super) struct Tile<'a, T> {
    /// `[rows, group * head_dim]`: the heads of one kv head.
    pub(super) query: View<'a>,
    /// The first output of the tile.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Position of the first row; the others follow.
    pub(super) first_position: usize,
    pub(super) keys: &'a [T],
    pub(super) values: &'a [T],
    /// Blocks of the sequence.
    pub(super) table: &'a [u32],
    pub(super) kv_heads: usize,
    pub(super) kv_head: usize,
    pub(super) block_size: usize,
    pub(super) head_dim: usize,
    pub(super) params: AttentionParams,
}

/// Working memory of a thread, grown when a larger tile comes and kept.
#[derive(Default)]
struct Scratch {
    /// `[queries, head_dim in vectors]`, zeros behind a head's end.
    queries: Vec<Lanes>,
    /// As `queries`: sums of values, weighted.
    sums: Vec<Lanes>,
    /// `[queries, block_size in vectors]`: scores, then weights, of one block.
    scores: Vec<Lanes>,
    /// Of each query.
    running: Vec<Running>,
}

#[derive(Clone, Copy)]
struct Running {
    max: f32,
    total: f32,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn reset<V: Copy>(memory: &mut Vec<V>, len: usize, value: V) {
    memory.clear();
    memory.resize(len, value);
}

impl<T: Float> Kernel for Tile<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // A closure is a function of its own, which the instruction set does not reach but by a call.
        SCRATCH.with_borrow_mut(|scratch| simd.call(Blocks { tile: &self, scratch }));
    }
}

/// All blocks that a tile sees.
struct Blocks<'a, 'b, T> {
    tile: &'a Tile<'b, T>,
    scratch: &'a mut Scratch,
}

impl<T: Float> Kernel for Blocks<'_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { tile, scratch } = self;
        tile.begin(simd, scratch);
        let last_position = tile.first_position + tile.query.rows() - 1;
        let first = tile.visible(0).start / tile.block_size;
        for index in first..=last_position / tile.block_size {
            simd.call(Block { tile, scratch, index });
        }
        tile.finish(simd, scratch);
    }
}

impl<T: Float> Tile<'_, T> {
    fn group(&self) -> usize {
        self.query.cols() / self.head_dim
    }
    fn num_queries(&self) -> usize {
        self.query.rows() * self.group()
    }
    /// Vectors of a head.
    fn depth(&self) -> usize {
        self.head_dim.div_ceil(LANES)
    }
    /// Vectors of a block's scores.
    fn width(&self) -> usize {
        self.block_size.div_ceil(LANES)
    }

    /// Positions that a row attends to.
    fn visible(&self, row: usize) -> Range<usize> {
        let end = self.first_position + row + 1;
        self.params.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    #[inline(always)]
    fn begin<S: Simd>(&self, simd: S, scratch: &mut Scratch) {
        let (num_queries, depth) = (self.num_queries(), self.depth());
        reset(&mut scratch.queries, num_queries * depth, Lanes::ZERO);
        reset(&mut scratch.sums, num_queries * depth, Lanes::ZERO);
        reset(&mut scratch.scores, num_queries * self.width(), Lanes::ZERO);
        reset(&mut scratch.running, num_queries, Running { max: f32::NEG_INFINITY, total: 0.0 });
        for (query, lanes) in scratch.queries.chunks_exact_mut(depth).enumerate() {
            let row = self.query.row::<f32>(query / self.group());
            let head = &row[query % self.group() * self.head_dim..][..self.head_dim];
            for ((start, len), lanes) in spans(self.head_dim).zip(lanes) {
                // SAFETY: a span lies within the head.
                unsafe {
                    simd.store(lanes.0.as_mut_ptr(), f32::load_part(simd, head.as_ptr().add(start), len));
                }
            }
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, scratch: &Scratch) {
        for (query, sums) in scratch.sums.chunks_exact(self.depth()).enumerate() {
            let total = simd.splat(scratch.running[query].total);
            let (row, head) = (query / self.group(), query % self.group());
            for ((start, len), sum) in spans(self.head_dim).zip(sums) {
                // SAFETY: the span lies within the output of this row and head, which this task alone writes.
                unsafe {
                    let out = self.out.add(row * self.out_stride + head * self.head_dim + start);
                    f32::store_part(simd, out, len, simd.div(simd.load(sum.0.as_ptr()), total));
                }
            }
        }
    }
}

/// One block of keys and values for all queries of a tile.
struct Block<'a, 'b, T> {
    tile: &'a Tile<'b, T>,
    scratch: &'a mut Scratch,
    index: usize,
}

impl<T: Float> Kernel for Block<'_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut row = 0;
        while row < self.tile.query.rows() {
            // Rows that see the same places of the block, mostly all of it, go together.
            let places = self.places(row);
            let mut end = row + 1;
            while end < self.tile.query.rows() && self.places(end) == places {
                end += 1;
            }
            if !places.is_empty() {
                self.attend(simd, row * self.tile.group()..end * self.tile.group(), &places);
            }
            row = end;
        }
    }
}

impl<T: Float> Block<'_, '_, T> {
    /// Places of the block that a row attends to.
    fn places(&self, row: usize) -> Range<usize> {
        let (visible, size) = (self.tile.visible(row), self.tile.block_size);
        let begin = self.index * size;
        let end = visible.end.clamp(begin, begin + size) - begin;
        visible.start.clamp(begin, begin + size) - begin..end
    }

    /// This block of the keys or values, `[block_size, head_dim]`.
    fn part_of(&self, cache: &[T]) -> *const T {
        let Tile { kv_heads, kv_head, block_size, head_dim, .. } = *self.tile;
        let block = self.tile.table[self.index] as usize * kv_heads + kv_head;
        cache[block * block_size * head_dim..][..block_size * head_dim].as_ptr()
    }

    /// Asks for a line of the next block of the keys or values while this one is in use: blocks lie anywhere, so the CPU
    /// does not guess the next one.
    #[inline(always)]
    fn prefetch_next<S: Simd>(&self, simd: S, cache: &[T], place: usize) {
        let Tile { table, kv_heads, kv_head, block_size, head_dim, .. } = *self.tile;
        // Behind the last block lies another one or rubbish; an address is all that is made of it.
        let Some(&block) = table.get(self.index + 1) else { return };
        let line = ((block as usize * kv_heads + kv_head) * block_size + place) * head_dim;
        let bytes = head_dim * size_of::<T>();
        for offset in (0..bytes).step_by(64) {
            simd.prefetch(cache.as_ptr().wrapping_add(line).cast::<u8>().wrapping_add(offset));
        }
    }

    /// Takes queries that see the same places. How many go together changes only how often a key or value is read.
    #[inline(always)]
    fn attend<S: Simd>(&mut self, simd: S, queries: Range<usize>, places: &Range<usize>) {
        let whole = queries.len() / TOGETHER * TOGETHER;
        let (together, alone) = (queries.start..queries.start + whole, queries.start + whole..queries.end);
        for query in together.clone().step_by(TOGETHER) {
            if S::WIDE {
                self.score::<S, TOGETHER, 2>(simd, query, places);
            } else {
                self.score::<S, TOGETHER, 1>(simd, query, places);
            }
        }
        for query in alone.clone() {
            self.score::<S, 1, 4>(simd, query, places);
        }
        for query in queries {
            self.weigh(simd, query, places);
        }
        for query in together.step_by(TOGETHER) {
            if S::WIDE {
                self.sum_values::<S, TOGETHER, 4>(simd, query, places);
            } else {
                self.sum_values::<S, TOGETHER, 1>(simd, query, places);
            }
        }
        for query in alone {
            self.sum_values::<S, 1, 4>(simd, query, places);
        }
    }

    /// Scaled scores of `N` queries, `P` places at a time.
    #[inline(always)]
    fn score<S: Simd, const N: usize, const P: usize>(
        &mut self,
        simd: S,
        first: usize,
        places: &Range<usize>,
    ) {
        let mut place = places.start;
        while place + P <= places.end {
            if first == 0 {
                (place..place + P).for_each(|place| self.prefetch_next(simd, self.tile.keys, place));
            }
            self.score_places::<S, N, P>(simd, first, place);
            place += P;
        }
        while place < places.end {
            self.score_places::<S, N, 1>(simd, first, place);
            place += 1;
        }
    }

    #[inline(always)]
    fn score_places<S: Simd, const N: usize, const P: usize>(&mut self, simd: S, first: usize, place: usize) {
        let (head_dim, depth, width) = (self.tile.head_dim, self.tile.depth(), self.tile.width());
        let keys = self.part_of(self.tile.keys).wrapping_add(place * head_dim);
        let queries = self.scratch.queries[first * depth..(first + N) * depth].as_ptr();
        let mut products = [[simd.splat(0.0); P]; N];
        for vector in 0..depth {
            let len = LANES.min(head_dim - vector * LANES);
            let mut key = [simd.splat(0.0); P];
            for (i, key) in key.iter_mut().enumerate() {
                // SAFETY: P places from `place` are in the block, and `len` elements from the vector's first in a key.
                *key = unsafe { T::load_part(simd, keys.add(i * head_dim + vector * LANES), len) };
            }
            for (i, products) in products.iter_mut().enumerate() {
                // SAFETY: the slice above has N queries of `depth` vectors.
                let query = unsafe { simd.load(queries.add(i * depth + vector).cast()) };
                for (product, key) in products.iter_mut().zip(key) {
                    *product = simd.mul_add(key, query, *product);
                }
            }
        }
        for (i, products) in products.iter().enumerate() {
            for (j, &product) in products.iter().enumerate() {
                let (vector, lane) = ((place + j) / LANES, (place + j) % LANES);
                self.scratch.scores[(first + i) * width + vector].0[lane] =
                    simd.sum(product) * self.tile.params.scale;
            }
        }
    }

    /// Scores to weights relative to the new maximum; former sums are scaled down to it.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, query: usize, places: &Range<usize>) {
        let (depth, width) = (self.tile.depth(), self.tile.width());
        let scores = &mut self.scratch.scores[query * width..][..width];
        for hidden in (0..places.start).chain(places.end..width * LANES) {
            scores[hidden / LANES].0[hidden % LANES] = f32::NEG_INFINITY;
        }
        let running = &mut self.scratch.running[query];
        let mut max = simd.splat(running.max);
        for lanes in &*scores {
            // SAFETY: lanes are a vector.
            max = simd.max(max, unsafe { simd.load(lanes.0.as_ptr()) });
        }
        let max = simd.max_lane(max);
        let correction = exp(simd, simd.sub(simd.splat(running.max), simd.splat(max)));
        let mut total = simd.splat(0.0);
        for lanes in scores {
            // SAFETY: lanes are a vector.
            unsafe {
                let weight = exp(simd, simd.sub(simd.load(lanes.0.as_ptr()), simd.splat(max)));
                simd.store(lanes.0.as_mut_ptr(), weight);
                total = simd.add(total, weight);
            }
        }
        running.total = running.total * simd.max_lane(correction) + simd.sum(total);
        running.max = max;
        for sum in &mut self.scratch.sums[query * depth..][..depth] {
            // SAFETY: lanes are a vector.
            unsafe { simd.store(sum.0.as_mut_ptr(), simd.mul(simd.load(sum.0.as_ptr()), correction)) }
        }
    }

    /// Adds the weighted values of `N` queries, `D` vectors of a head at a time.
    #[inline(always)]
    fn sum_values<S: Simd, const N: usize, const D: usize>(
        &mut self,
        simd: S,
        first: usize,
        places: &Range<usize>,
    ) {
        let full = self.tile.head_dim / LANES;
        let mut vector = 0;
        while vector + D <= full {
            self.sum_vectors::<S, N, D>(simd, first, places, vector);
            vector += D;
        }
        while vector < self.tile.depth() {
            self.sum_vectors::<S, N, 1>(simd, first, places, vector);
            vector += 1;
        }
    }

    #[inline(always)]
    fn sum_vectors<S: Simd, const N: usize, const D: usize>(
        &mut self,
        simd: S,
        first: usize,
        places: &Range<usize>,
        vector: usize,
    ) {
        let (head_dim, depth, width) = (self.tile.head_dim, self.tile.depth(), self.tile.width());
        let values = self.part_of(self.tile.values);
        let weights = &self.scratch.scores[first * width..(first + N) * width];
        let sums = self.scratch.sums[first * depth..(first + N) * depth].as_mut_ptr();
        let mut sum = [[simd.splat(0.0); D]; N];
        for (i, sum) in sum.iter_mut().enumerate() {
            for (j, sum) in sum.iter_mut().enumerate() {
                // SAFETY: N queries of `depth` vectors, of which D from `vector` exist.
                *sum = unsafe { simd.load(sums.add(i * depth + vector + j).cast()) };
            }
        }
        for place in places.clone() {
            if first == 0 && vector == 0 {
                self.prefetch_next(simd, self.tile.values, place);
            }
            let mut value = [simd.splat(0.0); D];
            for (j, value) in value.iter_mut().enumerate() {
                let start = (vector + j) * LANES;
                // SAFETY: `place` is in the block, and the elements in the value.
                *value = unsafe {
                    T::load_part(simd, values.add(place * head_dim + start), LANES.min(head_dim - start))
                };
            }
            for (i, sum) in sum.iter_mut().enumerate() {
                let weight = simd.splat(weights[i * width + place / LANES].0[place % LANES]);
                for (sum, value) in sum.iter_mut().zip(value) {
                    *sum = simd.mul_add(weight, value, *sum);
                }
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (j, &sum) in sum.iter().enumerate() {
                // SAFETY: as above.
                unsafe { simd.store(sums.add(i * depth + vector + j).cast(), sum) }
            }
        }
    }
}
