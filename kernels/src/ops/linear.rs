//! Matrix product with weights in place.
//!
//! Each output is one dot product with one fixed order of additions: sixteen lanes along k, a tail padded with zeros, then
//! the lanes as a tree. Tiles, panels and threads choose only *when* a product is added, never to what, so a row's
//! result is the same to the bit in any company. Where the CPU multiplies bf16, a bf16 weight is multiplied so for any
//! number of rows: x is rounded to bf16, sums are f32. Where it multiplies tiles of bf16, an int8 weight is multiplied so with
//! all bits of x.
//!
//! On a GPU, x has the type of dense weights, and what a row's sums are added up from depends on the number of rows: up to 16
//! of them give the same bits in any number, see `cuda/few.rs` (but of plain kernels: a library says what it adds up).

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use super::operands::{
    SharedRows, f32_vector, matrix, matrix_mut, on_cuda, require, require_f32_matrix, unsupported_float,
};
use crate::scratch::Scratch;
use crate::simd::amx::Amx;
use crate::simd::{Kernel, Level, Simd};
use crate::{Context, DType, Place, Result, Tensor, View, ViewMut};

#[cfg(feature = "cuda")]
mod cuda;
mod few;
mod finish;
mod format;
mod gated;
mod grouped;
mod input;
mod many;
mod tiles;
mod weight;

use finish::Finish;
use format::{Bf16Pairs, Format, Widened};
pub use gated::{GatedLinear, linear_gated};
pub use grouped::{Experts, linear_grouped};
use input::{Form, Input, Order};
use tiles::{TileBlock, Tiled};
pub use weight::{Int8Weight, Weight};

/// One of the weights that are multiplied with the same input.
#[derive(Clone, Copy)]
pub struct LinearPart<'a> {
    /// `[n, k]`.
    pub weight: Weight<'a>,
    /// `[1, n]` f32, added to each row.
    pub bias: Option<&'a Tensor>,
}

/// How products are computed, which a level and a layout decide: parts of one method have x in one form.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    /// Of f32, weights widened to it.
    Widened,
    /// Of pairs of bf16.
    Pairs,
    /// Of tiles of bf16.
    Tiles,
    /// Of tiles of bf16, with x as the sum of several.
    SplitTiles,
}

impl Method {
    const ALL: [Self; 4] = [Self::Widened, Self::Pairs, Self::Tiles, Self::SplitTiles];
}

impl LinearPart<'_> {
    fn method(&self, level: Level) -> Method {
        match (self.weight, level.amx()) {
            (Weight::Int8(_), Some(_)) => Method::SplitTiles,
            (Weight::Dense(weight), Some(_)) if weight.dtype() == DType::BF16 => Method::Tiles,
            (Weight::Dense(weight), None) if weight.dtype() == DType::BF16 && level.has_dot_bf16() => {
                Method::Pairs
            }
            _ => Method::Widened,
        }
    }
}

thread_local! {
    /// x as it is prepared for a call, kept.
    static INPUT: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// `out[i, ..] = concat over parts of (weight · x[i] + bias)`: a fused linear layer (query, key and value; gate and
/// up) over weights that lie apart in the file.
///
/// `x`: f32 `[rows, k]`; `out`: f32 `[rows, sum of n]`. Each weight is read once from memory.
///
/// On a GPU, `x` is f32, f16 or bf16, as dense weights are, and `out` is of that type or f32; parts that lie side by side
/// in memory are one product for many rows.
pub fn linear(context: &Context, x: View<'_>, parts: &[LinearPart<'_>], out: ViewMut<'_>) -> Result<()> {
    product(context, x, parts, out, false)
}

/// As [`linear`], added to what `out` holds: a projection and its residual connection.
pub fn linear_add(context: &Context, x: View<'_>, parts: &[LinearPart<'_>], out: ViewMut<'_>) -> Result<()> {
    product(context, x, parts, out, true)
}

fn product(
    context: &Context,
    x: View<'_>,
    parts: &[LinearPart<'_>],
    out: ViewMut<'_>,
    adds: bool,
) -> Result<()> {
    check_shapes(x, parts, &out)?;
    on_cuda!(context, |device| cuda::product(device, x, parts, &out, adds));
    check_types(x, parts, &out)?;
    let (total, level) = (out.cols(), context.level());
    if x.rows() == 0 {
        return Ok(());
    }
    let tasks = Tasks::new(context.num_threads(), x, parts, total);
    let out = SharedRows::new(out);
    for method in Method::ALL {
        if parts.iter().all(|part| part.method(level) != method) {
            continue;
        }
        INPUT.with_borrow_mut(|memory| {
            let x = Prepared::new(context, x, method, memory);
            let product = Product { level, x, method, parts, out, adds };
            context.parallel_for(tasks.count, |task| {
                level.run_with_dots(Outputs { product: &product, outputs: tasks.outputs(task) });
            });
        });
    }
    Ok(())
}

/// x as the loops read it.
#[derive(Clone, Copy)]
enum Prepared {
    Vectors { x: Input, order: Order },
    Tiles { x: tiles::Bands, amx: Amx },
}

impl Prepared {
    /// Prepares `x` in `memory`, which must live as long as the result is used.
    fn new(context: &Context, x: View<'_>, method: Method, memory: &mut Scratch) -> Self {
        let level = context.level();
        match (method, level.amx()) {
            (Method::Tiles, Some(amx)) => {
                Self::Tiles { x: tiles::Bands::prepare::<tiles::InBf16>(context, x, memory), amx }
            }
            (Method::SplitTiles, Some(amx)) => {
                Self::Tiles { x: tiles::Bands::prepare::<tiles::InSplitF32>(context, x, memory), amx }
            }
            _ => {
                let per_lane = if method == Method::Pairs { 2 } else { 1 };
                let form = form(level, x.rows(), per_lane);
                Self::Vectors { x: Input::prepare(context, x, form, memory), order: form.order }
            }
        }
    }
}

/// How x is read by the loop for this number of rows.
fn form(level: Level, rows: usize, per_lane: usize) -> Form {
    struct Ask<'a> {
        rows: usize,
        form: &'a mut Form,
    }
    impl Kernel for Ask<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, _simd: S) {
            (self.form.order, self.form.tile_rows) = if self.rows <= few::MOST_ROWS {
                (Order::Steps, few::tile_rows(S::WIDE))
            } else {
                (Order::Lanes, S::PANEL_ROWS)
            };
        }
    }
    let mut form = Form { order: Order::Steps, per_lane, tile_rows: 1 };
    level.run(Ask { rows, form: &mut form });
    form
}

const OP: &str = "linear";

/// What is asked on any device.
fn check_shapes(x: View<'_>, parts: &[LinearPart<'_>], out: &ViewMut<'_>) -> Result<()> {
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
    }
    let total: usize = parts.iter().map(|part| part.weight.rows()).sum();
    require(OP, out.rows() == x.rows() && out.cols() == total, || {
        format!("out is [{}, {}], expected [{}, {total}]", out.rows(), out.cols(), x.rows())
    })
}

/// What is asked on the CPU.
fn check_types(x: View<'_>, parts: &[LinearPart<'_>], out: &ViewMut<'_>) -> Result<()> {
    for part in parts {
        part.weight.require_place("a weight", Place::Host)?;
        if let Some(bias) = part.bias {
            f32_vector(OP, "a bias", bias, part.weight.rows())?;
        }
    }
    require_f32_matrix(OP, "x", matrix(x), (x.rows(), x.cols()))?;
    require_f32_matrix(OP, "out", matrix_mut(out), (out.rows(), out.cols()))
}

/// How outputs are spread over tasks: all in one where the work is too small to wake another thread for, else each thread has
/// several, so that one that is held up does not hold up the others.
#[derive(Clone, Copy)]
struct Tasks {
    num_outputs: usize,
    /// Outputs that stay together.
    unit: usize,
    count: usize,
}

impl Tasks {
    /// For products with `x` of which each of the `num_outputs` is one of every part's.
    fn new(num_threads: usize, x: View<'_>, parts: &[LinearPart<'_>], num_outputs: usize) -> Self {
        // Of one core: about 10 GB/s from memory and 50 GFLOP/s (measured with benches/linear.rs, rounded down).
        const BYTES_PER_NS: usize = 10;
        const FLOPS_PER_NS: usize = 50;
        // Waking a sleeping thread takes a few microseconds.
        const MIN_TASK_NS: usize = 10_000;
        const TASKS_PER_THREAD: usize = 8;
        let bytes: usize = parts.iter().map(|part| part.weight.size_in_bytes()).sum();
        let outputs: usize = parts.iter().map(|part| part.weight.rows()).sum();
        let work_ns = bytes / BYTES_PER_NS + 2 * x.rows() * x.cols() * outputs / FLOPS_PER_NS;
        let most = num_threads * TASKS_PER_THREAD;
        let most_work = most.min(work_ns / MIN_TASK_NS).min(num_outputs.div_ceil(many::OUTPUTS));
        // Many rows are read once for each group of panels: smaller tasks only where threads would have none.
        let (unit, count) = match x.rows() > few::MOST_ROWS {
            true if num_outputs >= most * many::GROUP => (many::GROUP, most_work),
            true => (many::OUTPUTS, most_work.min((num_outputs / many::GROUP).max(num_threads))),
            false => (many::OUTPUTS, most_work),
        };
        let count = match num_threads {
            1 => 1,
            // As many for each thread.
            _ if count > num_threads => count / num_threads * num_threads,
            _ => count.max(1),
        };
        Self { num_outputs, unit, count }
    }

    /// The outputs of a task: as many as any other's, or one unit more.
    fn outputs(&self, task: usize) -> Range<usize> {
        let units = self.num_outputs.div_ceil(self.unit);
        let end = |tasks: usize| self.num_outputs.min(tasks * units / self.count * self.unit);
        end(task)..end(task + 1)
    }
}

struct Product<'a> {
    level: Level,
    x: Prepared,
    /// Of the parts that are computed.
    method: Method,
    parts: &'a [LinearPart<'a>],
    out: SharedRows<'a>,
    adds: bool,
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
            if outputs.is_empty() || part.method(self.product.level) != self.product.method {
                continue;
            }
            let share = Share { product: self.product, part, column: all.start, outputs };
            match (self.product.x, part.weight) {
                (Prepared::Tiles { x, amx }, Weight::Dense(weight)) => {
                    simd.call(share.tiles::<tiles::InBf16>(weight, None, x, amx));
                }
                (Prepared::Tiles { x, amx }, Weight::Int8(weight)) => {
                    let scales = Some(weight.scales());
                    simd.call(share.tiles::<tiles::InSplitF32>(weight.values(), scales, x, amx));
                }
                (Prepared::Vectors { x, order }, Weight::Dense(weight)) => match weight.dtype() {
                    DType::F32 => simd.call(share.block::<Widened<f32>>(weight, None, x, order)),
                    DType::F16 => simd.call(share.block::<Widened<f16>>(weight, None, x, order)),
                    DType::BF16 if self.product.method == Method::Pairs => {
                        simd.call(share.block::<Bf16Pairs>(weight, None, x, order));
                    }
                    DType::BF16 => simd.call(share.block::<Widened<bf16>>(weight, None, x, order)),
                    dtype => unreachable!("{}", unsupported_float("linear", dtype)),
                },
                (Prepared::Vectors { x, order }, Weight::Int8(weight)) => {
                    let scales = Some(weight.scales());
                    simd.call(share.block::<Widened<i8>>(weight.values(), scales, x, order));
                }
            }
        }
    }
}

/// Some of a part's outputs.
struct Share<'a> {
    product: &'a Product<'a>,
    part: &'a LinearPart<'a>,
    /// Of the part's first output.
    column: usize,
    outputs: Range<usize>,
}

impl Share<'_> {
    /// Of the part's outputs the first that is computed.
    fn first(&self) -> usize {
        self.outputs.start - self.column
    }

    #[inline(always)]
    fn block<F: Format>(&self, values: &Tensor, scales: Option<&Tensor>, x: Input, order: Order) -> Block<F> {
        let weights = values.view().narrow_rows(self.first(), self.outputs.len());
        Block {
            weights: weights.ptr.cast(),
            weight_stride: weights.row_stride,
            num_outputs: self.outputs.len(),
            x,
            order,
            finish: self.finish(scales),
        }
    }

    fn tiles<F: Tiled>(
        &self,
        values: &Tensor,
        scales: Option<&Tensor>,
        x: tiles::Bands,
        amx: Amx,
    ) -> TileBlock<F> {
        let weights = values.view().narrow_rows(self.first(), self.outputs.len());
        TileBlock {
            amx,
            weights: weights.ptr.cast(),
            weight_stride: weights.row_stride,
            num_outputs: self.outputs.len(),
            x,
            finish: self.finish(scales),
        }
    }

    fn finish(&self, scales: Option<&Tensor>) -> Finish {
        let vector = |vector: &Tensor| vector.as_slice::<f32>()[self.first()..].as_ptr();
        let Product { out, adds, .. } = *self.product;
        Finish {
            scales: scales.map(vector),
            bias: self.part.bias.map(vector),
            out: out.at(0, self.outputs.start),
            out_stride: out.row_stride(),
            adds,
        }
    }
}

/// Consecutive rows of one weight, for all rows of x. The pointers are to the block's first elements.
#[derive(Clone, Copy)]
struct Block<F: Format> {
    weights: *const F::Element,
    weight_stride: usize,
    num_outputs: usize,
    x: Input,
    order: Order,
    finish: Finish,
}

impl<F: Format> Kernel for Block<F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.order {
            Order::Steps => few::few_rows(simd, &self),
            Order::Lanes => many::many_rows(simd, &self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_have_as_many_outputs_but_for_one_unit() {
        for (num_threads, rows) in
            [1, 2, 3, 8, 64].into_iter().flat_map(|threads| [(threads, 1), (threads, 512)])
        {
            for (num_outputs, k) in
                [(1, 8), (33, 64), (576, 1536), (2048, 2048), (2560, 2048), (5632, 2048), (128_000, 64)]
            {
                let weight = Tensor::zeros(num_outputs, k, DType::BF16);
                let x = Tensor::zeros(rows, k, DType::F32);
                let parts = [LinearPart { weight: (&weight).into(), bias: None }];
                let tasks = Tasks::new(num_threads, x.view(), &parts, num_outputs);
                // As the pool spreads them.
                let threads = tasks.count.min(num_threads);
                let mut shares = vec![0; threads];
                let mut next = 0;
                for (thread, share) in shares.iter_mut().enumerate() {
                    for task in thread * tasks.count / threads..(thread + 1) * tasks.count / threads {
                        let outputs = tasks.outputs(task);
                        assert_eq!(outputs.start, next);
                        assert!(!outputs.is_empty(), "{num_threads} threads, {num_outputs} outputs: {task}");
                        next = outputs.end;
                        *share += outputs.len();
                    }
                }
                assert_eq!(next, num_outputs);
                let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
                assert!(
                    most - least <= tasks.unit,
                    "{num_threads} threads, {num_outputs} outputs: {shares:?}"
                );
            }
        }
    }
}
