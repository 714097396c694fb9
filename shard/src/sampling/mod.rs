//! Logits to token: bias, penalties, temperature and truncation (one processor = one file), then the choice.
//!
//! A [`Sampler`] belongs to one sequence and sees nothing but that sequence's row of logits, its own tokens and the
//! position of the token to choose, so what it chooses does not depend on what else is in the batch.
//!
//! To add a processor: one file beside these, one line in [`PROCESSORS`] (docs/how-to/add-a-logits-processor.md). The mask of a
//! grammar is no processor, since it is another one for each token (`grammar_mask`).
#![expect(clippy::float_cmp, reason = "neutral values switch a processor off, and equal means the same bits")]

use proto::v1::SamplingParameters;

use self::distribution::Distribution;
use self::history::History;

mod choose;
mod distribution;
mod grammar_mask;
mod history;
mod logprobs;
mod rng;
mod sampler;

mod frequency_presence_penalty;
mod logit_bias;
mod min_p;
mod repetition_penalty;
mod temperature;
mod top_k;
mod top_p;
mod typical_p;

pub(crate) use logprobs::{LogSoftmax, NotFinite};
pub(crate) use sampler::{NoToken, Sampler, Scratch};

/// Changes the distribution that a token is chosen from.
trait LogitsProcessor: Send + Sync {
    /// `history`: the tokens of this sequence, and of no other.
    fn process(&self, history: &History, distribution: &mut Distribution);
}

/// Makes a processor from a sequence's parameters; none where they turn it off.
type BuildProcessor = fn(&SamplingParameters) -> Option<Box<dyn LogitsProcessor>>;

/// All processors in their order of application. Those that change logits come before those that drop candidates, and a
/// grammar's mask is applied between these two lists: whatever bias and penalties say, what it forbids is not chosen.
const PROCESSORS: [&[BuildProcessor]; 2] = [
    &[logit_bias::build, repetition_penalty::build, frequency_presence_penalty::build],
    &[temperature::build, top_k::build, top_p::build, min_p::build, typical_p::build],
];

/// Whether the most likely token is chosen, so that temperature and truncation have no effect.
fn is_greedy(parameters: &SamplingParameters) -> bool {
    parameters.temperature == 0.0
}

/// Parameters that leave the model's distribution as it is.
pub(crate) fn neutral_parameters() -> SamplingParameters {
    SamplingParameters {
        temperature: 1.0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..SamplingParameters::default()
    }
}
