//! Matrix product with weights in place.
//!
//! Each output is one dot product with one fixed order of additions: sixteen lanes along k, a tail padded with zeros, then
//! the lanes as a tree. Tiles, panels and threads choose only *when* a product is added, never to what, so a row's
//! result is the same to the bit in any company.

use std::ops::Range;

use half::{bf16, f16};

use super::operands::{
    SharedRows, f32_vector, matrix, matrix_mut, require, require_f32_matrix, unsupported_float,
};
use crate::simd::{Kernel, Simd};
use crate::{Context, DType, Result, Tensor, View, ViewMut};

mod panel;
mod tile;
mod weight;

use weight::WeightElement;
pub use weight::{Int8Weight, Weight};

/// One of the weights that are multiplied with the same input.
#[derive(Clone, Copy)]
pub struct LinearPart<'a> {
    /// `[n, k]`.
    pub weight: Weight<'a>,
    /// `[1, n]` f32, added to each row.
    pub bias: Option<&'a Tensor>,
}

/// `out[i, ..] = concat over parts of (weight · x[i] + bias)`: a fused linear layer (query, key and value; gate and
/// up) over weights that lie apart in the file.
///
/// `x`: f32 `[rows, k]`; `out`: f32 `[rows, sum of n]`. Each weight is read once for up to 16 rows.
pub fn linear(context: &Context, x: View<'_>, parts: &[LinearPart<'_>], out: ViewMut<'_>) -> Result<()> {
    check(x, parts, &out)?;
    let total = out.cols();
    let per_task = outputs_per_task(context.num_threads(), x, parts, total);
    let product = Product { x, parts, out: SharedRows::new(out) };
    context.parallel_for(total.div_ceil(per_task), |task| {
        let outputs = task * per_task..total.min((task + 1) * per_task);
        context.level().run(Outputs { product: &product, outputs });
    });
    Ok(())
}

fn check(x: View<'_>, parts: &[LinearPart<'_>], out: &ViewMut<'_>) -> Result<()> {
    const OP: &str = "linear";
    for (i, part) in parts.iter().enumerate() {
        let (weight, k) = (part.weight, x.cols());
        weight.check()?;
        require(OP, weight.cols() == k, || {
            format!(
                "weight {i} is [{}, {}], but x is [{}, {k}]: expected {k} columns",
                weight.rows(),
                weight.cols(),
                x.rows()
            )
        })?;
        if let Some(bias) = part.bias {
            f32_vector(OP, &format!("bias {i}"), bias, weight.rows())?;
        }
    }
    let total = parts.iter().map(|part| part.weight.rows()).sum();
    require_f32_matrix(OP, "x", matrix(x), (x.rows(), x.cols()))?;
    require_f32_matrix(OP, "out", matrix_mut(out), (x.rows(), total))
}

/// How many outputs a task computes: all where the work is too small to wake another thread for, else a fraction of
/// a thread's share, so that a thread that is held up does not hold up the others.
fn outputs_per_task(num_threads: usize, x: View<'_>, parts: &[LinearPart<'_>], total: usize) -> usize {
    // Of one core: about 10 GB/s from memory and 50 GFLOP/s (measured with benches/linear.rs, rounded down).
    const BYTES_PER_NS: usize = 10;
    const FLOPS_PER_NS: usize = 50;
    // Waking a sleeping thread takes a few microseconds.
    const MIN_TASK_NS: usize = 10_000;
    const TASKS_PER_THREAD: usize = 4;
    let bytes: usize = parts.iter().map(|part| part.weight.size_in_bytes()).sum();
    let flops = 2 * x.rows() * x.cols() * total;
    let work_ns = bytes / BYTES_PER_NS + flops / FLOPS_PER_NS;
    let tasks = match num_threads {
        1 => 1,
        _ => (num_threads * TASKS_PER_THREAD).min(work_ns / MIN_TASK_NS).max(1),
    };
    total.div_ceil(tasks).next_multiple_of(panel::OUTPUTS).max(1)
}

struct Product<'a> {
    x: View<'a>,
    parts: &'a [LinearPart<'a>],
    out: SharedRows<'a>,
}

/// A range of the outputs of all parts side by side: what a task computes.
struct Outputs<'a> {
    product: &'a Product<'a>,
    outputs: Range<usize>,
}

impl Kernel for Outputs<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut column = 0;
        for part in self.product.parts {
            let all = column..column + part.weight.rows();
            let outputs = self.outputs.start.max(all.start)..self.outputs.end.min(all.end);
            column = all.end;
            if outputs.is_empty() {
                continue;
            }
            let (values, scales) = match part.weight {
                Weight::Dense(weight) => (weight, None),
                Weight::Int8(weight) => (weight.values(), Some(weight.scales())),
            };
            let operands = Operands { values, scales, bias: part.bias };
            match values.dtype() {
                DType::F32 => simd.call(Block::<f32>::new(self.product, operands, all.start, outputs)),
                DType::F16 => simd.call(Block::<f16>::new(self.product, operands, all.start, outputs)),
                DType::BF16 => simd.call(Block::<bf16>::new(self.product, operands, all.start, outputs)),
                DType::U8 => simd.call(Block::<i8>::new(self.product, operands, all.start, outputs)),
                dtype => unreachable!("{}", unsupported_float("linear", dtype)),
            }
        }
    }
}

/// What a part multiplies with, by its parts.
#[derive(Clone, Copy)]
struct Operands<'a> {
    values: &'a Tensor,
    scales: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
}

/// Consecutive rows of one weight, for all rows of x. The pointers are to the block's first elements.
#[derive(Clone, Copy)]
struct Block<W> {
    weights: *const W,
    weight_stride: usize,
    num_outputs: usize,
    scales: Option<*const f32>,
    bias: Option<*const f32>,
    x: *const f32,
    x_stride: usize,
    rows: usize,
    k: usize,
    out: *mut f32,
    out_stride: usize,
}

impl<W: WeightElement> Block<W> {
    fn new(product: &Product<'_>, operands: Operands<'_>, column: usize, outputs: Range<usize>) -> Self {
        let first = outputs.start - column;
        let weights = operands.values.view().narrow_rows(first, outputs.len());
        let vector = |vector: &Tensor| vector.as_slice::<f32>()[first..].as_ptr();
        let Product { x, out, .. } = product;
        Self {
            weights: weights.ptr.cast(),
            weight_stride: weights.row_stride,
            num_outputs: outputs.len(),
            scales: operands.scales.map(vector),
            bias: operands.bias.map(vector),
            x: x.ptr.cast(),
            x_stride: x.row_stride,
            rows: x.rows,
            k: x.cols,
            out: out.at(0, outputs.start),
            out_stride: out.row_stride(),
        }
    }
}

impl<W: WeightElement> Kernel for Block<W> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.rows <= tile::DIRECT_ROWS { tile::direct(simd, &self) } else { panel::panels(simd, &self) }
    }
}
