//! Sixteen lanes in plain Rust, vectorized by the compiler as far as the target's baseline goes.

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Vector = [f32; LANES];

#[inline(always)]
fn zip(a: Vector, b: Vector, f: impl Fn(f32, f32) -> f32) -> Vector {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Folds halves onto each other until one lane is left: the tree of the vector instructions.
#[inline(always)]
fn fold(mut a: Vector, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            a[i] = f(a[i], a[i + width]);
        }
        width /= 2;
    }
    a[0]
}

/// As `f16::to_f32`, but without a branch, so that the compiler makes vectors of it.
#[inline(always)]
fn widen_f16(value: f16) -> f32 {
    const INFINITY: u32 = 0x7c00;
    let bits = u32::from(value.to_bits());
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // The exponent's bias grows by 112; the multiplication does it for denormal numbers too.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let special = if magnitude >= INFINITY { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | sign)
}

impl Simd for Portable {
    type Vector = Vector;
    const WIDE: bool = false;
    const PANEL_ROWS: usize = 2;

    fn call<K: Kernel>(self, kernel: K) {
        kernel.run(self);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Vector {
        [value; LANES]
    }
    #[inline(always)]
    fn add(self, a: Vector, b: Vector) -> Vector {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Vector, b: Vector) -> Vector {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Vector, b: Vector) -> Vector {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Vector, b: Vector) -> Vector {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Vector, b: Vector) -> Vector {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Vector, b: Vector) -> Vector {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: Vector, b: Vector, c: Vector) -> Vector {
        // Without the instruction, one rounding would be a library call per lane.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    fn round(self, a: Vector) -> Vector {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn exp2_of_integer(self, n: Vector) -> Vector {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn sum(self, a: Vector) -> f32 {
        fold(a, |a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self, a: Vector) -> f32 {
        fold(a, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Vector>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f16; LANES]>().read_unaligned() }.map(widen_f16)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[bf16; LANES]>().read_unaligned() }
            .map(|value| f32::from_bits(u32::from(value.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: Vector) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Vector>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, value: Vector) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f16; LANES]>().write_unaligned(value.map(f16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: Vector) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[bf16; LANES]>().write_unaligned(value.map(bf16::from_f32)) }
    }
    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _address: *const u8) {}
    #[inline(always)]
    fn prefetch_to_write(self, _address: *const u8) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_as_half_does() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let (got, want) = (widen_f16(value), value.to_f32());
            assert!(
                got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                "{bits:#x}: {got}, {want}"
            );
        }
    }
}
