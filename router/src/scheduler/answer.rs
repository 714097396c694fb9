//! What the shards say to a step, checked for form; and what can be wrong with it.

use std::time::Duration;

use proto::units::SequenceId;

use super::request::{EndReason, Token};

/// The answer to a step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StepAnswer {
    /// The step's id.
    pub(crate) step: u64,
    /// Of the scheduled sequences, those with something to say.
    pub(crate) outputs: Vec<SequenceOutput>,
    /// Scheduled sequences that had ended in an earlier step.
    pub(crate) skipped: Vec<SequenceId>,
    /// How long it took on the slowest rank.
    pub(crate) times: StepTimes,
}

/// Where a step's time went on a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StepTimes {
    /// In the model.
    pub(crate) forward: Duration,
    /// In choosing tokens.
    pub(crate) sampling: Duration,
    /// Of grammars.
    pub(crate) masks: MaskTimes,
}

/// What the masks of a step's grammars cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MaskTimes {
    pub(crate) num_masks: u32,
    /// To compute them, in all.
    pub(crate) computing: Duration,
    /// How long the step waited for them.
    pub(crate) waiting: Duration,
}

/// What a step gave for one sequence.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SequenceOutput {
    pub(crate) sequence: SequenceId,
    /// Prompt tokens whose predecessors were computed in this step, where asked for.
    pub(crate) prompt: Vec<Token>,
    pub(crate) outcome: Outcome,
}

/// How a sequence goes on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    /// Its prompt is not computed to the end yet.
    Nothing,
    /// A token was sampled, or several where shards speculate, and the next one can be.
    Sampled(Vec<Token>),
    /// The same, and the last of them ends the sequence.
    Ended(Vec<Token>, EndReason),
    /// The logits were not finite.
    InvalidLogits,
    /// The step was computed without it, for want of memory.
    OutOfMemory,
    /// The blocks that it was admitted over were not computed, for the same reason.
    MissingPrefix,
    /// Its grammar cannot be enforced any longer, for this reason.
    GrammarFailed(String),
}

/// An answer that does not fit what was asked: router and shards no longer agree on the state of the sequences.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WrongAnswer {
    #[error("step {got} was answered where the answer to {expected:?} was due")]
    Step { expected: Option<u64>, got: u64 },
    #[error(
        "the answer to step {step} has two outputs, or one that was not asked for, for sequence {sequence}"
    )]
    UnknownSequence { step: u64, sequence: SequenceId },
    #[error("step {step} skipped sequence {sequence}, which had not ended")]
    Skipped { step: u64, sequence: SequenceId },
    #[error("step {step} computed sequence {sequence} up to its last token and sampled none")]
    NoToken { step: u64, sequence: SequenceId },
    #[error("step {step} computed a part of sequence {sequence} and sampled a token")]
    EarlyToken { step: u64, sequence: SequenceId },
    #[error("step {step} sampled {got} tokens of sequence {sequence}, where {limit} could be")]
    TooManyTokens { step: u64, sequence: SequenceId, got: usize, limit: usize },
    #[error("step {step} sampled the last of max_new_tokens of sequence {sequence} and did not end it")]
    NotEnded { step: u64, sequence: SequenceId },
    #[error(
        "step {step} owes {expected} prompt log-probabilities of sequence {sequence}, in order, and gave {got}"
    )]
    Prompt { step: u64, sequence: SequenceId, expected: usize, got: usize },
}
