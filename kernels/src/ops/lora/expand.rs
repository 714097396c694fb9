//! The second factor on the CPU: few products for each output, so lanes go along the outputs and the factor lies turned, and no
//! sum over lanes is needed.
//!
//! An output is its products added up in the order of the rank, and then to what was there: the same whatever the tile.

use half::{bf16, f16};

use crate::ops::operands::unsupported_float;
use crate::simd::{Float, Kernel, LANES, Simd};
use crate::{Context, DType, Element, Result, Tensor, View, ViewMut};

/// Vectors of a panel: as many sums as hide the latency of a multiply-add, in the registers that AVX2 has.
const VECTORS: usize = 4;
/// Outputs of a panel.
const WIDTH: usize = VECTORS * LANES;

/// Products that are worth waking a thread for: about ten microseconds of one core.
const TASK_PRODUCTS: usize = 256 << 10;

/// A factor `b`, `[n, rank]`, in panels of outputs: `[panel][rank][WIDTH]`, zeros where there is no output.
#[derive(Debug)]
pub(super) struct Panels {
    values: Tensor,
    n: usize,
    rank: usize,
}

impl Panels {
    /// Of a float matrix in host memory.
    pub(super) fn new(b: &Tensor) -> Result<Self> {
        let (n, rank) = (b.rows(), b.cols());
        let mut values = Tensor::zeros(n.div_ceil(WIDTH) * rank, WIDTH, b.dtype());
        match b.dtype() {
            DType::F32 => turn::<f32>(b, &mut values),
            DType::F16 => turn::<f16>(b, &mut values),
            DType::BF16 => turn::<bf16>(b, &mut values),
            dtype => return Err(unsupported_float(super::OP, dtype)),
        }
        Ok(Self { values, n, rank })
    }

    /// `out += b · hidden[i]` for each row: f32 `[rows, n]` and `[rows, rank]` in host memory.
    pub(super) fn add(&self, context: &Context, hidden: View<'_>, out: &mut ViewMut<'_>) {
        assert!(hidden.rows() == out.rows() && hidden.cols() == self.rank && out.cols() == self.n);
        assert!(hidden.dtype() == DType::F32 && out.dtype() == DType::F32);
        let num_panels = self.n.div_ceil(WIDTH);
        let products_each = self.rank * WIDTH * hidden.rows();
        let panels_per_task = (TASK_PRODUCTS / products_each.max(1)).clamp(1, num_panels.max(1));
        let out = &*out;
        let task = |task: usize| {
            let first = task * panels_per_task;
            for panel in first..num_panels.min(first + panels_per_task) {
                let start = panel * WIDTH;
                // SAFETY: each task reaches the columns of its own panels only, and `out` is borrowed exclusively.
                let out = unsafe { out.alias() }.narrow_cols(start, WIDTH.min(self.n - start));
                let panel = self.values.view().narrow_rows(panel * self.rank, self.rank);
                match self.values.dtype() {
                    DType::F32 => context.level().run(Panel::<f32>::new(panel, hidden, out)),
                    DType::F16 => context.level().run(Panel::<f16>::new(panel, hidden, out)),
                    _ => context.level().run(Panel::<bf16>::new(panel, hidden, out)),
                }
            }
        };
        let num_tasks = num_panels.div_ceil(panels_per_task);
        if num_tasks == 1 { task(0) } else { context.parallel_for(num_tasks, task) }
    }
}

fn turn<T: Element>(b: &Tensor, values: &mut Tensor) {
    let rank = b.cols();
    let values = values.as_mut_slice::<T>();
    for output in 0..b.rows() {
        let (panel, lane) = (output / WIDTH, output % WIDTH);
        for (j, &value) in b.view().row::<T>(output).iter().enumerate() {
            values[(panel * rank + j) * WIDTH + lane] = value;
        }
    }
}

/// One panel's outputs for all rows. The pointers are to the first elements.
struct Panel<'a, W> {
    values: &'a [W],
    rank: usize,
    rows: usize,
    hidden: *const f32,
    hidden_stride: usize,
    out: *mut f32,
    out_stride: usize,
    num_outputs: usize,
}

impl<'a, W: Float> Panel<'a, W> {
    #[expect(clippy::needless_pass_by_value, reason = "takes the exclusive borrow over")]
    fn new(values: View<'a>, hidden: View<'a>, out: ViewMut<'a>) -> Self {
        Self {
            values: values.into_slice(),
            rank: hidden.cols(),
            rows: hidden.rows(),
            hidden: hidden.ptr.cast(),
            hidden_stride: hidden.row_stride,
            out: out.ptr.cast(),
            out_stride: out.row_stride,
            num_outputs: out.cols(),
        }
    }
}

impl<W: Float> Kernel for Panel<'_, W> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut row = 0;
        while row < self.rows {
            // More rows share a reading of the factor, where there are registers for them.
            if S::WIDE && row + 4 <= self.rows {
                simd.call(Tile::<W, 4> { panel: &self, row });
                row += 4;
            } else {
                simd.call(Tile::<W, 1> { panel: &self, row });
                row += 1;
            }
        }
    }
}

/// Some rows of a panel.
struct Tile<'a, W, const ROWS: usize> {
    panel: &'a Panel<'a, W>,
    row: usize,
}

impl<W: Float, const ROWS: usize> Kernel for Tile<'_, W, ROWS> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { panel, row } = self;
        let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
        for j in 0..panel.rank {
            let values = panel.values[j * WIDTH..][..WIDTH].as_ptr();
            // SAFETY: the panel has WIDTH values for each `j`, and `hidden` these rows of `rank` columns.
            let (factor, hidden): ([S::Vector; VECTORS], [S::Vector; ROWS]) = unsafe {
                (
                    std::array::from_fn(|i| W::load(simd, values.add(i * LANES))),
                    std::array::from_fn(|r| {
                        simd.splat(*panel.hidden.add((row + r) * panel.hidden_stride + j))
                    }),
                )
            };
            for (sums, hidden) in sums.iter_mut().zip(hidden) {
                for (sum, factor) in sums.iter_mut().zip(factor) {
                    *sum = simd.mul_add(factor, hidden, *sum);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (i, sum) in sums.into_iter().enumerate() {
                let len = LANES.min(panel.num_outputs.saturating_sub(i * LANES));
                if len == 0 {
                    break;
                }
                // SAFETY: `out` has this row and these columns, which no other task reaches.
                unsafe {
                    let out = panel.out.add((row + r) * panel.out_stride + i * LANES);
                    f32::store_part(simd, out, len, simd.add(f32::load_part(simd, out, len), sum));
                }
            }
        }
    }
}
