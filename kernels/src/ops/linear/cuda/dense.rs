//! Many rows: cuBLASLt, and what it does not do itself.

use super::{Call, Device, DevicePtr, Grid, Operand, Part, dot, grouped, or_null};
use crate::cuda::Product;
use crate::{DType, Result};

/// Each run of parts that lie side by side in memory is one product.
pub(super) fn product(device: &Device, call: &Call, parts: &[Part]) -> Result<()> {
    let mut column = 0;
    for run in parts.chunk_by(are_adjacent) {
        let mut call = call.narrow_cols(column);
        add_biases(device, &mut call, run)?;
        let n = run.iter().map(|part| part.n).sum();
        column += n;
        if n > 0 {
            multiply(device, &call, Part { n, bias: None, ..run[0] })?;
        }
    }
    Ok(())
}

/// Whether one product computes both: dense, or with scales that lie side by side as well; biases for both or none.
fn are_adjacent(a: &Part, b: &Part) -> bool {
    let behind = |start: DevicePtr, elements: usize, size: usize| start.0 + (elements * size) as u64;
    let values = a.values;
    let scales_are = match (a.scales, b.scales) {
        (None, None) => true,
        (Some(scales), Some(next)) => next.0 == behind(scales, a.n, size_of::<f32>()),
        _ => false,
    };
    scales_are
        && values.row_stride == b.values.row_stride
        && b.values.start.0 == behind(values.start, a.n * values.row_stride, values.dtype.size_in_bytes())
        && a.bias.is_some() == b.bias.is_some()
}

/// Where there are biases, the product is then added to them: to what was there and the bias, or to the bias alone. It is
/// rounded to the output's type before, which is the type that biases have in the file.
fn add_biases(device: &Device, call: &mut Call, run: &[Part]) -> Result<()> {
    const THREADS: usize = 256;
    let mut column = 0;
    for part in run {
        if part.bias.is_some() {
            let kernel = device.kernel("linear_bias", &[call.out.dtype])?;
            let blocks = [call.rows as u32, part.n.div_ceil(THREADS) as u32, 1];
            let grid = Grid { blocks, threads: THREADS as u32, shared_bytes: 0 };
            let [out, out_stride, adds] = call.narrow_cols(column).out_arguments();
            let arguments = [or_null(part.bias), out, out_stride, (part.n as u32).into(), adds];
            // SAFETY: the parameters of `linear_bias_*`; shapes, places and types have been checked.
            unsafe { kernel.launch(device, grid, &arguments)? };
        }
        column += part.n;
    }
    call.adds |= run.iter().any(|part| part.bias.is_some());
    Ok(())
}

fn multiply(device: &Device, call: &Call, part: Part) -> Result<()> {
    let part = dequantized(device, call, part)?;
    let product = Product {
        x: call.x,
        weight: part.values,
        out: call.out,
        rows: call.rows,
        n: part.n,
        k: call.k,
        adds: call.adds,
    };
    // SAFETY: shapes, places and types have been checked.
    if let Some(library) = device.cublaslt()?
        && unsafe { library.multiply(device, &product)? }
    {
        return Ok(());
    }
    if grouped::fits_tiles(device, call, &part) {
        return grouped::tiles(device, call, &part, None);
    }
    dot::product(device, call, &[part])
}

/// The part as x's type has it, in scratch memory: scales are applied to the weights here, and rounded with them.
fn dequantized(device: &Device, call: &Call, part: Part) -> Result<Part> {
    if part.values.dtype != DType::U8 {
        return Ok(part);
    }
    let dtype = call.x.dtype;
    let start = device.scratch("linear_dequantized", part.n * call.k * dtype.size_in_bytes())?;
    let kernel = device.kernel("linear_dequantize", &[dtype])?;
    let grid = Grid { blocks: [part.n as u32, 1, 1], threads: 256, shared_bytes: 0 };
    let [values, stride, _, scales, _] = part.arguments();
    let arguments = [values, stride, scales, (call.k as u32).into(), start.into()];
    // SAFETY: the parameters of `linear_dequantize_*`; the scratch memory has room for all.
    unsafe { kernel.launch(device, grid, &arguments)? };
    Ok(Part { values: Operand { start, dtype, row_stride: call.k }, scales: None, ..part })
}
