//! Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): which experts a row goes to, its way there and back.
//!
//! A step routes its rows, gathers them by expert, lets each expert compute its rows as one batch, and combines what comes
//! back. A row's weights and sum do not depend on the rows beside it, nor on where its experts put it.

use std::ops::Range;

use super::operands::{SharedRows, matrix, matrix_mut, on_cuda, require, require_f32_matrix};
use crate::ops::logits;
use crate::simd::{Float, Kernel, Simd, spans};
use crate::{Context, Result, View, ViewMut};

#[cfg(feature = "cuda")]
mod cuda;

/// How experts are chosen by the router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopK {
    /// Experts of a row, at least 1.
    pub experts_per_row: usize,
    /// Whether the weights of the chosen ones are divided by their sum (`norm_topk_prob`; always so in Mixtral).
    pub renormalize: bool,
}

/// Rows grouped by expert. Its buffers are kept from step to step.
///
/// On a GPU the host does not learn who goes where: [`Routing::starts`], [`Routing::gather`] and [`Routing::combine`] are what
/// there is; the rest is of a routing on the CPU, and panics.
#[derive(Debug, Default)]
pub struct Routing {
    experts_per_row: usize,
    #[cfg(feature = "cuda")]
    on_device: Option<cuda::OnDevice>,
    /// `[rows, experts_per_row]`, the most likely first.
    chosen: Vec<Choice>,
    /// Of each expert's slots, the first; one more at the end.
    starts: Vec<u32>,
    /// `[slots]`: the row that is there.
    rows: Vec<u32>,
}

/// One expert of a row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Choice {
    /// Which expert.
    pub expert: u32,
    /// What its output is multiplied with.
    pub weight: f32,
    /// Where the row stands among those grouped by expert.
    pub slot: u32,
}

impl Routing {
    /// Makes room on a GPU for the largest step, because steps that are recorded need buffers that stay where they are. On
    /// the CPU there is nothing to do.
    pub fn reserve(
        &mut self,
        context: &Context,
        max_rows: usize,
        experts: usize,
        experts_per_row: usize,
    ) -> Result<()> {
        let max_choices = max_rows * experts_per_row;
        on_cuda!(context, |_| cuda::OnDevice::reserve(&mut self.on_device, context, max_choices, experts));
        self.chosen.reserve(max_choices.saturating_sub(self.chosen.len()));
        self.starts.reserve((experts + 1).saturating_sub(self.starts.len()));
        Ok(())
    }

    /// Chooses the experts of each row by softmax over all experts, of equally likely ones those with lower ids, and groups
    /// the rows by expert, in order of rows. `router_logits`: f32 `[rows, experts]`.
    pub fn route(&mut self, context: &Context, router_logits: View<'_>, top_k: TopK) -> Result<()> {
        const OP: &str = "route";
        let TopK { experts_per_row, renormalize } = top_k;
        let (rows, experts) = (router_logits.rows(), router_logits.cols());
        require(OP, (1..=experts).contains(&experts_per_row), || {
            format!("{experts_per_row} experts for each row, expected 1 to {experts}")
        })?;
        self.experts_per_row = experts_per_row;
        on_cuda!(context, |device| {
            cuda::OnDevice::reserve(&mut self.on_device, context, rows * experts_per_row, experts)?;
            let on_device = self.on_device.as_mut().expect("reserved above");
            on_device.route(device, router_logits, top_k)
        });
        require_f32_matrix(OP, "router_logits", matrix(router_logits), (rows, experts))?;
        self.chosen.clear();
        self.chosen.resize(rows * experts_per_row, Choice::default());
        let chosen = SharedChoices(self.chosen.as_mut_ptr());
        let chosen = &chosen;
        context.for_rows(rows, experts * (4 + experts_per_row), |row| {
            // SAFETY: each task has rows of its own, and there is room for all.
            let chosen = unsafe {
                std::slice::from_raw_parts_mut(chosen.0.add(row * experts_per_row), experts_per_row)
            };
            choose(router_logits.row(row), chosen, renormalize);
        });
        self.group(experts);
        Ok(())
    }

    /// Counting sort, stable.
    fn group(&mut self, experts: usize) {
        let Self { experts_per_row, chosen, starts, rows, .. } = self;
        starts.clear();
        starts.resize(experts + 1, 0);
        for choice in &*chosen {
            starts[choice.expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        rows.clear();
        rows.resize(chosen.len(), 0);
        for (index, choice) in chosen.iter_mut().enumerate() {
            // The starts serve as the next free slots, which leaves each at the start of the next.
            let next = &mut starts[choice.expert as usize];
            choice.slot = *next;
            rows[*next as usize] = (index / *experts_per_row) as u32;
            *next += 1;
        }
        starts.copy_within(0..experts, 1);
        starts[0] = 0;
    }

    /// u32 `[1, experts + 1]`, where the context computes: of each expert's slots the first, and the end of all.
    pub fn starts(&self) -> View<'_> {
        #[cfg(feature = "cuda")]
        if let Some(on_device) = &self.on_device {
            return on_device.starts();
        }
        View::from_slice(&self.starts, 1, self.starts.len())
    }

    /// Slots of an expert: the rows of the gathered matrix that it computes.
    pub fn slots(&self, expert: usize) -> Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }

    /// The row in each slot.
    pub fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// The experts of a row, most likely first.
    pub fn chosen(&self, row: usize) -> &[Choice] {
        &self.chosen[row * self.experts_per_row..][..self.experts_per_row]
    }

    /// `out[slot] = x[rows()[slot]]`. `x`: f32 `[rows, cols]`; `out`: f32 `[rows * experts_per_row, cols]`; on a GPU also both
    /// f16 or both bf16.
    pub fn gather(&self, context: &Context, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        on_cuda!(context, |_| {
            super::embedding::gather_rows(
                context,
                x,
                cuda::routed("gather", self.on_device.as_ref())?.rows(),
                out,
            )
        });
        super::embedding::gather_rows(context, x, View::from_slice(&self.rows, 1, self.rows.len()), out)
    }

    /// `out[row] = sum over its experts of weight * expert_out[slot]`, most likely first. `expert_out`: f32
    /// `[rows * experts_per_row, cols]`; `out`: f32 `[rows, cols]`; on a GPU also both f16 or both bf16.
    pub fn combine(&self, context: &Context, expert_out: View<'_>, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "combine";
        on_cuda!(context, |device| cuda::routed(OP, self.on_device.as_ref())?
            .combine(device, expert_out, out));
        let (rows, cols) = (self.rows.len() / self.experts_per_row.max(1), expert_out.cols());
        require_f32_matrix(OP, "expert_out", matrix(expert_out), (self.rows.len(), cols))?;
        require_f32_matrix(OP, "out", matrix_mut(&out), (rows, cols))?;
        let out = SharedRows::new(out);
        context.for_rows(rows, cols * (1 + self.experts_per_row), |row| {
            // SAFETY: each task has rows of its own.
            let out = unsafe { out.row(row) };
            context.level().run(Combine { chosen: self.chosen(row), expert_out, out });
        });
        Ok(())
    }
}

/// Choices that tasks write to, each to those of its rows.
struct SharedChoices(*mut Choice);

// SAFETY: the choices are borrowed exclusively while tasks run, and each writes to its own.
unsafe impl Sync for SharedChoices {}

fn choose(router_logits: &[f32], chosen: &mut [Choice], renormalize: bool) {
    let max = logits::greatest(router_logits).logit;
    let mut total = logits::sum_of_exp(router_logits, max);
    for index in 0..chosen.len() {
        let (before, rest) = chosen.split_at_mut(index);
        let free = (0..router_logits.len())
            .filter(|&expert| before.iter().all(|choice| choice.expert as usize != expert));
        // Where all are NaN the first is taken, and its weight is NaN.
        let best = free.reduce(
            |best, expert| {
                if router_logits[expert] > router_logits[best] { expert } else { best }
            },
        );
        let expert = best.expect("at most as many as there are experts");
        let weight = (router_logits[expert] - max).exp();
        rest[0] = Choice { expert: expert as u32, weight, slot: 0 };
    }
    if renormalize {
        total = chosen.iter().map(|choice| f64::from(choice.weight)).sum();
    }
    for choice in chosen {
        choice.weight = (f64::from(choice.weight) / total) as f32;
    }
}

/// One row.
struct Combine<'a> {
    chosen: &'a [Choice],
    expert_out: View<'a>,
    out: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (index, choice) in self.chosen.iter().enumerate() {
            let from = self.expert_out.row::<f32>(choice.slot as usize);
            assert_eq!(from.len(), self.out.len(), "checked by the operation");
            let weight = simd.splat(choice.weight);
            for (start, len) in spans(from.len()) {
                // SAFETY: a span lies within both.
                unsafe {
                    let at = self.out.as_mut_ptr().add(start);
                    let value = f32::load_part(simd, from.as_ptr().add(start), len);
                    let sum = match index {
                        0 => simd.mul(weight, value),
                        _ => simd.mul_add(weight, value, f32::load_part(simd, at, len)),
                    };
                    f32::store_part(simd, at, len, sum);
                }
            }
        }
    }
}
