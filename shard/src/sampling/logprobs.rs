//! Log-probabilities of the model's raw distribution.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use kernels::ops::logits::{Greatest, greatest, sum_of_exp};
use proto::v1::TokenLogprob;

/// Tokens that are passed over together where none of them is likely.
const CHUNK: usize = 256;

/// A row of logits holds NaN or +infinity, or nothing but -infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotFinite;

/// The normalizer of a row of logits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogSoftmax {
    max: f32,
    most_likely: u32,
    /// ln(sum(exp(logit - max))), summed in f64.
    log_sum: f64,
}

impl LogSoftmax {
    /// Of a row of logits. Single tokens may have -infinity (a model may mask them); the row as a whole must be a
    /// distribution.
    pub(crate) fn of(logits: &[f32]) -> Result<Self, NotFinite> {
        let Greatest { logit: max, index } = greatest(logits);
        if !max.is_finite() {
            return Err(NotFinite);
        }
        // NaN is not the greatest, but the sum is NaN then.
        let sum = sum_of_exp(logits, max);
        if sum.is_nan() {
            return Err(NotFinite);
        }
        Ok(Self { max, most_likely: index as u32, log_sum: sum.ln() })
    }

    /// The most likely token; of equally likely ones that with the lowest id.
    pub(crate) fn most_likely_token(&self) -> u32 {
        self.most_likely
    }

    /// Natural logarithm of the probability of a token with this logit; at most 0.
    pub(crate) fn logprob(&self, logit: f32) -> f32 {
        ((f64::from(logit) - f64::from(self.max) - self.log_sum) as f32).min(0.0)
    }

    /// The `n` most likely tokens of the row, most likely first, of equally likely ones the lower ids.
    pub(crate) fn most_likely(&self, logits: &[f32], n: usize) -> Vec<TokenLogprob> {
        if n == 0 {
            return Vec::new();
        }
        // The heap's greatest element is the least likely token of the best n so far.
        let mut best = BinaryHeap::with_capacity(n + 1);
        for (chunk, first) in logits.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            // Nearly all chunks hold nothing that is likelier than the best so far, and the greatest is found quickly.
            let is_full = best.len() == n;
            if is_full && best.peek().is_some_and(|worst: &Ranked| greatest(chunk).logit <= worst.logit) {
                continue;
            }
            for (token_id, &logit) in (first..).zip(chunk) {
                let ranked = Ranked { logit, token_id };
                if best.len() < n {
                    best.push(ranked);
                } else if best.peek().is_some_and(|worst| ranked < *worst) {
                    best.pop();
                    best.push(ranked);
                }
            }
        }
        best.into_sorted_vec()
            .into_iter()
            .map(|ranked| TokenLogprob { token_id: ranked.token_id, logprob: self.logprob(ranked.logit) })
            .collect()
    }
}

/// Ordered by descending logit, then by ascending id.
#[derive(PartialEq)]
struct Ranked {
    logit: f32,
    token_id: u32,
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.token_id.cmp(&other.token_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_those_of_softmax() {
        let logits = [1.0f32, 2.0, 3.0, 0.0];
        let softmax = LogSoftmax::of(&logits).unwrap();
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        for logit in logits {
            let expected = (f64::from(logit).exp() / total).ln();
            assert!((f64::from(softmax.logprob(logit)) - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn large_logits_do_not_overflow_and_masked_tokens_have_no_probability() {
        let softmax = LogSoftmax::of(&[3e38, f32::NEG_INFINITY, -3e38]).unwrap();
        assert_eq!(softmax.logprob(3e38), 0.0);
        assert_eq!(softmax.logprob(f32::NEG_INFINITY), f32::NEG_INFINITY);
    }

    #[test]
    fn rows_that_are_no_distribution_are_refused() {
        let check = |logits: &[f32]| assert_eq!(LogSoftmax::of(logits).unwrap_err(), NotFinite, "{logits:?}");
        check(&[0.0, f32::NAN]);
        check(&[f32::NAN, 0.0, 1.0]);
        check(&[0.0, f32::INFINITY]);
        check(&[f32::NEG_INFINITY; 2]);
    }

    #[test]
    fn the_most_likely_tokens_come_in_order_and_ties_by_lower_id() {
        let logits = [1.0, 4.0, 2.0, 4.0, 3.0, 2.0];
        let softmax = LogSoftmax::of(&logits).unwrap();
        let ids =
            |n| softmax.most_likely(&logits, n).iter().map(|token| token.token_id).collect::<Vec<u32>>();
        assert_eq!(ids(0), [0u32; 0]);
        assert_eq!(ids(3), [1, 3, 4]);
        assert_eq!(ids(4), [1, 3, 4, 2]);
        assert_eq!(ids(100), [1, 3, 4, 2, 5, 0]);
        assert_eq!(softmax.most_likely(&logits, 1)[0].logprob, softmax.logprob(4.0));
    }
}
