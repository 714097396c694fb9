//! x as the loops read it: in tiles of rows, in the order of use, as f32 or as pairs of bf16, padded with zeros along k.
//!
//! The input is copied because it is read many times and small beside the weights: read where it lies, its rows would share
//! the few places that a cache has for one stride.

use half::bf16;

use crate::scratch::Scratch;
use crate::simd::{Float, Kernel, LANES, Simd};
use crate::{Context, View};

/// Order of a tile's lanes. A *step* is a vector of k: sixteen f32 or sixteen pairs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// `[step][row][lane]`, for loops whose lanes go along k.
    Steps,
    /// `[lane][step][row]`, for loops whose lanes go along the outputs.
    Lanes,
}

/// How x is to be prepared.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub(super) order: Order,
    /// Elements in a lane; see [`super::format::Format::PER_LANE`].
    pub(super) per_lane: usize,
    /// Most rows of a tile.
    pub(super) tile_rows: usize,
}

/// x, prepared.
#[derive(Clone, Copy)]
pub(super) struct Input {
    lanes: *const f32,
    pub(super) rows: usize,
    pub(super) k: usize,
    /// Vectors along k.
    pub(super) steps: usize,
    tile_rows: usize,
}

// SAFETY: read only, but for the tiles that tasks of `prepare` write each on its own.
unsafe impl Send for Input {}
// SAFETY: as above.
unsafe impl Sync for Input {}

/// Some rows of x.
pub(super) struct RowTile {
    pub(super) row: usize,
    pub(super) num_rows: usize,
    pub(super) x: *const f32,
}

impl Input {
    /// Prepares `x` in `memory`, which is made as large as needed, and must live as long as the result is used.
    pub(super) fn prepare(context: &Context, x: View<'_>, form: Form, memory: &mut Scratch) -> Self {
        let steps = x.cols().div_ceil(LANES * form.per_lane);
        let lanes = memory.lanes(x.rows() * steps).as_mut_ptr().cast::<f32>().cast_const();
        let input = Self { lanes, rows: x.rows(), k: x.cols(), steps, tile_rows: form.tile_rows };
        context.for_rows(input.num_tiles(), form.tile_rows * x.cols(), |tile| {
            context.level().run_with_dots(Prepare { x, form, tile: input.tile(tile), steps });
        });
        input
    }

    pub(super) fn num_tiles(&self) -> usize {
        self.rows.div_ceil(self.tile_rows)
    }

    /// The tiles are as even as can be.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> RowTile {
        let tiles = self.num_tiles();
        let (row, end) = (tile * self.rows / tiles, (tile + 1) * self.rows / tiles);
        // SAFETY: within the memory, which has `rows * steps` vectors.
        let x = unsafe { self.lanes.add(row * self.steps * LANES) };
        RowTile { row, num_rows: end - row, x }
    }
}

/// Writes one tile.
struct Prepare<'a> {
    x: View<'a>,
    form: Form,
    tile: RowTile,
    steps: usize,
}

impl Kernel for Prepare<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let RowTile { num_rows, x: to, .. } = self.tile;
        let to = to.cast_mut();
        let per_lane = self.form.per_lane;
        for step in 0..self.steps {
            if self.form.order == Order::Steps {
                for row in 0..num_rows {
                    // SAFETY: within the tile's memory, which no other task writes.
                    unsafe {
                        simd.store(
                            to.add((step * num_rows + row) * LANES),
                            x_vector(simd, self.x, self.tile.row + row, per_lane, step),
                        );
                    }
                }
                continue;
            }
            for first in (0..num_rows).step_by(LANES) {
                let len = LANES.min(num_rows - first);
                let mut rows = [simd.splat(0.0); LANES];
                for (row, lanes) in rows.iter_mut().enumerate().take(len) {
                    *lanes = x_vector(simd, self.x, self.tile.row + first + row, per_lane, step);
                }
                for (lane, rows) in simd.transpose(rows).into_iter().enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        f32::store_part(
                            simd,
                            to.add((lane * self.steps + step) * num_rows + first),
                            len,
                            rows,
                        );
                    }
                }
            }
        }
    }
}

/// One row's vector of a step; see [`Form::per_lane`].
#[inline(always)]
pub(super) fn x_vector<S: Simd>(simd: S, x: View<'_>, row: usize, per_lane: usize, step: usize) -> S::Vector {
    let start = step * LANES * per_lane;
    let left = x.cols() - start;
    let mut pairs = [bf16::ZERO; 2 * LANES];
    // SAFETY: within the row; a vector and its second half are asked for as far as the row goes.
    unsafe {
        let elements: *const f32 = x.ptr.cast();
        let from = elements.add(row * x.row_stride + start);
        if per_lane == 1 {
            return f32::load_part(simd, from, left.min(LANES));
        }
        let first = f32::load_part(simd, from, left.min(LANES));
        simd.store_bf16_factor(pairs.as_mut_ptr(), first);
        if left > LANES {
            let second = f32::load_part(simd, from.add(LANES), (left - LANES).min(LANES));
            simd.store_bf16_factor(pairs.as_mut_ptr().add(LANES), second);
        }
        simd.load(pairs.as_ptr().cast())
    }
}
