//! What penalties need to know about a sequence's own tokens.

use std::collections::HashMap;

use proto::v1::SamplingParameters;

/// How often each token has occurred in one sequence.
#[derive(Debug, Default)]
pub(super) struct History {
    counts: HashMap<u32, Occurrences>,
    /// Counting costs memory per distinct token, so it is done only where a penalty reads it.
    counts_tokens: bool,
}

/// Of one token in one sequence.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Occurrences {
    /// How many times it was generated; 0 where it is in the prompt only.
    pub(super) generated: u32,
}

impl History {
    pub(super) fn new(parameters: &SamplingParameters) -> Self {
        let counts_tokens = parameters.repetition_penalty != 1.0
            || parameters.frequency_penalty != 0.0
            || parameters.presence_penalty != 0.0;
        Self { counts: HashMap::new(), counts_tokens }
    }

    pub(super) fn push_prompt(&mut self, token_id: u32) {
        if self.counts_tokens {
            self.counts.entry(token_id).or_default();
        }
    }

    pub(super) fn push_generated(&mut self, token_id: u32) {
        if self.counts_tokens {
            self.counts.entry(token_id).or_default().generated += 1;
        }
    }

    /// Each distinct token of prompt and output once, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, Occurrences)> {
        self.counts.iter().map(|(&token_id, &occurrences)| (token_id, occurrences))
    }
}
