//! What the tests of several operations share.

use kernels::{Context, DType, Level, Tensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The element types of weights and caches.
pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A source of test data.
pub(crate) fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Uniform in -1 .. 1.
pub(crate) fn uniform(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Uniform values in an element type.
pub(crate) fn tensor(rng: &mut StdRng, rows: usize, cols: usize, dtype: DType) -> Tensor {
    Tensor::from_slice(&uniform(rng, rows * cols), rows, cols).to_dtype(dtype).expect("a float type")
}

/// Single-threaded contexts for the instruction sets of this machine.
pub(crate) fn levels() -> Vec<Context> {
    contexts(&[1]).into_iter().flatten().collect()
}

/// For each instruction set of this machine, contexts of so many threads.
pub(crate) fn contexts(threads: &[usize]) -> Vec<Vec<Context>> {
    let available = Level::ALL.into_iter().filter(|level| level.is_available());
    let of_level = |level| threads.iter().map(|&n| Context::cpu_with_level(n, level)).collect();
    available.map(of_level).collect()
}

/// Fails with the place of the worst difference unless all are within `tolerance`, absolute.
pub(crate) fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(a) - e).abs() <= tolerance,
            "{what}: element {i} is {a}, expected {e} +- {tolerance}"
        );
    }
}

/// Fails unless all bits are the same.
pub(crate) fn assert_same_bits(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert_eq!(a.to_bits(), e.to_bits(), "{what}: element {i} is {a}, expected {e}");
    }
}
