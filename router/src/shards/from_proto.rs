//! A rank's answer, checked. Nothing in it is trusted: a wrong value is an error that names it.

use std::time::Duration;

use proto::units::{SequenceId, TokenId};
use proto::v1;

use crate::scheduler::{EndReason, MaskTimes, Outcome, SequenceOutput, StepAnswer, StepTimes, Token};

/// An answer with a value that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidAnswer {
    #[error("sequence {sequence} got token {token} from a vocabulary of {vocab_size}")]
    Token { sequence: u64, token: u32, vocab_size: usize },
    #[error("sequence {sequence} ended without a last token")]
    EndWithoutToken { sequence: u64 },
    #[error("sequence {sequence} ended for the unknown reason {reason}")]
    FinishReason { sequence: u64, reason: i32 },
}

/// The answer of rank 0, whose outputs are the group's.
pub(crate) fn step_answer(
    response: &v1::StepResponse,
    vocab_size: usize,
) -> Result<StepAnswer, InvalidAnswer> {
    let outputs = response.outputs.iter().map(|output| sequence_output(output, vocab_size));
    Ok(StepAnswer {
        step: response.step_id,
        outputs: outputs.collect::<Result<_, _>>()?,
        skipped: response.skipped_sequence_ids.iter().copied().map(SequenceId).collect(),
        times: StepTimes {
            forward: Duration::from_micros(response.forward_us),
            sampling: Duration::from_micros(response.sample_us),
            masks: MaskTimes {
                num_masks: response.num_masks,
                computing: Duration::from_micros(response.mask_us),
                waiting: Duration::from_micros(response.mask_wait_us),
            },
        },
    })
}

fn sequence_output(output: &v1::SequenceOutput, vocab_size: usize) -> Result<SequenceOutput, InvalidAnswer> {
    let sequence = output.sequence_id;
    let reason = output.finish_reason;
    let reason =
        v1::FinishReason::try_from(reason).map_err(|_| InvalidAnswer::FinishReason { sequence, reason })?;
    let failed = |outcome| SequenceOutput { sequence: SequenceId(sequence), prompt: Vec::new(), outcome };
    let end = match reason {
        v1::FinishReason::InvalidLogits => return Ok(failed(Outcome::InvalidLogits)),
        v1::FinishReason::OutOfMemory => return Ok(failed(Outcome::OutOfMemory)),
        v1::FinishReason::MissingPrefix => return Ok(failed(Outcome::MissingPrefix)),
        v1::FinishReason::Grammar => return Ok(failed(Outcome::GrammarFailed(output.failure.clone()))),
        v1::FinishReason::Eos => Some(EndReason::Eos),
        v1::FinishReason::Length => Some(EndReason::Length),
        v1::FinishReason::Unspecified => None,
    };

    let tokens = |tokens: &[v1::SampledToken]| {
        tokens.iter().map(|sampled| token(sequence, sampled, vocab_size)).collect::<Result<Vec<_>, _>>()
    };
    let prompt = tokens(&output.prompt_tokens)?;
    let sampled = tokens(&output.tokens)?;
    // Only logits that are not finite give such a number. It concerns this sequence alone, and JSON cannot hold it.
    if prompt.iter().chain(&sampled).any(has_nan) {
        return Ok(failed(Outcome::InvalidLogits));
    }
    let outcome = match (sampled.is_empty(), end) {
        (false, Some(end)) => Outcome::Ended(sampled, end),
        (false, None) => Outcome::Sampled(sampled),
        (true, None) => Outcome::Nothing,
        (true, Some(_)) => return Err(InvalidAnswer::EndWithoutToken { sequence }),
    };
    Ok(SequenceOutput { sequence: SequenceId(sequence), prompt, outcome })
}

fn token(sequence: u64, sampled: &v1::SampledToken, vocab_size: usize) -> Result<Token, InvalidAnswer> {
    let id = |token: u32| {
        if (token as usize) < vocab_size {
            Ok(TokenId(token))
        } else {
            Err(InvalidAnswer::Token { sequence, token, vocab_size })
        }
    };
    let top = sampled.top.iter().map(|top| Ok((id(top.token_id)?, top.logprob)));
    Ok(Token { id: id(sampled.token_id)?, logprob: sampled.logprob, top: top.collect::<Result<_, _>>()? })
}

fn has_nan(token: &Token) -> bool {
    token.logprob.is_nan() || token.top.iter().any(|(_, logprob)| logprob.is_nan())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(token_id: u32, logprob: f32) -> v1::SampledToken {
        v1::SampledToken { token_id, logprob, top: vec![v1::TokenLogprob { token_id, logprob }] }
    }

    fn output(tokens: Vec<v1::SampledToken>, finish_reason: i32) -> v1::SequenceOutput {
        v1::SequenceOutput {
            sequence_id: 7,
            tokens,
            finish_reason,
            failure: "why".to_owned(),
            ..v1::SequenceOutput::default()
        }
    }

    #[test]
    fn tokens_and_ends_are_told_apart() {
        let tokens = vec![Token { id: TokenId(3), logprob: -0.5, top: vec![(TokenId(3), -0.5)] }];
        let check = |tokens: Vec<v1::SampledToken>, reason: v1::FinishReason, outcome: Outcome| {
            assert_eq!(sequence_output(&output(tokens, reason.into()), 10).unwrap().outcome, outcome);
        };
        check(vec![], v1::FinishReason::Unspecified, Outcome::Nothing);
        check(vec![sampled(3, -0.5)], v1::FinishReason::Unspecified, Outcome::Sampled(tokens.clone()));
        check(vec![sampled(3, -0.5)], v1::FinishReason::Eos, Outcome::Ended(tokens.clone(), EndReason::Eos));
        let two = [tokens.clone(), tokens.clone()].concat();
        check(vec![sampled(3, -0.5); 2], v1::FinishReason::Unspecified, Outcome::Sampled(two));
        check(vec![sampled(3, -0.5)], v1::FinishReason::Length, Outcome::Ended(tokens, EndReason::Length));
        check(vec![sampled(99, f32::NAN)], v1::FinishReason::InvalidLogits, Outcome::InvalidLogits);
        let failed = Outcome::GrammarFailed("why".to_owned());
        check(vec![], v1::FinishReason::Grammar, failed);
        check(vec![sampled(3, f32::NAN)], v1::FinishReason::Unspecified, Outcome::InvalidLogits);
        check(vec![], v1::FinishReason::OutOfMemory, Outcome::OutOfMemory);
        check(vec![], v1::FinishReason::MissingPrefix, Outcome::MissingPrefix);
    }

    #[test]
    fn what_cannot_be_is_an_error_that_names_it() {
        let check = |tokens: Vec<v1::SampledToken>, reason: i32, expected: InvalidAnswer| {
            assert_eq!(sequence_output(&output(tokens, reason), 10).unwrap_err(), expected);
        };
        check(vec![sampled(10, 0.0)], 0, InvalidAnswer::Token { sequence: 7, token: 10, vocab_size: 10 });
        check(vec![], v1::FinishReason::Eos.into(), InvalidAnswer::EndWithoutToken { sequence: 7 });
        check(vec![], 99, InvalidAnswer::FinishReason { sequence: 7, reason: 99 });
    }
}
