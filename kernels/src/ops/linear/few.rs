//! Few rows (decode): the weights are used as they lie in memory, lanes along k, sums in registers.

use std::cell::RefCell;
use std::ops::Range;

use super::Block;
use super::format::Format;
use super::input::{Input, RowTile};
use crate::simd::{Kernel, LANES, Lanes, Simd};

/// Up to this many rows the weights are read this way; above, it pays to turn them into a panel first.
pub(super) const MOST_ROWS: usize = 16;

/// Most rows of a tile.
pub(super) fn tile_rows(wide: bool) -> usize {
    if wide { 8 } else { 3 }
}

const LINE_BYTES: usize = 64;

/// Of x, what is used over and over lies in an L1 cache: of 32 KiB or more, or, with wide registers, of 48 KiB. Two tiles of
/// rows leave no room for more.
fn x_bytes(wide: bool, rows: usize) -> usize {
    if wide && rows <= tile_rows(wide) { 24 << 10 } else { 16 << 10 }
}
/// Outputs whose sums are kept while a part of k is multiplied; all tiles' numbers of outputs divide it.
const GROUP: usize = 96;

thread_local! {
    /// Sums of a group of outputs, to be carried on by the next part of k.
    static CARRIED: RefCell<Vec<Lanes>> = const { RefCell::new(Vec::new()) };
}

/// All rows of a block. Where there are several tiles of rows, the weights come from memory once, while those before are in
/// use.
#[inline(always)]
pub(super) fn few_rows<S: Simd, F: Format>(simd: S, block: &Block<F>) {
    // A closure is a function of its own, which the instruction set does not reach but by a call.
    CARRIED.with_borrow_mut(|carried| simd.call(Groups { block, carried }));
}

struct Groups<'a, F: Format> {
    block: &'a Block<F>,
    carried: &'a mut Vec<Lanes>,
}

impl<F: Format> Kernel for Groups<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, carried } = self;
        let Input { rows, k, .. } = block.x;
        let num_tiles = block.x.num_tiles();
        let part_len = part_len::<S, F>(rows, k);
        if part_len < k && carried.is_empty() {
            carried.resize(GROUP * MOST_ROWS, Lanes::ZERO);
        }
        for first in (0..block.num_outputs).step_by(GROUP) {
            let last = block.num_outputs.min(first + GROUP);
            for start in (0..k.max(1)).step_by(part_len) {
                let part = start..k.min(start + part_len);
                let mut output = first;
                while output < last {
                    let most_rows = block.x.tile(num_tiles - 1).num_rows;
                    let num_outputs = tile_outputs::<S>(most_rows, last - output);
                    // Where the next weights begin: beside these, in the next part, or in the next group.
                    let (next_output, next_start) = match (output + num_outputs, part.end) {
                        (next, _) if next < last => (next, part.start),
                        (next, end) if end == k => (next, 0),
                        (_, end) => (first, end),
                    };
                    let next = next_output * block.weight_stride + next_start;
                    for time in 0..num_tiles {
                        let rows_of_tile = block.x.tile(time);
                        let place = (output - first) * rows + num_outputs * rows_of_tile.row;
                        let tile = Tile {
                            block,
                            output,
                            rows: rows_of_tile,
                            part: part.clone(),
                            carried: carried.as_mut_ptr().wrapping_add(place),
                            next: block.weights.wrapping_add(next),
                            prefetch: Prefetch { times_used: num_tiles, time },
                        };
                        tile.call(simd, num_outputs);
                    }
                    output += num_outputs;
                }
            }
        }
    }
}

/// Elements of k that are multiplied with a group of outputs before the next: all where x is small, or read seldom enough
/// to come from the L2 cache.
fn part_len<S: Simd, F: Format>(rows: usize, k: usize) -> usize {
    /// Whole cache lines and vectors of any type.
    const MULTIPLE: usize = 64;
    const FEW: usize = 4;
    let most = x_bytes(S::WIDE, rows);
    let x_bytes = rows * k.div_ceil(F::PER_STEP) * size_of::<Lanes>();
    if rows <= FEW || x_bytes <= most * 4 / 3 {
        return k.max(1);
    }
    (most / (rows * size_of::<Lanes>()) * F::PER_STEP).next_multiple_of(MULTIPLE)
}

/// Outputs of the next tile: as many as there are registers for.
#[inline(always)]
fn tile_outputs<S: Simd>(rows: usize, left: usize) -> usize {
    let widest = match (S::WIDE, rows) {
        (true, 3 | 4) => 6,
        (true, 1 | 2 | 5 | 6) | (false, 1) => 4,
        (true, _) => 3,
        (false, _) => 2,
    };
    if left >= widest { widest } else { 1 }
}

/// How often weights are used while they are in the cache, and which of these uses a tile is: each brings a part of the
/// next tile's weights.
#[derive(Clone, Copy)]
struct Prefetch {
    times_used: usize,
    time: usize,
}

/// A few rows of weights times a few rows of x.
struct Tile<'a, F: Format> {
    block: &'a Block<F>,
    output: usize,
    rows: RowTile,
    /// Of k.
    part: Range<usize>,
    /// Its sums: those of the part before, or to be carried on by the next.
    carried: *mut Lanes,
    /// The weights of the tile that comes next.
    next: *const F::Element,
    prefetch: Prefetch,
}

impl<F: Format> Tile<'_, F> {
    /// Runs the loop for this number of outputs and rows.
    #[inline(always)]
    fn call<S: Simd>(self, simd: S, num_outputs: usize) {
        match (num_outputs, self.rows.num_rows) {
            (1, 1) => simd.call(Sized::<F, 1, 1>(self)),
            (1, 2) => simd.call(Sized::<F, 1, 2>(self)),
            (1, 3) => simd.call(Sized::<F, 1, 3>(self)),
            (1, 4) if S::WIDE => simd.call(Sized::<F, 1, 4>(self)),
            (1, 5) if S::WIDE => simd.call(Sized::<F, 1, 5>(self)),
            (1, 6) if S::WIDE => simd.call(Sized::<F, 1, 6>(self)),
            (1, 7) if S::WIDE => simd.call(Sized::<F, 1, 7>(self)),
            (1, 8) if S::WIDE => simd.call(Sized::<F, 1, 8>(self)),
            (4, 2) if S::WIDE => simd.call(Sized::<F, 4, 2>(self)),
            (6, 3) if S::WIDE => simd.call(Sized::<F, 6, 3>(self)),
            (6, 4) if S::WIDE => simd.call(Sized::<F, 6, 4>(self)),
            (4, 5) if S::WIDE => simd.call(Sized::<F, 4, 5>(self)),
            (4, 6) if S::WIDE => simd.call(Sized::<F, 4, 6>(self)),
            (4, 4) if S::WIDE => simd.call(Sized::<F, 4, 4>(self)),
            (3, 6) if S::WIDE => simd.call(Sized::<F, 3, 6>(self)),
            (3, 7) if S::WIDE => simd.call(Sized::<F, 3, 7>(self)),
            (3, 8) if S::WIDE => simd.call(Sized::<F, 3, 8>(self)),
            (4, 1) => simd.call(Sized::<F, 4, 1>(self)),
            (2, 1) => simd.call(Sized::<F, 2, 1>(self)),
            (2, 2) if !S::WIDE => simd.call(Sized::<F, 2, 2>(self)),
            (2, 3) if !S::WIDE => simd.call(Sized::<F, 2, 3>(self)),
            (outputs, rows) => unreachable!("no tile of {outputs} outputs and {rows} rows"),
        }
    }
}

/// The cache lines of the next tile's weights, row by row: memory is read fastest in one stream, not in one for each row of
/// the tile in use.
struct Ahead<E> {
    line: *const E,
    lines_per_row: usize,
    left_in_row: usize,
    /// From a row's end to the next one's start.
    to_next_row: usize,
}

impl<E> Ahead<E> {
    /// This use's part of the lines of `rows` rows, which begin at `start` and are `stride` elements apart.
    #[inline(always)]
    fn new(start: *const E, stride: usize, rows: usize, lines_per_row: usize, part: Prefetch) -> Self {
        let line_len = LINE_BYTES / size_of::<E>();
        let skipped = rows * lines_per_row * part.time / part.times_used;
        let (row, line) = (skipped / lines_per_row.max(1), skipped % lines_per_row.max(1));
        Self {
            line: start.wrapping_add(row * stride + line * line_len),
            lines_per_row,
            left_in_row: lines_per_row - line,
            to_next_row: stride.wrapping_sub(lines_per_row * line_len),
        }
    }

    /// An address to ask for, which may lie behind the weights' end.
    #[inline(always)]
    fn next(&mut self) -> *const E {
        let line = self.line;
        self.line = line.wrapping_add(LINE_BYTES / size_of::<E>());
        self.left_in_row -= 1;
        if self.left_in_row == 0 {
            self.left_in_row = self.lines_per_row;
            self.line = self.line.wrapping_add(self.to_next_row);
        }
        line
    }
}

struct Sized<'a, F: Format, const OUTPUTS: usize, const ROWS: usize>(Tile<'a, F>);

impl<F: Format, const OUTPUTS: usize, const ROWS: usize> Kernel for Sized<'_, F, OUTPUTS, ROWS> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Tile { block, output, rows, part, carried, next, prefetch } = self.0;
        let (k, stride) = (part.len(), block.weight_stride);
        // SAFETY: the block has these outputs; the part begins within x and the weights.
        let (weights, mut x) = unsafe {
            let x = rows.x.add(part.start / F::PER_STEP * ROWS * LANES);
            (block.weights.add(output * stride + part.start), x)
        };
        let line = LINE_BYTES / size_of::<F::Element>();
        let mut sums = [[simd.splat(0.0); ROWS]; OUTPUTS];
        if part.start > 0 {
            for (output, sums) in sums.iter_mut().enumerate() {
                for (row, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: there is a place for each; written after the part before.
                    *sum = unsafe { simd.load(carried.add(output * ROWS + row).cast()) };
                }
            }
        }
        let mut ahead = Ahead::new(next, stride, OUTPUTS, k.div_ceil(line), prefetch);
        let lines_per_step = OUTPUTS.div_ceil(prefetch.times_used);
        let mut at = 0;
        while at + line <= k {
            for _ in 0..lines_per_step {
                simd.prefetch(ahead.next().cast());
            }
            for part in 0..line / F::PER_STEP {
                // SAFETY: the line ends at k or before.
                unsafe {
                    let from = weights.add(at + part * F::PER_STEP);
                    step::<S, F, OUTPUTS, ROWS>(simd, from, stride, F::PER_STEP, x, &mut sums);
                    x = x.add(ROWS * LANES);
                }
            }
            at += line;
        }
        while at < k {
            // SAFETY: as far as the row goes.
            unsafe {
                let len = F::PER_STEP.min(k - at);
                step::<S, F, OUTPUTS, ROWS>(simd, weights.add(at), stride, len, x, &mut sums);
                x = x.add(ROWS * LANES);
            }
            at += F::PER_STEP;
        }
        if part.end < block.x.k {
            for (output, sums) in sums.iter().enumerate() {
                for (row, &sum) in sums.iter().enumerate() {
                    // SAFETY: there is a place for each.
                    unsafe { simd.store(carried.add(output * ROWS + row).cast(), sum) }
                }
            }
            return;
        }
        // By way of memory of their own: the sums stay in registers only if each is named by a constant.
        let mut lanes = [[Lanes::ZERO; ROWS]; OUTPUTS];
        for (lanes, sums) in lanes.iter_mut().zip(&sums) {
            for (lanes, &sum) in lanes.iter_mut().zip(sums) {
                // SAFETY: `Lanes` has room for a vector.
                unsafe { simd.store(lanes.0.as_mut_ptr(), sum) }
            }
        }
        for (i, lanes) in lanes.iter().enumerate() {
            for (row, lanes) in lanes.iter().enumerate() {
                // SAFETY: the block has these rows and outputs, and no other task writes them.
                unsafe {
                    let sum = simd.sum(simd.load(lanes.0.as_ptr()));
                    block.finish.write_one(rows.row + row, output + i, sum);
                }
            }
        }
    }
}

/// Adds the products of a vector, of which `len` elements exist.
///
/// # Safety
/// `len` elements can be read in each of the rows of weights, a vector of x for each of the rows.
#[inline(always)]
unsafe fn step<S: Simd, F: Format, const OUTPUTS: usize, const ROWS: usize>(
    simd: S,
    weights: *const F::Element,
    stride: usize,
    len: usize,
    x: *const f32,
    sums: &mut [[S::Vector; ROWS]; OUTPUTS],
) {
    let mut loaded = [simd.splat(0.0); OUTPUTS];
    for (output, weight) in loaded.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *weight = unsafe { F::load(simd, weights.add(output * stride), len) };
    }
    for row in 0..ROWS {
        // SAFETY: the caller's promise.
        let x = unsafe { simd.load(x.add(row * LANES)) };
        for (sums, weight) in sums.iter_mut().zip(loaded) {
            sums[row] = F::mul_add(simd, weight, x, sums[row]);
        }
    }
}
