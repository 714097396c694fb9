//! What is done to a sum before it is an output.

use crate::simd::{Float, Simd};

/// Scale, bias and destination of consecutive outputs. The pointers are to the first output's.
#[derive(Clone, Copy)]
pub(super) struct Finish {
    pub(super) scales: Option<*const f32>,
    pub(super) bias: Option<*const f32>,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Whether the product is added to what lies at `out`.
    pub(super) adds: bool,
}

impl Finish {
    /// Writes one output.
    ///
    /// # Safety
    /// Row and output exist, and no other task writes them.
    #[inline(always)]
    pub(super) unsafe fn write_one(&self, row: usize, output: usize, sum: f32) {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = self.scales.map_or(1.0, |scales| *scales.add(output));
            let bias = self.bias.map_or(0.0, |bias| *bias.add(output));
            let out = self.out.add(row * self.out_stride + output);
            let product = sum * scale + bias;
            *out = if self.adds { *out + product } else { product };
        }
    }

    /// Writes `len` outputs from `output` on, with the arithmetic of [`Finish::write_one`].
    ///
    /// # Safety
    /// As there; `len <= LANES`.
    #[inline(always)]
    pub(super) unsafe fn write_lanes<S: Simd>(
        &self,
        simd: S,
        row: usize,
        output: usize,
        len: usize,
        sums: S::Vector,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let lanes = |from: *const f32| f32::load_part(simd, from.add(output), len);
            let scales = self.scales.map_or(simd.splat(1.0), lanes);
            let bias = self.bias.map_or(simd.splat(0.0), lanes);
            let product = simd.add(simd.mul(sums, scales), bias);
            let out = self.out.add(row * self.out_stride + output);
            let value = if self.adds { simd.add(f32::load_part(simd, out, len), product) } else { product };
            f32::store_part(simd, out, len, value);
        }
    }
}
