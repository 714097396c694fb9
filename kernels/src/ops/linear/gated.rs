//! Two linear layers of which one gates the other.

use std::ops::Range;

use super::{INPUT, LinearPart, Method, Outputs, Prepared, Product, Tasks, check_types, linear};
use crate::ops::activation::{Activation, Apply, gated};
use crate::ops::operands::{SharedRows, matrix_mut, on_cuda, require, require_f32_matrix};
use crate::{Context, Result, View, ViewMut};

/// The first half of a gated MLP (Shazeer 2020, arXiv:2002.05202).
#[derive(Clone, Copy)]
pub struct GatedLinear<'a> {
    /// What is activated.
    pub gate: LinearPart<'a>,
    /// What is multiplied with it; as many outputs.
    pub up: LinearPart<'a>,
    /// Of the gate.
    pub activation: Activation,
}

/// `out = activation(gate · x) * (up · x)`, each with its bias.
///
/// `x`: `[rows, k]`; `out`: `[rows, n]`; `gate_up`: `[rows, 2 * n]`, for the products, if they are not kept in registers: its
/// contents are lost. All of one type, as of [`linear`].
pub fn linear_gated(
    context: &Context,
    x: View<'_>,
    layer: GatedLinear<'_>,
    mut gate_up: ViewMut<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "linear_gated";
    let GatedLinear { gate, up, activation } = layer;
    let n = gate.weight.rows();
    require(OP, up.weight.rows() == n, || {
        format!("gate has {n} outputs, up {}: expected as many", up.weight.rows())
    })?;
    require(OP, out.rows() == x.rows() && out.cols() == n, || {
        format!("out is [{}, {}], expected [{}, {n}]", out.rows(), out.cols(), x.rows())
    })?;
    super::check_shapes(x, &[gate, up], &gate_up)?;
    on_cuda!(context, |device| super::cuda::gated(context, device, x, layer, &gate_up, out));
    let method = gate.method(context.level());
    if method != up.method(context.level()) {
        linear(context, x, &[gate, up], gate_up.reborrow())?;
        return gated(context, activation, gate_up.as_view(), out);
    }
    check_types(x, &[gate, up], &gate_up)?;
    require_f32_matrix(OP, "out", matrix_mut(&out), (x.rows(), n))?;
    products_and_activation(context, x, layer, method, gate_up, out);
    Ok(())
}

/// A task computes some outputs of the gate and the same of what it gates, and combines them while they are in its cache:
/// one region of threads instead of two.
fn products_and_activation(
    context: &Context,
    x: View<'_>,
    layer: GatedLinear<'_>,
    method: Method,
    gate_up: ViewMut<'_>,
    out: ViewMut<'_>,
) {
    let GatedLinear { gate, up, activation } = layer;
    let (parts, level, rows, n) = ([gate, up], context.level(), x.rows(), out.cols());
    if rows == 0 {
        return;
    }
    let tasks = Tasks::new(context.num_threads(), x, &parts, n);
    let (gate_up, out) = (SharedRows::new(gate_up), SharedRows::new(out));
    INPUT.with_borrow_mut(|memory| {
        let x = Prepared::new(context, x, method, memory);
        let product = Product { level, x, method, parts: &parts, out: gate_up, adds: false };
        context.parallel_for(tasks.count, |task| {
            let Range { start, end } = tasks.outputs(task);
            level.run_with_dots(Outputs { product: &product, outputs: start..end });
            level.run_with_dots(Outputs { product: &product, outputs: n + start..n + end });
            for row in 0..rows {
                // SAFETY: each task has outputs of its own, in both.
                let (gate, up, out) = unsafe {
                    let (gate, up) = (gate_up.part(row, start..end), gate_up.part(row, n + start..n + end));
                    (gate, up, out.part(row, start..end))
                };
                level.run(Apply { activation, x: gate, factor: Some(up), out });
            }
        });
    });
}
