//! What crosses between host and device as words of 32 bits, as `cuda/sampling.cuh` has it.

use super::{MAX_TOP_N, NONE};

/// How one row is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingRow {
    /// 0: the most likely token, and the truncations have no effect.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0: off.
    pub top_k: u32,
    /// Keep the smallest set of tokens with this probability together, 0 < `top_p` <= 1; 1: off.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the most likely one, 0 to 1; 0: off.
    pub min_p: f32,
    /// Locally typical sampling (Meister et al. 2022, arXiv:2202.00666), 0 < `typical_p` <= 1; 1: off.
    pub typical_p: f32,
    /// Keys the random numbers.
    pub seed: u64,
    /// Of the token to choose, in its sequence: the counter of the random numbers.
    pub position: u64,
    /// Divides positive and multiplies negative logits of tokens that have occurred, > 0; 1: off.
    pub repetition_penalty: f32,
    /// Subtracted for each time a token was generated; 0: off.
    pub frequency_penalty: f32,
    /// Subtracted where a token was generated; 0: off.
    pub presence_penalty: f32,
    /// Where the sequence's tokens are counted; read only with a penalty.
    pub slot: u32,
    /// Of the row's biases the first, and how many they are.
    pub biases: (u32, u32),
    /// The grammar's row of masks; [`NONE`]: all is allowed.
    pub mask: u32,
    /// A known token, below the vocabulary's size, whose log-probability is asked for; [`NONE`]: choose.
    pub token: u32,
    /// How many of the most likely tokens are reported, up to [`MAX_TOP_N`].
    pub top_n: u32,
}

impl Default for SamplingRow {
    /// The model's distribution as it is.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            seed: 0,
            position: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            slot: NONE,
            biases: (0, 0),
            mask: NONE,
            token: NONE,
            top_n: 0,
        }
    }
}

/// `ROW_IS_UNUSED` and `ROW_HAS_PENALTIES` of the kernels.
const IS_UNUSED: u32 = 1;
const HAS_PENALTIES: u32 = 2;
/// 2^26.
const KEYS_PER_NAT: f64 = 67_108_864.0;

impl SamplingRow {
    /// Words of a row.
    pub const WORDS: usize = 20;
    /// A row that only fills a recorded batch up: its token is [`NONE`].
    pub const UNUSED: [u32; Self::WORDS] = {
        let mut words = [0; Self::WORDS];
        words[15] = NONE;
        words[16] = NONE;
        words[18] = IS_UNUSED;
        words
    };

    /// As a device reads it.
    pub fn to_words(self) -> [u32; Self::WORDS] {
        [
            self.temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            min_p_key(self.min_p),
            self.typical_p.to_bits(),
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.position as u32,
            (self.position >> 32) as u32,
            self.repetition_penalty.to_bits(),
            self.frequency_penalty.to_bits(),
            self.presence_penalty.to_bits(),
            self.slot,
            self.biases.0,
            self.biases.1,
            self.mask,
            self.token,
            self.top_n,
            if self.has_penalties() { HAS_PENALTIES } else { 0 },
            self.min_p.to_bits(),
        ]
    }

    /// None of a row that is not used.
    pub(super) fn from_words(words: &[u32]) -> Option<Self> {
        let float = |word: usize| f32::from_bits(words[word]);
        let long = |word: usize| u64::from(words[word + 1]) << 32 | u64::from(words[word]);
        (words[18] & IS_UNUSED == 0).then(|| Self {
            temperature: float(0),
            top_k: words[1],
            top_p: float(2),
            min_p: float(19),
            typical_p: float(4),
            seed: long(5),
            position: long(7),
            repetition_penalty: float(9),
            frequency_penalty: float(10),
            presence_penalty: float(11),
            slot: words[12],
            biases: (words[13], words[14]),
            mask: words[15],
            token: words[16],
            top_n: words[17],
        })
    }

    #[expect(
        clippy::float_cmp,
        reason = "neutral values switch a penalty off, and equal means the same bits"
    )]
    pub(super) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// How far from the most likely token a token may be, in the steps of a GPU; [`NONE`] where `min_p` is off.
fn min_p_key(min_p: f32) -> u32 {
    if min_p > 0.0 {
        (-f64::from(min_p).ln() * KEYS_PER_NAT).clamp(0.0, f64::from(NONE - 1)) as u32
    } else {
        NONE
    }
}

/// Whether a row has a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampledStatus {
    /// It has.
    Chosen,
    /// The logits hold NaN or +infinity, or nothing but -infinity.
    NotFinite,
    /// The grammar allows no token that the model gives a probability.
    NothingAllowed,
    /// The row only filled a batch up.
    Unused,
}

/// What came out of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// [`NONE`] unless the status is [`SampledStatus::Chosen`].
    pub token_id: u32,
    /// Of the token in the raw distribution; at most 0.
    pub logprob: f32,
    /// Whether there is a token.
    pub status: SampledStatus,
    /// The most likely tokens of the raw distribution, most likely first, of equally likely ones the lower ids.
    pub top: Vec<(u32, f32)>,
}

impl Sampled {
    /// Words of a row.
    pub const WORDS: usize = 4 + 2 * MAX_TOP_N;

    pub(super) fn without_token(status: SampledStatus) -> Self {
        Self { token_id: NONE, logprob: 0.0, status, top: Vec::new() }
    }

    pub(super) fn write(&self, words: &mut [u32]) {
        words[0] = self.token_id;
        words[1] = self.logprob.to_bits();
        words[2] = self.status as u32;
        words[3] = self.top.len() as u32;
        for (i, (token_id, logprob)) in self.top.iter().enumerate() {
            words[4 + i] = *token_id;
            words[4 + MAX_TOP_N + i] = logprob.to_bits();
        }
    }

    /// As a device wrote it.
    ///
    /// # Panics
    /// Where these are not the words of one row.
    pub fn from_words(words: &[u32]) -> Self {
        let status = match words[2] {
            0 => SampledStatus::Chosen,
            1 => SampledStatus::NotFinite,
            2 => SampledStatus::NothingAllowed,
            3 => SampledStatus::Unused,
            other => panic!("a row's status is {other}"),
        };
        let top_tokens = &words[4..][..words[3] as usize];
        let top_logprobs = words[4 + MAX_TOP_N..].iter().map(|&bits| f32::from_bits(bits));
        let top = top_tokens.iter().copied().zip(top_logprobs).collect();
        Self { token_id: words[0], logprob: f32::from_bits(words[1]), status, top }
    }
}
