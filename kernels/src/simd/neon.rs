//! Sixteen lanes as four NEON registers, which every 64-bit Arm has.
//!
//! With one rounding per multiply-add and the same tree of additions as the others, it gives their bits.
//!
//! One reason makes all unsafe blocks of this file sound, so that they do not repeat it: a `Neon` value is made only by
//! its `detect`, which has asked the CPU, so the instructions exist; loads and stores are unaligned ones within what the
//! caller promised.

use std::arch::aarch64::{
    float32x4_t, uint16x8_t, uint32x4_t, vadd_f32, vaddq_f32, vaddq_s32, vaddq_u32, vandq_u32, vbslq_f32,
    vbslq_u32, vceqq_f32, vcgtq_f32, vcltq_f32, vcombine_u16, vcvt_f16_f32, vcvt_f32_f16, vcvt_high_f16_f32,
    vcvt_high_f32_f16, vcvtq_f32_s32, vcvtq_s32_f32, vdivq_f32, vdup_lane_f32, vdupq_n_f32, vdupq_n_s32,
    vdupq_n_u32, vfmaq_f32, vget_high_f32, vget_lane_f32, vget_low_f16, vget_low_f32, vget_low_s8,
    vget_low_s16, vget_low_u16, vld1q_f32, vld1q_s8, vld1q_u16, vmovl_high_s8, vmovl_high_s16, vmovl_s8,
    vmovl_s16, vmulq_f32, vorrq_u32, vreinterpretq_f16_u16, vreinterpretq_f32_f64, vreinterpretq_f32_s32,
    vreinterpretq_f32_u32, vreinterpretq_f64_f32, vreinterpretq_u16_f16, vreinterpretq_u32_f32, vrndnq_f32,
    vshll_high_n_u16, vshll_n_u16, vshlq_n_s32, vshrn_n_u32, vshrq_n_u32, vst1q_f32, vst1q_u16, vsubq_f32,
    vtrn1q_f32, vtrn1q_f64, vtrn2q_f32, vtrn2q_f64,
};
use std::arch::asm;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.
type Quarters = [float32x4_t; 4];

/// The operation on each quarter of its operands.
macro_rules! each_quarter {
    ($operation:ident($($operand:expr),+)) => {
        // SAFETY: see the module's head.
        unsafe {
            [
                $operation($($operand[0]),+),
                $operation($($operand[1]),+),
                $operation($($operand[2]),+),
                $operation($($operand[3]),+),
            ]
        }
    };
}

/// The greater of each lane; `b` where one is NaN, unlike the instruction for it.
#[inline(always)]
unsafe fn max_of_four(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: see the module's head; so for all below.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

#[inline(always)]
unsafe fn min_of_four(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
}

/// `2^n` of four integers.
#[inline(always)]
unsafe fn exp2_of_four(n: float32x4_t) -> float32x4_t {
    unsafe {
        let exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
        vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
    }
}

#[inline(always)]
unsafe fn widen_eight_f16(bits: uint16x8_t) -> [float32x4_t; 2] {
    unsafe {
        let eight = vreinterpretq_f16_u16(bits);
        [vcvt_f32_f16(vget_low_f16(eight)), vcvt_high_f32_f16(eight)]
    }
}

#[inline(always)]
unsafe fn widen_eight_bf16(bits: uint16x8_t) -> [float32x4_t; 2] {
    unsafe {
        let (low, high) = (vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits));
        [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
    }
}

#[inline(always)]
unsafe fn round_eight_to_f16(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    unsafe { vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high)) }
}

#[inline(always)]
unsafe fn round_eight_to_bf16(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    unsafe {
        let (low, high) = (round_four_to_bf16(low), round_four_to_bf16(high));
        vcombine_u16(vshrn_n_u32::<16>(low), vshrn_n_u32::<16>(high))
    }
}

/// Rounded to bf16, in the upper halves of four integers.
#[inline(always)]
unsafe fn round_four_to_bf16(v: float32x4_t) -> uint32x4_t {
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vbslq_u32(vceqq_f32(v, v), rounded, quiet)
    }
}

/// A square of four rows and four columns.
#[inline(always)]
unsafe fn transpose_four([a, b, c, d]: [float32x4_t; 4]) -> [float32x4_t; 4] {
    unsafe {
        let (even_ab, odd_ab) = (vtrn1q_f32(a, b), vtrn2q_f32(a, b));
        let (even_cd, odd_cd) = (vtrn1q_f32(c, d), vtrn2q_f32(c, d));
        let pairs = |ab, cd| {
            let (ab, cd) = (vreinterpretq_f64_f32(ab), vreinterpretq_f64_f32(cd));
            [vreinterpretq_f32_f64(vtrn1q_f64(ab, cd)), vreinterpretq_f32_f64(vtrn2q_f64(ab, cd))]
        };
        let ([first, third], [second, fourth]) = (pairs(even_ab, even_cd), pairs(odd_ab, odd_cd));
        [first, second, third, fourth]
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

#[target_feature(enable = "neon")]
fn run_neon<K: Kernel>(simd: Neon, kernel: K) {
    kernel.run(simd);
}

impl Simd for Neon {
    type Vector = Quarters;
    const WIDE: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        unsafe { run_neon(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Quarters {
        [unsafe { vdupq_n_f32(value) }; 4]
    }
    #[inline(always)]
    fn add(self, a: Quarters, b: Quarters) -> Quarters {
        each_quarter!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Quarters, b: Quarters) -> Quarters {
        each_quarter!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Quarters, b: Quarters) -> Quarters {
        each_quarter!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Quarters, b: Quarters) -> Quarters {
        each_quarter!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: Quarters, b: Quarters) -> Quarters {
        each_quarter!(max_of_four(a, b))
    }
    #[inline(always)]
    fn min(self, a: Quarters, b: Quarters) -> Quarters {
        each_quarter!(min_of_four(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Quarters, b: Quarters, c: Quarters) -> Quarters {
        each_quarter!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn transpose(self, rows: [Quarters; 16]) -> [Quarters; 16] {
        let mut columns = rows;
        for group in 0..4 {
            for quarter in 0..4 {
                let square: [float32x4_t; 4] = std::array::from_fn(|i| rows[4 * group + i][quarter]);
                for (i, four) in unsafe { transpose_four(square) }.into_iter().enumerate() {
                    columns[4 * quarter + i][group] = four;
                }
            }
        }
        columns
    }
    #[inline(always)]
    fn round(self, a: Quarters) -> Quarters {
        each_quarter!(vrndnq_f32(a))
    }
    #[inline(always)]
    fn exp2_of_integer(self, n: Quarters) -> Quarters {
        each_quarter!(exp2_of_four(n))
    }
    #[inline(always)]
    fn sum(self, a: Quarters) -> f32 {
        unsafe {
            let four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(vadd_f32(two, vdup_lane_f32::<1>(two)))
        }
    }
    #[inline(always)]
    fn max_lane(self, a: Quarters) -> f32 {
        unsafe {
            let four = max_of_four(max_of_four(a[0], a[2]), max_of_four(a[1], a[3]));
            let (low, high) = (vget_low_f32(four), vget_high_f32(four));
            let (a, b) = (vget_lane_f32::<0>(low), vget_lane_f32::<1>(low));
            let (c, d) = (vget_lane_f32::<0>(high), vget_lane_f32::<1>(high));
            let (even, odd) = (if a > c { a } else { c }, if b > d { b } else { d });
            if even > odd { even } else { odd }
        }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Quarters {
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4)), vld1q_f32(from.add(8)), vld1q_f32(from.add(12))] }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Quarters {
        unsafe {
            let [a, b] = widen_eight_f16(vld1q_u16(from.cast()));
            let [c, d] = widen_eight_f16(vld1q_u16(from.add(8).cast()));
            [a, b, c, d]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Quarters {
        unsafe {
            let [a, b] = widen_eight_bf16(vld1q_u16(from.cast()));
            let [c, d] = widen_eight_bf16(vld1q_u16(from.add(8).cast()));
            [a, b, c, d]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Quarters {
        unsafe {
            let bytes = vld1q_s8(from);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: Quarters) {
        unsafe {
            vst1q_f32(to, value[0]);
            vst1q_f32(to.add(4), value[1]);
            vst1q_f32(to.add(8), value[2]);
            vst1q_f32(to.add(12), value[3]);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, value: Quarters) {
        unsafe {
            vst1q_u16(to.cast(), round_eight_to_f16(value[0], value[1]));
            vst1q_u16(to.add(8).cast(), round_eight_to_f16(value[2], value[3]));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: Quarters) {
        unsafe {
            vst1q_u16(to.cast(), round_eight_to_bf16(value[0], value[1]));
            vst1q_u16(to.add(8).cast(), round_eight_to_bf16(value[2], value[3]));
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // A hint that reads nothing, whatever the address; the compiler has no stable function for it.
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly)) }
    }
    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        // As above.
        unsafe { asm!("prfm pldl2keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly)) }
    }
    #[inline(always)]
    fn prefetch_to_write(self, address: *const u8) {
        // As above.
        unsafe { asm!("prfm pstl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly)) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::portable::Portable;
    use super::super::{Float, LANES};
    use super::*;

    fn neon() -> Neon {
        Neon::detect().expect("every 64-bit Arm has it")
    }

    /// Numbers of every kind: both zeros, denormal, infinite and not a number among many magnitudes.
    fn numbers() -> impl Iterator<Item = [f32; LANES]> {
        const SPECIAL: [f32; 12] = [
            0.0,
            -0.0,
            1e-40,
            -3e-8,
            0.5,
            1.5,
            -2.5,
            65519.996,
            65520.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
        ];
        let mut state = 1_u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state >> 29 == 0 {
                SPECIAL[(state >> 8) as usize % SPECIAL.len()]
            } else {
                f32::from_bits(state)
            }
        };
        (0..10_000).map(move |_| std::array::from_fn(|_| next()))
    }

    fn lanes<S: Simd>(simd: S, vector: S::Vector) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has `LANES` elements.
        unsafe { simd.store(lanes.as_mut_ptr(), vector) }
        lanes
    }

    /// Which of several NaNs comes out is not defined, so all are one here.
    fn bits(values: [f32; LANES]) -> [u32; LANES] {
        values.map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() })
    }

    /// All that an instruction set computes from three vectors.
    fn results<S: Simd>(simd: S, [a, b, c]: [[f32; LANES]; 3]) -> Vec<[u32; LANES]> {
        // SAFETY: the arrays have `LANES` elements.
        let [a, b, c] = [a, b, c].map(|values| unsafe { simd.load(values.as_ptr()) });
        let vectors = [
            simd.add(a, b),
            simd.sub(a, b),
            simd.mul(a, b),
            simd.div(a, b),
            simd.max(a, b),
            simd.min(a, b),
            simd.mul_add(a, b, c),
            simd.round(a),
            simd.splat(simd.sum(a)),
            simd.splat(simd.max_lane(a)),
        ];
        vectors.map(|vector| bits(lanes(simd, vector))).to_vec()
    }

    #[test]
    fn neon_computes_the_bits_of_plain_rust() {
        let numbers: Vec<_> = numbers().collect();
        for three in numbers.windows(3) {
            let three = [three[0], three[1], three[2]];
            assert_eq!(results(neon(), three), results(Portable, three), "{three:?}");
        }
    }

    #[test]
    fn powers_of_two_are_exact() {
        for n in -126..=127_i16 {
            let powers = lanes(neon(), neon().exp2_of_integer(neon().splat(f32::from(n))));
            assert_eq!(bits(powers), bits([2.0_f32.powi(i32::from(n)); LANES]), "2^{n}");
        }
    }

    #[test]
    fn a_transposed_square_has_its_columns_as_rows() {
        let rows: [[f32; LANES]; LANES] =
            std::array::from_fn(|row| std::array::from_fn(|lane| (100 * row + lane) as f32));
        // SAFETY: the rows have `LANES` elements.
        let columns = neon().transpose(rows.map(|row| unsafe { neon().load(row.as_ptr()) }));
        for (i, column) in columns.into_iter().enumerate() {
            assert_eq!(bits(lanes(neon(), column)), bits(rows.map(|row| row[i])), "column {i}");
        }
    }

    /// Bits of sixteen elements after loading them, and after storing them again.
    fn there_and_back<S: Simd, T: Float>(simd: S, elements: &[T]) -> ([u32; LANES], [f32; LANES]) {
        let mut stored = [T::ZERO; LANES];
        // SAFETY: both have `LANES` elements.
        unsafe {
            let vector = T::load(simd, elements.as_ptr());
            T::store(simd, stored.as_mut_ptr(), vector);
            (bits(lanes(simd, vector)), lanes(simd, T::load(simd, stored.as_ptr())))
        }
    }

    fn every_element_is_loaded_and_stored_as_by_plain_rust<T: Float>(from_bits: fn(u16) -> T) {
        let all: Vec<T> = (0..=u16::MAX).map(from_bits).collect();
        for sixteen in all.chunks_exact(LANES) {
            let (loaded, stored) = there_and_back(neon(), sixteen);
            assert_eq!(loaded, there_and_back(Portable, sixteen).0);
            assert_eq!(loaded, bits(stored));
        }
    }

    #[test]
    fn every_f16_and_bf16_is_loaded_and_stored_as_by_plain_rust() {
        every_element_is_loaded_and_stored_as_by_plain_rust(f16::from_bits);
        every_element_is_loaded_and_stored_as_by_plain_rust(bf16::from_bits);
    }

    #[test]
    fn every_i8_is_loaded_exactly() {
        let all: Vec<i8> = (i8::MIN..=i8::MAX).collect();
        for sixteen in all.chunks_exact(LANES) {
            // SAFETY: there are `LANES` elements.
            let loaded = lanes(neon(), unsafe { neon().load_i8(sixteen.as_ptr()) });
            assert_eq!(loaded.as_slice(), sixteen.iter().copied().map(f32::from).collect::<Vec<_>>());
        }
    }

    #[test]
    fn numbers_are_rounded_to_f16_and_bf16_as_by_plain_rust() {
        for values in numbers() {
            let (mut halves, mut brains) = ([f16::ZERO; LANES], [bf16::ZERO; LANES]);
            // SAFETY: all have `LANES` elements.
            unsafe {
                let vector = neon().load(values.as_ptr());
                neon().store_f16(halves.as_mut_ptr(), vector);
                neon().store_bf16(brains.as_mut_ptr(), vector);
            }
            for (value, (half, brain)) in values.into_iter().zip(halves.into_iter().zip(brains)) {
                assert_eq!(half.to_bits(), f16::from_f32(value).to_bits(), "{value} to f16");
                assert_eq!(brain.to_bits(), bf16::from_f32(value).to_bits(), "{value} to bf16");
            }
        }
    }

    #[test]
    fn vectors_may_lie_at_any_address() {
        let mut memory = [0.0_f32; LANES + 1];
        let values: [f32; LANES] = std::array::from_fn(|lane| lane as f32);
        // SAFETY: behind the first byte there is room for `LANES` elements.
        unsafe {
            let odd = memory.as_mut_ptr().byte_add(1);
            neon().store(odd, neon().load(values.as_ptr()));
            assert_eq!(bits(lanes(neon(), neon().load(odd))), bits(values));
        }
    }

    #[test]
    fn any_address_can_be_asked_for() {
        neon().prefetch(std::ptr::null());
        neon().prefetch(std::ptr::without_provenance(usize::MAX));
    }
}
