//! Launches of `cuda/linear_tile.cu`, and of the kernel for experts that it does not read.

use super::{Call, Device, DevicePtr, Grid, Kernels, Part, is_packed, or_null};
use crate::{DType, Result};

/// Where each expert's rows begin: in device memory, and nothing on the host depends on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Starts {
    pub(super) start: DevicePtr,
    pub(super) num_experts: usize,
}

/// Outputs of a block of the kernel for single rows: one a warp.
const WARPS: usize = 8;
/// Outputs of a tile, in the kernels.
const WIDTH: usize = 128;

/// `part.n`: of one expert.
pub(super) fn product(device: &Device, call: &Call, part: &Part, starts: &Starts) -> Result<()> {
    if fits_tiles(device, call, part) {
        return tiles(device, call, part, Some(starts));
    }
    let kernel = device.kernel("linear_grouped_dot", &[call.x.dtype, part.values.dtype, call.out.dtype])?;
    let grid = Grid {
        blocks: [call.rows as u32, part.n.div_ceil(WARPS) as u32, 1],
        threads: 32 * WARPS as u32,
        shared_bytes: 0,
    };
    let [x, x_stride, _, k] = call.x_arguments();
    let [values, stride, n, scales, _] = part.arguments();
    let [out, out_stride, _] = call.out_arguments();
    let (at, num_experts) = (starts.start.into(), (starts.num_experts as u32).into());
    let arguments = [x, x_stride, k, values, stride, n, scales, at, num_experts, out, out_stride];
    // SAFETY: the parameters of `linear_grouped_dot_*`; shapes, places and types have been checked.
    unsafe { kernel.launch(device, grid, &arguments) }
}

pub(super) fn fits_tiles(device: &Device, call: &Call, part: &Part) -> bool {
    let is_16_bit = call.x.dtype != DType::F32 && part.values.dtype == call.x.dtype;
    device.kernels() == Kernels::Tuned
        && is_16_bit
        && is_packed(call.x, call.k)
        && is_packed(part.values, call.k)
}

/// Without `starts` all rows are of one weight. `part` has neither scales nor bias.
pub(super) fn tiles(device: &Device, call: &Call, part: &Part, starts: Option<&Starts>) -> Result<()> {
    let num_experts = starts.map_or(1, |starts| starts.num_experts);
    let Tile { op, height, stages } = tile(call.rows / num_experts);
    // Each expert has at most one tile that is not full.
    let tiles = call.rows / height + num_experts.min(call.rows);
    let stage_bytes = (height + WIDTH) * 32 * call.x.dtype.size_in_bytes();
    let grid = Grid {
        blocks: [tiles as u32, part.n.div_ceil(WIDTH) as u32, 1],
        threads: 256,
        shared_bytes: (stages * stage_bytes) as u32,
    };
    let kernel = device.kernel(op, &[call.x.dtype, call.out.dtype])?;
    let [values, stride, n, _, _] = part.arguments();
    let mut arguments = call.x_arguments().to_vec();
    arguments.extend([
        values,
        stride,
        n,
        or_null(starts.map(|starts| starts.start)),
        (num_experts as u32).into(),
    ]);
    arguments.extend(call.out_arguments());
    // SAFETY: the parameters of `linear_tile_*`; shapes, places and types have been checked, alignments by `fits_tiles`.
    unsafe { kernel.launch(device, grid, &arguments) }
}

/// A kernel of `cuda/linear_tile.cu`: rows of a tile, and stages as in `Shape`.
struct Tile {
    op: &'static str,
    height: usize,
    stages: usize,
}

/// By the rows that an expert has on average: a tile that is mostly empty multiplies for nothing.
fn tile(rows: usize) -> Tile {
    match rows {
        0..=16 => Tile { op: "linear_tile_16", height: 16, stages: 4 },
        17..=64 => Tile { op: "linear_tile_64", height: 64, stages: 4 },
        _ => Tile { op: "linear_tile_128", height: 128, stages: 3 },
    }
}
