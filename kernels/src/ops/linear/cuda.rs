//! Linear layers on a GPU: which kernels compute which sizes.
//!
//! - Up to [`few::MOST_ROWS`] rows of bf16 or f16: `linear_few.cu`, bound by reading the weights.
//! - More rows: cuBLASLt, weights of 8 bits widened before; `linear_tile.cu` where there is no cuBLASLt.
//! - What neither reads (rows that do not begin at 16 bytes, few rows of f32): `linear_dot.cu`, of any size and alignment.
//!
//! Of plain kernels, all that cuBLASLt computes is its own, and the rest that of `linear_dot.cu`.
//!
//! cuBLASLt is the better one when tensor cores have something to do: 16 rows make 16 products of each weight, 77 TFLOP/s at
//! 4.8 TB/s, a tenth of what an H200 has, while reading x begins to cost beside reading the weights (see `linear_few.cu`).

use crate::cuda::{Argument, Device, DevicePtr, Grid, Kernels, Operand};
use crate::ops::activation::gated as gate;
use crate::ops::operands::{
    device_vector, matrix, matrix_mut, require_dtype, require_float, require_on_device, require_place,
};
use crate::{Context, DType, Error, Place, Result, View, ViewMut};

use super::{Experts, GatedLinear, LinearPart, OP, Weight};

mod dense;
mod dot;
mod few;
mod grouped;

/// Parts of a launch, as in the kernels.
const MAX_PARTS: usize = 3;

/// A weight in device memory, with what is done to its sums.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// f32, f16, bf16, or u8 for i8.
    values: Operand,
    n: usize,
    scales: Option<DevicePtr>,
    bias: Option<DevicePtr>,
}

impl Part {
    /// Checks types and places.
    fn new(part: &LinearPart<'_>, x: DType) -> Result<Self> {
        let bias = part
            .bias
            .map(|bias| device_vector(OP, "a bias", bias, DType::F32, part.weight.rows()))
            .transpose()?;
        Ok(Self { bias: bias.map(address), ..Self::of(part.weight, x)? })
    }

    fn of(weight: Weight<'_>, x: DType) -> Result<Self> {
        weight.require_place("a weight", Place::Device)?;
        let (values, scales) = match weight {
            Weight::Dense(weight) => {
                // There is one kernel for each type, and no model mixes them.
                if weight.dtype() != x {
                    let supported = "on a GPU, that of x";
                    return Err(Error::DType { op: OP, dtype: weight.dtype(), supported });
                }
                (weight.view(), None)
            }
            Weight::Int8(weight) => (weight.values().view(), Some(address(weight.scales().view()))),
        };
        Ok(Self { values: operand(values), n: weight.rows(), scales, bias: None })
    }

    fn arguments(self) -> [Argument; 5] {
        [
            self.values.start.into(),
            (self.values.row_stride as u32).into(),
            (self.n as u32).into(),
            or_null(self.scales),
            or_null(self.bias),
        ]
    }

    /// Of a part that is not there.
    fn none() -> [Argument; 5] {
        [or_null(None), 0_u32.into(), 0_u32.into(), or_null(None), or_null(None)]
    }
}

/// A product, as far as all kernels want it alike.
#[derive(Debug, Clone, Copy)]
struct Call {
    x: Operand,
    out: Operand,
    rows: usize,
    k: usize,
    adds: bool,
}

impl Call {
    /// For outputs `column ..`.
    fn narrow_cols(self, column: usize) -> Self {
        let offset = (column * self.out.dtype.size_in_bytes()) as u64;
        Self { out: Operand { start: DevicePtr(self.out.start.0 + offset), ..self.out }, ..self }
    }

    fn x_arguments(&self) -> [Argument; 4] {
        let stride = self.x.row_stride as u32;
        [self.x.start.into(), stride.into(), (self.rows as u32).into(), (self.k as u32).into()]
    }

    fn out_arguments(&self) -> [Argument; 3] {
        [self.out.start.into(), (self.out.row_stride as u32).into(), u32::from(self.adds).into()]
    }
}

/// The shapes have been checked.
pub(super) fn product(
    device: &Device,
    x: View<'_>,
    parts: &[LinearPart<'_>],
    out: &ViewMut<'_>,
    adds: bool,
) -> Result<()> {
    let call = call(x, out, adds)?;
    let parts: Vec<Part> = parts.iter().map(|part| Part::new(part, x.dtype())).collect::<Result<_>>()?;
    if call.rows == 0 {
        return Ok(());
    }
    let mut column = 0;
    for same_type in parts.chunk_by(|a, b| a.values.dtype == b.values.dtype) {
        for parts in same_type.chunks(MAX_PARTS) {
            let call = call.narrow_cols(column);
            column += parts.iter().map(|part| part.n).sum::<usize>();
            if few::fits(device, &call, parts) {
                few::product(device, &call, parts)?;
            } else if dot::is_better(device, &call) {
                dot::product(device, &call, parts)?;
            } else {
                dense::product(device, &call, parts)?;
            }
        }
    }
    Ok(())
}

/// The shapes have been checked.
pub(super) fn gated(
    context: &Context,
    device: &Device,
    x: View<'_>,
    layer: GatedLinear<'_>,
    gate_up: &ViewMut<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    let call = call(x, &out, false)?;
    require_dtype("linear_gated", out.dtype(), x.dtype())?;
    let parts = [Part::new(&layer.gate, x.dtype())?, Part::new(&layer.up, x.dtype())?];
    if call.rows == 0 {
        return Ok(());
    }
    if few::fits(device, &call, &parts) && parts[0].values.dtype == parts[1].values.dtype {
        return few::gated(device, &call, &parts, layer.activation);
    }
    product(device, x, &[layer.gate, layer.up], gate_up, false)?;
    gate(context, layer.activation, gate_up.as_view(), out)
}

/// The shapes have been checked.
pub(super) fn grouped(
    device: &Device,
    x: View<'_>,
    experts: Experts<'_>,
    num_experts: usize,
    out: &ViewMut<'_>,
) -> Result<()> {
    let call = call(x, out, false)?;
    let weight = Part::of(experts.weight, x.dtype())?;
    let part = Part { n: out.cols(), ..weight };
    require_dtype(OP, experts.starts.dtype(), DType::U32)?;
    require_place(OP, "starts", experts.starts.place(), Place::Device)?;
    grouped::product(device, &call, &part, &grouped::Starts { start: address(experts.starts), num_experts })
}

/// Checks types and places of input and output.
fn call(x: View<'_>, out: &ViewMut<'_>, adds: bool) -> Result<Call> {
    require_float(OP, x.dtype())?;
    require_on_device(OP, "x", matrix(x), x.dtype(), (x.rows(), x.cols()))?;
    let dtype = if out.dtype() == DType::F32 { DType::F32 } else { x.dtype() };
    require_on_device(OP, "out", matrix_mut(out), dtype, (out.rows(), out.cols()))?;
    Ok(Call { x: operand(x), out: operand(out.as_view()), rows: x.rows(), k: x.cols(), adds })
}

fn address(view: View<'_>) -> DevicePtr {
    DevicePtr(view.ptr.addr() as u64)
}

fn operand(view: View<'_>) -> Operand {
    Operand { start: address(view), dtype: view.dtype(), row_stride: view.row_stride }
}

fn or_null(at: Option<DevicePtr>) -> Argument {
    at.unwrap_or(DevicePtr(0)).into()
}

/// Whether rows can be read 16 bytes at a time, to their end.
fn is_packed(operand: Operand, cols: usize) -> bool {
    operand.alignment() >= 16 && (cols * operand.dtype.size_in_bytes()).is_multiple_of(16)
}
