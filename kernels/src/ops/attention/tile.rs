//! Attention of some rows of one sequence, all query heads of one kv head together: each key and value is read once for
//! all of them.
//!
//! Positions are cut at fixed places: into splits, whose results are merged in order, and within a split into units,
//! after each of which the running maximum is renewed. A row sees the same cuts in a chunk of a prompt, as a decode row, and
//! on any number of threads; what is computed together is only a matter of speed.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use super::Scoring;
use super::products::{Prefetch, Scores, SumValues, Values, values_together};
use super::state::{self, State};
use super::tiles;
use crate::View;
use crate::simd::amx::{Amx, Shaped, TILE, TILE_K};
use crate::simd::{Float, Kernel, LANES, Lanes, Simd, exp_of_nonpositive, spans, tanh};

/// Queries (rows times heads of the group) of a tile, unless a group alone has more. Their queries, sums and scores
/// stay in the L2 cache.
const MAX_QUERIES: usize = 64;
/// The same with products of tiles, for which keys and values are packed: the more queries, the less that counts.
const MAX_TILED_QUERIES: usize = 128;
/// Above this many queries, a block is widened to f32 once instead of in registers each time.
const WIDEN_ABOVE: usize = 16;
/// Positions of a unit: enough that renewing sums costs little.
const UNIT_POSITIONS: usize = 128;
/// Positions of a split: a few microseconds of reading, and far more than merging it costs.
const SPLIT_POSITIONS: usize = 1024;

fn unit_blocks(block_size: usize) -> usize {
    (UNIT_POSITIONS / block_size).max(1)
}

/// Positions of a split: those of whole units, which are whole blocks.
pub(super) fn split_positions(block_size: usize) -> usize {
    unit_blocks(block_size) * block_size * (SPLIT_POSITIONS / UNIT_POSITIONS)
}

/// Rows of a tile, with so many query heads for each kv head; `tiled`: with products of tiles.
pub(super) fn rows_per_tile(group: usize, tiled: bool) -> usize {
    if !tiled {
        return (MAX_QUERIES / group).max(1);
    }
    let rows = (MAX_TILED_QUERIES / group).max(1);
    // Whole tiles of queries.
    let whole = TILE / (1 << group.trailing_zeros()).min(TILE);
    if rows >= whole { rows / whole * whole } else { rows }
}

pub(super) struct Tile<'a, T> {
    /// `[rows, group * head_dim]`: the heads of one kv head.
    pub(super) query: View<'a>,
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
    pub(super) scoring: Scoring<'a>,
    /// Products of tiles, if they are used: the cache is of bf16, and they [fit](tiles::fit).
    pub(super) amx: Option<Amx>,
}

/// Where a tile's rows go.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    /// The first element.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// Of the group's heads.
    pub(super) sinks: Option<&'a [f32]>,
}

/// All splits of a tile, to its output.
pub(super) struct Whole<'a, T> {
    pub(super) tile: Tile<'a, T>,
    pub(super) output: Output<'a>,
}

/// Some splits of a tile, to the states of each.
pub(super) struct Splits<'a, T> {
    pub(super) tile: Tile<'a, T>,
    /// `[splits, queries, state]`.
    pub(super) states: &'a mut [Lanes],
    pub(super) range: Range<usize>,
}

/// The states of all splits of a tile to its output.
pub(super) struct Merge<'a> {
    /// `[splits, states_len]`.
    pub(super) states: &'a mut [Lanes],
    /// Of one split.
    pub(super) states_len: usize,
    pub(super) output: Output<'a>,
}

/// Working memory of a thread, grown when a larger tile comes and kept.
#[derive(Default)]
struct Scratch {
    /// `[head_dim, queries]`, scaled; for tiles `[queries, head_dim]` in bf16.
    queries: Vec<Lanes>,
    /// `[queries, blocks of a unit, block_size in vectors]`: scores, then weights.
    scores: Vec<Lanes>,
    /// A block of keys or values, widened; for tiles columns of them, packed, and then the weights in bf16.
    wide: Vec<Lanes>,
    /// Of the split at hand, and of those before.
    current: Vec<Lanes>,
    merged: Vec<Lanes>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The first `len` vectors, whatever is in them.
fn at_least(memory: &mut Vec<Lanes>, len: usize) -> &mut [Lanes] {
    if memory.len() < len {
        memory.resize(len, Lanes::ZERO);
    }
    &mut memory[..len]
}

impl<T: Float> Kernel for Whole<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // A closure is a function of its own, which the instruction set does not reach but by a call.
        SCRATCH.with_borrow_mut(|scratch| simd.call(WithScratch { job: &self, scratch }));
    }
}

impl<T: Float> Kernel for Splits<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        SCRATCH.with_borrow_mut(|scratch| simd.call(WithScratch { job: &mut self, scratch }));
    }
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let depth = self.output.head_dim.div_ceil(LANES);
        let (first, rest) = self.states.split_at_mut(self.states_len);
        for states in rest.chunks_exact_mut(self.states_len) {
            state::merge(simd, first, states, depth);
        }
        state::finish(simd, first, &self.output);
    }
}

struct WithScratch<'a, J> {
    job: J,
    scratch: &'a mut Scratch,
}

impl<T: Float> Kernel for WithScratch<'_, &Whole<'_, T>> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let tile = &self.job.tile;
        let Scratch { queries, scores, wide, current, merged } = self.scratch;
        let (states_len, depth) = (tile.states_len(), tile.depth());
        let mut buffers = tile.begin(simd, queries, scores, wide);
        let merged = at_least(merged, states_len);
        for (index, split) in tile.splits().enumerate() {
            if index == 0 {
                simd.call(Split { tile, buffers: &mut buffers, states: merged, index: split });
            } else {
                let states = at_least(current, states_len);
                simd.call(Split { tile, buffers: &mut buffers, states, index: split });
                state::merge(simd, merged, states, depth);
            }
        }
        state::finish(simd, merged, &self.job.output);
    }
}

impl<T: Float> Kernel for WithScratch<'_, &mut Splits<'_, T>> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Splits { tile, states, range } = self.job;
        let Scratch { queries, scores, wide, .. } = self.scratch;
        let mut buffers = tile.begin(simd, queries, scores, wide);
        for (states, split) in states.chunks_exact_mut(tile.states_len()).zip(range.clone()) {
            simd.call(Split { tile, buffers: &mut buffers, states, index: split });
        }
    }
}

/// A thread's working memory, as long as a tile needs it.
struct Buffers<'a> {
    queries: &'a [Lanes],
    scores: &'a mut [Lanes],
    wide: &'a mut [Lanes],
    /// With products of tiles.
    tiles: Option<TileBuffers<'a>>,
}

struct TileBuffers<'a> {
    shaped: Shaped,
    /// Columns of keys or values of a unit.
    packed: &'a mut [Lanes],
    /// `[queries, positions of a unit]` in bf16.
    weights: &'a mut [Lanes],
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
    /// Vectors of a unit's scores.
    fn unit_width(&self) -> usize {
        unit_blocks(self.block_size) * self.width()
    }
    /// Vectors of the states of all queries.
    pub(super) fn states_len(&self) -> usize {
        self.num_queries() * state::len(self.depth())
    }

    /// Positions that a row attends to.
    fn visible(&self, row: usize) -> Range<usize> {
        let end = self.first_position + row + 1;
        self.scoring.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Positions that any row attends to.
    fn seen(&self) -> Range<usize> {
        self.visible(0).start..self.first_position + self.query.rows()
    }

    /// Splits that hold them.
    pub(super) fn splits(&self) -> Range<usize> {
        let (seen, size) = (self.seen(), split_positions(self.block_size));
        seen.start / size..seen.end.div_ceil(size)
    }

    /// Rows that attend to positions of a block.
    fn rows_seeing(&self, block: usize) -> Range<usize> {
        let begin = block * self.block_size;
        let first = begin.saturating_sub(self.first_position);
        let end = self.scoring.window.map_or(usize::MAX, |window| {
            (begin + self.block_size).saturating_add(window).saturating_sub(self.first_position + 1)
        });
        first..end.min(self.query.rows())
    }

    /// Places of a block that a row attends to.
    fn places(&self, row: usize, block: usize) -> Range<usize> {
        let (visible, size) = (self.visible(row), self.block_size);
        let begin = block * size;
        let end = visible.end.clamp(begin, begin + size) - begin;
        visible.start.clamp(begin, begin + size) - begin..end
    }

    /// A block of the keys or values.
    fn block_of<'c>(&self, cache: &'c [T], block: usize) -> &'c [T] {
        let len = self.block_size * self.head_dim;
        let index = self.table[block] as usize * self.kv_heads + self.kv_head;
        &cache[index * len..][..len]
    }

    /// Where a block of the keys or values begins, if there is such a block; the entry of the table may be rubbish.
    fn start_of(&self, cache: &[T], block: usize) -> Option<*const u8> {
        let bytes = self.block_size * self.head_dim * size_of::<T>();
        self.table.get(block).map(|&id| {
            let index = id as usize * self.kv_heads + self.kv_head;
            cache.as_ptr().cast::<u8>().wrapping_add(index.wrapping_mul(bytes))
        })
    }

    /// What is asked for during a loop of so many steps; `far` is a block of what the loop is over.
    fn prefetch(&self, near: (&[T], usize), far: (&[T], usize), steps: usize) -> Prefetch {
        let (near, far) = (self.start_of(near.0, near.1), self.start_of(far.0, far.1));
        let bytes_per_step = self.block_size * self.head_dim * size_of::<T>() / steps;
        match (near.or(far), far.or(near)) {
            (Some(near), Some(far)) => Prefetch { near, far, bytes_per_step },
            _ => Prefetch::NONE,
        }
    }

    fn widens(&self) -> bool {
        self.num_queries() > WIDEN_ABOVE && size_of::<T>() < size_of::<f32>()
    }

    #[inline(always)]
    fn begin<'b, S: Simd>(
        &self,
        simd: S,
        queries: &'b mut Vec<Lanes>,
        scores: &'b mut Vec<Lanes>,
        wide: &'b mut Vec<Lanes>,
    ) -> Buffers<'b> {
        let num_queries = self.num_queries();
        let scores = at_least(scores, num_queries * self.unit_width());
        if let Some(amx) = self.amx {
            let queries = at_least(queries, (num_queries * self.head_dim).div_ceil(TILE_K));
            self.round_queries(simd, queries);
            let unit_steps = self.unit_width() / 2;
            let packed = tiles::packed_len((self.head_dim / TILE_K).max(unit_steps));
            let (packed, weights) = at_least(wide, packed + num_queries * unit_steps).split_at_mut(packed);
            let shaped = amx.shape(num_queries.min(TILE), TILE);
            let tiles = Some(TileBuffers { shaped, packed, weights });
            return Buffers { queries, scores, wide: &mut [], tiles };
        }
        let queries = at_least(queries, (num_queries * self.head_dim).div_ceil(LANES));
        let to: *mut f32 = queries.as_mut_ptr().cast();
        let scale = simd.splat(self.scoring.scale);
        for query in 0..num_queries {
            let row = self.query.row::<f32>(query / self.group());
            let head = &row[query % self.group() * self.head_dim..][..self.head_dim];
            for (start, len) in spans(self.head_dim) {
                let mut scaled = Lanes::ZERO;
                // SAFETY: a span lies within the head; lanes are a vector; `head_dim * num_queries` elements have room.
                unsafe {
                    let query_part = f32::load_part(simd, head.as_ptr().add(start), len);
                    simd.store(scaled.0.as_mut_ptr(), simd.mul(query_part, scale));
                    for (i, &value) in scaled.0[..len].iter().enumerate() {
                        to.add((start + i) * num_queries + query).write(value);
                    }
                }
            }
        }
        let wide_len = if self.widens() { (self.block_size * self.head_dim).div_ceil(LANES) } else { 0 };
        Buffers { queries, scores, wide: at_least(wide, wide_len), tiles: None }
    }

    /// Scales queries and rounds them to bf16.
    #[inline(always)]
    fn round_queries<S: Simd>(&self, simd: S, queries: &mut [Lanes]) {
        let scale = simd.splat(self.scoring.scale);
        let to: *mut bf16 = queries.as_mut_ptr().cast();
        for query in 0..self.num_queries() {
            let row = self.query.row::<f32>(query / self.group());
            let head = &row[query % self.group() * self.head_dim..][..self.head_dim];
            for (i, part) in head.as_chunks::<LANES>().0.iter().enumerate() {
                // SAFETY: a part is a vector; the queries have room for each.
                unsafe {
                    let scaled = simd.mul(simd.load(part.as_ptr()), scale);
                    simd.store_bf16_factor(to.add(query * self.head_dim + i * LANES), scaled);
                }
            }
        }
    }
}

/// The positions of one split.
struct Split<'a, 'b, 'c, T> {
    tile: &'a Tile<'b, T>,
    buffers: &'a mut Buffers<'c>,
    states: &'a mut [Lanes],
    index: usize,
}

impl<T: Float> Kernel for Split<'_, '_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { tile, buffers, states, index } = self;
        state::reset(states, tile.depth());
        let (seen, size) = (tile.seen(), split_positions(tile.block_size));
        let positions = seen.start.max(index * size)..seen.end.min((index + 1) * size);
        if positions.is_empty() {
            return;
        }
        let blocks = positions.start / tile.block_size..positions.end.div_ceil(tile.block_size);
        let per_unit = unit_blocks(tile.block_size);
        for unit in blocks.start / per_unit..blocks.end.div_ceil(per_unit) {
            let blocks = blocks.start.max(unit * per_unit)..blocks.end.min((unit + 1) * per_unit);
            let begin = unit * per_unit;
            simd.call(Unit { tile, buffers: &mut *buffers, states: &mut *states, begin, blocks });
        }
    }
}

/// The blocks of one unit.
struct Unit<'a, 'b, 'c, T> {
    tile: &'a Tile<'b, T>,
    buffers: &'a mut Buffers<'c>,
    states: &'a mut [Lanes],
    /// The unit's first block; `blocks` are those of it that some row sees.
    begin: usize,
    blocks: Range<usize>,
}

impl<T: Float> Kernel for Unit<'_, '_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for block in self.blocks.clone() {
            self.score(simd, block);
        }
        // Pass by pass, because each is a chain of dependent instructions in one query, and free between queries. Loops, not
        // closures, for the same reason as in `Whole`.
        let (num_rows, group) = (self.tile.query.rows(), self.tile.group());
        for row in 0..num_rows {
            let lanes = self.visible_lanes(row);
            for query in row * group..(row + 1) * group {
                self.bound(simd, query, lanes.clone());
            }
        }
        for query in 0..num_rows * group {
            self.rescale(simd, query);
        }
        let tiled = self.buffers.tiles.is_some();
        for row in 0..num_rows {
            let lanes = self.visible_lanes(row);
            for query in row * group..(row + 1) * group {
                if tiled {
                    self.weigh_for_tiles(simd, query, lanes.clone());
                } else {
                    self.weigh(simd, query, lanes.clone());
                }
            }
        }
        if tiled {
            simd.call(SumTiles { unit: &mut self });
            return;
        }
        for block in self.blocks.clone() {
            self.sum_values(simd, block);
        }
    }
}

impl<T: Float> Unit<'_, '_, '_, T> {
    #[inline(always)]
    fn score<S: Simd>(&mut self, simd: S, block: usize) {
        let tile = self.tile;
        let keys = tile.block_of(tile.keys, block);
        if self.buffers.tiles.is_some() {
            simd.call(ScoreTiles { unit: &mut *self, block });
        } else if tile.widens() {
            simd.call(Widen { from: keys, to: &mut *self.buffers.wide });
            let wide = self.buffers.wide.as_ptr().cast();
            simd.call(self.scores::<f32>(block, wide, Prefetch::NONE));
        } else {
            let next = match block + 1 {
                next if next < self.blocks.end => (tile.keys, next),
                _ => (tile.values, self.blocks.start),
            };
            let far = (tile.keys, block + unit_blocks(tile.block_size));
            let prefetch = tile.prefetch(next, far, tile.head_dim);
            simd.call(self.scores::<T>(block, keys.as_ptr(), prefetch));
        }
    }

    fn scores<E>(&mut self, block: usize, keys: *const E, prefetch: Prefetch) -> Scores<E> {
        let tile = self.tile;
        let (rows, group) = (tile.rows_seeing(block), tile.group());
        let first = rows.start * group;
        let score_stride = tile.unit_width() * LANES;
        let scores = &mut self.buffers.scores[first * tile.unit_width()..];
        Scores {
            queries: self.buffers.queries.as_ptr().cast::<f32>().wrapping_add(first),
            query_stride: tile.num_queries(),
            num_queries: rows.len() * group,
            keys,
            head_dim: tile.head_dim,
            block_size: tile.block_size,
            out: scores[(block - self.begin) * tile.width()..].as_mut_ptr().cast(),
            score_stride,
            prefetch,
        }
    }

    /// Lane of a position among the scores of a query.
    fn lane(&self, position: usize) -> usize {
        let (tile, place) = (self.tile, position - self.begin * self.tile.block_size);
        place / tile.block_size * tile.width() * LANES + place % tile.block_size
    }

    /// Lanes of the unit's scores that a row sees, from the first to the last.
    fn visible_lanes(&self, row: usize) -> Range<usize> {
        let (size, visible) = (self.tile.block_size, self.tile.visible(row));
        let (first, end) =
            (visible.start.max(self.blocks.start * size), visible.end.min(self.blocks.end * size));
        if first < end { self.lane(first)..self.lane(end - 1) + 1 } else { 0..0 }
    }

    /// Positions of the unit's blocks that a row attends to.
    fn seen_by(&self, row: usize) -> Range<usize> {
        let (size, visible) = (self.tile.block_size, self.tile.visible(row));
        let (begin, end) = (self.blocks.start * size, self.blocks.end * size);
        visible.start.clamp(begin, end)..visible.end.clamp(begin, end)
    }

    fn scores_of(&mut self, query: usize, vectors: Range<usize>) -> &mut [Lanes] {
        &mut self.buffers.scores[query * self.tile.unit_width()..][vectors]
    }

    /// Finishes scores, takes those that the query does not see out of the softmax, and notes the new maximum.
    #[inline(always)]
    fn bound<S: Simd>(&mut self, simd: S, query: usize, lanes: Range<usize>) {
        let tile = self.tile;
        let vectors = lanes.start / LANES..lanes.end.div_ceil(LANES);
        self.change_scores(simd, query, vectors.clone());
        let scores = self.scores_of(query, 0..vectors.end);
        hide(scores, vectors.start * LANES..lanes.start);
        hide(scores, lanes.end..vectors.end * LANES);
        if !tile.block_size.is_multiple_of(LANES) {
            let padded = tile.width() * LANES;
            for block in vectors.start / tile.width()..vectors.end / tile.width() {
                hide(scores, block * padded + tile.block_size..(block + 1) * padded);
            }
        }
        let mut max = simd.splat(f32::NEG_INFINITY);
        for lanes in &scores[vectors] {
            // SAFETY: lanes are a vector.
            max = simd.max(max, unsafe { simd.load(lanes.0.as_ptr()) });
        }
        let max = simd.max_lane(max);
        let mut state = State::of(self.states, query, tile.depth());
        state.note_max(max);
    }

    /// Brings the sums so far to the new maximum.
    #[inline(always)]
    fn rescale<S: Simd>(&mut self, simd: S, query: usize) {
        State::of(self.states, query, self.tile.depth()).rescale_to_noted(simd);
    }

    /// Scores to weights relative to the maximum.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, query: usize, lanes: Range<usize>) {
        if lanes.is_empty() {
            return;
        }
        let depth = self.tile.depth();
        let max = simd.splat(State::of(self.states, query, depth).max());
        let mut total = simd.splat(0.0);
        for lanes in self.scores_of(query, lanes.start / LANES..lanes.end.div_ceil(LANES)) {
            // SAFETY: lanes are a vector.
            unsafe {
                let score = simd.load(lanes.0.as_ptr());
                let weight = exp_of_nonpositive(simd, simd.sub(score, max));
                simd.store(lanes.0.as_mut_ptr(), weight);
                total = simd.add(total, weight);
            }
        }
        State::of(self.states, query, depth).add_total(simd.sum(total));
    }

    /// As [`Unit::weigh`], with weights rounded to bf16, zeros for what the query does not see. The total is that of the weights
    /// before.
    #[inline(always)]
    fn weigh_for_tiles<S: Simd>(&mut self, simd: S, query: usize, lanes: Range<usize>) {
        let (depth, width) = (self.tile.depth(), self.tile.unit_width());
        let seen = if lanes.is_empty() { 0..0 } else { lanes.start / LANES..lanes.end.div_ceil(LANES) };
        let max = simd.splat(State::of(self.states, query, depth).max());
        let Buffers { scores, tiles: Some(buffers), .. } = &mut *self.buffers else { return };
        let scores = &scores[query * width..][..width];
        let to = buffers.weights.as_mut_ptr().cast::<bf16>().wrapping_add(query * width * LANES);
        let zero = simd.splat(0.0);
        let mut total = zero;
        // SAFETY: lanes are a vector; weights have room for those of each query.
        unsafe {
            for vector in (0..seen.start).chain(seen.end..width) {
                simd.store_bf16_factor(to.add(vector * LANES), zero);
            }
            for vector in seen.clone() {
                let score = simd.load(scores[vector].0.as_ptr());
                let weight = exp_of_nonpositive(simd, simd.sub(score, max));
                simd.store_bf16_factor(to.add(vector * LANES), weight);
                total = simd.add(total, weight);
            }
            for lane in (seen.start * LANES..lanes.start).chain(lanes.end..seen.end * LANES) {
                to.add(lane).write(bf16::ZERO);
            }
        }
        State::of(self.states, query, depth).add_total(simd.sum(total));
    }

    /// Soft cap, then the bias that grows with the distance.
    #[inline(always)]
    fn change_scores<S: Simd>(&mut self, simd: S, query: usize, vectors: Range<usize>) {
        const LANE_NUMBERS: [f32; LANES] =
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
        let tile = self.tile;
        let Scoring { soft_cap, alibi_slopes, .. } = tile.scoring;
        if soft_cap.is_none() && alibi_slopes.is_none() {
            return;
        }
        let (row, head) = (query / tile.group(), query % tile.group());
        let own_position = tile.first_position + row;
        let slope = alibi_slopes.map(|slopes| slopes[tile.kv_head * tile.group() + head]);
        for vector in vectors {
            let lanes = &mut self.buffers.scores[query * tile.unit_width() + vector];
            // SAFETY: lanes are a vector, and so are the numbers.
            unsafe {
                let mut score = simd.load(lanes.0.as_ptr());
                if let Some(cap) = soft_cap {
                    score = simd.mul(simd.splat(cap), tanh(simd, simd.div(score, simd.splat(cap))));
                }
                if let Some(slope) = slope {
                    let (block, part) = (self.begin + vector / tile.width(), vector % tile.width());
                    let position = block * tile.block_size + part * LANES;
                    // Exact: positions are far below 2^24.
                    let offset = simd.splat(position as f32 - own_position as f32);
                    let distance = simd.add(offset, simd.load(LANE_NUMBERS.as_ptr()));
                    score = simd.mul_add(simd.splat(slope), distance, score);
                }
                simd.store(lanes.0.as_mut_ptr(), score);
            }
        }
    }

    #[inline(always)]
    fn sum_values<S: Simd>(&mut self, simd: S, block: usize) {
        let tile = self.tile;
        let values = tile.block_of(tile.values, block);
        if tile.widens() {
            simd.call(Widen { from: values, to: &mut *self.buffers.wide });
            let values = self.values::<f32>(block, self.buffers.wide.as_ptr().cast(), Prefetch::NONE);
            self.sum_rows(simd, block, &values);
        } else {
            let next = match block + 1 {
                next if next < self.blocks.end => (tile.values, next),
                next => (tile.keys, next),
            };
            let far = (tile.values, block + unit_blocks(tile.block_size));
            let values = self.values::<T>(block, values.as_ptr(), tile.prefetch(next, far, tile.block_size));
            self.sum_rows(simd, block, &values);
        }
    }

    fn values<E>(&mut self, block: usize, values: *const E, prefetch: Prefetch) -> Values<E> {
        let tile = self.tile;
        Values {
            weights: self.buffers.scores[(block - self.begin) * tile.width()..].as_ptr().cast(),
            weight_stride: tile.unit_width() * LANES,
            cached: values,
            head_dim: tile.head_dim,
            sums: self.states.as_mut_ptr().cast(),
            sum_stride: state::len(tile.depth()) * LANES,
            prefetch,
        }
    }

    #[inline(always)]
    fn sum_rows<S: Simd, E: Float>(&self, simd: S, block: usize, values: &Values<E>) {
        let (tile, group) = (self.tile, self.tile.group());
        let rows = tile.rows_seeing(block);
        let first = rows.start * group;
        let mut query = first;
        while query < rows.end * group {
            let together = values_together::<S>(rows.end * group - query);
            let add = |query: usize, num_queries: usize, places: Range<usize>| {
                if !places.is_empty() {
                    let prefetch = query == first;
                    simd.call(SumValues { block: values, query, num_queries, places, prefetch });
                }
            };
            // Rows see a block up to different places only at the two ends of what is visible.
            let (begin, end) =
                (tile.places(query / group, block), tile.places((query + together - 1) / group, block));
            if begin == end {
                add(query, together, begin);
            } else {
                // What all see goes together; each query adds up its places in order all the same.
                let (common, rest) = (end.start..begin.end, begin.end.max(end.start));
                for query in query..query + together {
                    let places = tile.places(query / group, block);
                    add(query, 1, places.start..places.end.min(common.start));
                }
                add(query, together, common);
                for query in query..query + together {
                    let places = tile.places(query / group, block);
                    add(query, 1, places.start.max(rest)..places.end);
                }
            }
            query += together;
        }
    }
}

/// Scores of all queries with the keys of a block, by tiles.
struct ScoreTiles<'u, 'a, 'b, 'c, T> {
    unit: &'u mut Unit<'a, 'b, 'c, T>,
    block: usize,
}

impl<T: Float> Kernel for ScoreTiles<'_, '_, '_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { unit, block } = self;
        let tile = unit.tile;
        let keys = tile.block_of(tile.keys, block).as_ptr().cast::<bf16>();
        let next = match block + 1 {
            next if next < unit.blocks.end => (tile.keys, next),
            _ => (tile.values, unit.blocks.start),
        };
        let far = (tile.keys, block + unit_blocks(tile.block_size));
        let parts = tile.block_size / tiles::COLUMNS;
        let pairs = tile.head_dim / 2;
        let prefetch = tile.prefetch(next, far, parts * pairs);
        let Buffers { queries, scores, tiles: Some(buffers), .. } = &mut *unit.buffers else { return };
        let packed = &mut buffers.packed[..tiles::packed_len(tile.head_dim / TILE_K)];
        let out = scores[(block - unit.begin) * tile.width()..].as_mut_ptr().cast::<f32>();
        for part in 0..parts {
            simd.call(tiles::Pack {
                from: keys.wrapping_add(part * tiles::COLUMNS),
                stride: tile.block_size,
                rows: 0..tile.head_dim,
                to: &mut *packed,
                prefetch,
                first_pair: part * pairs,
            });
            let product = tiles::Product {
                left: queries.as_ptr().cast(),
                left_stride: tile.head_dim,
                num_rows: tile.num_queries(),
                packed,
                out: out.wrapping_add(part * tiles::COLUMNS),
                out_stride: tile.unit_width() * LANES,
                adds: false,
            };
            // SAFETY: queries have `head_dim` elements each, scores whole blocks.
            unsafe { product.run(&mut buffers.shaped) }
        }
    }
}

/// Adds the weighted values of a unit to the sums of all queries, by tiles.
struct SumTiles<'u, 'a, 'b, 'c, T> {
    unit: &'u mut Unit<'a, 'b, 'c, T>,
}

impl<T: Float> Kernel for SumTiles<'_, '_, '_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let unit = self.unit;
        let num_rows = unit.tile.query.rows();
        // Zero times what is not finite is NaN, so rows that do not see it must not meet it.
        let mut apart = false;
        if unit.seen_by(0) != unit.seen_by(num_rows - 1) {
            for block in unit.blocks.clone() {
                let values = unit.tile.block_of(unit.tile.values, block);
                let (at, len) = (values.as_ptr().cast(), values.len());
                simd.call(tiles::FindNonFinite { values: at, len, found: &mut apart });
            }
        }
        if apart {
            for row in 0..num_rows {
                simd.call(SumRows { unit, rows: row..row + 1 });
            }
        } else {
            simd.call(SumRows { unit, rows: 0..num_rows });
        }
    }
}

/// The same of some rows, with what none of them sees as zeros.
struct SumRows<'u, 'a, 'b, 'c, T> {
    unit: &'u mut Unit<'a, 'b, 'c, T>,
    rows: Range<usize>,
}

impl<T: Float> Kernel for SumRows<'_, '_, '_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { unit, rows } = self;
        let (tile, blocks, group) = (unit.tile, unit.blocks.clone(), unit.tile.group());
        let seen = unit.seen_by(rows.start).start..unit.seen_by(rows.end - 1).end;
        let (first, num_queries) = (rows.start * group, rows.len() * group);
        let (unit_width, sum_stride) = (tile.unit_width(), state::len(tile.depth()) * LANES);
        let Buffers { tiles: Some(buffers), .. } = &mut *unit.buffers else { return };
        let block_steps = tile.block_size / TILE_K;
        let packed = &mut buffers.packed[..tiles::packed_len(blocks.len() * block_steps)];
        let first_weight = (blocks.start - unit.begin) * tile.block_size;
        if num_queries < tile.num_queries() {
            buffers.shaped.reshape(num_queries.min(TILE), TILE);
        }
        for part in 0..tile.head_dim / tiles::COLUMNS {
            for (block, packed) in blocks.clone().zip(packed.chunks_exact_mut(tiles::packed_len(block_steps)))
            {
                let next = match block + 1 {
                    next if next < blocks.end => (tile.values, next),
                    next => (tile.keys, next),
                };
                let far = (tile.values, block + unit_blocks(tile.block_size));
                let (begin, end) = (block * tile.block_size, (block + 1) * tile.block_size);
                simd.call(tiles::Pack {
                    from: tile.block_of(tile.values, block)[part * tiles::COLUMNS..].as_ptr().cast(),
                    stride: tile.head_dim,
                    // What lies at other places may be an earlier sequence's, and NaN.
                    rows: seen.start.clamp(begin, end) - begin..seen.end.clamp(begin, end) - begin,
                    to: packed,
                    prefetch: match part {
                        0 => tile.prefetch(next, far, tile.block_size / 2),
                        _ => Prefetch::NONE,
                    },
                    first_pair: 0,
                });
            }
            let weights = buffers.weights.as_ptr().cast::<bf16>();
            let sums = unit.states.as_mut_ptr().cast::<f32>();
            let product = tiles::Product {
                left: weights.wrapping_add(first * unit_width * LANES + first_weight),
                left_stride: unit_width * LANES,
                num_rows: num_queries,
                packed,
                out: sums.wrapping_add(first * sum_stride + part * tiles::COLUMNS),
                out_stride: sum_stride,
                adds: true,
            };
            // SAFETY: weights are those of the unit, of which these blocks are a part; sums have `head_dim` elements.
            unsafe { product.run(&mut buffers.shaped) }
        }
        if num_queries < tile.num_queries() {
            buffers.shaped.reshape(tile.num_queries().min(TILE), TILE);
        }
    }
}

/// Takes lanes out of the softmax.
fn hide(scores: &mut [Lanes], lanes: Range<usize>) {
    for lane in lanes {
        scores[lane / LANES].0[lane % LANES] = f32::NEG_INFINITY;
    }
}

/// A block to f32; the memory has room for all of it.
struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [Lanes],
}

impl<T: Float> Kernel for Widen<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.to.len() >= self.from.len().div_ceil(LANES), "made for a block");
        for ((start, len), lanes) in spans(self.from.len()).zip(self.to) {
            // SAFETY: a span lies within the block; lanes are a vector.
            unsafe {
                let vector = T::load_part(simd, self.from.as_ptr().add(start), len);
                simd.store(lanes.0.as_mut_ptr(), vector);
            }
        }
    }
}
