//! Rows of logits as distributions, against f64.

#[expect(dead_code, reason = "what other tests need")]
mod common;

use common::{assert_close, rng, uniform};
use kernels::ops::logits::{greatest, sum_of_exp, weights};

const LENS: [usize; 8] = [1, 15, 16, 33, 1000, 1024, 1025, 50_001];

fn logits(seed: u64, len: usize) -> Vec<f32> {
    uniform(&mut rng(seed), len).into_iter().map(|v| v * 30.0).collect()
}

#[test]
fn the_greatest_is_the_first_of_equals() {
    for len in LENS {
        let mut row = logits(1, len);
        for place in [0, len / 2, len - 1] {
            row[place] = 50.0;
            row[len - 1] = 50.0;
            let first = row.iter().position(|&logit| logit >= 50.0).expect("it was written");
            let found = greatest(&row);
            assert_eq!((found.logit.to_bits(), found.index), (50.0_f32.to_bits(), first), "of {len}");
            row[place] = 0.0;
        }
    }
}

#[test]
fn nan_and_masked_tokens_are_not_the_greatest() {
    assert_eq!(greatest(&[f32::NAN, 1.0, f32::NAN, 2.0]).index, 3);
    let mut row = vec![f32::NAN; 40];
    row[33] = -7.0;
    assert_eq!(greatest(&row).index, 33);
    let none = greatest(&[f32::NEG_INFINITY; 20]);
    assert_eq!((none.logit, none.index), (f32::NEG_INFINITY, 0));
    assert_eq!(greatest(&[0.0, f32::INFINITY]).logit.to_bits(), f32::INFINITY.to_bits());
}

#[test]
fn sums_and_weights_are_those_of_f64() {
    for len in LENS {
        let row = logits(2, len);
        let max = greatest(&row).logit;
        let want: Vec<f64> = row.iter().map(|&logit| f64::from(logit - max).exp()).collect();
        let mut got = vec![0.0; len];
        weights(&row, max, &mut got);
        // The exponential is good to two units in the last place.
        assert_close(&got, &want, 3e-7, "weights");
        let (sum, expected) = (sum_of_exp(&row, max), want.iter().sum::<f64>());
        // Some thousand numbers in sixteen lanes.
        assert!((sum / expected - 1.0).abs() < 1e-6, "{sum} is not {expected}");
    }
}

#[test]
fn masked_tokens_weigh_nothing_and_nan_is_seen() {
    let mut row = logits(3, 70);
    (row[1], row[69]) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    let mut got = vec![1.0; 70];
    weights(&row, greatest(&row).logit, &mut got);
    assert_eq!((got[1], got[69]), (0.0, 0.0));
    for place in [0, 40, 69] {
        let mut row = row.clone();
        row[place] = f32::NAN;
        assert!(sum_of_exp(&row, greatest(&row).logit).is_nan());
    }
}
