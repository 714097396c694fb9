//! Launches of `cuda/linear_dot.cu` for any size and alignment.

use super::{Call, Device, Grid, Kernels, MAX_PARTS, Part};
use crate::Result;

/// Rows that share a reading of the weights, in the kernels.
const ROWS: usize = 4;
/// Outputs of a block, in the kernels: one a warp.
const WARPS: usize = 8;

/// Where what is asked for is not a large product: 16 rows read the weights four times, mostly from the second-level cache,
/// which is still less than what a library's tile of 64 or 128 rows costs.
pub(super) fn is_better(device: &Device, call: &Call) -> bool {
    call.k == 0 || (device.kernels() == Kernels::Tuned && call.rows <= 4 * ROWS)
}

pub(super) fn product(device: &Device, call: &Call, parts: &[Part]) -> Result<()> {
    let kernel = device.kernel("linear_dot", &[call.x.dtype, parts[0].values.dtype, call.out.dtype])?;
    let blocks: usize = parts.iter().map(|part| part.n.div_ceil(WARPS)).sum();
    let grid = Grid {
        blocks: [blocks as u32, call.rows.div_ceil(ROWS) as u32, 1],
        threads: 32 * WARPS as u32,
        shared_bytes: 0,
    };
    let mut arguments = call.x_arguments().to_vec();
    for i in 0..MAX_PARTS {
        arguments.extend(parts.get(i).map_or_else(Part::none, |part| part.arguments()));
    }
    arguments.extend(call.out_arguments());
    // SAFETY: the parameters of `linear_dot_*`; shapes, places and types have been checked.
    unsafe { kernel.launch(device, grid, &arguments) }
}
