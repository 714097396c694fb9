//! bf16 weights in tiles (Intel AMX), for any number of rows: weights are the left operand, as they lie in memory, x the right
//! one, so sums come as `[output][row]` and are turned once.
//!
//! A sum is one chain along k, whatever the shape of what is computed together.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use super::finish::Finish;
use super::input::x_vector;
use crate::scratch::Scratch;
use crate::simd::amx::{Ahead, Amx, Left, Shaped, Sums, TILE, TILE_BYTES, TILE_K, TILE_ROW_BYTES};
use crate::simd::{Float, Kernel, LANES, Lanes, Simd};
use crate::{Context, View};

/// Tiles of rows that are multiplied with weights straight from memory: while a tile of weights arrives, there is time for as
/// many products. With more rows, it pays to copy weights into a panel first.
const MOST_TILES_AT_ONCE: usize = 4;

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

/// x as tiles of the right operand: *bands* of tiles side by side, `[band][step][tile][pair of k][row]`, padded with zeros.
#[derive(Clone, Copy)]
pub(super) struct Bands {
    x: *const Lanes,
    rows: usize,
    k: usize,
    /// Tiles along k.
    steps: usize,
    /// Rows that a tile has room for.
    tile_rows: usize,
    /// Tiles of a band; the last band may have fewer.
    band_tiles: usize,
}

// SAFETY: read only, but for the tiles that tasks of `prepare` write each on its own.
unsafe impl Send for Bands {}
// SAFETY: as above.
unsafe impl Sync for Bands {}

impl Bands {
    /// Prepares `x` in `memory`, which is made as large as needed, and must live as long as the result is used.
    pub(super) fn prepare(context: &Context, x: View<'_>, memory: &mut Scratch) -> Self {
        let (steps, tiles) = (x.cols().div_ceil(TILE_K), x.rows().div_ceil(TILE));
        // Powers of two, so that no line of a tile lies across two cache lines.
        let tile_rows = x.rows().next_power_of_two().min(TILE);
        let band_tiles = if tiles <= MOST_TILES_AT_ONCE { tiles } else { SQUARE };
        let x_tiles = memory.lanes(tiles * steps * tile_rows).as_mut_ptr().cast_const();
        let bands = Self { x: x_tiles, rows: x.rows(), k: x.cols(), steps, tile_rows, band_tiles };
        context.for_rows(tiles, TILE * x.cols(), |tile| {
            context.level().run_with_dots(Prepare { x, bands, tile });
        });
        bands
    }

    fn num_tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    fn num_bands(&self) -> usize {
        self.num_tiles().div_ceil(self.band_tiles)
    }

    /// What is multiplied at a step of a band.
    fn at(&self, band: usize, step: usize) -> *const u8 {
        let (tiles, x) = self.band(band);
        x.wrapping_add(step * tiles * self.tile_rows).cast()
    }

    /// Tiles of a band, and its first.
    fn band(&self, band: usize) -> (usize, *const Lanes) {
        let first = band * self.band_tiles;
        let tiles = self.band_tiles.min(self.num_tiles() - first);
        (tiles, self.x.wrapping_add(first * self.steps * self.tile_rows))
    }
}

/// Writes one tile of rows, for all steps.
struct Prepare<'a> {
    x: View<'a>,
    bands: Bands,
    tile: usize,
}

impl Kernel for Prepare<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, bands, tile } = self;
        let tile_rows = bands.tile_rows;
        let (tiles, band) = bands.band(tile / bands.band_tiles);
        let first = tile * TILE;
        let num_rows = TILE.min(x.rows() - first);
        for step in 0..bands.steps {
            let at = (step * tiles + tile % bands.band_tiles) * tile_rows;
            let to = band.cast_mut().wrapping_add(at).cast::<f32>();
            if tile_rows == 1 {
                // SAFETY: a tile of one row is one vector.
                unsafe { simd.store(to, x_vector(simd, x, first, 2, step)) }
                continue;
            }
            let mut rows = [simd.splat(0.0); LANES];
            for (row, vector) in rows.iter_mut().enumerate().take(num_rows) {
                *vector = x_vector(simd, x, first + row, 2, step);
            }
            for (pair, rows) in simd.transpose(rows).into_iter().enumerate() {
                // SAFETY: within the tile, which no other task writes.
                unsafe { f32::store_part(simd, to.add(pair * tile_rows), tile_rows, rows) }
            }
        }
    }
}

/// Consecutive rows of one weight, for all rows of x. The pointers are to the first elements.
pub(super) struct TileBlock {
    pub(super) amx: Amx,
    pub(super) weights: *const bf16,
    pub(super) weight_stride: usize,
    pub(super) num_outputs: usize,
    pub(super) x: Bands,
    pub(super) finish: Finish,
}

impl Kernel for TileBlock {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match (self.x.num_bands(), self.x.num_tiles()) {
            (1, 1) => simd.call(InPlace::<1>(&self)),
            (1, 2) => simd.call(InPlace::<2>(&self)),
            (1, 3) => simd.call(InPlace::<3>(&self)),
            (1, 4) => simd.call(InPlace::<4>(&self)),
            _ => SCRATCH.with_borrow_mut(|scratch| simd.call(Panels { block: &self, scratch })),
        }
    }
}

impl TileBlock {
    /// Writes the sums, every `stride` vectors a line, of outputs from `output` on and of the tile's rows.
    #[inline(always)]
    fn write<S: Simd>(&self, simd: S, sums: &[Lanes], stride: usize, output: usize, tile: usize) {
        let num_outputs = TILE.min(self.num_outputs - output);
        let num_rows = TILE.min(self.x.rows - tile * TILE);
        let mut lanes = [simd.splat(0.0); LANES];
        for (lanes, sums) in lanes.iter_mut().zip(sums.iter().step_by(stride)) {
            // SAFETY: lanes are a vector.
            *lanes = unsafe { simd.load(sums.0.as_ptr()) };
        }
        for (row, outputs) in simd.transpose(lanes).into_iter().enumerate().take(num_rows) {
            // SAFETY: the block has these rows and outputs, and no other task writes them.
            unsafe { self.finish.write_lanes(simd, tile * TILE + row, output, num_outputs, outputs) }
        }
    }
}

/// Up to [`MOST_TILES_AT_ONCE`] tiles of rows.
struct InPlace<'a, const TILES: usize>(&'a TileBlock);

impl<const TILES: usize> Kernel for InPlace<'_, TILES> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(block) = self;
        let Bands { k, steps, tile_rows, .. } = block.x;
        let x = block.x.band(0).1.cast::<u8>();
        let whole_steps = k / TILE_K;
        let mut shaped = block.amx.shape(TILE.min(block.num_outputs), tile_rows);
        let mut lines = [[Lanes::ZERO; TILES]; TILE];
        for output in (0..block.num_outputs).step_by(TILE) {
            let num_outputs = TILE.min(block.num_outputs - output);
            if num_outputs < TILE && output > 0 {
                shaped.reshape(num_outputs, tile_rows);
            }
            let first = lines.as_mut_ptr().cast();
            let sums = |carries_on| Sums { first, stride: TILES * size_of::<Lanes>(), carries_on };
            // SAFETY: the block has these outputs.
            let weights = unsafe { block.weights.add(output * block.weight_stride) };
            // SAFETY: x has all steps, each of the outputs' rows k elements.
            unsafe {
                if whole_steps > 0 {
                    let stride = block.weight_stride * size_of::<bf16>();
                    let left = Left { first: weights.cast(), stride, step: TILE_ROW_BYTES };
                    shaped.row::<TILES>(left, x, whole_steps, sums(false));
                }
                if whole_steps < steps {
                    let mut tail = [[bf16::ZERO; TILE_K]; TILE];
                    for (row, tail) in tail.iter_mut().enumerate().take(num_outputs) {
                        let from = weights.add(row * block.weight_stride + whole_steps * TILE_K);
                        std::ptr::copy_nonoverlapping(from, tail.as_mut_ptr(), k % TILE_K);
                    }
                    let left = Left { first: tail.as_ptr().cast(), stride: TILE_ROW_BYTES, step: 0 };
                    let x = x.add(whole_steps * TILES * tile_rows * size_of::<Lanes>());
                    shaped.row::<TILES>(left, x, 1, sums(whole_steps > 0));
                }
            }
            for tile in 0..TILES {
                block.write(simd, &lines.as_flattened()[tile..], TILES, output, tile);
            }
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
struct Panels<'a> {
    block: &'a TileBlock,
    scratch: &'a mut Scratch,
}

impl Kernel for Panels<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, scratch } = self;
        let Bands { steps, tile_rows, .. } = block.x;
        let num_bands = block.x.num_bands();
        // At least a step, so that there are panels.
        let panel_len = steps.max(1) * PANEL_OUTPUTS;
        let num_sums = num_bands.min(BANDS_TOGETHER) * PANELS;
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
                simd.call(Copy { block, output, panel });
            }
            // The weights of the next group, where there are no gaps.
            let mut later: *const u8 =
                block.weights.wrapping_add((first + PANELS * PANEL_OUTPUTS) * block.weight_stride).cast();
            for bands in (0..num_bands).step_by(BANDS_TOGETHER) {
                let bands = bands..num_bands.min(bands + BANDS_TOGETHER);
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
                                later = later.wrapping_add(part.len() * Ahead::LATER_BYTES);
                            }
                        }
                    }
                }
                for (band, sums) in bands.zip(sums.chunks_exact(PANELS)) {
                    for (output, sums) in outputs.clone().zip(sums) {
                        simd.call(WriteSquare { block, sums, output, band });
                    }
                }
            }
        }
    }
}

impl TileBlock {
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

/// Copies outputs from `output` on into a panel, zeros where there is none.
struct Copy<'a> {
    block: &'a TileBlock,
    output: usize,
    panel: &'a mut [Lanes],
}

impl Kernel for Copy<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        /// Steps of all outputs together: what is written stays in an L1 cache meanwhile.
        const TOGETHER: usize = 8;
        let Self { block, output, panel } = self;
        let (k, num_outputs) = (block.x.k, PANEL_OUTPUTS.min(block.num_outputs - output));
        for (i, part) in panel.chunks_mut(TOGETHER * PANEL_OUTPUTS).enumerate() {
            for row in 0..PANEL_OUTPUTS {
                let lines = part[row..].iter_mut().step_by(PANEL_OUTPUTS);
                if row >= num_outputs {
                    lines.for_each(|line| *line = Lanes::ZERO);
                    continue;
                }
                let weights = block.weights.wrapping_add((output + row) * block.weight_stride);
                for (step, line) in lines.enumerate() {
                    let start = (i * TOGETHER + step) * TILE_K;
                    let (from, len) = (weights.wrapping_add(start), TILE_K.min(k - start));
                    // SAFETY: `len` elements can be read of the row; a line of the panel is a vector.
                    unsafe {
                        if len < TILE_K {
                            *line = Lanes::ZERO;
                            let to = line.0.as_mut_ptr().cast::<bf16>();
                            std::ptr::copy_nonoverlapping(from, to, len);
                        } else {
                            simd.store(line.0.as_mut_ptr(), simd.load(from.cast()));
                        }
                    }
                }
            }
        }
    }
}

/// Writes the sums of a panel and a band.
struct WriteSquare<'a> {
    block: &'a TileBlock,
    sums: &'a SquareSums,
    output: usize,
    band: usize,
}

impl Kernel for WriteSquare<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, sums, output, band } = self;
        let tiles = block.x.band(band).0;
        for upper in (0..PANEL_OUTPUTS).step_by(TILE) {
            for tile in 0..tiles {
                if output + upper < block.num_outputs {
                    let lines = &sums[upper..].as_flattened()[tile..];
                    block.write(simd, lines, SQUARE, output + upper, band * SQUARE + tile);
                }
            }
        }
    }
}

const _: () = assert!(TILE == LANES && TILE_BYTES == TILE * size_of::<Lanes>());
