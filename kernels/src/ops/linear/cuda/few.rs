//! Launches of `cuda/linear_few.cu`.

use super::{Call, Device, Grid, Kernels, MAX_PARTS, Part, is_packed};
use crate::ops::activation::Activation;
use crate::{DType, Result};

/// Two columns of an mma's right operand, which has eight.
pub(super) const MOST_ROWS: usize = 16;

/// Outputs of a tile: the rows of an mma's left operand.
const TILE: usize = 16;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Variant {
    op: &'static str,
    /// Of a block.
    tiles: usize,
    /// Groups of eight rows of x.
    columns: usize,
}

pub(super) fn fits(device: &Device, call: &Call, parts: &[Part]) -> bool {
    let is_few = call.rows <= MOST_ROWS && call.x.dtype != DType::F32;
    let reads_packs = || is_packed(call.x, call.k) && parts.iter().all(|part| is_packed(part.values, call.k));
    device.kernels() == Kernels::Tuned && is_few && reads_packs()
}

pub(super) fn product(device: &Device, call: &Call, parts: &[Part]) -> Result<()> {
    let tiles = parts.iter().map(|part| part.n.div_ceil(TILE)).sum();
    let multiprocessors = device.properties().num_multiprocessors;
    let Variant { op, tiles: tiles_per_block, columns } = variant(call.rows, tiles, multiprocessors);
    let kernel = device.kernel(op, &[call.x.dtype, parts[0].values.dtype, call.out.dtype])?;
    let blocks = parts.iter().map(|part| part.n.div_ceil(tiles_per_block * TILE)).sum();
    let grid = grid(blocks, num_warps(tiles, multiprocessors), tiles_per_block, columns);
    let mut arguments = call.x_arguments().to_vec();
    for i in 0..MAX_PARTS {
        arguments.extend(parts.get(i).map_or_else(Part::none, |part| part.arguments()));
    }
    arguments.extend(call.out_arguments());
    // SAFETY: the parameters of `linear_few_*`; shapes, places and types have been checked, alignments by `fits`.
    unsafe { kernel.launch(device, grid, &arguments) }
}

pub(super) fn gated(device: &Device, call: &Call, parts: &[Part; 2], activation: Activation) -> Result<()> {
    let tiles = 2 * parts[0].n.div_ceil(TILE);
    let Variant { op, tiles: tiles_per_block, columns } =
        gated_variant(call.rows, tiles, device.properties().num_multiprocessors);
    let kernel = device.kernel(op, &[call.x.dtype, parts[0].values.dtype, call.out.dtype])?;
    let blocks = parts[0].n.div_ceil(tiles_per_block / 2 * TILE);
    let mut arguments = call.x_arguments().to_vec();
    arguments.extend(parts.iter().flat_map(|part| part.arguments()));
    let [out, out_stride, _] = call.out_arguments();
    arguments.extend([out, out_stride, (activation as u32).into()]);
    // SAFETY: the parameters of `linear_gated_*`; as above.
    unsafe { kernel.launch(device, grid(blocks, WARPS, tiles_per_block, columns), &arguments) }
}

/// Of a block, where blocks are enough to occupy all multiprocessors, which 8 warps on each do.
const WARPS: usize = 8;

/// A block's warps, which deal out k among themselves. It must not depend on the number of rows, so that their sums do not.
fn num_warps(tiles: usize, multiprocessors: usize) -> usize {
    if tiles <= multiprocessors { 2 * WARPS } else { WARPS }
}

/// More outputs a block, and x is read less often: it comes from the second-level cache, whose rate is not much above
/// memory's. For 8 rows and 16 outputs that is half as many bytes as the weights have.
fn variant(rows: usize, tiles: usize, multiprocessors: usize) -> Variant {
    // Twice as large blocks occupy all at 1, four times as large ones twice at 4.
    let fills = |blocks: usize| tiles >= blocks * 2 * multiprocessors;
    if rows > 8 {
        return if fills(4) {
            Variant { op: "linear_few_4x2", tiles: 4, columns: 2 }
        } else {
            Variant { op: "linear_few_2x2", tiles: 2, columns: 2 }
        };
    }
    if rows > 4 && fills(1) {
        Variant { op: "linear_few_2x1", tiles: 2, columns: 1 }
    } else {
        Variant { op: "linear_few_1x1", tiles: 1, columns: 1 }
    }
}

/// Half of a block's tiles are of the gate.
fn gated_variant(rows: usize, tiles: usize, multiprocessors: usize) -> Variant {
    match rows {
        0..=8 => Variant { op: "linear_gated_2x1", tiles: 2, columns: 1 },
        _ if tiles >= 8 * multiprocessors => Variant { op: "linear_gated_4x2", tiles: 4, columns: 2 },
        _ => Variant { op: "linear_gated_2x2", tiles: 2, columns: 2 },
    }
}

fn grid(blocks: usize, warps: usize, tiles: usize, columns: usize) -> Grid {
    // `Sums::PER_WARP` in the kernels.
    let floats = warps * columns * 8 * (tiles * TILE + 4);
    Grid {
        blocks: [blocks as u32, 1, 1],
        threads: 32 * warps as u32,
        shared_bytes: (floats * size_of::<f32>()) as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_no_more_threads_than_its_kernel_is_compiled_for() {
        const H200: usize = 132;
        for rows in 1..=MOST_ROWS {
            for tiles in 1..2000 {
                let Variant { tiles: per_block, columns, .. } = variant(rows, tiles, H200);
                assert!(rows <= 8 * columns, "{rows} rows, {tiles} tiles");
                let most = if matches!((per_block, columns), (1, 1) | (2, 2)) { 16 } else { 8 };
                let warps = num_warps(tiles, H200);
                assert!(warps <= most, "{rows} rows, {tiles} tiles");
                assert!(grid(1, warps, per_block, columns).shared_bytes <= 48 << 10);
                let gated = gated_variant(rows, 2 * tiles, H200);
                assert!(rows <= 8 * gated.columns && gated.tiles.is_multiple_of(2));
            }
        }
    }
}
