//! Few rows (decode): the weights are used as they lie in memory, lanes along k, sums in registers.

use std::cell::RefCell;
use std::ops::Range;

use super::Block;
use super::format::Format;
use super::input::{Input, RowTile};
use crate::simd::{Kernel, LANES, Lanes, Simd};

/// Up to this many rows the weights are read this way; above, it pays to turn them into a panel first.
pub(super) const MOST_ROWS: usize = 16;

/// Most rows of a tile: their sums fit into registers beside a vector or two of weights.
pub(super) fn tile_rows(wide: bool) -> usize {
    if wide { 8 } else { 6 }
}

const LINE_BYTES: usize = 64;

/// Of x, what is used over and over lies in an L1 cache: of 32 KiB or more, or, with wide registers, of 48 KiB.
fn x_bytes(wide: bool, rows: usize) -> usize {
    if wide && rows > MEMORY_ORDER_ROWS { 32 << 10 } else { 24 << 10 }
}

/// Up to this, x is not cut into parts: then few lines of weights are in an L1 cache beside it.
fn whole_x_bytes(wide: bool, rows: usize) -> usize {
    if wide && rows <= MEMORY_ORDER_ROWS { 32 << 10 } else { 24 << 10 }
}

/// Up to this many rows, a part's weights are done with before memory has answered for the next group's if these are asked for in
/// the order of use, a piece of each row; in the order in which they lie, it answers sooner.
const MEMORY_ORDER_ROWS: usize = 4;

/// Most outputs whose sums are kept while a part of k is multiplied; all tiles' numbers of outputs divide it and its half.
const GROUP: usize = 48;

/// Weights of a group, which with those of the next are to stay in an L2 cache.
const GROUP_BYTES: usize = 256 << 10;

/// How far ahead lines are asked for, at least, where the weights are read from first to last: for the L2 cache, enough for memory
/// to answer, ...
const AHEAD_BYTES: usize = 8 << 10;

/// ... and for the L1 cache, enough for the L2 cache to answer. A request for the L1 cache keeps one of its few places for lines
/// under way until it is answered.
const NEAR_BYTES: usize = 512;

thread_local! {
    /// Sums of a group of outputs, to be carried on by the next part of k.
    static CARRIED: RefCell<Vec<Lanes>> = const { RefCell::new(Vec::new()) };
}

/// All rows of a block. Where there are several tiles of rows, the weights come from memory once, while those before are in
/// use.
///
/// Memory is what binds here, and it gives most to few streams. So a tile has the fewest outputs that keep the multiply-add units
/// busy, and lines are asked for ahead. A CPU may drop such requests while others are under way, so where k is cut into
/// parts, and the weights are not read in one stream, each line is asked for twice: for the L2 cache while the group of
/// outputs before is in use, and for the L1 cache one tile before its use.
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
        let group = match GROUP * block.weight_stride * size_of::<F::Element>() {
            bytes if bytes <= GROUP_BYTES => GROUP,
            _ => GROUP / 2,
        };
        if part_len < k && carried.is_empty() {
            carried.resize(GROUP * MOST_ROWS, Lanes::ZERO);
        }
        let line_len = LINE_BYTES / size_of::<F::Element>();
        let lines_per_row = k.div_ceil(line_len).max(1);
        // Where the weights are read from first to last.
        let rows_ahead = match block.weight_stride * size_of::<F::Element>() {
            row_bytes if part_len >= k => AHEAD_BYTES.div_ceil(row_bytes.max(1)),
            _ => 0,
        };
        for first in (0..block.num_outputs).step_by(group) {
            let last = block.num_outputs.min(first + group);
            let asks_far = part_len < k && last + group <= block.num_outputs;
            let mut lines_before = 0;
            for start in (0..k.max(1)).step_by(part_len) {
                let part = start..k.min(start + part_len);
                let mut output = first;
                while output < last {
                    let most_rows = block.x.tile(num_tiles - 1).num_rows;
                    let num_outputs = tile_outputs::<S, F>(most_rows, last - output);
                    let at = output * block.weight_stride + part.start;
                    let next = Stream {
                        start: at + num_outputs.max(rows_ahead) * block.weight_stride,
                        row: block.weight_stride,
                        line: line_len,
                    };
                    let near = match rows_ahead {
                        0 => next,
                        _ => Stream { start: at + NEAR_BYTES / size_of::<F::Element>(), ..next },
                    };
                    let far = match rows {
                        _ if !asks_far => next,
                        ..=MEMORY_ORDER_ROWS => {
                            let (row, line) = (lines_before / lines_per_row, lines_before % lines_per_row);
                            let start = (last + row) * block.weight_stride + line * line_len;
                            Stream { start, row: line_len, line: num_outputs * line_len }
                        }
                        _ => Stream { start: at + group * block.weight_stride, ..next },
                    };
                    lines_before += num_outputs * part.len().div_ceil(line_len);
                    for time in 0..num_tiles {
                        let rows_of_tile = block.x.tile(time);
                        let place = (output - first) * rows + num_outputs * rows_of_tile.row;
                        let tile = Tile {
                            block,
                            output,
                            rows: rows_of_tile,
                            part: part.clone(),
                            carried: carried.as_mut_ptr().wrapping_add(place),
                            near,
                            far,
                        };
                        tile.call(simd, num_outputs);
                    }
                    output += num_outputs;
                }
            }
        }
    }
}

/// Elements of k that are multiplied with a group of outputs before the next: all where x is small.
fn part_len<S: Simd, F: Format>(rows: usize, k: usize) -> usize {
    /// Whole cache lines and vectors of any type.
    const MULTIPLE: usize = 64;
    let all = rows * k.div_ceil(F::PER_STEP) * size_of::<Lanes>();
    let most = x_bytes(S::WIDE, rows);
    // Half of a cache and more for all of x would leave too little for the weights that are asked for.
    let parts = if all <= whole_x_bytes(S::WIDE, rows) { 1 } else { all.div_ceil(most).max(2) };
    k.div_ceil(parts).next_multiple_of(MULTIPLE).max(MULTIPLE)
}

/// Outputs of the next tile: the fewest whose sums, each of which waits for its last addition, and whose loads keep the
/// units busy. Found by trial, for each number of rows and bytes of weights in a vector.
#[inline(always)]
fn tile_outputs<S: Simd, F: Format>(rows: usize, left: usize) -> usize {
    let step_bytes = F::PER_STEP * size_of::<F::Element>();
    let fewest = match (step_bytes, rows) {
        (64.., ..=6) | (32..64, ..=2) if S::WIDE => 1,
        (32..64, 3..=6) | (..32, 2..=6) if S::WIDE => 4,
        _ if S::WIDE => 2,
        (..32, 1) => 4,
        (_, 3) | (..32, 2) => 2,
        _ => 1,
    };
    if left >= fewest { fewest } else { 1 }
}

/// Which weights are asked for beside each line of those in use, in elements from the block's first.
#[derive(Clone, Copy)]
struct Stream {
    start: usize,
    /// From what is asked for beside a line of one row to that of the next row.
    row: usize,
    /// The same from line to line of a row.
    line: usize,
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
    /// For the L1 cache: the next tile's weights, or those of one soon after.
    near: Stream,
    /// For the L2 cache: a share of the next group's, where there is one.
    far: Stream,
}

impl<F: Format> Tile<'_, F> {
    /// Runs the loop for this number of outputs and rows.
    #[inline(always)]
    fn call<S: Simd>(self, simd: S, num_outputs: usize) {
        match (num_outputs, self.rows.num_rows) {
            (1, 1) => simd.call(Sized::<F, 1, 1>(self)),
            (1, 2) => simd.call(Sized::<F, 1, 2>(self)),
            (1, 3) => simd.call(Sized::<F, 1, 3>(self)),
            (1, 4) => simd.call(Sized::<F, 1, 4>(self)),
            (1, 5) => simd.call(Sized::<F, 1, 5>(self)),
            (1, 6) => simd.call(Sized::<F, 1, 6>(self)),
            (1, 7) if S::WIDE => simd.call(Sized::<F, 1, 7>(self)),
            (1, 8) if S::WIDE => simd.call(Sized::<F, 1, 8>(self)),
            (2, 1) => simd.call(Sized::<F, 2, 1>(self)),
            (2, 2) => simd.call(Sized::<F, 2, 2>(self)),
            (2, 3) => simd.call(Sized::<F, 2, 3>(self)),
            (2, 4) if S::WIDE => simd.call(Sized::<F, 2, 4>(self)),
            (2, 5) if S::WIDE => simd.call(Sized::<F, 2, 5>(self)),
            (2, 6) if S::WIDE => simd.call(Sized::<F, 2, 6>(self)),
            (2, 7) if S::WIDE => simd.call(Sized::<F, 2, 7>(self)),
            (2, 8) if S::WIDE => simd.call(Sized::<F, 2, 8>(self)),
            (4, 1) if !S::WIDE => simd.call(Sized::<F, 4, 1>(self)),
            (4, 2) if S::WIDE => simd.call(Sized::<F, 4, 2>(self)),
            (4, 3) if S::WIDE => simd.call(Sized::<F, 4, 3>(self)),
            (4, 4) if S::WIDE => simd.call(Sized::<F, 4, 4>(self)),
            (4, 5) if S::WIDE => simd.call(Sized::<F, 4, 5>(self)),
            (4, 6) if S::WIDE => simd.call(Sized::<F, 4, 6>(self)),
            (outputs, rows) => unreachable!("no tile of {outputs} outputs and {rows} rows"),
        }
    }
}

struct Sized<'a, F: Format, const OUTPUTS: usize, const ROWS: usize>(Tile<'a, F>);

impl<F: Format, const OUTPUTS: usize, const ROWS: usize> Kernel for Sized<'_, F, OUTPUTS, ROWS> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Tile { block, output, rows, part, carried, near, far } = self.0;
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
        // Hints, whose addresses may lie behind the weights' end.
        let (mut near_line, mut far_line) =
            (block.weights.wrapping_add(near.start), block.weights.wrapping_add(far.start));
        let mut at = 0;
        while at + line <= k {
            for output in 0..OUTPUTS {
                simd.prefetch(near_line.wrapping_add(output * near.row).cast());
                simd.prefetch_far(far_line.wrapping_add(output * far.row).cast());
            }
            near_line = near_line.wrapping_add(near.line);
            far_line = far_line.wrapping_add(far.line);
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
