//! The layouts in which weights lie in memory. A checkpoint's format is parsed into one of them.

use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use crate::ops::operands::{require, require_dtype, require_float, require_place};
use crate::{Context, DType, Error, Place, Result, Tensor, View};

const OP: &str = "int8 weight";

/// The weight of a linear layer, `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// f32, f16 or bf16, any row stride.
    Dense(&'a Tensor),
    /// Integers with one scale for each output.
    Int8(&'a Int8Weight),
}

impl Weight<'_> {
    /// Number of outputs, n.
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.rows(),
            Self::Int8(weight) => weight.rows(),
        }
    }

    /// Number of inputs, k.
    pub fn cols(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.cols(),
            Self::Int8(weight) => weight.cols(),
        }
    }

    /// Bytes that one use reads.
    pub fn size_in_bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.size_in_bytes(),
            Self::Int8(weight) => weight.size_in_bytes(),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::Dense(weight) => require_float("linear", weight.dtype()),
            // Checked when it was made.
            Self::Int8(_) => Ok(()),
        }
    }

    pub(super) fn require_place(&self, name: &str, place: Place) -> Result<()> {
        match self {
            Self::Dense(weight) => require_place("linear", name, weight.place(), place),
            Self::Int8(weight) => {
                require_place("linear", name, weight.values.place(), place)?;
                require_place("linear", name, weight.scales.place(), place)
            }
        }
    }
}

impl<'a> From<&'a Tensor> for Weight<'a> {
    fn from(weight: &'a Tensor) -> Self {
        Self::Dense(weight)
    }
}

impl<'a> From<&'a Int8Weight> for Weight<'a> {
    fn from(weight: &'a Int8Weight) -> Self {
        Self::Int8(weight)
    }
}

/// A weight as signed 8-bit integers with one f32 scale for each output: `w[n, k] = scales[n] * values[n, k]`.
///
/// A product is `scales[n] * sum over k of values[n, k] * x[k]` with x in f32: the scale is applied once, to the sum.
/// Clones share the storage.
#[derive(Clone, Debug)]
pub struct Int8Weight {
    /// `[n, k]`: the bytes are two's complements, for which candle has no element type.
    values: Tensor,
    /// `[1, n]` f32.
    scales: Tensor,
}

impl Int8Weight {
    /// Integers and scales as they are: `values` is `[n, k]` bytes (u8) that are read as signed, `scales` `[1, n]` f32.
    pub fn new(values: Tensor, scales: Tensor) -> Result<Self> {
        if values.dtype() != DType::U8 {
            return Err(Error::DType { op: OP, dtype: values.dtype(), supported: "u8" });
        }
        require_dtype(OP, scales.dtype(), DType::F32)?;
        require(OP, scales.rows() == 1 && scales.cols() == values.rows(), || {
            let (rows, cols) = (scales.rows(), scales.cols());
            format!("scales are [{rows}, {cols}], expected [1, {}]", values.rows())
        })?;
        Ok(Self { values, scales })
    }

    /// Quantizes a weight `[n, k]` of f32, f16 or bf16 as EETQ does: an output's scale is its greatest magnitude / 128, a
    /// value the quotient rounded to nearest (halves away from zero) and limited to -128 ..= 127. An output of zeros has
    /// scale 0. Unlike EETQ's, the scales are not rounded to f16.
    ///
    /// Values that are not finite are refused.
    pub fn quantize(context: &Context, dense: &Tensor) -> Result<Self> {
        let (n, k) = (dense.rows(), dense.cols());
        let mut values = Tensor::zeros(n, k, DType::U8);
        let mut scales = Tensor::zeros(1, n, DType::F32);
        let outputs = values.as_mut_slice::<u8>().chunks_mut(k.max(1)).zip(scales.as_mut_slice::<f32>());
        // What one task writes; no other looks at it.
        let outputs: Vec<_> = outputs.map(Mutex::new).collect();
        let refusal = Mutex::new(None);
        let widen_row: fn(View<'_>, usize, &mut [f32]) = match dense.dtype() {
            DType::F32 => widen_row::<f32>,
            DType::F16 => widen_row::<f16>,
            DType::BF16 => widen_row::<bf16>,
            dtype => return Err(Error::DType { op: OP, dtype, supported: "f32, f16, bf16" }),
        };
        context.parallel_for(outputs.len().div_ceil(ROWS_PER_TASK), |task| {
            let mut row = vec![0.0; k];
            let first = task * ROWS_PER_TASK;
            for (n, output) in outputs.iter().enumerate().skip(first).take(ROWS_PER_TASK) {
                widen_row(dense.view(), n, &mut row);
                let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
                let (values, scale) = &mut *output;
                if let Err(k) = quantize_row(&row, values, scale) {
                    *refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some((n, k, row[k]));
                }
            }
        });
        drop(outputs);
        if let Some((n, k, value)) = refusal.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let message = format!("the value at [{n}, {k}] is {value}: only finite weights can be quantized");
            return Err(Error::Shape { op: OP, message });
        }
        Self::new(values, scales)
    }

    /// The weight where operations expect it, as [`Context::upload`].
    pub fn upload(&self, context: &Context) -> Result<Self> {
        Ok(Self { values: context.upload(&self.values)?, scales: context.upload(&self.scales)? })
    }

    /// Number of outputs, n.
    pub fn rows(&self) -> usize {
        self.values.rows()
    }

    /// Number of inputs, k.
    pub fn cols(&self) -> usize {
        self.values.cols()
    }

    /// Bytes of integers and scales.
    pub fn size_in_bytes(&self) -> usize {
        self.values.size_in_bytes() + self.scales.size_in_bytes()
    }

    /// The integers, `[n, k]`: u8 that stand for i8.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The scales, `[1, n]` f32.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// Outputs `start .. start + len`, sharing the storage.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_rows(&self, start: usize, len: usize) -> Self {
        Self { values: self.values.narrow_rows(start, len), scales: self.scales.narrow_cols(start, len) }
    }

    /// Inputs `start .. start + len`, sharing the storage: the scales stay those of the whole outputs.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_cols(&self, start: usize, len: usize) -> Self {
        Self { values: self.values.narrow_cols(start, len), scales: self.scales.clone() }
    }
}

/// A number that is an f32 exactly.
trait ToF32: crate::Element {
    fn to_f32(self) -> f32;
}
impl ToF32 for f32 {
    fn to_f32(self) -> f32 {
        self
    }
}
impl ToF32 for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}
impl ToF32 for bf16 {
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Rows of a weight that a task quantizes.
const ROWS_PER_TASK: usize = 16;

fn widen_row<T: ToF32>(dense: View<'_>, row: usize, to: &mut [f32]) {
    to.iter_mut().zip(dense.row::<T>(row)).for_each(|(to, from)| *to = from.to_f32());
}

/// Returns where a value is not finite, if one is.
fn quantize_row(row: &[f32], values: &mut [u8], scale: &mut f32) -> Result<(), usize> {
    /// The greatest magnitude of the integers, which are -128 ..= 127.
    const STEPS: f32 = 128.0;
    // Zero times a number is zero, but NaN for those that are not finite.
    if row.iter().fold(0.0, |sum, value| sum + value * 0.0).is_nan() {
        return Err(row.iter().position(|value| !value.is_finite()).unwrap_or_default());
    }
    *scale = row.iter().fold(0.0_f32, |greatest, value| greatest.max(value.abs())) / STEPS;
    if *scale > 0.0 {
        for (to, value) in values.iter_mut().zip(row) {
            // The cast limits to the type's range.
            *to = ((value / *scale).round() as i8).cast_unsigned();
        }
    }
    Ok(())
}
