//! Scores and sums of values as products of bf16 tiles (Intel AMX), for caches of bf16: queries and weights are rounded to bf16,
//! as the reference implementations do in this type, sums are f32.
//!
//! Keys lie as `[head_dim, block_size]`, values as `[block_size, head_dim]`, so of both two neighbouring rows, interleaved, are
//! what a tile of the right operand wants. A sum is one chain along its index, and what a query does not see has weight zero.

use std::ops::Range;

use half::bf16;

use super::products::Prefetch;
use crate::simd::amx::{Ahead, Left, Shaped, Sums, TILE, TILE_BYTES, TILE_K, TILE_ROW_BYTES};
use crate::simd::{Float, Kernel, LANES, Lanes, Simd};

/// Columns that are multiplied together: two tiles of the right operand.
pub(super) const COLUMNS: usize = 2 * TILE;

/// Whether blocks of this size and heads of this length are made of whole tiles.
pub(super) fn fit(block_size: usize, head_dim: usize) -> bool {
    block_size.is_multiple_of(TILE_K) && head_dim.is_multiple_of(TILE_K)
}

/// Vectors of [`COLUMNS`] columns of the right operand.
pub(super) fn packed_len(steps: usize) -> usize {
    steps * COLUMNS
}

/// Interleaves rows by twos: [`TILE_K`] rows of [`COLUMNS`] elements to two tiles side by side, step by step.
pub(super) struct Pack<'a> {
    /// The first of `32 * steps` rows.
    pub(super) from: *const bf16,
    /// Elements from row to row.
    pub(super) stride: usize,
    /// Rows with contents; the others count as zeros.
    pub(super) rows: Range<usize>,
    /// `[step][tile][pair of rows][column]`.
    pub(super) to: &'a mut [Lanes],
    /// Beside each pair of rows, counted from `first_pair`.
    pub(super) prefetch: Prefetch,
    pub(super) first_pair: usize,
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { from, stride, rows, to, prefetch, first_pair } = self;
        let all = rows.start == 0 && rows.end >= to.len();
        for (step, tiles) in to.as_chunks_mut::<COLUMNS>().0.iter_mut().enumerate() {
            let (first_tile, second_tile) = tiles.split_at_mut(TILE);
            for (pair, (first, second)) in first_tile.iter_mut().zip(second_tile).enumerate() {
                let row = step * TILE_K + 2 * pair;
                prefetch.step(simd, first_pair + step * TILE + pair);
                let mut both = [simd.splat(0.0); 2];
                for (row, vector) in (row..).zip(&mut both) {
                    if all || rows.contains(&row) {
                        // SAFETY: a row has two tiles' columns, which are a vector.
                        *vector = unsafe { simd.load(from.add(row * stride).cast()) };
                    }
                }
                let [low, high] = simd.interleave(both[0], both[1]);
                // SAFETY: lanes are a vector.
                unsafe {
                    simd.store(first.0.as_mut_ptr(), low);
                    simd.store(second.0.as_mut_ptr(), high);
                }
            }
        }
    }
}

/// Rows of the left operand times [`COLUMNS`] packed columns.
pub(super) struct Product<'a> {
    /// bf16, `32 * steps` of each row.
    pub(super) left: *const bf16,
    /// Elements from row to row.
    pub(super) left_stride: usize,
    pub(super) num_rows: usize,
    pub(super) packed: &'a [Lanes],
    pub(super) out: *mut f32,
    /// Elements from row to row.
    pub(super) out_stride: usize,
    /// Whether the product is added to what is there.
    pub(super) adds: bool,
}

impl Product<'_> {
    /// `shaped`: for as many rows as there are, at most a tile's, by a tile's columns; it is left so.
    ///
    /// # Safety
    /// The rows can be read and written as said.
    pub(super) unsafe fn run(&self, shaped: &mut Shaped) {
        let steps = self.packed.len() / COLUMNS;
        let right = self.packed.as_ptr().cast();
        let ahead = Ahead { soon: right, later: right };
        let mut row = 0;
        while row < self.num_rows {
            let left = Left {
                first: self.left.wrapping_add(row * self.left_stride).cast(),
                stride: self.left_stride * size_of::<bf16>(),
                step: TILE_ROW_BYTES,
            };
            let sums = Sums {
                first: self.out.wrapping_add(row * self.out_stride),
                stride: self.out_stride * size_of::<f32>(),
                carries_on: self.adds,
            };
            let rows = self.num_rows - row;
            // SAFETY: the caller's promise.
            unsafe {
                if rows >= 2 * TILE {
                    let lower = left.first.wrapping_add(TILE * left.stride);
                    shaped.square::<2>(left, lower, right, steps, sums, ahead);
                } else if rows >= TILE || row == 0 {
                    shaped.row::<2>(left, right, steps, sums);
                } else {
                    shaped.reshape(rows, TILE);
                    shaped.row::<2>(left, right, steps, sums);
                    shaped.reshape(TILE, TILE);
                }
            }
            row += if rows >= 2 * TILE { 2 * TILE } else { TILE };
        }
    }
}

/// Whether there is an infinity or NaN among whole vectors of values.
pub(super) struct FindNonFinite<'a> {
    pub(super) values: *const bf16,
    /// A multiple of 16.
    pub(super) len: usize,
    /// Set where one is found.
    pub(super) found: &'a mut bool,
}

impl Kernel for FindNonFinite<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let zero = simd.splat(0.0);
        let mut sum = zero;
        for start in (0..self.len).step_by(LANES) {
            // SAFETY: within the values. Zero times a number is zero, but NaN for those that are not finite.
            sum = simd.mul_add(unsafe { bf16::load(simd, self.values.add(start)) }, zero, sum);
        }
        *self.found |= simd.sum(sum).is_nan();
    }
}

const _: () =
    assert!(TILE_BYTES == TILE * size_of::<Lanes>() && COLUMNS * size_of::<bf16>() == size_of::<Lanes>());
