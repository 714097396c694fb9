//! The innermost loops: a few outputs times a few rows, sums in registers.

use super::Block;
use super::weight::WeightElement;
use crate::simd::{Float, Kernel, LANES, Lanes, Simd, spans};

/// Up to this many rows the weights are widened in registers each time; above, it pays to widen them once to memory.
pub(super) const DIRECT_ROWS: usize = 16;

/// How far ahead of its use a weight is asked for, per row of a tile, where a tile is used once.
const PREFETCH_BYTES: usize = 1024;

/// All rows of a block, the weights as they lie in memory. Where there are several tiles of rows, the weights come from
/// memory once, while those before are in use.
#[inline(always)]
pub(super) fn direct<S: Simd, W: WeightElement>(simd: S, block: &Block<W>) {
    let mut output = 0;
    while output < block.num_outputs {
        let num_outputs = tile_outputs::<S>(block.rows, block.num_outputs - output);
        let row_tiles = row_tiles::<S>(block.rows, num_outputs);
        let times_used = row_tiles.len();
        for (time, (row, num_rows)) in row_tiles.enumerate() {
            // SAFETY: `output` and `row` with their numbers are within the block.
            let tile = unsafe {
                Tile {
                    weights: block.weights.add(output * block.weight_stride),
                    weight_stride: block.weight_stride,
                    x: block.x.add(row * block.x_stride),
                    x_stride: block.x_stride,
                    k: block.k,
                    carried: None,
                    prefetch: Prefetch { times_used, time },
                    target: Target::Out {
                        out: block.out.add(row * block.out_stride + output),
                        out_stride: block.out_stride,
                        bias: block.bias.map(|bias| bias.add(output)),
                        scales: block.scales.map(|scales| scales.add(output)),
                    },
                }
            };
            tile.call::<S, true>(simd, num_outputs, num_rows);
        }
        output += num_outputs;
    }
}

/// Outputs of the next tile.
#[inline(always)]
pub(super) fn tile_outputs<S: Simd>(rows: usize, left: usize) -> usize {
    let widest = match (S::WIDE, rows) {
        (true, 1) => 8,
        (true, _) | (false, 1) => 4,
        (false, _) => 2,
    };
    match left {
        _ if left >= widest => widest,
        4..8 if S::WIDE => 4,
        _ => 1,
    }
}

/// First row and number of rows of each tile, as even as can be.
#[inline(always)]
pub(super) fn row_tiles<S: Simd>(
    rows: usize,
    num_outputs: usize,
) -> impl ExactSizeIterator<Item = (usize, usize)> {
    let most = match (num_outputs, S::WIDE) {
        (1, _) => 1,
        (_, true) => 4,
        (_, false) => 3,
    };
    let tiles = rows.div_ceil(most);
    (0..tiles).map(move |tile| {
        let (start, end) = (tile * rows / tiles, (tile + 1) * rows / tiles);
        (start, end - start)
    })
}

/// Where a tile's sums go.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// To be carried on by the next part of k: one [`Lanes`] per output and row.
    Carried(*mut Lanes),
    /// Lanes added up, multiplied with the scale, bias added.
    Out { out: *mut f32, out_stride: usize, bias: Option<*const f32>, scales: Option<*const f32> },
}

/// How often weights are used while they are in the cache, and which of these uses a tile is: each brings a part of the
/// next tile's weights.
#[derive(Clone, Copy)]
pub(super) struct Prefetch {
    pub(super) times_used: usize,
    pub(super) time: usize,
}

/// A few rows of weights times a few rows of x. The pointers are to the tile's first elements.
#[derive(Clone, Copy)]
pub(super) struct Tile<W> {
    pub(super) weights: *const W,
    pub(super) weight_stride: usize,
    pub(super) x: *const f32,
    pub(super) x_stride: usize,
    pub(super) k: usize,
    /// Sums of the former part of k, as [`Target::Carried`] left them.
    pub(super) carried: Option<*const Lanes>,
    pub(super) prefetch: Prefetch,
    pub(super) target: Target,
}

impl<W: WeightElement> Tile<W> {
    /// Runs the loop for this number of outputs and rows: one of those that [`tile_outputs`] and [`row_tiles`] give.
    #[inline(always)]
    pub(super) fn call<S: Simd, const PREFETCH: bool>(self, simd: S, num_outputs: usize, num_rows: usize) {
        match (num_outputs, num_rows) {
            (1, 1) => simd.call(Sized::<W, 1, 1, PREFETCH>(self)),
            (4, 1) => simd.call(Sized::<W, 4, 1, PREFETCH>(self)),
            (8, 1) if S::WIDE => simd.call(Sized::<W, 8, 1, PREFETCH>(self)),
            (4, 2) if S::WIDE => simd.call(Sized::<W, 4, 2, PREFETCH>(self)),
            (4, 3) if S::WIDE => simd.call(Sized::<W, 4, 3, PREFETCH>(self)),
            (4, 4) if S::WIDE => simd.call(Sized::<W, 4, 4, PREFETCH>(self)),
            (2, 1) if !S::WIDE => simd.call(Sized::<W, 2, 1, PREFETCH>(self)),
            (2, 2) if !S::WIDE => simd.call(Sized::<W, 2, 2, PREFETCH>(self)),
            (2, 3) if !S::WIDE => simd.call(Sized::<W, 2, 3, PREFETCH>(self)),
            _ => unreachable!("no tile of {num_outputs} outputs and {num_rows} rows"),
        }
    }
}

struct Sized<W, const OUTPUTS: usize, const ROWS: usize, const PREFETCH: bool>(Tile<W>);

impl<W: WeightElement, const OUTPUTS: usize, const ROWS: usize, const PREFETCH: bool> Kernel
    for Sized<W, OUTPUTS, ROWS, PREFETCH>
{
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let tile = self.0;
        let mut sums = [[simd.splat(0.0); ROWS]; OUTPUTS];
        if let Some(carried) = tile.carried {
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                // SAFETY: `carried` has OUTPUTS * ROWS sums.
                *sum = unsafe { simd.load(carried.add(i).cast()) };
            }
        }
        let full = tile.k / (2 * LANES) * (2 * LANES);
        let next_tile = OUTPUTS * tile.weight_stride;
        let Prefetch { times_used, time } = tile.prefetch;
        // Element of a row that is asked for next. Used once: somewhat ahead, and at the row's end, in the row that the next
        // tile has at its place. Used several times: a part of that row each time.
        let (mut ahead, wrap_at) = match times_used {
            1 => {
                let ahead = PREFETCH_BYTES / size_of::<W>();
                (ahead, tile.k.saturating_sub(ahead).next_multiple_of(2 * LANES))
            }
            _ => (next_tile + time * tile.k / times_used, usize::MAX),
        };
        let mut at = 0;
        while at < full {
            if PREFETCH {
                if at == wrap_at {
                    ahead = ahead.wrapping_add(next_tile).wrapping_sub(tile.k);
                }
                for output in 0..OUTPUTS {
                    let line = tile.weights.wrapping_add(output * tile.weight_stride + ahead).cast::<u8>();
                    simd.prefetch(line);
                    if times_used == 1 && size_of::<W>() == 4 {
                        simd.prefetch(line.wrapping_add(64));
                    }
                }
                ahead = ahead.wrapping_add((2 * LANES).div_ceil(times_used));
            }
            // SAFETY: `at + 2 * LANES <= k`.
            unsafe {
                step(simd, &tile, at, LANES, &mut sums);
                step(simd, &tile, at + LANES, LANES, &mut sums);
            }
            at += 2 * LANES;
        }
        for (start, len) in spans(tile.k - full) {
            // SAFETY: the spans end at k.
            unsafe { step(simd, &tile, full + start, len, &mut sums) }
        }
        finish(simd, &tile.target, &sums);
    }
}

/// Adds the products of `len` elements from `at`.
///
/// # Safety
/// `len <= LANES` and `at + len <= k`.
#[inline(always)]
unsafe fn step<S: Simd, W: WeightElement, const OUTPUTS: usize, const ROWS: usize>(
    simd: S,
    tile: &Tile<W>,
    at: usize,
    len: usize,
    sums: &mut [[S::Vector; ROWS]; OUTPUTS],
) {
    let mut x = [simd.splat(0.0); ROWS];
    for (row, x) in x.iter_mut().enumerate() {
        // SAFETY: the caller's promise; the tile has ROWS rows of x.
        *x = unsafe { f32::load_part(simd, tile.x.add(row * tile.x_stride + at), len) };
    }
    for (output, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise; the tile has OUTPUTS rows of weights.
        let weight =
            unsafe { W::load_weights(simd, tile.weights.add(output * tile.weight_stride + at), len) };
        for row in 0..ROWS {
            sums[row] = simd.mul_add(weight, x[row], sums[row]);
        }
    }
}

#[inline(always)]
fn finish<S: Simd, const OUTPUTS: usize, const ROWS: usize>(
    simd: S,
    target: &Target,
    sums: &[[S::Vector; ROWS]; OUTPUTS],
) {
    for (output, sums) in sums.iter().enumerate() {
        for (row, &sum) in sums.iter().enumerate() {
            // SAFETY: the target has room for OUTPUTS and ROWS; no other task writes these outputs.
            unsafe {
                match *target {
                    Target::Carried(to) => simd.store(to.add(output * ROWS + row).cast(), sum),
                    Target::Out { out, out_stride, bias, scales } => {
                        let scale = scales.map_or(1.0, |scales| *scales.add(output));
                        let bias = bias.map_or(0.0, |bias| *bias.add(output));
                        *out.add(row * out_stride + output) = simd.sum(sum) * scale + bias;
                    }
                }
            }
        }
    }
}
