//! Many rows (prefill): a panel of weights is widened once into the cache and used for all rows of a group.

use std::cell::RefCell;

use super::Block;
use super::tile::{Prefetch, Target, Tile, row_tiles, tile_outputs};
use super::weight::WeightElement;
use crate::simd::{Kernel, LANES, Lanes, Simd, spans};

/// Outputs of a panel.
pub(super) const OUTPUTS: usize = 32;
/// Part of k that a panel covers. With it, a panel (64 KiB), its rows of x (128 KiB) and the carried sums (128 KiB) lie in
/// an L2 cache of 512 KiB, a tile's operands in L1.
const K: usize = 512;
/// Rows that use a panel before the next part of k.
const ROWS: usize = 64;

/// Working memory of a thread, got at its first panel and kept.
struct Scratch {
    panel: Vec<Lanes>,
    carried: Vec<Lanes>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        panel: vec![Lanes::ZERO; OUTPUTS * K / LANES],
        carried: vec![Lanes::ZERO; OUTPUTS * ROWS],
    });
}

/// All rows of a block. The weights are read once from memory, for later groups of rows from the cache.
#[inline(always)]
pub(super) fn panels<S: Simd, W: WeightElement>(simd: S, block: &Block<W>) {
    // A closure is a function of its own, which the instruction set does not reach but by a call.
    SCRATCH.with_borrow_mut(|scratch| simd.call(Panels { block, scratch }));
}

struct Panels<'a, W> {
    block: &'a Block<W>,
    scratch: &'a mut Scratch,
}

impl<W: WeightElement> Kernel for Panels<'_, W> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, scratch } = self;
        for output in (0..block.num_outputs).step_by(OUTPUTS) {
            let num_outputs = OUTPUTS.min(block.num_outputs - output);
            for row in (0..block.rows).step_by(ROWS) {
                let num_rows = ROWS.min(block.rows - row);
                for k in (0..block.k.max(1)).step_by(K) {
                    let part = Part { output, num_outputs, row, num_rows, k, k_len: K.min(block.k - k) };
                    part.widen(simd, block, &mut scratch.panel);
                    part.multiply(simd, block, scratch);
                }
            }
        }
    }
}

/// A panel's part of k for a group of rows.
struct Part {
    output: usize,
    num_outputs: usize,
    row: usize,
    num_rows: usize,
    k: usize,
    k_len: usize,
}

impl Part {
    #[inline(always)]
    fn widen<S: Simd, W: WeightElement>(&self, simd: S, block: &Block<W>, panel: &mut [Lanes]) {
        for (output, line) in panel.chunks_exact_mut(K / LANES).take(self.num_outputs).enumerate() {
            for ((start, len), lanes) in spans(self.k_len).zip(line) {
                // SAFETY: within the block's weights; a lane of the panel has room for a vector.
                unsafe {
                    let from =
                        block.weights.add((self.output + output) * block.weight_stride + self.k + start);
                    simd.store(lanes.0.as_mut_ptr(), W::load_weights(simd, from, len));
                }
            }
        }
    }

    #[inline(always)]
    fn multiply<S: Simd, W: WeightElement>(&self, simd: S, block: &Block<W>, scratch: &mut Scratch) {
        let mut output = 0;
        let mut carried = scratch.carried.as_mut_ptr();
        let mut next_lines = self.next_lines(block);
        while output < self.num_outputs {
            let num_outputs = tile_outputs::<S>(self.num_rows, self.num_outputs - output);
            for (row, num_rows) in row_tiles::<S>(self.num_rows, num_outputs) {
                next_lines.by_ref().take(num_outputs * num_rows).for_each(|line| simd.prefetch(line));
                // SAFETY: within the panel, the block, and `carried`, which has a place for each output and row.
                unsafe {
                    let tile = Tile {
                        weights: scratch.panel.as_ptr().cast::<f32>().add(output * K),
                        weight_stride: K,
                        x: block.x.add((self.row + row) * block.x_stride + self.k),
                        x_stride: block.x_stride,
                        k: self.k_len,
                        carried: (self.k > 0).then_some(carried.cast_const()),
                        prefetch: Prefetch { times_used: 1, time: 0 },
                        target: self.target(block, carried, self.output + output, self.row + row),
                    };
                    tile.call::<S, false>(simd, num_outputs, num_rows);
                    carried = carried.add(num_outputs * num_rows);
                }
            }
            output += num_outputs;
        }
    }

    /// The cache lines of the weights that are widened next, if they come from memory. One for each output and row of a
    /// tile is enough: there are half as many lines, or fewer, as `ROWS * OUTPUTS`.
    #[inline(always)]
    fn next_lines<W: WeightElement>(&self, block: &Block<W>) -> impl Iterator<Item = *const u8> {
        const LINE_BYTES: usize = 64;
        let (next_k, is_first_use) = (self.k + self.k_len, self.row == 0);
        let (output, k) = if next_k < block.k { (self.output, next_k) } else { (self.output + OUTPUTS, 0) };
        let num_outputs =
            if is_first_use { OUTPUTS.min(block.num_outputs.saturating_sub(output)) } else { 0 };
        let lines = (K.min(block.k - k) * size_of::<W>()).div_ceil(LINE_BYTES);
        let first = block.weights.wrapping_add(output * block.weight_stride + k).cast::<u8>();
        let row_bytes = block.weight_stride * size_of::<W>();
        (0..num_outputs).flat_map(move |output| {
            (0..lines).map(move |line| first.wrapping_add(output * row_bytes + line * LINE_BYTES))
        })
    }

    /// # Safety
    /// `output` and `row` are within the block.
    #[inline(always)]
    unsafe fn target<W>(&self, block: &Block<W>, carried: *mut Lanes, output: usize, row: usize) -> Target {
        if self.k + self.k_len < block.k {
            return Target::Carried(carried);
        }
        // SAFETY: the caller's promise.
        unsafe {
            Target::Out {
                out: block.out.add(row * block.out_stride + output),
                out_stride: block.out_stride,
                bias: block.bias.map(|bias| bias.add(output)),
                scales: block.scales.map(|scales| scales.add(output)),
            }
        }
    }
}
