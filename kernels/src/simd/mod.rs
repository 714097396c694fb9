//! Vectors of sixteen f32 lanes, for each instruction set the same, so that one text of a kernel serves all and the order of
//! a reduction does not depend on the machine: AVX2, AVX-512 and NEON give the same bits.
//!
//! A kernel is a [`Kernel`]; [`Level::run`] compiles it once per instruction set and calls the one for this CPU. A value
//! of a [`Simd`] type exists only where its instructions do.
#![expect(
    clippy::inline_always,
    reason = "a kernel must be inlined into the function that enables its instructions"
)]

#[cfg_attr(all(not(emulated_tiles), not(target_arch = "x86_64")), path = "no_amx.rs")]
#[cfg_attr(emulated_tiles, path = "amx_emulated.rs")]
pub(crate) mod amx;
mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::{bf16, f16};

pub(crate) use math::{erf, exp, exp_of_nonpositive, silu, tanh};

/// Lanes of a vector, whatever the instruction set.
pub(crate) const LANES: usize = 16;

/// One vector's worth of memory, aligned for the fastest access.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub(crate) [f32; LANES]);

impl Lanes {
    pub(crate) const ZERO: Self = Self([0.0; LANES]);
}

/// Instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What the compiler makes of plain Rust.
    Portable,
    /// NEON of 64-bit Arm.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// As [`Level::Avx512`], and products of bf16.
    Avx512Bf16,
    /// As [`Level::Avx512Bf16`], and products of tiles of bf16.
    Amx,
}

impl Level {
    /// All, slowest first.
    pub const ALL: [Level; 6] =
        [Level::Portable, Level::Neon, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx];

    /// The fastest of this CPU.
    pub fn detect() -> Self {
        Self::fastest(|level| level != Level::Avx512Bf16 || Self::bf16_vectors_pay())
    }

    /// The fastest of this CPU among those that keep activations in f32 whatever the weights' type.
    pub fn detect_f32_activations() -> Self {
        Self::fastest(|level| !level.has_dot_bf16())
    }

    fn fastest(is_wanted: impl Fn(Self) -> bool) -> Self {
        let can_be = |level: &Self| level.is_available() && is_wanted(*level);
        Self::ALL.into_iter().rfind(can_be).unwrap_or(Level::Portable)
    }

    /// Whether vectors of bf16 are multiplied faster than widened to f32. On Intel's CPUs, where tiles are for that, one of their
    /// products takes as long as four multiply-adds of f32 (measured: 89 and 178 GFLOP/s of a Xeon of the fifth generation).
    fn bf16_vectors_pay() -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let vendor = std::arch::x86_64::__cpuid(0);
            [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() != b"GenuineIntel"
        }
        #[cfg(not(target_arch = "x86_64"))]
        true
    }

    /// Whether this CPU (and its system) has it.
    pub fn is_available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::Neon::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => x86::Avx512::<false>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => x86::Avx512::<true>::detect().is_some(),
            Level::Amx => Level::Avx512Bf16.is_available() && amx::Amx::detect().is_some(),
            _ => false,
        }
    }

    /// Runs the kernel, compiled for this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            Level::Portable => portable::Portable.call(kernel),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::Neon::detect().expect("checked by the context").call(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::Avx2::detect().expect("checked by the context").call(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 | Level::Amx => {
                x86::Avx512::<false>::detect().expect("checked by the context").call(kernel);
            }
            _ => portable::Portable.call(kernel),
        }
    }

    /// As [`Level::run`], with [`Simd::dot_bf16`] where the CPU has it. Kernels without it would be compiled once more to
    /// the same code.
    #[inline]
    pub(crate) fn run_with_dots<K: Kernel>(self, kernel: K) {
        #[cfg(target_arch = "x86_64")]
        if self.has_dot_bf16() {
            return x86::Avx512::<true>::detect().expect("checked by the context").call(kernel);
        }
        self.run(kernel);
    }

    /// Whether bf16 weights are multiplied with activations in bf16: [`Simd::dot_bf16`] may be called in
    /// [`Level::run_with_dots`].
    pub fn has_dot_bf16(self) -> bool {
        matches!(self, Level::Avx512Bf16 | Level::Amx)
    }

    /// Products of tiles, where this level has them.
    pub(crate) fn amx(self) -> Option<amx::Amx> {
        if self == Level::Amx { amx::Amx::detect() } else { None }
    }
}

/// A computation that is compiled for each instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    fn run<S: Simd>(self, simd: S);
}

/// Sixteen lanes of one instruction set.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type Vector: Copy;
    /// Whether there are registers for sixteen accumulators and their operands.
    const WIDE: bool;
    /// Rows of x for which a tile of [`Simd::WIDE`]'s one or two vectors has registers.
    const PANEL_ROWS: usize = 6;

    /// Runs a part of a kernel as a function of its own.
    fn call<K: Kernel>(self, kernel: K);

    fn splat(self, value: f32) -> Self::Vector;
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The greater; `b` where one is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The lesser; `b` where one is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once where the CPU can.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Adds to each lane of `sum` the two products of the pairs of bf16 in the lanes of `a` and `b`; only where
    /// [`Level::has_dot_bf16`].
    fn dot_bf16(self, _a: Self::Vector, _b: Self::Vector, _sum: Self::Vector) -> Self::Vector {
        unreachable!("asked of the level")
    }
    /// With both vectors as 32 elements of 16 bits: the first of `a`, the first of `b`, the second of `a`, ...; only where
    /// [`Level::amx`] is.
    fn interleave(self, _a: Self::Vector, _b: Self::Vector) -> [Self::Vector; 2] {
        unreachable!("asked of the level")
    }
    /// Each lane as a bf16, nearer to zero where it is none, and the rest: together, exactly the lane. An infinity and NaN have no
    /// rest. Only where [`Level::amx`] is.
    fn split_bf16(self, _a: Self::Vector) -> [Self::Vector; 2] {
        unreachable!("asked of the level")
    }
    /// Lanes that are bf16 as pairs: `a` lower, `b` upper. Only where [`Level::amx`] is.
    fn pair_bf16(self, _a: Self::Vector, _b: Self::Vector) -> Self::Vector {
        unreachable!("asked of the level")
    }
    /// Vector `i` of the result has lane `i` of each of the vectors.
    #[inline(always)]
    fn transpose(self, rows: [Self::Vector; LANES]) -> [Self::Vector; LANES] {
        let mut columns = [Lanes::ZERO; LANES];
        for (i, row) in rows.into_iter().enumerate() {
            let mut lanes = Lanes::ZERO;
            // SAFETY: `Lanes` has room for a vector.
            unsafe { self.store(lanes.0.as_mut_ptr(), row) }
            columns.iter_mut().zip(lanes.0).for_each(|(column, lane)| column.0[i] = lane);
        }
        // SAFETY: as above.
        columns.map(|column| unsafe { self.load(column.0.as_ptr()) })
    }
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::Vector) -> Self::Vector;
    /// `2^n` for integers -126 ..= 127.
    fn exp2_of_integer(self, n: Self::Vector) -> Self::Vector;
    /// `a * 2^n` for integers -126 ..= 127; NaN where `a` is.
    #[inline(always)]
    fn times_exp2_of_integer(self, a: Self::Vector, n: Self::Vector) -> Self::Vector {
        self.mul(a, self.exp2_of_integer(n))
    }
    /// The sum of the lanes, always as the same tree: halves, quarters, ...
    fn sum(self, a: Self::Vector) -> f32;
    /// The greatest lane.
    fn max_lane(self, a: Self::Vector) -> f32;

    /// # Safety
    /// Sixteen elements can be read at `from`, at any address.
    unsafe fn load(self, from: *const f32) -> Self::Vector;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_f16(self, from: *const f16) -> Self::Vector;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_bf16(self, from: *const bf16) -> Self::Vector;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_i8(self, from: *const i8) -> Self::Vector;
    /// # Safety
    /// Sixteen elements can be written at `to`, at any address.
    unsafe fn store(self, to: *mut f32, value: Self::Vector);
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store_f16(self, to: *mut f16, value: Self::Vector);
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store_bf16(self, to: *mut bf16, value: Self::Vector);
    /// As [`Simd::store_bf16`]; denormal numbers may become zeros, as products of bf16 take them.
    ///
    /// # Safety
    /// As [`Simd::store`].
    #[inline(always)]
    unsafe fn store_bf16_factor(self, to: *mut bf16, value: Self::Vector) {
        // SAFETY: the caller's promise.
        unsafe { self.store_bf16(to, value) }
    }
    /// Asks for the cache line at `address`, which may be any.
    fn prefetch(self, address: *const u8);
    /// As [`Simd::prefetch`], for the L2 cache: for what is used later.
    fn prefetch_far(self, address: *const u8);
    /// As [`Simd::prefetch`], for what is written next, so that no other core has the line.
    fn prefetch_to_write(self, address: *const u8);
}

/// Element types that vectors are loaded from and stored to.
pub(crate) trait Float: crate::Element {
    const ZERO: Self;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::Vector;
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, value: S::Vector);

    /// The first `len` lanes from memory, zero behind them, so that a tail has the arithmetic of a full vector.
    ///
    /// # Safety
    /// `len <= LANES` elements can be read at `from`.
    #[inline(always)]
    unsafe fn load_part<S: Simd>(simd: S, from: *const Self, len: usize) -> S::Vector {
        if len == LANES {
            // SAFETY: the caller's promise.
            return unsafe { Self::load(simd, from) };
        }
        let mut padded = [Self::ZERO; LANES];
        // SAFETY: the caller's promise; `padded` has `LANES` elements.
        unsafe {
            std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), len);
            Self::load(simd, padded.as_ptr())
        }
    }

    /// The first `len` lanes to memory.
    ///
    /// # Safety
    /// `len <= LANES` elements can be written at `to`.
    #[inline(always)]
    unsafe fn store_part<S: Simd>(simd: S, to: *mut Self, len: usize, value: S::Vector) {
        if len == LANES {
            // SAFETY: the caller's promise.
            return unsafe { Self::store(simd, to, value) };
        }
        let mut padded = [Self::ZERO; LANES];
        // SAFETY: the caller's promise; `padded` has `LANES` elements.
        unsafe {
            Self::store(simd, padded.as_mut_ptr(), value);
            std::ptr::copy_nonoverlapping(padded.as_ptr(), to, len);
        }
    }
}

macro_rules! float {
    ($($t:ty: $zero:expr, $load:ident, $store:ident;)*) => {$(
        impl Float for $t {
            const ZERO: Self = $zero;
            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::Vector {
                // SAFETY: the caller's promise.
                unsafe { simd.$load(from) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(simd: S, to: *mut Self, value: S::Vector) {
                // SAFETY: the caller's promise.
                unsafe { simd.$store(to, value) }
            }
        }
    )*};
}
float! {
    f32: 0.0, load, store;
    f16: f16::ZERO, load_f16, store_f16;
    bf16: bf16::ZERO, load_bf16, store_bf16;
}

/// The vectors that cover `len` elements: first element and number of each.
#[inline(always)]
pub(crate) fn spans(len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(LANES).map(move |start| (start, LANES.min(len - start)))
}
