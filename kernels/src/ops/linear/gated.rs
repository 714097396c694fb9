//! Two linear layers of which one gates the other.

use super::{LinearPart, linear};
use crate::ops::activation::{Activation, gated};
use crate::ops::operands::{on_cuda, require};
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
    linear(context, x, &[gate, up], gate_up.reborrow())?;
    gated(context, activation, gate_up.as_view(), out)
}
