//! How the weights of a layout meet x. A layout is one implementation of [`Format`]; loops and panels serve all.

use std::marker::PhantomData;

use half::bf16;

use crate::simd::{Float, LANES, Simd};

/// A way to read weights, sixteen lanes at a time, and to multiply them with x, which is prepared to fit.
///
/// What is done once per output, such as scaling, is not here but in [`super::finish::Finish`].
pub(super) trait Format: Copy {
    /// What a row of weights consists of.
    type Element: Copy;
    /// Elements that a lane takes at once: 1, with x in f32, or 2, with x in pairs of bf16.
    const PER_LANE: usize;
    /// Elements of a vector.
    const PER_STEP: usize = LANES * Self::PER_LANE;

    /// The first `len` elements from memory, zeros behind them.
    ///
    /// # Safety
    /// `len <= PER_STEP` elements can be read at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const Self::Element, len: usize) -> S::Vector;

    /// `sum` and the products of each lane.
    fn mul_add<S: Simd>(simd: S, weight: S::Vector, x: S::Vector, sum: S::Vector) -> S::Vector;
}

/// Weights that are widened to f32 in registers; products and sums are f32.
#[derive(Clone, Copy)]
pub(super) struct Widened<W>(PhantomData<W>);

impl<F: Float> Format for Widened<F> {
    type Element = F;
    const PER_LANE: usize = 1;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const F, len: usize) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { F::load_part(simd, from, len) }
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, weight: S::Vector, x: S::Vector, sum: S::Vector) -> S::Vector {
        simd.mul_add(weight, x, sum)
    }
}

impl Format for Widened<i8> {
    type Element = i8;
    const PER_LANE: usize = 1;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const i8, len: usize) -> S::Vector {
        let mut padded = [0; LANES];
        // SAFETY: the caller's promise; `padded` has `LANES` elements.
        unsafe { simd.load_i8(padded_part(from, len, &mut padded)) }
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, weight: S::Vector, x: S::Vector, sum: S::Vector) -> S::Vector {
        simd.mul_add(weight, x, sum)
    }
}

/// bf16 weights times x in bf16, sums in f32: only where [`Level::has_dot_bf16`](crate::Level::has_dot_bf16). As the reference implementations do in
/// this type, x is rounded to it.
#[derive(Clone, Copy)]
pub(super) struct Bf16Pairs;

impl Format for Bf16Pairs {
    type Element = bf16;
    const PER_LANE: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const bf16, len: usize) -> S::Vector {
        let mut padded = [bf16::ZERO; 2 * LANES];
        // SAFETY: the caller's promise; two bf16 have the size of an f32, and no alignment is asked for.
        unsafe { simd.load(padded_part(from, len, &mut padded).cast()) }
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, weight: S::Vector, x: S::Vector, sum: S::Vector) -> S::Vector {
        simd.dot_bf16(weight, x, sum)
    }
}

/// Where `N` elements can be read: `from` itself where there are as many, else a copy of what there is.
///
/// # Safety
/// `len <= N` elements can be read at `from`.
#[inline(always)]
pub(super) unsafe fn padded_part<T: Copy, const N: usize>(
    from: *const T,
    len: usize,
    padded: &mut [T; N],
) -> *const T {
    if len == N {
        return from;
    }
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), len) }
    padded.as_ptr()
}
