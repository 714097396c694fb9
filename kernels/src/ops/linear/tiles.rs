//! Weights in tiles of bf16 (Intel AMX), for any number of rows: weights are the left operand, x the right one, so sums come as
//! `[output][row]` and are turned once.
//!
//! bf16 weights are multiplied with x in bf16. Others keep x in f32: as the sum of several bf16, its *terms*, each a column of the
//! right operand. Their sums are added at the end.
//!
//! A sum is one chain along k, whatever the shape of what is computed together.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use super::finish::Finish;
use super::format::padded_part;
use super::input::x_vector;
use crate::scratch::Scratch;
use crate::simd::amx::{Ahead, Amx, Left, Shaped, Sums, TILE, TILE_BYTES, TILE_K, TILE_ROW_BYTES};
use crate::simd::{Kernel, LANES, Lanes, Simd};
use crate::{Context, View};

/// Tiles of rows that are multiplied with weights straight from memory: while a tile of weights arrives, there is time for as
/// many products. With more rows, it pays to copy weights into a panel first.
const MOST_TILES_AT_ONCE: usize = 4;

/// Most [`Tiled::TERMS`].
const MOST_TERMS: usize = 3;

const CACHE_LINE: usize = 64;

/// How far ahead of their use weights are asked for, for the L1 cache (64 and 512 were slower).
const NEAR_BYTES: usize = 128;

/// Tiles of rows, and of outputs, of a square of sums in registers.
const SQUARE: usize = 2;

/// Outputs of a panel.
const PANEL_OUTPUTS: usize = SQUARE * TILE;

/// Panels of a group: the more, the less often x comes from beyond the L2 cache.
const PANELS: usize = 4;

/// Steps of k whose weights, of all panels of a group, stay in an L2 cache of 1 MiB or more.
const CHUNK_STEPS: usize = 32;

/// Steps of k of a band's x that stay in an L1 cache while the panels of a group pass by.
const PART_STEPS: usize = 8;

/// Bands whose sums are kept while chunks of k are multiplied.
const BANDS_TOGETHER: usize = 16;

/// How weights become rows of tiles, and what they are multiplied with.
pub(super) trait Tiled: Copy {
    /// What a row of weights consists of.
    type Element: Copy;
    /// How many bf16 a value of x is the sum of, exactly; with one, x is rounded.
    const TERMS: usize;
    /// Whether weights lie in memory as in tiles.
    const IN_PLACE: bool;

    /// The first `len` elements from memory, zeros behind them, as a row of a tile; x has the same order.
    ///
    /// # Safety
    /// `len <= TILE_K` elements can be read at `from`.
    unsafe fn line<S: Simd>(simd: S, from: *const Self::Element, len: usize) -> S::Vector;
}

/// bf16 weights and x in bf16.
#[derive(Clone, Copy)]
pub(super) struct InBf16;

impl Tiled for InBf16 {
    type Element = bf16;
    const TERMS: usize = 1;
    const IN_PLACE: bool = true;

    #[inline(always)]
    unsafe fn line<S: Simd>(simd: S, from: *const bf16, len: usize) -> S::Vector {
        let mut padded = [bf16::ZERO; TILE_K];
        // SAFETY: the caller's promise; two bf16 have the size of an f32, and no alignment is asked for.
        unsafe { simd.load(padded_part(from, len, &mut padded).cast()) }
    }
}

/// Weights of 8 bits, which are bf16 exactly, and x in f32, as the sum of three bf16 of 8 bits each: products are f32 exactly.
///
/// Tile products take bf16 below the least normal one (2^-126) for zero, so of x what is below is lost, and sums are zero
/// there.
#[derive(Clone, Copy)]
pub(super) struct InSplitF32;

impl Tiled for InSplitF32 {
    type Element = i8;
    const TERMS: usize = 3;
    const IN_PLACE: bool = false;

    #[inline(always)]
    unsafe fn line<S: Simd>(simd: S, from: *const i8, len: usize) -> S::Vector {
        let mut padded = [0; TILE_K];
        // SAFETY: the caller's promise; `padded` has a line's elements.
        unsafe {
            let from = padded_part(from, len, &mut padded);
            simd.pair_bf16(simd.load_i8(from), simd.load_i8(from.add(LANES)))
        }
    }
}

/// A step's lines of the right operand for one row of x: the terms of x, each as its second half over its first.
#[inline(always)]
fn split_x<S: Simd>(simd: S, x: View<'_>, row: usize, step: usize) -> [S::Vector; MOST_TERMS] {
    let half = |half: usize| match 2 * step + half {
        vector if vector * LANES < x.cols() => x_vector(simd, x, row, 1, vector),
        _ => simd.splat(0.0),
    };
    let (mut first, mut second) = (half(0), half(1));
    let mut terms = [simd.splat(0.0); MOST_TERMS];
    for term in &mut terms {
        let ([a, rest_of_first], [b, rest_of_second]) = (simd.split_bf16(first), simd.split_bf16(second));
        *term = simd.pair_bf16(a, b);
        (first, second) = (rest_of_first, rest_of_second);
    }
    terms
}

/// x as tiles of the right operand: *bands* of tiles side by side, `[band][step][tile][pair of k][column]`, padded with zeros.
///
/// Columns are `[term][row]` of up to [`TILE`] rows: these rows are in one tile, or each of their terms in one of its own.
#[derive(Clone, Copy)]
pub(super) struct Bands {
    x: *const Lanes,
    rows: usize,
    k: usize,
    /// Of [`Tiled::TERMS`].
    terms: usize,
    /// Tiles along k.
    steps: usize,
    /// Rows that a tile has room for.
    tile_rows: usize,
    /// Terms that a tile has room for.
    tile_terms: usize,
    /// Tiles of a band; the last band may have fewer.
    band_tiles: usize,
}

// SAFETY: read only, but for the tiles that tasks of `prepare` write each on its own.
unsafe impl Send for Bands {}
// SAFETY: as above.
unsafe impl Sync for Bands {}

impl Bands {
    /// Prepares `x` in `memory`, which is made as large as needed, and must live as long as the result is used.
    pub(super) fn prepare<F: Tiled>(context: &Context, x: View<'_>, memory: &mut Scratch) -> Self {
        let (rows, k, terms) = (x.rows(), x.cols(), F::TERMS);
        // Powers of two, so that no line of a tile lies across two cache lines.
        let tile_rows = rows.next_power_of_two().min(TILE);
        let tile_terms = terms.next_power_of_two().min(TILE / tile_rows);
        let steps = k.div_ceil(TILE_K);
        let mut bands =
            Self { x: std::ptr::null(), rows, k, terms, steps, tile_rows, tile_terms, band_tiles: SQUARE };
        if bands.num_tiles() <= MOST_TILES_AT_ONCE {
            bands.band_tiles = bands.num_tiles();
        }
        // A vector more: see `Prepare`.
        bands.x = memory.lanes(bands.num_tiles() * steps * bands.columns() + 1).as_mut_ptr().cast_const();
        context.for_rows(bands.num_row_tiles(), TILE * k, |row_tile| {
            context.level().run_with_dots(Prepare { x, bands, row_tile });
        });
        bands
    }

    /// Columns of a tile.
    fn columns(&self) -> usize {
        self.tile_rows * self.tile_terms
    }

    fn num_row_tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    fn num_tiles(&self) -> usize {
        self.num_row_tiles() * self.terms.div_ceil(self.tile_terms)
    }

    fn num_bands(&self) -> usize {
        self.num_tiles().div_ceil(self.band_tiles)
    }

    /// Where a term of some rows is: the tile, and the column of the first of the rows.
    fn place(&self, row_tile: usize, term: usize) -> (usize, usize) {
        let tile = row_tile * self.terms.div_ceil(self.tile_terms) + term / self.tile_terms;
        (tile, term % self.tile_terms * self.tile_rows)
    }

    /// What is multiplied at a step of a band.
    fn at(&self, band: usize, step: usize) -> *const u8 {
        let (tiles, x) = self.band(band);
        x.wrapping_add(step * tiles * self.columns()).cast()
    }

    /// Tiles of a band, and its first.
    fn band(&self, band: usize) -> (usize, *const Lanes) {
        let first = band * self.band_tiles;
        let tiles = self.band_tiles.min(self.num_tiles() - first);
        (tiles, self.x.wrapping_add(first * self.steps * self.columns()))
    }
}

/// Writes the tiles of some rows, for all steps.
struct Prepare<'a> {
    x: View<'a>,
    bands: Bands,
    row_tile: usize,
}

impl Kernel for Prepare<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, bands, row_tile } = self;
        let Bands { terms, band_tiles, .. } = bands;
        let first = row_tile * TILE;
        let num_rows = TILE.min(x.rows() - first);
        let columns = bands.columns();
        let num_tiles = bands.num_tiles() / bands.num_row_tiles();
        // Of each tile, as a line for each column; zeros where a tile has room for more.
        let mut lines = [[simd.splat(0.0); LANES]; MOST_TERMS];
        for step in 0..bands.steps {
            for row in 0..num_rows {
                if terms == 1 {
                    lines[0][row] = x_vector(simd, x, first + row, 2, step);
                    continue;
                }
                for (term, value) in split_x(simd, x, first + row, step).into_iter().enumerate() {
                    let (tile, column) = bands.place(0, term);
                    lines[tile][column + row] = value;
                }
            }
            for (tile, &lines) in lines.iter().enumerate().take(num_tiles) {
                let tile = row_tile * num_tiles + tile;
                let (tiles, band) = bands.band(tile / band_tiles);
                let at = (step * tiles + tile % band_tiles) * columns;
                let to = band.cast_mut().wrapping_add(at).cast::<f32>();
                if columns == 1 {
                    // SAFETY: a tile of one column is one vector.
                    unsafe { simd.store(to, lines[0]) }
                    continue;
                }
                for (pair, columns_of_pair) in simd.transpose(lines).into_iter().enumerate() {
                    // SAFETY: what is written behind these columns is the next ones', which come later in this task, as it is the
                    // only one where columns are fewer than a vector's; behind the last tile there is room.
                    unsafe { simd.store(to.add(pair * columns), columns_of_pair) }
                }
            }
        }
    }
}

/// Consecutive rows of one weight, for all rows of x. The pointers are to the first elements.
pub(super) struct TileBlock<F: Tiled> {
    pub(super) amx: Amx,
    pub(super) weights: *const F::Element,
    pub(super) weight_stride: usize,
    pub(super) num_outputs: usize,
    pub(super) x: Bands,
    pub(super) finish: Finish,
}

impl<F: Tiled> Kernel for TileBlock<F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        macro_rules! at_once {
            ($tiles:literal) => {
                if F::IN_PLACE {
                    simd.call(InPlace::<F, $tiles>(&self))
                } else {
                    simd.call(ByStep::<F, $tiles>(&self))
                }
            };
        }
        match (self.x.num_bands(), self.x.num_tiles()) {
            (1, 1) => at_once!(1),
            (1, 2) => at_once!(2),
            (1, 3) => at_once!(3),
            (1, 4) => at_once!(4),
            _ => SCRATCH.with_borrow_mut(|scratch| simd.call(Panels { block: &self, scratch })),
        }
    }
}

impl<F: Tiled> TileBlock<F> {
    /// Where a row of weights begins.
    fn row(&self, output: usize) -> *const F::Element {
        self.weights.wrapping_add(output * self.weight_stride)
    }

    /// Writes the sums of outputs from `output` on and of a tile's rows: of each term, as many lines of `stride` values.
    ///
    /// # Safety
    /// A vector can be read of each line.
    #[inline(always)]
    unsafe fn write<S: Simd>(
        &self,
        simd: S,
        terms: [*const f32; MOST_TERMS],
        stride: usize,
        output: usize,
        row_tile: usize,
    ) {
        let num_outputs = TILE.min(self.num_outputs - output);
        let num_rows = TILE.min(self.x.rows - row_tile * TILE);
        let mut lanes = [simd.splat(0.0); LANES];
        for (line, lanes) in lanes.iter_mut().enumerate().take(num_outputs) {
            // The least first.
            for term in (0..F::TERMS).rev() {
                // SAFETY: the caller's promise.
                let sums = unsafe { simd.load(terms[term].add(line * stride)) };
                *lanes = if term + 1 == F::TERMS { sums } else { simd.add(sums, *lanes) };
            }
        }
        for (row, outputs) in simd.transpose(lanes).into_iter().enumerate().take(num_rows) {
            // SAFETY: the block has these rows and outputs, and no other task writes them.
            unsafe { self.finish.write_lanes(simd, row_tile * TILE + row, output, num_outputs, outputs) }
        }
    }

    /// Writes the sums of a band that is all there is.
    #[inline(always)]
    fn write_band<S: Simd, const TILES: usize>(&self, simd: S, sums: &BandSums<TILES>, output: usize) {
        for row_tile in 0..self.x.num_row_tiles() {
            let terms = std::array::from_fn(|term| {
                let (tile, column) = self.x.place(row_tile, term.min(F::TERMS - 1));
                std::ptr::from_ref(sums).cast::<f32>().wrapping_add(tile * TILE + column)
            });
            // SAFETY: there is a vector behind the last line's last column.
            unsafe { self.write(simd, terms, TILES * TILE, output, row_tile) }
        }
    }

    /// Writes a line of weights to `to`.
    #[inline(always)]
    fn line<S: Simd>(&self, simd: S, output: usize, step: usize, to: &mut Lanes) {
        let (start, row) = (step * TILE_K, self.row(output));
        // SAFETY: so many elements can be read of the row; a line is a vector.
        unsafe {
            let line = F::line(simd, row.add(start), TILE_K.min(self.x.k - start));
            simd.store(to.0.as_mut_ptr(), line);
        }
    }

    /// Writes the lines of a whole tile, and asks for some that come later: for the L1 cache, of the same rows, and for the L2
    /// cache, of the next tile's at the same place. A line of the caches serves several steps, so each asks for a share of the
    /// rows'.
    ///
    /// # Safety
    /// There are as many outputs, and the step is whole.
    #[inline(always)]
    unsafe fn whole_lines<S: Simd>(&self, simd: S, output: usize, step: usize, lines: &mut [Lanes; TILE]) {
        let stride = self.weight_stride;
        let shares = CACHE_LINE / (TILE_K * size_of::<F::Element>());
        let mut weights = self.row(output).wrapping_add(step * TILE_K);
        let mut asked = weights.wrapping_add(step % shares * stride);
        for lines in lines.chunks_exact_mut(shares) {
            simd.prefetch(asked.cast::<u8>().wrapping_add(NEAR_BYTES));
            simd.prefetch_far(asked.wrapping_add(TILE * stride).cast());
            asked = asked.wrapping_add(shares * stride);
            for line in lines {
                // SAFETY: the caller's promise; a line is a vector.
                unsafe { simd.store(line.0.as_mut_ptr(), F::line(simd, weights, TILE_K)) }
                weights = weights.wrapping_add(stride);
            }
        }
    }
}

/// The sums of up to [`MOST_TILES_AT_ONCE`] tiles: `[output][column]`, and room for what is loaded beside the last columns.
#[repr(C)]
struct BandSums<const TILES: usize> {
    lines: [[Lanes; TILES]; TILE],
    _room: Lanes,
}

impl<const TILES: usize> BandSums<TILES> {
    const ZERO: Self = Self { lines: [[Lanes::ZERO; TILES]; TILE], _room: Lanes::ZERO };

    /// Bytes from line to line.
    const STRIDE: usize = TILES * size_of::<Lanes>();

    fn first(&mut self) -> *mut f32 {
        self.lines.as_mut_ptr().cast()
    }

    fn sums(&mut self, carries_on: bool) -> Sums {
        Sums { first: self.first(), stride: Self::STRIDE, carries_on }
    }
}

/// A band that is all there is, weights as they lie in memory.
struct InPlace<'a, F: Tiled, const TILES: usize>(&'a TileBlock<F>);

impl<F: Tiled, const TILES: usize> Kernel for InPlace<'_, F, TILES> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(block) = self;
        let Bands { k, steps, .. } = block.x;
        let whole_steps = k / TILE_K;
        let mut shaped = block.amx.shape(TILE.min(block.num_outputs), block.x.columns());
        let mut sums = BandSums::<TILES>::ZERO;
        for output in (0..block.num_outputs).step_by(TILE) {
            let num_outputs = TILE.min(block.num_outputs - output);
            if num_outputs < TILE && output > 0 {
                shaped.reshape(num_outputs, block.x.columns());
            }
            let stride = block.weight_stride * size_of::<F::Element>();
            let left = Left { first: block.row(output).cast(), stride, step: TILE_ROW_BYTES };
            if whole_steps > 0 {
                // SAFETY: x has all steps, each of the outputs' rows k elements.
                unsafe { shaped.row::<TILES>(left, block.x.at(0, 0), whole_steps, sums.sums(false)) }
            }
            if whole_steps < steps {
                let mut tail = [Lanes::ZERO; TILE];
                for (row, tail) in tail.iter_mut().enumerate().take(num_outputs) {
                    block.line(simd, output + row, whole_steps, tail);
                }
                let left = Left { first: tail.as_ptr().cast(), stride: TILE_ROW_BYTES, step: 0 };
                // SAFETY: x has this step, the tail the outputs' rows.
                unsafe {
                    let x = block.x.at(0, whole_steps);
                    shaped.row::<TILES>(left, x, 1, sums.sums(whole_steps > 0));
                }
            }
            block.write_band(simd, &sums, output);
        }
    }
}

/// A band that is all there is; weights become lines in the L1 cache a step before they are multiplied.
///
/// Memory is what binds here, and it gives most where it is asked in the order in which weights lie.
struct ByStep<'a, F: Tiled, const TILES: usize>(&'a TileBlock<F>);

impl<F: Tiled, const TILES: usize> Kernel for ByStep<'_, F, TILES> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(block) = self;
        let (steps, whole_steps) = (block.x.steps, block.x.k / TILE_K);
        let mut shaped = block.amx.shape(TILE.min(block.num_outputs), block.x.columns());
        let mut sums = BandSums::<TILES>::ZERO;
        let x = block.x.at(0, 0);
        let x_step = TILES * block.x.columns() * size_of::<Lanes>();
        // One is multiplied while the other is filled.
        let mut lines = [[Lanes::ZERO; TILE]; 2];
        for output in (0..block.num_outputs).step_by(TILE) {
            let num_outputs = TILE.min(block.num_outputs - output);
            if num_outputs < TILE && output > 0 {
                shaped.reshape(num_outputs, block.x.columns());
            }
            shaped.zero();
            for step in 0..=steps {
                if step < whole_steps && num_outputs == TILE {
                    // SAFETY: as asked.
                    unsafe { block.whole_lines(simd, output, step, &mut lines[step % 2]) }
                } else if step < steps {
                    for (row, line) in lines[step % 2].iter_mut().enumerate().take(num_outputs) {
                        block.line(simd, output + row, step, line);
                    }
                }
                if let Some(before) = step.checked_sub(1) {
                    // SAFETY: x has this step, the lines are the outputs'.
                    unsafe {
                        let x = x.wrapping_add(before * x_step);
                        shaped.add::<TILES>(lines[before % 2].as_ptr().cast(), x);
                    }
                }
            }
            // SAFETY: there is room for as many sums.
            unsafe { shaped.store::<TILES>(sums.first(), BandSums::<TILES>::STRIDE) }
            block.write_band(simd, &sums, output);
        }
    }
}

/// Of a panel and a band: `[output][row]`.
type SquareSums = [[Lanes; SQUARE]; PANEL_OUTPUTS];

thread_local! {
    /// Panels `[panel][step][tile][output][pair of k]`, then sums `[band][panel]`.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// More rows: squares of sums, over copies of the weights.
struct Panels<'a, F: Tiled> {
    block: &'a TileBlock<F>,
    scratch: &'a mut Scratch,
}

impl<F: Tiled> Kernel for Panels<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, scratch } = self;
        let Bands { steps, tile_rows, .. } = block.x;
        let num_bands = block.x.num_bands();
        // At least a step, so that there are panels.
        let panel_len = steps.max(1) * PANEL_OUTPUTS;
        // Whole tiles of rows, with all terms.
        let together = BANDS_TOGETHER / F::TERMS * F::TERMS;
        let num_sums = num_bands.min(together) * PANELS;
        let (panels, sums) = scratch
            .lanes(PANELS * panel_len + num_sums * PANEL_OUTPUTS * SQUARE)
            .split_at_mut(PANELS * panel_len);
        let sums: &mut [SquareSums] = sums.as_chunks_mut::<SQUARE>().0.as_chunks_mut::<PANEL_OUTPUTS>().0;
        if steps == 0 {
            sums.fill([[Lanes::ZERO; SQUARE]; PANEL_OUTPUTS]);
        }
        let shaped = block.amx.shape(TILE, tile_rows);
        for first in (0..block.num_outputs).step_by(PANELS * PANEL_OUTPUTS) {
            let outputs = (first..block.num_outputs).step_by(PANEL_OUTPUTS).take(PANELS);
            for (output, panel) in outputs.clone().zip(panels.chunks_exact_mut(panel_len)) {
                simd.call(Fill { block, output, panel });
            }
            // The weights of the next group, where there are no gaps.
            let mut later: *const u8 = block.row(first + PANELS * PANEL_OUTPUTS).cast();
            let last: *const u8 = block.row(first + 2 * PANELS * PANEL_OUTPUTS).cast();
            for bands in (0..num_bands).step_by(together) {
                let bands = bands..num_bands.min(bands + together);
                for chunk in (0..steps).step_by(CHUNK_STEPS) {
                    let chunk = chunk..steps.min(chunk + CHUNK_STEPS);
                    for (band, sums) in bands.clone().zip(sums.chunks_exact_mut(PANELS)) {
                        for start in chunk.clone().step_by(PART_STEPS) {
                            let part = start..chunk.end.min(start + PART_STEPS);
                            // The x that comes next.
                            let mut soon = match part.end {
                                end if end < chunk.end => block.x.at(band, end),
                                _ if band + 1 < bands.end => block.x.at(band + 1, chunk.start),
                                end => block.x.at(bands.start, end),
                            };
                            for (panel, sums) in
                                panels.chunks_exact(panel_len).zip(&mut *sums).take(outputs.len())
                            {
                                block.square(&shaped, panel, band, part.clone(), sums, Ahead { soon, later });
                                soon = soon.wrapping_add(part.len() * Ahead::SOON_BYTES);
                                later = later.wrapping_add(part.len() * Ahead::LATER_BYTES).min(last);
                            }
                        }
                    }
                }
                let row_tiles = |bands: usize| (bands * SQUARE / F::TERMS).min(block.x.num_row_tiles());
                for row_tile in row_tiles(bands.start)..row_tiles(bands.end) {
                    for (panel, output) in outputs.clone().enumerate() {
                        let sums = std::array::from_fn(|term| {
                            let tile =
                                block.x.place(row_tile, term.min(F::TERMS - 1)).0 - bands.start * SQUARE;
                            (&sums[tile / SQUARE * PANELS + panel], tile % SQUARE)
                        });
                        simd.call(WritePanel { block, sums, output, row_tile });
                    }
                }
            }
        }
    }
}

impl<F: Tiled> TileBlock<F> {
    /// A panel times a band, some steps of k.
    #[inline(always)]
    fn square(
        &self,
        shaped: &Shaped,
        panel: &[Lanes],
        band: usize,
        part: Range<usize>,
        sums: &mut SquareSums,
        ahead: Ahead,
    ) {
        let (tiles, x) = self.x.band(band);
        let x = x.wrapping_add(part.start * tiles * TILE).cast();
        let first = panel[part.start * PANEL_OUTPUTS..part.end * PANEL_OUTPUTS].as_ptr().cast::<u8>();
        let left = Left { first, stride: TILE_ROW_BYTES, step: SQUARE * TILE_BYTES };
        let lower = first.wrapping_add(TILE_BYTES);
        let sums = Sums {
            first: sums.as_mut_ptr().cast(),
            stride: SQUARE * size_of::<Lanes>(),
            carries_on: part.start > 0,
        };
        // SAFETY: panel and band have all steps.
        unsafe {
            if tiles == SQUARE {
                shaped.square::<2>(left, lower, x, part.len(), sums, ahead);
            } else {
                shaped.square::<1>(left, lower, x, part.len(), sums, ahead);
            }
        }
    }
}

/// Brings outputs from `output` on into a panel, zeros where there is none.
struct Fill<'a, F: Tiled> {
    block: &'a TileBlock<F>,
    output: usize,
    panel: &'a mut [Lanes],
}

impl<F: Tiled> Kernel for Fill<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        /// Steps of all outputs together: what is written stays in an L1 cache meanwhile.
        const TOGETHER: usize = 8;
        for (i, part) in self.panel.chunks_mut(TOGETHER * PANEL_OUTPUTS).enumerate() {
            for row in 0..PANEL_OUTPUTS {
                for (step, line) in part[row..].iter_mut().step_by(PANEL_OUTPUTS).enumerate() {
                    if self.output + row < self.block.num_outputs {
                        self.block.line(simd, self.output + row, i * TOGETHER + step, line);
                    } else {
                        *line = Lanes::ZERO;
                    }
                }
            }
        }
    }
}

/// Writes the sums of a panel and a tile of rows.
struct WritePanel<'a, F: Tiled> {
    block: &'a TileBlock<F>,
    /// Of each term, and in which tile of its square.
    sums: [(&'a SquareSums, usize); MOST_TERMS],
    output: usize,
    row_tile: usize,
}

impl<F: Tiled> Kernel for WritePanel<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, sums, output, row_tile } = self;
        for upper in (0..PANEL_OUTPUTS).step_by(TILE).take_while(|upper| output + upper < block.num_outputs) {
            let terms = sums.map(|(square, tile)| square[upper][tile].0.as_ptr());
            // SAFETY: a square has these lines.
            unsafe { block.write(simd, terms, SQUARE * TILE, output + upper, row_tile) }
        }
    }
}

const _: () = assert!(TILE == LANES && TILE_BYTES == TILE * size_of::<Lanes>());
