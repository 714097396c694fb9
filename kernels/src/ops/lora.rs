//! Low-rank changes of linear layers, of which each row has its own or none (Hu et al. 2021, "LoRA", arXiv:2106.09685; many in
//! one batch: Chen et al. 2023, "Punica", arXiv:2310.18547, and Sheng et al. 2023, "S-LoRA", arXiv:2311.03285).
//!
//! A change has two factors: `a` shrinks a row to the change's rank, `b` expands it to the layer's outputs. Rows that stand
//! side by side and have one adapter are computed together.
//!
//! On the CPU the first is a product of [`linear`], the second one of `expand`, so a row's result is the same to the bit in any company; a row without an
//! adapter keeps its bits. On a GPU the rows' adapters are read on the device, so a recorded step serves any of them; what a
//! row's sums are added up from depends on the number of rows, see `cuda/lora.cu`.

use super::linear::{LinearPart, Weight, linear};
use super::operands::{
    matrix, matrix_mut, on_cuda, require, require_f32_matrix, require_float, require_place, u32_vector,
};
use crate::{Context, Place, Result, Tensor, View, ViewMut};

#[cfg(feature = "cuda")]
mod cuda;
mod expand;

use expand::Panels;

/// The slot of rows without an adapter.
pub const NO_ADAPTER: u32 = u32::MAX;

/// The greatest rank of a change.
pub const MAX_RANK: usize = 256;

/// The most layers that are changed at once: query, key and value.
pub const MAX_PARTS: usize = 3;

/// Rows of a task: fewer are not worth waking a thread for.
const LEAST_ROWS: usize = 4;

const OP: &str = "lora";

/// What one adapter does to one linear layer: `scale * b · a` is added to its weight.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, k]`, f32, f16 or bf16, any row stride.
    pub a: Tensor,
    /// `[n, rank]`, likewise.
    pub b: Tensor,
    /// What the product is multiplied with.
    pub scale: f32,
}

impl LowRank {
    fn rank(&self) -> usize {
        self.a.rows()
    }
}

/// What adapters do to linear layers with one input, whose outputs lie side by side.
#[derive(Debug)]
pub struct Lora {
    k: usize,
    /// Outputs of each layer.
    outputs: Vec<usize>,
    /// Of each adapter, what it does to each layer.
    adapters: Vec<Vec<Option<LowRank>>>,
    /// The greatest rank, a multiple of 16.
    rank: usize,
    /// On the CPU, the second factors as they are multiplied.
    panels: Vec<Vec<Option<Panels>>>,
    #[cfg(feature = "cuda")]
    on_device: Option<cuda::Table>,
}

/// Which rows have which adapter.
#[derive(Clone, Copy)]
pub struct AdapterRows<'a> {
    /// u32 `[1, rows]`: an adapter's place in the [`Lora`], or [`NO_ADAPTER`]. On a GPU the device alone reads it, and takes
    /// places that are not there for none.
    pub slots: View<'a>,
    /// Where it is false, no row has an adapter, and nothing is done. A step that is recorded says true.
    pub any: bool,
}

impl Lora {
    /// `outputs`: of each layer. `adapters`: of each adapter, for each layer, what it does to it; they lie where `context`
    /// computes. On a GPU, all are of one element type: that of activations.
    pub fn new(
        context: &Context,
        k: usize,
        outputs: &[usize],
        adapters: Vec<Vec<Option<LowRank>>>,
    ) -> Result<Self> {
        require(OP, (1..=MAX_PARTS).contains(&outputs.len()), || {
            format!("there are {} layers, expected 1 to {MAX_PARTS}", outputs.len())
        })?;
        for (slot, parts) in adapters.iter().enumerate() {
            require(OP, parts.len() == outputs.len(), || {
                format!("adapter {slot} is of {} layers, expected {}", parts.len(), outputs.len())
            })?;
            for (part, &n) in parts.iter().zip(outputs) {
                if let Some(part) = part {
                    check_part(context, slot, part, k, n)?;
                }
            }
        }
        let ranks = adapters.iter().flatten().flatten().map(LowRank::rank);
        let rank = ranks.max().unwrap_or(0).next_multiple_of(16);
        let panels_of = |part: &Option<LowRank>| part.as_ref().map(|part| Panels::new(&part.b)).transpose();
        let panels = match context.place() {
            Place::Host => {
                let of_adapter = |parts: &Vec<Option<LowRank>>| parts.iter().map(panels_of).collect();
                adapters.iter().map(of_adapter).collect::<Result<_>>()?
            }
            Place::Device => Vec::new(),
        };
        #[cfg(feature = "cuda")]
        let on_device = match context.device() {
            Some(_) => cuda::Table::new(context, &adapters)?,
            None => None,
        };
        Ok(Self {
            k,
            outputs: outputs.to_vec(),
            adapters,
            rank,
            panels,
            #[cfg(feature = "cuda")]
            on_device,
        })
    }

    /// Columns of the memory between the two factors.
    pub fn hidden_cols(&self) -> usize {
        self.rank * self.outputs.len()
    }

    /// Bytes of all factors.
    pub fn size_in_bytes(&self) -> usize {
        let parts = self.adapters.iter().flatten().flatten();
        parts.map(|part| part.a.size_in_bytes() + part.b.size_in_bytes()).sum()
    }
}

fn check_part(context: &Context, slot: usize, part: &LowRank, k: usize, n: usize) -> Result<()> {
    let LowRank { a, b, scale } = part;
    let rank = a.rows();
    for (name, factor, rows, cols) in [("a", a, rank, k), ("b", b, n, rank)] {
        require_float(OP, factor.dtype())?;
        require_place(OP, name, factor.place(), context.place())?;
        require(OP, factor.rows() == rows && factor.cols() == cols, || {
            format!(
                "{name} of adapter {slot} is [{}, {}], expected [{rows}, {cols}]",
                factor.rows(),
                factor.cols()
            )
        })?;
    }
    require(OP, (1..=MAX_RANK).contains(&rank), || {
        format!("adapter {slot} has rank {rank}, expected 1 to {MAX_RANK}")
    })?;
    require(OP, scale.is_finite(), || format!("the scale of adapter {slot} is {scale}, expected a number"))
}

/// `out[i] += scale * b · (a · x[i])` with the factors of the row's adapter, for each layer in its columns.
///
/// `x`: `[rows, k]`; `out`: `[rows, sum of outputs]`, both f32 on the CPU. `hidden`: f32 `[rows, at least hidden_cols]`, whose
/// contents are lost. On a GPU, `x` has the type of the factors, and `out` that one or f32.
pub fn lora_add(
    context: &Context,
    x: View<'_>,
    lora: &Lora,
    rows: AdapterRows<'_>,
    hidden: ViewMut<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    let (num_rows, total) = (x.rows(), lora.outputs.iter().sum());
    require(OP, x.cols() == lora.k, || format!("x has {} columns, expected {}", x.cols(), lora.k))?;
    require(OP, hidden.rows() == num_rows && hidden.cols() >= lora.hidden_cols(), || {
        let (rows, cols) = (hidden.rows(), hidden.cols());
        format!("hidden is [{rows}, {cols}], expected [{num_rows}, at least {}]", lora.hidden_cols())
    })?;
    require(OP, out.rows() == num_rows && out.cols() == total, || {
        format!("out is [{}, {}], expected [{num_rows}, {total}]", out.rows(), out.cols())
    })?;
    on_cuda!(context, |device| cuda::add(device, x, lora, rows, &hidden, &out));
    let slots = u32_vector(OP, "slots", rows.slots, num_rows)?;
    require_f32_matrix(OP, "x", matrix(x), (num_rows, lora.k))?;
    require_f32_matrix(OP, "hidden", matrix_mut(&hidden), (num_rows, hidden.cols()))?;
    require_f32_matrix(OP, "out", matrix_mut(&out), (num_rows, total))?;
    let num_adapters = lora.adapters.len();
    if let Some(row) = slots.iter().position(|&slot| slot != NO_ADAPTER && slot as usize >= num_adapters) {
        return require(OP, false, || format!("row {row} has adapter {} of {num_adapters}", slots[row]));
    }
    if !rows.any || slots.iter().all(|&slot| slot == NO_ADAPTER) {
        return Ok(());
    }
    let change = Change { context, x, lora, slots };
    let threads = context.num_threads();
    if threads == 1 || num_rows < threads {
        // A product that is worth it wakes other threads.
        return change.rows(0..num_rows, hidden, out);
    }
    // Rows are dealt out, so that the threads meet once: inside a task a product stays on its thread.
    let rows_per_task = num_rows.div_ceil(2 * threads).max(LEAST_ROWS);
    context.parallel_for(num_rows.div_ceil(rows_per_task), |task| {
        let first = task * rows_per_task;
        let rows = first..num_rows.min(first + rows_per_task);
        // SAFETY: each task reaches its own rows only, and nobody else the matrices until all are done.
        let (hidden, out) = unsafe { (hidden.alias(), out.alias()) };
        change.rows(rows, hidden, out).expect("shapes and types have been checked");
    });
    Ok(())
}

/// A call on the CPU.
struct Change<'a> {
    context: &'a Context,
    x: View<'a>,
    lora: &'a Lora,
    slots: &'a [u32],
}

impl Change<'_> {
    /// Reaches nothing of `hidden` and `out` but these rows.
    fn rows(
        &self,
        rows: std::ops::Range<usize>,
        mut hidden: ViewMut<'_>,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        let mut first = rows.start;
        for same in self.slots[rows].chunk_by(|a, b| a == b) {
            let start = first;
            first += same.len();
            if same[0] == NO_ADAPTER {
                continue;
            }
            let x = self.x.narrow_rows(start, same.len());
            let hidden = hidden.reborrow().narrow_rows(start, same.len());
            let out = out.reborrow().narrow_rows(start, same.len());
            self.run(same[0] as usize, x, hidden, out)?;
        }
        Ok(())
    }

    /// Rows of one adapter.
    fn run(&self, slot: usize, x: View<'_>, mut hidden: ViewMut<'_>, mut out: ViewMut<'_>) -> Result<()> {
        let (adapter, panels) = (&self.lora.adapters[slot], &self.lora.panels[slot]);
        // Their factors `a` side by side, as one product; those that are not there are not used.
        let mut parts = [None; MAX_PARTS];
        let present = adapter.iter().flatten();
        parts.iter_mut().zip(present.clone()).for_each(|(part, present)| *part = Some(shrinking(present)));
        let Some(first) = parts[0] else { return Ok(()) };
        let parts = parts.map(|part| part.unwrap_or(first));
        let cols = present.clone().map(LowRank::rank).sum();
        let mut shrunk = hidden.reborrow().narrow_cols(0, cols);
        linear(self.context, x, &parts[..present.count()], shrunk.reborrow())?;
        let (mut start, mut column) = (0, 0);
        for ((part, panels), &n) in adapter.iter().zip(panels).zip(&self.lora.outputs) {
            if let (Some(part), Some(panels)) = (part, panels) {
                let mut of_part = shrunk.reborrow().narrow_cols(start, part.rank());
                for row in 0..x.rows() {
                    of_part.row::<f32>(row).iter_mut().for_each(|value| *value *= part.scale);
                }
                panels.add(self.context, of_part.as_view(), &mut out.reborrow().narrow_cols(column, n));
                start += part.rank();
            }
            column += n;
        }
        Ok(())
    }
}

fn shrinking(part: &LowRank) -> LinearPart<'_> {
    LinearPart { weight: Weight::Dense(&part.a), bias: None }
}
