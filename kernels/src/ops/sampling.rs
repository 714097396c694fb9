//! From logits to tokens on the device, each row by its own parameters, so that any mixture of requests is one call.
//!
//! A row goes through: logit bias, repetition penalty, frequency and presence penalty, grammar, temperature, top-k, top-p,
//! min-p, typical-p, and the choice: the inverse of the cumulative distribution, in order of token id, at a Philox number
//! (Salmon et al. 2011) of the row's seed and position. Truncations prefer lower ids among equals. What a row gets does not
//! depend on the other rows. Log-probabilities are those of the raw logits.
//!
//! A GPU takes distances from the greatest logit, over the temperature, in steps of 2^-26 nats, and probabilities in steps of
//! 2^-44 of the greatest one; the CPU computes them in floating point. So where two candidates differ by less, where
//! a sum of probabilities meets a limit (top-p, typical-p, the random number) to about one part in a million, or a
//! candidate's probability that of min-p, one of both may keep or choose the neighbour. Candidates that are 64 nats or more
//! below the greatest have no probability on a GPU.

use super::operands::{matrix, on_cuda, require, require_f32_matrix, u32_vector, u32_vector_mut};
use crate::{Context, DType, Result, Tensor, View, ViewMut};

#[cfg(feature = "cuda")]
mod cuda;
mod reference;
mod words;

pub use words::{Sampled, SampledStatus, SamplingRow};

/// The most tokens whose log-probabilities are reported for a row.
pub const MAX_TOP_N: usize = 20;

/// The largest vocabulary that can be sampled from.
pub const MAX_VOCAB_SIZE: usize = 1 << 20;

/// Places without a meaning in [`SamplingRow`], and the token of a row that has none.
pub const NONE: u32 = u32::MAX;

/// What a step's rows are sampled from.
#[derive(Clone, Copy)]
pub struct SamplingInput<'a> {
    /// f32 `[rows, vocab_size]`.
    pub logits: View<'a>,
    /// u32 `[rows, SamplingRow::WORDS]`: see [`SamplingRow::to_words`].
    pub rows: View<'a>,
    /// u32 `[1, 2 * biases]`: pairs of a token and the bits of an f32. No token twice within a row's part.
    pub biases: View<'a>,
    /// u32 `[masks, vocab_size / 32 rounded up]`: a bit for each token, from the lowest on; 1: the grammar allows it. None
    /// where no row has a mask.
    pub masks: Option<View<'a>>,
}

/// What sampling needs besides: memory between its kernels, for the largest step, so that steps can be recorded.
#[derive(Debug)]
pub struct SamplingBuffers {
    max_rows: usize,
    vocab_size: usize,
    /// None on the CPU.
    #[cfg(feature = "cuda")]
    on_device: Option<cuda::Buffers>,
}

impl SamplingBuffers {
    /// For steps of up to `max_rows` rows.
    pub fn new(context: &Context, max_rows: usize, vocab_size: usize) -> Result<Self> {
        const OP: &str = "sampling buffers";
        require(OP, (1..=MAX_VOCAB_SIZE).contains(&vocab_size), || {
            format!("a vocabulary of {vocab_size}, expected 1 to {MAX_VOCAB_SIZE}")
        })?;
        #[cfg(feature = "cuda")]
        let on_device =
            context.device().map(|_| cuda::Buffers::new(context, max_rows, vocab_size)).transpose()?;
        #[cfg(not(feature = "cuda"))]
        let _ = context;
        Ok(Self {
            max_rows,
            vocab_size,
            #[cfg(feature = "cuda")]
            on_device,
        })
    }

    /// Bytes of device memory.
    pub fn size_in_bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(on_device) = &self.on_device {
            return on_device.size_in_bytes();
        }
        0
    }
}

/// How often each token has occurred in each running sequence, for penalties; 2 bytes for each token of the vocabulary and
/// slot. Up to 32767 occurrences are counted.
#[derive(Debug)]
pub struct TokenCounts {
    /// u32 `[slots, words]`: two counts in a word, the lower token in the lower half; a count's top bit: it is in the prompt.
    words: Tensor,
    vocab_size: usize,
}

const IN_PROMPT: u32 = 0x8000;
const MOST_GENERATED: u32 = 0x7fff;

impl TokenCounts {
    /// Of no tokens.
    pub fn new(context: &Context, num_slots: usize, vocab_size: usize) -> Result<Self> {
        // Rows of whole 16 bytes.
        let words = context.zeros(num_slots, vocab_size.div_ceil(8) * 4, DType::U32)?;
        Ok(Self { words, vocab_size })
    }

    /// Bytes of all counts.
    pub fn size_in_bytes(&self) -> usize {
        self.words.size_in_bytes()
    }

    /// As they lie, for tests.
    #[doc(hidden)]
    pub fn words(&self) -> View<'_> {
        self.words.view()
    }

    /// A slot's counts become those of a sequence that begins with `prompt` and has generated `generated` already. Both: u32
    /// `[1, n]`; ids beyond the vocabulary are not counted.
    pub fn recount(
        &mut self,
        context: &Context,
        slot: u32,
        prompt: View<'_>,
        generated: View<'_>,
    ) -> Result<()> {
        const OP: &str = "recount";
        require(OP, (slot as usize) < self.words.rows(), || {
            format!("slot {slot} is beyond the {} there are", self.words.rows())
        })?;
        on_cuda!(context, |device| cuda::recount(device, self, slot, prompt, generated));
        let prompt = u32_vector(OP, "prompt", prompt, prompt.cols())?;
        let generated = u32_vector(OP, "generated", generated, generated.cols())?;
        self.words.view_mut().row::<u32>(slot as usize).fill(0);
        let vocab_size = self.vocab_size;
        let is_known = |token: &&u32| (**token as usize) < vocab_size;
        for &token in prompt.iter().filter(is_known) {
            self.update(slot, token, |count| count | IN_PROMPT);
        }
        for &token in generated.iter().filter(is_known) {
            self.count(slot, token);
        }
        Ok(())
    }

    /// On the host.
    fn of(&self, slot: u32, token: u32) -> u32 {
        let word = self.words.view().row::<u32>(slot as usize)[token as usize / 2];
        word >> (16 * (token % 2)) & 0xffff
    }

    fn count(&mut self, slot: u32, token: u32) {
        self.update(
            slot,
            token,
            |count| if count & MOST_GENERATED < MOST_GENERATED { count + 1 } else { count },
        );
    }

    fn update(&mut self, slot: u32, token: u32, function: impl Fn(u32) -> u32) {
        let count = function(self.of(slot, token));
        let shift = 16 * (token % 2);
        let mut words = self.words.view_mut();
        let word = &mut words.row::<u32>(slot as usize)[token as usize / 2];
        *word = *word & !(0xffff << shift) | count << shift;
    }
}

/// Chooses a token for each row, or looks a known one up, and reports log-probabilities.
///
/// `counts`: those of the slots that rows with penalties name; `out`: u32 `[rows, Sampled::WORDS]`, see
/// [`Sampled::from_words`]. On a GPU nothing of the rows' contents is checked, because only the device knows them: whoever
/// makes them keeps to [`SamplingRow`]'s limits.
pub fn sample(
    context: &Context,
    buffers: &mut SamplingBuffers,
    input: &SamplingInput<'_>,
    counts: Option<&TokenCounts>,
    out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "sample";
    let (rows, vocab_size) = (input.logits.rows(), input.logits.cols());
    require(OP, vocab_size == buffers.vocab_size && rows <= buffers.max_rows, || {
        format!(
            "logits are [{rows}, {vocab_size}], the buffers are for up to [{}, {}]",
            buffers.max_rows, buffers.vocab_size
        )
    })?;
    require(OP, counts.is_none_or(|counts| counts.vocab_size == vocab_size), || {
        format!("the counts are of another vocabulary than {vocab_size}")
    })?;
    on_cuda!(context, |device| {
        let buffers = buffers.on_device.as_mut().ok_or_else(|| crate::Error::Shape {
            op: OP,
            message: "the buffers are of a context on the CPU: make them with this one".into(),
        })?;
        cuda::sample(device, buffers, input, counts, out)
    });
    require_f32_matrix(OP, "logits", matrix(input.logits), (rows, vocab_size))?;
    reference::sample(input, counts, out)
}

/// Takes note of chosen tokens: `last_tokens[slot] = token`, and one more in `counts`. Rows whose token or slot is [`NONE`] (or
/// beyond the vocabulary or the slots) have no effect, and of one slot no two rows may have a token.
///
/// `tokens`: u32 `[rows, n]`, the first column counts: [`Sampled`]'s words, or tokens as another rank sent them; `slots`: u32
/// `[1, rows]`; `last_tokens`: u32 `[1, slots]`.
pub fn commit_tokens(
    context: &Context,
    tokens: View<'_>,
    slots: View<'_>,
    last_tokens: ViewMut<'_>,
    counts: Option<&mut TokenCounts>,
    vocab_size: usize,
) -> Result<()> {
    const OP: &str = "commit_tokens";
    let (num_slots, rows) = (last_tokens.cols(), tokens.rows());
    require(OP, tokens.dtype() == DType::U32 && tokens.cols() > 0, || {
        format!("tokens are {:?} of {} columns, expected u32 of one or more", tokens.dtype(), tokens.cols())
    })?;
    require(OP, counts.as_ref().is_none_or(|counts| counts.vocab_size == vocab_size), || {
        format!("the counts are of another vocabulary than {vocab_size}")
    })?;
    require(OP, counts.as_ref().is_none_or(|counts| counts.words.rows() >= num_slots), || {
        format!("there are fewer counts than the {num_slots} slots")
    })?;
    on_cuda!(context, |device| cuda::commit(device, tokens, slots, last_tokens, counts, vocab_size));
    let slots = u32_vector(OP, "slots", slots, rows)?;
    let last_tokens = u32_vector_mut(OP, "last_tokens", last_tokens, num_slots)?;
    let mut counts = counts;
    for (row, &slot) in slots.iter().enumerate() {
        let token = tokens.row::<u32>(row)[0];
        if token as usize >= vocab_size || slot as usize >= num_slots {
            continue;
        }
        last_tokens[slot as usize] = token;
        if let Some(counts) = &mut counts {
            counts.count(slot, token);
        }
    }
    Ok(())
}
