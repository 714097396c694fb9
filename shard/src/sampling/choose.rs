//! The choice of a token from a distribution.

use kernels::ops::logits::greatest;

use super::distribution::Distribution;
use super::rng;

/// The most likely token; of equally likely ones that with the lowest id.
///
/// # Panics
/// Where `logits` is empty: a model has at least one token.
pub(super) fn most_likely(logits: &[f32]) -> u32 {
    assert!(!logits.is_empty(), "a vocabulary has at least one token");
    greatest(logits).index as u32
}

/// Inverts the cumulative distribution of the candidates in order of token id at a uniform number that is a pure
/// function of `seed` and `position`.
///
/// The order by id makes the choice a function of the distribution alone, not of how truncations sorted it.
pub(super) fn at_random(distribution: &mut Distribution, seed: u64, position: u64) -> u32 {
    distribution.order_by_token_id();
    let threshold = rng::uniform(seed, position) * distribution.total_weight();
    let candidates = distribution.candidates();
    let mut sum = 0.0;
    let chosen = candidates.iter().find(|candidate| {
        sum += f64::from(candidate.weight);
        sum > threshold
    });
    // Rounding may leave the sum at the threshold after the last candidate.
    chosen.or(candidates.last()).expect("the most likely token is always a candidate").token_id
}

#[cfg(test)]
mod tests {
    use super::super::distribution::tests::{distribution_of, logits_of};
    use super::*;

    #[test]
    fn greedy_takes_the_lowest_id_of_equally_likely_tokens() {
        let check = |logits: &[f32], expected| assert_eq!(most_likely(logits), expected, "{logits:?}");
        check(&[0.5], 0);
        check(&[1.0, 3.0, 2.0, 3.0], 1);
        check(&[f32::NEG_INFINITY, -5.0], 1);
        check(&[2.0, 2.0], 0);
    }

    /// Pearson's test with fixed seeds: deterministic, and passed by a right sampler with these seeds.
    #[test]
    fn tokens_are_chosen_as_often_as_they_are_likely() {
        let probabilities = [0.4, 0.05, 0.25, 0.1, 0.15, 0.05];
        let logits = logits_of(&probabilities);
        let draws = 20_000;
        let mut counts = [0u32; 6];
        for position in 0..draws {
            let mut distribution = distribution_of(&logits);
            counts[at_random(&mut distribution, 1234, position) as usize] += 1;
        }
        let chi_squared: f64 = counts
            .iter()
            .zip(probabilities)
            .map(|(&count, probability)| {
                let expected = f64::from(probability) * draws as f64;
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        // 99.9 % quantile for 5 degrees of freedom.
        assert!(chi_squared < 20.5, "chi squared {chi_squared}, counts {counts:?}");
    }

    #[test]
    fn the_choice_does_not_depend_on_how_candidates_were_sorted() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        for position in 0..200 {
            let mut plain = distribution_of(&logits);
            let mut sorted = distribution_of(&logits);
            sorted.keep_weight(f64::INFINITY);
            assert_eq!(at_random(&mut plain, 7, position), at_random(&mut sorted, 7, position));
        }
    }
}
