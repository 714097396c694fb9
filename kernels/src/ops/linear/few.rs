//! Few rows (decode): the weights are used as they lie in memory, lanes along k, sums in registers.

use super::Block;
use super::format::Format;
use super::input::RowTile;
use crate::simd::{Kernel, LANES, Lanes, Simd};

/// Up to this many rows the weights are read this way; above, it pays to turn them into a panel first.
pub(super) const MOST_ROWS: usize = 16;

/// Most rows of a tile.
pub(super) fn tile_rows(wide: bool) -> usize {
    if wide { 8 } else { 3 }
}

/// Weights that are asked for ahead of their use, over the rows of a tile together, where a tile is used once.
const PREFETCH_BYTES: usize = 8 << 10;
const LINE_BYTES: usize = 64;

/// All rows of a block. Where there are several tiles of rows, the weights come from memory once, while those before are in
/// use.
#[inline(always)]
pub(super) fn few_rows<S: Simd, F: Format>(simd: S, block: &Block<F>) {
    let num_tiles = block.x.num_tiles();
    let mut output = 0;
    while output < block.num_outputs {
        let most_rows = block.x.tile(num_tiles - 1).num_rows;
        let num_outputs = tile_outputs::<S>(most_rows, block.num_outputs - output);
        for time in 0..num_tiles {
            let rows = block.x.tile(time);
            let prefetch = Prefetch { times_used: num_tiles, time };
            Tile { block, output, rows, prefetch }.call(simd, num_outputs);
        }
        output += num_outputs;
    }
}

/// Outputs of the next tile: as many as there are registers for.
#[inline(always)]
fn tile_outputs<S: Simd>(rows: usize, left: usize) -> usize {
    let widest = match (S::WIDE, rows) {
        (true, 1 | 2) => 8,
        (true, 3 | 4) => 6,
        (true, 5 | 6) | (false, 1) => 4,
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
            (8, 1) if S::WIDE => simd.call(Sized::<F, 8, 1>(self)),
            (8, 2) if S::WIDE => simd.call(Sized::<F, 8, 2>(self)),
            (6, 3) if S::WIDE => simd.call(Sized::<F, 6, 3>(self)),
            (6, 4) if S::WIDE => simd.call(Sized::<F, 6, 4>(self)),
            (4, 5) if S::WIDE => simd.call(Sized::<F, 4, 5>(self)),
            (4, 6) if S::WIDE => simd.call(Sized::<F, 4, 6>(self)),
            (4, 4) if S::WIDE => simd.call(Sized::<F, 4, 4>(self)),
            (3, 6) if S::WIDE => simd.call(Sized::<F, 3, 6>(self)),
            (3, 7) if S::WIDE => simd.call(Sized::<F, 3, 7>(self)),
            (3, 8) if S::WIDE => simd.call(Sized::<F, 3, 8>(self)),
            (4, 1) if !S::WIDE => simd.call(Sized::<F, 4, 1>(self)),
            (2, 1) if !S::WIDE => simd.call(Sized::<F, 2, 1>(self)),
            (2, 2) if !S::WIDE => simd.call(Sized::<F, 2, 2>(self)),
            (2, 3) if !S::WIDE => simd.call(Sized::<F, 2, 3>(self)),
            (outputs, rows) => unreachable!("no tile of {outputs} outputs and {rows} rows"),
        }
    }
}

struct Sized<'a, F: Format, const OUTPUTS: usize, const ROWS: usize>(Tile<'a, F>);

impl<F: Format, const OUTPUTS: usize, const ROWS: usize> Kernel for Sized<'_, F, OUTPUTS, ROWS> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Tile { block, output, rows, prefetch } = self.0;
        let (k, stride) = (block.x.k, block.weight_stride);
        // SAFETY: the block has these outputs.
        let weights = unsafe { block.weights.add(output * stride) };
        let line = LINE_BYTES / size_of::<F::Element>();
        let mut sums = [[simd.splat(0.0); ROWS]; OUTPUTS];
        // Element of a row that is asked for next. Used once: somewhat ahead, and at the row's end, in the row that the next
        // tile has at its place. Used several times: a part of that row each time.
        let next_tile = OUTPUTS * stride;
        let (mut ahead, wrap_at) = match prefetch.times_used {
            1 => {
                let ahead = PREFETCH_BYTES / OUTPUTS / size_of::<F::Element>() / line * line;
                (ahead, k.saturating_sub(ahead).next_multiple_of(line))
            }
            times => (next_tile + prefetch.time * k / times, usize::MAX),
        };
        let mut x = rows.x;
        let mut at = 0;
        while at + line <= k {
            if at == wrap_at {
                ahead = ahead.wrapping_add(next_tile).wrapping_sub(k);
            }
            for output in 0..OUTPUTS {
                simd.prefetch(weights.wrapping_add(output * stride + ahead).cast());
            }
            ahead = ahead.wrapping_add(line.div_ceil(prefetch.times_used));
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
        for output in 0..OUTPUTS {
            sums[output][row] = F::mul_add(simd, loaded[output], x, sums[output][row]);
        }
    }
}
