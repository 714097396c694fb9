//! Of several sequences the most likely ones: `best_of`.

use std::cmp::Ordering;

use crate::stream::Generated;

/// The index of the sequence with the highest mean log-probability of a token; of equal ones the first.
pub(super) fn most_likely(sequences: &[Generated]) -> usize {
    order(sequences).first().copied().unwrap_or(0)
}

/// Of each prompt's `per_prompt` sequences the `answers` most likely ones, the best first.
pub(super) fn keep_best(sequences: Vec<Generated>, per_prompt: usize, answers: usize) -> Vec<Generated> {
    let mut best = Vec::with_capacity(sequences.len() / per_prompt.max(1) * answers);
    let mut sequences = sequences.into_iter();
    loop {
        let of_prompt: Vec<Generated> = sequences.by_ref().take(per_prompt).collect();
        if of_prompt.is_empty() {
            return best;
        }
        let order = order(&of_prompt);
        let mut of_prompt: Vec<Option<Generated>> = of_prompt.into_iter().map(Some).collect();
        best.extend(order.into_iter().take(answers).filter_map(|index| of_prompt[index].take()));
    }
}

/// Indices, the most likely sequence first.
fn order(sequences: &[Generated]) -> Vec<usize> {
    let means: Vec<f32> = sequences.iter().map(mean_logprob).collect();
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by(|&a, &b| means[b].partial_cmp(&means[a]).unwrap_or(Ordering::Equal));
    order
}

/// The least where a token was impossible without a bias, so that it is not a number.
fn mean_logprob(sequence: &Generated) -> f32 {
    let sum: f32 = sequence.tokens.iter().map(|token| token.token.logprob).sum();
    let mean = sum / sequence.tokens.len().max(1) as f32;
    if mean.is_nan() { f32::NEG_INFINITY } else { mean }
}
