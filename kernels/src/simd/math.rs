//! Elementary functions on vectors.

use super::Simd;

/// `e^x` to about one unit in the last place, denormal results included; NaN stays NaN.
///
/// Range reduction by multiples of ln 2 in two parts and the polynomial of the Cephes library (Moshier, `expf`).
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    let constant = |value: f32| simd.splat(value);
    // Beyond these the result is 0 or infinity; NaN passes, being the second operand.
    let x = simd.min(constant(89.0), simd.max(constant(-104.0), x));
    let (n, p) = exp_parts(simd, x);
    // Two factors, because 2^n itself may be beyond the normal numbers.
    let half = simd.round(simd.mul(n, constant(0.5)));
    let other = simd.sub(n, half);
    simd.mul(simd.mul(p, simd.exp2_of_integer(half)), simd.exp2_of_integer(other))
}

/// [`exp`] of numbers that are not positive, as they come up in a softmax; below -87 it stays at `e^-87`, which is
/// nothing beside the 1 of the greatest. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp_of_nonpositive<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    // NaN passes, being the second operand.
    let x = simd.max(simd.splat(-87.0), x);
    let (n, p) = exp_parts(simd, x);
    simd.times_exp2_of_integer(p, n)
}

/// `n` and `p` with `e^x = p * 2^n`.
#[inline(always)]
fn exp_parts<S: Simd>(simd: S, x: S::Vector) -> (S::Vector, S::Vector) {
    let constant = |value: f32| simd.splat(value);
    let n = simd.round(simd.mul(x, constant(std::f32::consts::LOG2_E)));
    let r = simd.mul_add(n, constant(-0.693_359_4), x);
    let r = simd.mul_add(n, constant(2.121_944_4e-4), r);
    let mut p = constant(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = simd.mul_add(p, r, constant(coefficient));
    }
    (n, simd.add(simd.mul_add(simd.mul(p, r), r, r), constant(1.0)))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    let negated = simd.sub(simd.splat(0.0), x);
    simd.div(x, simd.add(simd.splat(1.0), exp(simd, negated)))
}

/// Hyperbolic tangent, good to a few units of `2^-24`; NaN stays NaN.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    // Beyond nine it is 1 in f32. NaN passes, being the second operand.
    let x = simd.min(simd.splat(9.1), simd.max(simd.splat(-9.1), x));
    let e = exp(simd, simd.add(x, x));
    let one = simd.splat(1.0);
    simd.div(simd.sub(e, one), simd.add(e, one))
}

/// Error function, good to a few units of `2^-24`; NaN stays NaN. The odd rational approximation that Eigen and XLA use.
#[inline(always)]
pub(crate) fn erf<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    // Beyond four it is 1 in f32. NaN passes, being the second operand.
    let x = simd.min(simd.splat(4.0), simd.max(simd.splat(-4.0), x));
    let square = simd.mul(x, x);
    let polynomial = |first: f32, rest: &[f32]| {
        rest.iter().fold(simd.splat(first), |sum, &c| simd.mul_add(sum, square, simd.splat(c)))
    };
    let p = polynomial(
        -2.726_142_3e-10,
        &[2.770_681_4e-8, -2.101_024e-6, -5.692_506_5e-5, -7.349_906e-4, -2.954_6e-3, -1.609_603_3e-2],
    );
    let q = polynomial(-1.456_607_2e-5, &[-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2]);
    simd.div(simd.mul(x, p), q)
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, LANES, Level};
    use super::*;

    struct Exp<'a>(&'a [f32; LANES], &'a mut [f32; LANES]);
    impl Kernel for Exp<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            // SAFETY: both arrays have `LANES` elements.
            unsafe { simd.store(self.1.as_mut_ptr(), exp(simd, simd.load(self.0.as_ptr()))) }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            for step in 0..40_000 {
                let input: [f32; LANES] =
                    std::array::from_fn(|lane| -90.0 + step as f32 * 0.0045 + lane as f32 * 2e-4);
                let mut output = [0.0; LANES];
                level.run(Exp(&input, &mut output));
                for (x, y) in input.iter().zip(output) {
                    let want = f64::from(*x).exp();
                    if want > f64::from(f32::MAX) {
                        // Between the greatest f32 and the rounding border either is right.
                        assert!(y >= f32::MAX, "exp({x}) = {y} at {level:?}");
                        continue;
                    }
                    let unit = f64::from((want as f32).next_up()) - f64::from(want as f32);
                    assert!((f64::from(y) - want).abs() <= 2.0 * unit, "exp({x}) = {y} at {level:?}");
                }
            }
        }
    }

    #[test]
    fn exp_of_extremes_is_exact() {
        let mut input = [0.0; LANES];
        input[1..6].copy_from_slice(&[f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -1e30, 1e30]);
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            let mut output = [0.0; LANES];
            level.run(Exp(&input, &mut output));
            assert_eq!(output[0].to_bits(), 1.0_f32.to_bits());
            assert_eq!(
                (output[1], output[2], output[4], output[5]),
                (0.0, f32::INFINITY, 0.0, f32::INFINITY)
            );
            assert!(output[3].is_nan());
        }
    }
}
