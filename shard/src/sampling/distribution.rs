//! The distribution that a token is chosen from, while processors change it.

use kernels::ops::logits::{greatest, weights};

/// A token that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) token_id: u32,
    /// Probability relative to the most likely token of the row: `exp(logit - max)`, in 0 ..= 1. Not normalized.
    pub(super) weight: f32,
}

/// Logits of the whole vocabulary at first; candidates with weights once a processor asks for them.
///
/// Buffers are kept from row to row, so a steady decode step allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Distribution {
    logits: Vec<f32>,
    /// Of all logits, while candidates are made.
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
    /// Of `candidates`, how many at the front are the most likely ones, in descending order.
    num_sorted: usize,
    weighed: bool,
}

/// The first part of a row that is sorted where a truncation asks for it. Nearly all of a language model's
/// probability lies in fewer tokens; if not, eight times as many are sorted next.
const FIRST_SORTED: usize = 64;

impl Distribution {
    /// Starts anew with a row of logits.
    pub(super) fn reset(&mut self, logits: &[f32]) {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.candidates.clear();
        self.num_sorted = 0;
        self.weighed = false;
    }

    /// The logits, by token id.
    ///
    /// # Panics
    /// After candidates were asked for: a processor stands in the wrong place in `PROCESSORS`.
    pub(super) fn logits_mut(&mut self) -> &mut [f32] {
        assert!(!self.weighed, "processors that change logits come before those that drop candidates");
        &mut self.logits
    }

    /// The logits with the changes made so far, by token id.
    pub(super) fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// All candidates that are left; in order of token id if nothing has sorted them yet.
    pub(super) fn candidates(&mut self) -> &[Candidate] {
        self.weigh();
        &self.candidates
    }

    /// Sum of the weights of all candidates that are left.
    pub(super) fn total_weight(&mut self) -> f64 {
        self.weigh();
        // Several sums, because an addition takes longer than it keeps the CPU busy.
        let (chunks, rest) = self.candidates.as_chunks::<8>();
        let mut sums = [0.0; 8];
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, candidate)| *sum += f64::from(candidate.weight));
        }
        sums.iter().sum::<f64>() + rest.iter().map(|candidate| f64::from(candidate.weight)).sum::<f64>()
    }

    /// Keeps the candidates for which `keep` holds.
    pub(super) fn retain(&mut self, keep: impl Fn(Candidate) -> bool) {
        self.weigh();
        self.num_sorted =
            self.candidates[..self.num_sorted].iter().filter(|candidate| keep(**candidate)).count();
        self.candidates.retain(|candidate| keep(*candidate));
    }

    /// Keeps the `k` most likely candidates, of equally likely ones those with lower ids.
    pub(super) fn keep_most_likely(&mut self, k: usize) {
        self.weigh();
        if k < self.candidates.len() {
            self.sort_first(k);
            self.candidates.truncate(k);
        }
    }

    /// Keeps the smallest set of most likely candidates whose weights sum up to `weight`, at least one.
    pub(super) fn keep_weight(&mut self, weight: f64) {
        self.weigh();
        let (mut sum, mut kept) = (0.0, 0);
        while kept < self.candidates.len() && (kept == 0 || sum < weight) {
            if kept == self.num_sorted {
                self.sort_first((8 * kept).max(FIRST_SORTED));
            }
            sum += f64::from(self.candidates[kept].weight);
            kept += 1;
        }
        self.candidates.truncate(kept);
        self.num_sorted = self.num_sorted.min(kept);
    }

    /// Keeps the smallest set of candidates with least `key` whose weights sum up to `weight`, at least one; of equal
    /// keys those with lower ids.
    pub(super) fn keep_weight_by_key(&mut self, weight: f64, key: impl Fn(Candidate) -> f64) {
        self.weigh();
        self.candidates
            .sort_unstable_by(|a, b| key(*a).total_cmp(&key(*b)).then(a.token_id.cmp(&b.token_id)));
        let mut sum = 0.0;
        let kept = self.candidates.iter().position(|candidate| {
            sum += f64::from(candidate.weight);
            sum >= weight
        });
        self.candidates.truncate(kept.map_or(usize::MAX, |last| last + 1));
        self.num_sorted = 0;
    }

    /// Puts the candidates in order of token id.
    pub(super) fn order_by_token_id(&mut self) {
        self.weigh();
        if !self.candidates.is_sorted_by_key(|candidate| candidate.token_id) {
            self.candidates.sort_unstable_by_key(|candidate| candidate.token_id);
            self.num_sorted = 0;
        }
    }

    fn weigh(&mut self) {
        if self.weighed {
            return;
        }
        self.weighed = true;
        self.weights.resize(self.logits.len(), 0.0);
        weights(&self.logits, greatest(&self.logits).logit, &mut self.weights);
        self.candidates.extend(
            self.weights
                .iter()
                .zip(0..)
                .map(|(&weight, token_id)| Candidate { token_id, weight })
                // What has no probability must not be chosen for lack of others, nor be sorted.
                .filter(|candidate| candidate.weight > 0.0),
        );
    }

    /// Makes the first `n` candidates the most likely ones, in descending order.
    fn sort_first(&mut self, n: usize) {
        let n = n.min(self.candidates.len());
        if n <= self.num_sorted {
            return;
        }
        let rest = &mut self.candidates[self.num_sorted..];
        let more = n - self.num_sorted;
        if more < rest.len() {
            rest.select_nth_unstable_by(more - 1, more_likely_first);
        }
        rest[..more].sort_unstable_by(more_likely_first);
        self.num_sorted = n;
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that sorting asks for")]
fn more_likely_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.token_id.cmp(&b.token_id))
}

/// What the tests of processors have in common.
#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sampling::{BuildProcessor, History, SamplingParameters};

    /// A distribution of these logits.
    pub(in crate::sampling) fn distribution_of(logits: &[f32]) -> Distribution {
        let mut distribution = Distribution::default();
        distribution.reset(logits);
        distribution
    }

    /// Logits with these probabilities.
    pub(in crate::sampling) fn logits_of(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|probability| probability.ln()).collect()
    }

    /// Ids that are left after the processor built from `parameters`, ascending; all where it is off.
    pub(in crate::sampling) fn kept(
        build: BuildProcessor,
        parameters: &SamplingParameters,
        logits: &[f32],
    ) -> Vec<u32> {
        let mut distribution = distribution_of(logits);
        if let Some(processor) = build(parameters) {
            processor.process(&History::default(), &mut distribution);
        }
        distribution.order_by_token_id();
        distribution.candidates().iter().map(|candidate| candidate.token_id).collect()
    }

    /// Logits after the processor built from `parameters`.
    pub(in crate::sampling) fn changed(
        build: BuildProcessor,
        parameters: &SamplingParameters,
        history: &History,
        logits: &[f32],
    ) -> Vec<f32> {
        let mut distribution = distribution_of(logits);
        if let Some(processor) = build(parameters) {
            processor.process(history, &mut distribution);
        }
        distribution.logits().to_vec()
    }

    /// Rows longer than the first sorted part, with ties.
    pub(in crate::sampling) fn rows() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec((-40i8..40).prop_map(|value| f32::from(value) / 8.0), 1..700)
    }

    /// Ids in descending order of probability, with their probabilities, by the plain definition.
    pub(in crate::sampling) fn by_probability(logits: &[f32]) -> Vec<(u32, f64)> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f64> = logits.iter().map(|logit| f64::from((logit - max).exp())).collect();
        let total: f64 = weights.iter().sum();
        let mut pairs: Vec<(u32, f64)> = (0..).zip(weights.iter().map(|weight| weight / total)).collect();
        pairs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        pairs
    }

    #[test]
    fn a_token_without_probability_is_no_candidate() {
        let mut distribution = distribution_of(&[0.0, f32::NEG_INFINITY, -1e9, -1.0]);
        let ids: Vec<u32> = distribution.candidates().iter().map(|candidate| candidate.token_id).collect();
        assert_eq!(ids, [0, 3]);
    }

    proptest! {
        #[test]
        fn truncations_one_after_the_other_agree_with_sorting_everything(
            row in rows(), k in 1usize..700, share in 0.01f64..1.0,
        ) {
            let mut distribution = distribution_of(&row);
            distribution.keep_most_likely(k);
            let total = distribution.total_weight();
            distribution.keep_weight(share * total);

            let mut expected = by_probability(&row);
            expected.truncate(k);
            let total: f64 = expected.iter().map(|(_, probability)| probability).sum();
            let mut sum = 0.0;
            let last = expected.iter().position(|(_, probability)| {
                sum += probability;
                sum >= share * total * (1.0 - 1e-12)
            });
            expected.truncate(last.map_or(usize::MAX, |last| last + 1));
            // Sums in another order may differ in the last bits and with them the last token.
            let difference = distribution.candidates().len().abs_diff(expected.len());
            prop_assert!(difference <= 1, "{} and {}", distribution.candidates().len(), expected.len());
            for (candidate, (token_id, _)) in distribution.candidates().iter().zip(&expected) {
                prop_assert_eq!(candidate.token_id, *token_id);
            }
        }
    }
}
