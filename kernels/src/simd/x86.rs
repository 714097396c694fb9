//! Sixteen lanes as two AVX2 registers or one AVX-512 register.
//!
//! One reason makes all unsafe blocks of this file sound, so that they do not repeat it: an `Avx2` or `Avx512` value is
//! made only by its `detect`, which has asked the CPU, so the instructions exist; loads and stores are unaligned ones
//! within what the caller promised.
#![expect(
    clippy::cast_ptr_alignment,
    reason = "the unaligned loads and stores take pointers to whole vectors"
)]

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, __m256, __m256bh, __m256i, __m512, __m512bh, _CMP_UNORD_Q, _MM_FROUND_NO_EXC,
    _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _MM_HINT_T1, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32,
    _mm_loadu_si128, _mm_max_ps, _mm_max_ss, _mm_movehl_ps, _mm_prefetch, _mm_shuffle_ps, _mm_storeu_si128,
    _mm_unpackhi_epi64, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_blendv_ps,
    _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtepi8_epi32,
    _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_cvtps_ph,
    _mm256_div_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_packus_epi32,
    _mm256_permute2f128_ps, _mm256_permute4x64_epi64, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps, _mm256_storeu_si256,
    _mm256_sub_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512, _mm512_castps512_ps256, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtepi8_epi32, _mm512_cvtepi32_epi16, _mm512_cvtepi32_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_cvtps_ph,
    _mm512_div_ps, _mm512_dpbf16_ps, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_fpclass_ps_mask,
    _mm512_loadu_ps, _mm512_mask_blend_epi32, _mm512_mask_or_epi32, _mm512_maskz_sub_ps, _mm512_max_ps,
    _mm512_min_ps, _mm512_mul_ps, _mm512_or_si512, _mm512_permutex2var_epi64, _mm512_roundscale_ps,
    _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi64, _mm512_shuffle_f32x4,
    _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_sub_ps, _mm512_unpackhi_epi16,
    _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_epi16, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use std::mem::transmute;

use half::{bf16, f16};

use super::{Kernel, Simd};

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// The sum of eight lanes: the lower half of the tree, shared by both.
#[inline(always)]
fn sum_of_eight(a: __m256) -> f32 {
    // SAFETY: see the module's head.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

#[inline(always)]
fn max_of_eight(a: __m256) -> f32 {
    // SAFETY: see the module's head.
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

#[inline(always)]
fn prefetch(address: *const u8) {
    // SAFETY: a hint that reads nothing and is in every x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[inline(always)]
fn prefetch_far(address: *const u8) {
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
}

#[inline(always)]
fn prefetch_to_write(address: *const u8) {
    // SAFETY: as above; the compiler's function becomes an ordinary request where it does not know that the CPU has this one,
    // which is one or does nothing on all that have AVX2.
    unsafe { asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly)) }
}

#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let available = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        available.then_some(Self(()))
    }
}

/// Lanes 0 to 7 and 8 to 15.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

/// `2^n` of eight integers.
#[inline(always)]
fn exp2_of_eight(n: __m256) -> __m256 {
    // SAFETY: see the module's head.
    unsafe {
        let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
    }
}

#[inline(always)]
fn transpose_eight(mut v: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: see the module's head.
    unsafe {
        // In each half, a square of four rows and four columns; then the halves, as a square themselves.
        for i in [0, 4] {
            let (a, b) = (_mm256_unpacklo_ps(v[i], v[i + 1]), _mm256_unpackhi_ps(v[i], v[i + 1]));
            let (c, d) = (_mm256_unpacklo_ps(v[i + 2], v[i + 3]), _mm256_unpackhi_ps(v[i + 2], v[i + 3]));
            v[i] = _mm256_shuffle_ps::<0x44>(a, c);
            v[i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            v[i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            v[i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        for i in 0..4 {
            let (low, high) = (v[i], v[i + 4]);
            v[i] = _mm256_permute2f128_ps::<0x20>(low, high);
            v[i + 4] = _mm256_permute2f128_ps::<0x31>(low, high);
        }
    }
    v
}

/// # Safety
/// Eight elements can be read at `from`.
#[inline(always)]
unsafe fn load_eight_bf16(from: *const bf16) -> __m256 {
    // SAFETY: see the module's head.
    unsafe {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast::<__m128i>()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

/// Rounded to bf16, in the lower halves of eight integers.
#[inline(always)]
fn round_eight_to_bf16(v: __m256) -> __m256i {
    // SAFETY: see the module's head.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
        let chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
        _mm256_srli_epi32::<16>(_mm256_castps_si256(chosen))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(simd: Avx2, kernel: K) {
    kernel.run(simd);
}

impl Simd for Avx2 {
    type Vector = Pair;
    const WIDE: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        // SAFETY: see the module's head.
        unsafe { run_avx2(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        // SAFETY: see the module's head; so for all below.
        let half = unsafe { _mm256_set1_ps(value) };
        Pair(half, half)
    }
    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        unsafe { Pair(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        unsafe { Pair(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        unsafe { Pair(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        unsafe { Pair(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        unsafe { Pair(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        unsafe { Pair(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        unsafe { Pair(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn transpose(self, v: [Pair; 16]) -> [Pair; 16] {
        // Four squares of eight.
        let square = |first: usize, upper: bool| {
            transpose_eight(std::array::from_fn(|i| if upper { v[first + i].1 } else { v[first + i].0 }))
        };
        let lower = [square(0, false), square(8, false)];
        let upper = [square(0, true), square(8, true)];
        std::array::from_fn(|i| {
            let [left, right] = if i < 8 { lower } else { upper };
            Pair(left[i % 8], right[i % 8])
        })
    }
    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        unsafe { Pair(_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1)) }
    }
    #[inline(always)]
    fn exp2_of_integer(self, n: Pair) -> Pair {
        Pair(exp2_of_eight(n.0), exp2_of_eight(n.1))
    }
    #[inline(always)]
    fn sum(self, a: Pair) -> f32 {
        sum_of_eight(unsafe { _mm256_add_ps(a.0, a.1) })
    }
    #[inline(always)]
    fn max_lane(self, a: Pair) -> f32 {
        max_of_eight(unsafe { _mm256_max_ps(a.0, a.1) })
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Pair {
        unsafe { Pair(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Pair {
        unsafe {
            Pair(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast::<__m128i>())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast::<__m128i>())),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Pair {
        unsafe { Pair(load_eight_bf16(from), load_eight_bf16(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Pair {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast::<__m128i>());
            let upper = _mm_unpackhi_epi64(bytes, bytes);
            Pair(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(upper)),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: Pair) {
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, value: Pair) {
        unsafe {
            _mm_storeu_si128(to.cast::<__m128i>(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value.0));
            _mm_storeu_si128(
                to.add(8).cast::<__m128i>(),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value.1),
            );
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: Pair) {
        unsafe {
            // The pack works within 128-bit halves; the permutation puts the quarters in order.
            let packed = _mm256_packus_epi32(round_eight_to_bf16(value.0), round_eight_to_bf16(value.1));
            _mm256_storeu_si256(to.cast::<__m256i>(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        prefetch(address);
    }
    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        prefetch_far(address);
    }
    #[inline(always)]
    fn prefetch_to_write(self, address: *const u8) {
        prefetch_to_write(address);
    }
}

/// With or without `AVX512_BF16`.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    pub(crate) fn detect() -> Option<Self> {
        let available = Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!BF16 || is_x86_feature_detected!("avx512bf16"));
        available.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<K: Kernel>(simd: Avx512<false>, kernel: K) {
    kernel.run(simd);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn run_avx512_bf16<K: Kernel>(simd: Avx512<true>, kernel: K) {
    kernel.run(simd);
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type Vector = __m512;
    const WIDE: bool = true;
    const PANEL_ROWS: usize = 14;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        // SAFETY: see the module's head; so for all below.
        unsafe { if BF16 { run_avx512_bf16(Avx512(()), kernel) } else { run_avx512(Avx512(()), kernel) } }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn dot_bf16(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        assert!(BF16, "asked of the level");
        unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b)) }
    }
    #[inline(always)]
    fn interleave(self, a: __m512, b: __m512) -> [__m512; 2] {
        unsafe {
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            // In each quarter; then the quarters, as pairs of 64 bits.
            let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
            let first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            let second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            [first, second]
                .map(|quarters| _mm512_castsi512_ps(_mm512_permutex2var_epi64(low, quarters, high)))
        }
    }
    #[inline(always)]
    fn split_bf16(self, a: __m512) -> [__m512; 2] {
        /// The bits of an f32 that a bf16 has.
        const UPPER_HALF: i32 = 0xffff_u32.cast_signed() << 16;
        /// Of the classes, quiet and signaling NaN, and with them the infinities.
        const NAN: i32 = 0x81;
        const NOT_FINITE: i32 = NAN | 0x18;
        unsafe {
            let bits = _mm512_castps_si512(a);
            let upper = _mm512_and_si512(bits, _mm512_set1_epi32(UPPER_HALF));
            // Cut off, some NaN would be infinities: so they become quiet ones, which have this bit.
            let nan = _mm512_fpclass_ps_mask::<NAN>(a);
            let upper = _mm512_mask_or_epi32(upper, nan, upper, _mm512_set1_epi32(0x0040_0000));
            let upper = _mm512_castsi512_ps(upper);
            let finite = !_mm512_fpclass_ps_mask::<NOT_FINITE>(a);
            [upper, _mm512_maskz_sub_ps(finite, a, upper)]
        }
    }
    #[inline(always)]
    fn pair_bf16(self, a: __m512, b: __m512) -> __m512 {
        unsafe {
            let lower = _mm512_srli_epi32::<16>(_mm512_castps_si512(a));
            _mm512_castsi512_ps(_mm512_or_si512(lower, _mm512_castps_si512(b)))
        }
    }
    #[inline(always)]
    fn transpose(self, mut v: [__m512; 16]) -> [__m512; 16] {
        // In each quarter, a square of four rows and four columns; then the quarters, as a square themselves.
        unsafe {
            for i in (0..16).step_by(4) {
                let (a, b) = (_mm512_unpacklo_ps(v[i], v[i + 1]), _mm512_unpackhi_ps(v[i], v[i + 1]));
                let (c, d) = (_mm512_unpacklo_ps(v[i + 2], v[i + 3]), _mm512_unpackhi_ps(v[i + 2], v[i + 3]));
                let pair = |lower, upper| {
                    let (lower, upper) = (_mm512_castps_pd(lower), _mm512_castps_pd(upper));
                    [_mm512_unpacklo_pd(lower, upper), _mm512_unpackhi_pd(lower, upper)]
                };
                let ([first, second], [third, fourth]) = (pair(a, c), pair(b, d));
                v[i] = _mm512_castpd_ps(first);
                v[i + 1] = _mm512_castpd_ps(second);
                v[i + 2] = _mm512_castpd_ps(third);
                v[i + 3] = _mm512_castpd_ps(fourth);
            }
            for i in 0..4 {
                const EVEN: i32 = 0x88;
                const ODD: i32 = 0xdd;
                let even_low = _mm512_shuffle_f32x4::<EVEN>(v[i], v[i + 4]);
                let odd_low = _mm512_shuffle_f32x4::<ODD>(v[i], v[i + 4]);
                let even_high = _mm512_shuffle_f32x4::<EVEN>(v[i + 8], v[i + 12]);
                let odd_high = _mm512_shuffle_f32x4::<ODD>(v[i + 8], v[i + 12]);
                v[i] = _mm512_shuffle_f32x4::<EVEN>(even_low, even_high);
                v[i + 4] = _mm512_shuffle_f32x4::<EVEN>(odd_low, odd_high);
                v[i + 8] = _mm512_shuffle_f32x4::<ODD>(even_low, even_high);
                v[i + 12] = _mm512_shuffle_f32x4::<ODD>(odd_low, odd_high);
            }
        }
        v
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<NEAREST>(a) }
    }
    #[inline(always)]
    fn exp2_of_integer(self, n: __m512) -> __m512 {
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn times_exp2_of_integer(self, a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe { sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))) }
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        unsafe { max_of_eight(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast::<__m256i>())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast::<__m256i>()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast::<__m128i>()))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, value: __m512) {
        unsafe {
            _mm256_storeu_si256(to.cast::<__m256i>(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let chosen = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
            _mm256_storeu_si256(to.cast::<__m256i>(), _mm512_cvtepi32_epi16(chosen));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_factor(self, to: *mut bf16, value: __m512) {
        unsafe {
            if BF16 {
                let rounded = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value));
                _mm256_storeu_si256(to.cast::<__m256i>(), rounded);
            } else {
                self.store_bf16(to, value);
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        prefetch(address);
    }
    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        prefetch_far(address);
    }
    #[inline(always)]
    fn prefetch_to_write(self, address: *const u8) {
        prefetch_to_write(address);
    }
}
