//! Many rows (prefill): weights are turned into a panel in the cache, lanes along the outputs, and multiplied with x one
//! broadcast value at a time, so that a tile reads few bytes for many products.
//!
//! The order of additions stays that of [`super::few`], where lane `l` of sixteen sums up every sixteenth product and the
//! lanes are added as a tree. Here the sums of one such lane are computed for a whole tile, then those of the next, in the
//! order in which the tree is walked, and added as soon as both sides of a node are there.

use std::cell::RefCell;
use std::ops::Range;

use super::Block;
use super::format::Format;
use super::input::RowTile;
use crate::simd::{Kernel, LANES, Lanes, Simd};

/// Most outputs of a panel.
pub(super) const OUTPUTS: usize = 2 * LANES;

/// Levels of the tree of sixteen lanes.
const LEVELS: usize = LANES.ilog2() as usize;

/// Part of a panel that is multiplied with some rows before the next part: it stays in an L1 cache of 32 KiB or more, while
/// x passes by.
const PART_BYTES: usize = 16 << 10;

/// Rows whose part of x stays in the L2 cache while the panels of a group are multiplied with it.
const ROWS_TOGETHER: usize = 128;

/// Panels of a group: the more, the less often x comes from beyond the L2 cache.
const PANELS: usize = 4;

/// Outputs of a group.
pub(super) const GROUP: usize = PANELS * OUTPUTS;

/// Working memory of a thread, kept.
struct Scratch {
    panel: Vec<Lanes>,
    /// Of each tile, the nodes of the tree whose other side is yet to come: `[level][row][vector]`.
    nodes: Vec<Lanes>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { panel: Vec::new(), nodes: Vec::new() }) };
}

/// All rows of a block.
#[inline(always)]
pub(super) fn many_rows<S: Simd, F: Format>(simd: S, block: &Block<F>) {
    // A closure is a function of its own, which the instruction set does not reach but by a call.
    SCRATCH.with_borrow_mut(|scratch| simd.call(Panels { block, scratch }));
}

struct Panels<'a, F: Format> {
    block: &'a Block<F>,
    scratch: &'a mut Scratch,
}

impl<F: Format> Kernel for Panels<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, scratch } = self;
        let panel_vectors = if S::WIDE { 2 } else { 1 };
        let panel_outputs = panel_vectors * LANES;
        let panel_len = block.x.steps * panel_outputs;
        let panel_bytes = panel_len * size_of::<Lanes>();
        let parts = panel_bytes.div_ceil(PART_BYTES).next_power_of_two().min(LANES);
        let num_tiles = block.x.num_tiles();
        let tiles_together = (ROWS_TOGETHER / S::PANEL_ROWS).max(1);
        let kept_len = tiles_together * S::PANEL_ROWS * panel_vectors * LEVELS;
        grow(&mut scratch.panel, PANELS * panel_len);
        grow(&mut scratch.nodes, PANELS * kept_len);
        for first in (0..block.num_outputs).step_by(PANELS * panel_outputs) {
            let outputs = (first..block.num_outputs).step_by(panel_outputs).take(PANELS);
            for (i, output) in outputs.clone().enumerate() {
                let panel = scratch.panel[i * panel_len..].as_mut_ptr();
                for vector in 0..panel_vectors {
                    let output = output + vector * LANES;
                    let num_outputs = block.num_outputs.saturating_sub(output).min(LANES);
                    simd.call(Turn { block, output, num_outputs, panel, vector, panel_vectors });
                }
            }
            for tiles in (0..num_tiles).step_by(tiles_together) {
                let tiles = tiles..num_tiles.min(tiles + tiles_together);
                let first_row = block.x.tile(tiles.start).row;
                for part in 0..parts {
                    let leaves = part * LANES / parts..(part + 1) * LANES / parts;
                    for (i, output) in outputs.clone().enumerate() {
                        for tile in tiles.clone() {
                            let rows = block.x.tile(tile);
                            let kept = (rows.row - first_row) * panel_vectors * LEVELS;
                            let tile = Tile {
                                block,
                                panel: scratch.panel[i * panel_len..].as_ptr(),
                                output,
                                num_outputs: panel_outputs.min(block.num_outputs - output),
                                rows,
                                next_x: block.x.tile((tile + 1).min(tiles.end - 1)).x,
                                leaves: leaves.clone(),
                                nodes: scratch.nodes[i * kept_len + kept..].as_mut_ptr(),
                            };
                            tile.call(simd);
                        }
                    }
                }
            }
        }
    }
}

fn grow(memory: &mut Vec<Lanes>, len: usize) {
    if memory.len() < len {
        memory.resize(len, Lanes::ZERO);
    }
}

/// Writes one of the vectors of outputs into a panel, `[lane of k][step][vector]`, zeros where there is no output.
struct Turn<'a, F: Format> {
    block: &'a Block<F>,
    output: usize,
    num_outputs: usize,
    panel: *mut Lanes,
    vector: usize,
    panel_vectors: usize,
}

impl<F: Format> Kernel for Turn<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, output, num_outputs, panel, vector, panel_vectors } = self;
        let (k, steps, stride) = (block.x.k, block.x.steps, block.weight_stride);
        // SAFETY: the block has `num_outputs` from `output` on; the panel has `LANES * steps * panel_vectors` vectors.
        unsafe {
            let weights = block.weights.wrapping_add(output * stride);
            for step in 0..steps {
                let at = step * F::PER_STEP;
                let len = F::PER_STEP.min(k - at);
                let mut rows = [simd.splat(0.0); LANES];
                for (row, lanes) in rows.iter_mut().enumerate().take(num_outputs) {
                    *lanes = F::load(simd, weights.add(row * stride + at), len);
                }
                for (lane, outputs) in simd.transpose(rows).into_iter().enumerate() {
                    simd.store(panel.add((lane * steps + step) * panel_vectors + vector).cast(), outputs);
                }
            }
        }
    }
}

/// A panel times a few rows of x.
struct Tile<'a, F: Format> {
    block: &'a Block<F>,
    panel: *const Lanes,
    output: usize,
    num_outputs: usize,
    rows: RowTile,
    /// Of the tile that comes next.
    next_x: *const f32,
    /// Which lanes of k, by their place in the tree.
    leaves: Range<usize>,
    nodes: *mut Lanes,
}

impl<F: Format> Tile<'_, F> {
    #[inline(always)]
    fn call<S: Simd>(self, simd: S) {
        macro_rules! call {
            ($($wide:literal)*; $($narrow:literal)*) => {
                match self.rows.num_rows {
                    $($wide if S::WIDE => simd.call(Sized::<F, 2, $wide>(self)),)*
                    $($narrow if !S::WIDE && $narrow <= S::PANEL_ROWS => simd.call(Sized::<F, 1, $narrow>(self)),)*
                    rows => unreachable!("no tile of {rows} rows"),
                }
            };
        }
        // More than `few::MOST_ROWS` rows in even tiles.
        call!(8 9 10 11 12 13 14; 1 2 3 4 5 6);
    }
}

struct Sized<'a, F: Format, const VECTORS: usize, const ROWS: usize>(Tile<'a, F>);

impl<F: Format, const VECTORS: usize, const ROWS: usize> Kernel for Sized<'_, F, VECTORS, ROWS> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Tile { block, panel, output, num_outputs, rows, next_x, leaves, nodes } = self.0;
        let steps = block.x.steps;
        // The order of the leaves: 0 and 8, 4 and 12, 2 and 10, ...
        let lane_of = |leaf: usize| leaf.reverse_bits() >> (usize::BITS as usize - LEVELS);
        for leaf in leaves.clone() {
            let lane = lane_of(leaf);
            let next = match leaf + 1 {
                next if next < leaves.end => rows.x.wrapping_add(lane_of(next) * steps * ROWS),
                _ => next_x.wrapping_add(lane_of(leaves.start) * steps * ROWS),
            };
            // SAFETY: panel and tile have `steps` of each lane.
            let mut sums = unsafe {
                let weights = panel.add(lane * steps * VECTORS).cast::<f32>();
                let x = rows.x.add(lane * steps * ROWS);
                lane_sums::<S, F, VECTORS, ROWS>(simd, weights, x, next, steps)
            };
            let level = leaf.trailing_ones() as usize;
            for level in 0..level {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (vector, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: within the nodes; written when the other side was computed.
                        let other =
                            unsafe { simd.load(nodes.add((level * ROWS + row) * VECTORS + vector).cast()) };
                        *sum = simd.add(other, *sum);
                    }
                }
            }
            if level < LEVELS {
                for (row, sums) in sums.iter().enumerate() {
                    for (vector, &sum) in sums.iter().enumerate() {
                        // SAFETY: within the nodes.
                        unsafe { simd.store(nodes.add((level * ROWS + row) * VECTORS + vector).cast(), sum) }
                    }
                }
                continue;
            }
            for (row, sums) in sums.iter().enumerate() {
                for (vector, &sum) in sums.iter().enumerate() {
                    let len = LANES.min(num_outputs.saturating_sub(vector * LANES));
                    if len > 0 {
                        let output = output + vector * LANES;
                        // SAFETY: the block has these rows and outputs, and no other task writes them.
                        unsafe { block.finish.write_lanes(simd, rows.row + row, output, len, sum) }
                    }
                }
            }
        }
    }
}

/// The sums of one lane of k. Asks for the x that comes next: the parts of x are short and lie apart, so the CPU guesses
/// them late.
///
/// # Safety
/// `steps * VECTORS` vectors can be read at `weights`, `steps * ROWS` values at `x`.
#[inline(always)]
unsafe fn lane_sums<S: Simd, F: Format, const VECTORS: usize, const ROWS: usize>(
    simd: S,
    mut weights: *const f32,
    mut x: *const f32,
    mut next: *const f32,
    steps: usize,
) -> [[S::Vector; VECTORS]; ROWS] {
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    for _ in 0..steps {
        simd.prefetch(next.cast());
        next = next.wrapping_add(ROWS);
        let mut loaded = [simd.splat(0.0); VECTORS];
        for (vector, weight) in loaded.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *weight = unsafe { simd.load(weights.add(vector * LANES)) };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let x = simd.splat(unsafe { *x.add(row) });
            for (vector, sum) in sums.iter_mut().enumerate() {
                *sum = F::mul_add(simd, loaded[vector], x, *sum);
            }
        }
        // SAFETY: at the last step, to the end.
        unsafe {
            weights = weights.add(VECTORS * LANES);
            x = x.add(ROWS);
        }
    }
    sums
}
