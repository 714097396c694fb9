//! What a device must know to choose a sequence's tokens.

use kernels::ops::sampling::{NONE, SamplingRow, TokenCounts};
use kernels::{Context, Result, Staging};
use proto::v1::{NewSequence, SamplingParameters};

use crate::decoder::SamplingInput;

/// One sequence's part.
#[derive(Debug, Clone)]
pub(super) struct DeviceSampling {
    /// Where the device keeps its last token and counts its tokens.
    pub(super) slot: u32,
    /// Position, biases and token are filled in for each step.
    row: SamplingRow,
    /// Pairs of a token and the bits of an f32, no token twice.
    biases: Vec<u32>,
}

impl DeviceSampling {
    pub(super) fn new(slot: u32, parameters: &SamplingParameters, top_n_tokens: u32) -> Self {
        let row = SamplingRow {
            temperature: parameters.temperature,
            top_k: parameters.top_k,
            top_p: parameters.top_p,
            min_p: parameters.min_p,
            typical_p: parameters.typical_p,
            seed: parameters.seed,
            repetition_penalty: parameters.repetition_penalty,
            frequency_penalty: parameters.frequency_penalty,
            presence_penalty: parameters.presence_penalty,
            slot,
            top_n: top_n_tokens,
            ..SamplingRow::default()
        };
        Self { slot, row, biases: merged_biases(parameters) }
    }

    #[expect(
        clippy::float_cmp,
        reason = "neutral values switch a penalty off, and equal means the same bits"
    )]
    fn counts_tokens(&self) -> bool {
        let SamplingRow { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.row;
        repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0
    }

    /// Makes the counts those of a new sequence's tokens, if a penalty reads them.
    pub(super) fn count_tokens(
        &self,
        context: &Context,
        staging: &mut Staging,
        counts: &mut TokenCounts,
        new: &NewSequence,
    ) -> Result<()> {
        if !self.counts_tokens() {
            return Ok(());
        }
        let (prompt, generated) = new.token_ids.split_at(new.prompt_tokens as usize);
        let [prompt, generated] = staging.send(context, [prompt, generated])?;
        counts.recount(context, self.slot, prompt, generated)
    }

    /// Appends the row of the token to choose at `position`, behind the known ones. `mask`: its grammar's row of masks.
    pub(super) fn push_choice(&self, position: usize, mask: Option<u32>, to: &mut SamplingInput) {
        let biases = (to.biases.len() as u32 / 2, self.biases.len() as u32 / 2);
        to.biases.extend_from_slice(&self.biases);
        let mask = mask.unwrap_or(NONE);
        let row = SamplingRow { position: position as u64, biases, mask, ..self.row };
        to.rows.extend_from_slice(&row.to_words());
        to.slots.push(self.slot);
    }

    /// Appends the row that looks the log-probability of a known token up.
    pub(super) fn push_known(&self, token: u32, to: &mut SamplingInput) {
        let row = SamplingRow { token, top_n: self.row.top_n, ..SamplingRow::default() };
        to.rows.extend_from_slice(&row.to_words());
        to.slots.push(NONE);
    }
}

/// Biases of one token are added up, as on the CPU.
fn merged_biases(parameters: &SamplingParameters) -> Vec<u32> {
    let mut merged: Vec<(u32, f32)> = Vec::with_capacity(parameters.logit_bias.len());
    let mut entries: Vec<_> =
        parameters.logit_bias.iter().map(|entry| (entry.token_id, entry.bias)).collect();
    entries.sort_by_key(|(token_id, _)| *token_id);
    for (token_id, bias) in entries {
        match merged.last_mut() {
            Some((last, sum)) if *last == token_id => *sum += bias,
            _ => merged.push((token_id, bias)),
        }
    }
    merged.into_iter().flat_map(|(token_id, bias)| [token_id, bias.to_bits()]).collect()
}

#[cfg(test)]
mod tests {
    use proto::v1::LogitBias;

    use super::*;
    use crate::sampling::neutral_parameters;

    #[test]
    fn biases_of_one_token_are_added_up_and_each_row_finds_its_own() {
        let logit_bias = [(7, 1.0), (3, 0.5), (7, 0.25)];
        let logit_bias = logit_bias.map(|(token_id, bias)| LogitBias { token_id, bias }).to_vec();
        let biased = SamplingParameters { logit_bias, ..neutral_parameters() };
        let mut input = SamplingInput::default();
        for slot in 0..2 {
            DeviceSampling::new(slot, &biased, 0).push_choice(9, (slot == 1).then_some(4), &mut input);
        }
        let pairs = [3, 0.5f32.to_bits(), 7, 1.25f32.to_bits()];
        assert_eq!(input.biases, [pairs, pairs].concat());
        assert_eq!(input.slots, [0, 1]);
        let second = SamplingRow { position: 9, slot: 1, biases: (2, 2), mask: 4, ..SamplingRow::default() };
        assert_eq!(input.rows[SamplingRow::WORDS..], second.to_words());
    }

    #[test]
    fn a_known_token_is_looked_up_in_the_raw_distribution_and_noted_nowhere() {
        let parameters =
            SamplingParameters { temperature: 0.0, repetition_penalty: 2.0, ..neutral_parameters() };
        let mut input = SamplingInput::default();
        DeviceSampling::new(5, &parameters, 3).push_known(42, &mut input);
        let expected = SamplingRow { token: 42, top_n: 3, ..SamplingRow::default() };
        assert_eq!(input.rows, expected.to_words());
        assert_eq!(input.slots, [NONE]);
    }
}
