//! Sampling on the CPU by its plain definition, in f64 and with sorting: what a GPU's answers are compared with. (The shard
//! samples on the CPU with processors of its own, which cost nothing where they are off.)

use super::super::operands::{matrix, require, require_dtype, u32_vector};
use super::{
    IN_PROMPT, MAX_TOP_N, MOST_GENERATED, NONE, Sampled, SampledStatus, SamplingInput, SamplingRow,
    TokenCounts,
};
use crate::{DType, Place, Result, View, ViewMut};

const OP: &str = "sample";

pub(super) fn sample(
    input: &SamplingInput<'_>,
    counts: Option<&TokenCounts>,
    mut out: ViewMut<'_>,
) -> Result<()> {
    let (rows, vocab_size) = (input.logits.rows(), input.logits.cols());
    require_words("rows", input.rows, (rows, SamplingRow::WORDS))?;
    require_words("out", out.as_view(), (rows, Sampled::WORDS))?;
    let biases = u32_vector(OP, "biases", input.biases, input.biases.cols())?;
    if let Some(masks) = input.masks {
        require_words("masks", masks, (masks.rows(), vocab_size.div_ceil(32)))?;
    }
    for row in 0..rows {
        let sampled = match SamplingRow::from_words(input.rows.row::<u32>(row)) {
            None => Sampled::without_token(SampledStatus::Unused),
            Some(parameters) => {
                let row = Row { logits: input.logits.row::<f32>(row), parameters, biases, counts };
                row.check(input.masks)?;
                row.sample(input.masks)
            }
        };
        sampled.write(out.row::<u32>(row));
    }
    Ok(())
}

fn require_words(name: &str, view: View<'_>, shape: (usize, usize)) -> Result<()> {
    require_dtype(OP, view.dtype(), DType::U32)?;
    matrix(view).require(OP, name, Place::Host, shape)
}

struct Row<'a> {
    logits: &'a [f32],
    parameters: SamplingRow,
    biases: &'a [u32],
    counts: Option<&'a TokenCounts>,
}

/// A token that may be chosen, and its probability relative to the greatest.
#[derive(Clone, Copy)]
struct Candidate {
    token_id: usize,
    weight: f64,
}

impl Row<'_> {
    /// Refuses places that are not there, which a device would read.
    fn check(&self, masks: Option<View<'_>>) -> Result<()> {
        let SamplingRow { slot, biases: (first, len), mask, token, top_n, .. } = self.parameters;
        let vocab_size = self.logits.len();
        let end = 2 * (first as usize + len as usize);
        require(OP, end <= self.biases.len(), || {
            format!("biases end at word {end} of {}", self.biases.len())
        })?;
        let bias_tokens = self.row_biases().map(|(token, _)| token);
        require(OP, bias_tokens.max().is_none_or(|token| token < vocab_size), || {
            format!("a bias is for a token beyond the vocabulary of {vocab_size}")
        })?;
        require(OP, mask == NONE || masks.is_some_and(|masks| (mask as usize) < masks.rows()), || {
            format!("there is no mask {mask}")
        })?;
        let counted = || self.counts.is_some_and(|counts| (slot as usize) < counts.words.rows());
        require(OP, !self.parameters.has_penalties() || counted(), || {
            format!("penalties need counts, and there are none of slot {slot}")
        })?;
        require(OP, token == NONE || (token as usize) < vocab_size, || {
            format!("token {token} is beyond the vocabulary of {vocab_size}")
        })?;
        require(OP, top_n as usize <= MAX_TOP_N, || {
            format!("{top_n} most likely tokens are asked for, at most {MAX_TOP_N} are reported")
        })
    }

    fn row_biases(&self) -> impl Iterator<Item = (usize, f32)> {
        let (first, len) = self.parameters.biases;
        let pairs = &self.biases.as_chunks::<2>().0[first as usize..][..len as usize];
        pairs.iter().map(|&[token, bias]| (token as usize, f32::from_bits(bias)))
    }

    fn sample(&self, masks: Option<View<'_>>) -> Sampled {
        let max = self.logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !max.is_finite() || self.logits.iter().any(|logit| logit.is_nan()) {
            return Sampled::without_token(SampledStatus::NotFinite);
        }
        let sum: f64 = self.logits.iter().map(|&logit| (f64::from(logit) - f64::from(max)).exp()).sum();
        let logprob =
            |token: usize| ((f64::from(self.logits[token]) - f64::from(max) - sum.ln()) as f32).min(0.0);
        let known = (self.parameters.token != NONE).then_some(self.parameters.token as usize);
        let Some(token) = known.or_else(|| self.choose(&self.changed(masks))) else {
            return Sampled::without_token(SampledStatus::NothingAllowed);
        };
        let mut most_likely: Vec<usize> = (0..self.logits.len()).collect();
        most_likely.sort_by(|&a, &b| self.logits[b].total_cmp(&self.logits[a]).then(a.cmp(&b)));
        most_likely.truncate(self.parameters.top_n as usize);
        Sampled {
            token_id: token as u32,
            logprob: logprob(token),
            status: SampledStatus::Chosen,
            top: most_likely.into_iter().map(|token| (token as u32, logprob(token))).collect(),
        }
    }

    /// The logits with bias, penalties and grammar.
    fn changed(&self, masks: Option<View<'_>>) -> Vec<f32> {
        let mut logits = self.logits.to_vec();
        for (token, bias) in self.row_biases() {
            logits[token] += bias;
        }
        if let Some(counts) = self.counts.filter(|_| self.parameters.has_penalties()) {
            for (token, logit) in logits.iter_mut().enumerate() {
                *logit = self.penalized(*logit, counts.of(self.parameters.slot, token as u32));
            }
        }
        if let Some(mask) = masks.filter(|_| self.parameters.mask != NONE) {
            let mask = mask.row::<u32>(self.parameters.mask as usize);
            for (token, logit) in logits.iter_mut().enumerate() {
                if mask[token / 32] >> (token % 32) & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        logits
    }

    #[expect(clippy::float_cmp, reason = "1 switches the penalty off")]
    fn penalized(&self, logit: f32, count: u32) -> f32 {
        let SamplingRow { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.parameters;
        let mut logit = logit;
        if count & (IN_PROMPT | MOST_GENERATED) != 0 && repetition_penalty != 1.0 {
            let scaled = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
            logit = scaled.clamp(f32::MIN, f32::MAX);
        }
        match count & MOST_GENERATED {
            0 => logit,
            generated => logit - (frequency_penalty * generated as f32 + presence_penalty),
        }
    }

    fn choose(&self, logits: &[f32]) -> Option<usize> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY {
            return None;
        }
        if self.parameters.temperature == 0.0 {
            return logits.iter().position(|&logit| logit >= max);
        }
        let temperature = f64::from(self.parameters.temperature);
        let weight = |logit: f32| ((f64::from(logit) - f64::from(max)) / temperature).exp();
        let mut candidates: Vec<Candidate> = logits
            .iter()
            .enumerate()
            .map(|(token_id, &logit)| Candidate { token_id, weight: weight(logit) })
            .filter(|candidate| candidate.weight > 0.0)
            .collect();
        self.truncate(&mut candidates);
        candidates.sort_by_key(|candidate| candidate.token_id);
        let threshold = uniform(self.parameters.seed, self.parameters.position) * total(&candidates);
        let mut sum = 0.0;
        let chosen = candidates.iter().find(|candidate| {
            sum += candidate.weight;
            sum > threshold
        });
        chosen.or(candidates.last()).map(|candidate| candidate.token_id)
    }

    fn truncate(&self, candidates: &mut Vec<Candidate>) {
        let SamplingRow { top_k, top_p, min_p, typical_p, .. } = self.parameters;
        sort_by_key(candidates, |candidate| -candidate.weight);
        if top_k > 0 {
            candidates.truncate(top_k as usize);
        }
        if top_p < 1.0 {
            keep_share(candidates, top_p);
        }
        candidates.retain(|candidate| candidate.weight >= f64::from(min_p));
        if typical_p < 1.0 {
            let total = total(candidates);
            let information = |candidate: &Candidate| -(candidate.weight / total).ln();
            let entropy: f64 =
                candidates.iter().map(|candidate| candidate.weight / total * information(candidate)).sum();
            sort_by_key(candidates, |candidate| (information(candidate) - entropy).abs());
            keep_share(candidates, typical_p);
        }
    }
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// Ascending, of equal keys the lower ids first.
fn sort_by_key(candidates: &mut [Candidate], key: impl Fn(&Candidate) -> f64) {
    candidates.sort_by(|a, b| key(a).total_cmp(&key(b)).then(a.token_id.cmp(&b.token_id)));
}

/// Keeps the first whose weights sum up to this share of all, at least one.
fn keep_share(candidates: &mut Vec<Candidate>, share: f32) {
    let wanted = f64::from(share) * total(candidates);
    let mut sum = 0.0;
    let last = candidates.iter().position(|candidate| {
        sum += candidate.weight;
        sum >= wanted
    });
    candidates.truncate(last.map_or(usize::MAX, |last| last + 1));
}

/// Philox4x32-10: a number in `[0, 1)` with 53 random bits.
fn uniform(seed: u64, position: u64) -> f64 {
    let (mut c, mut k) =
        ([position as u32, (position >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        let product_0 = 0xD251_1F53 * u64::from(c[0]);
        let product_1 = 0xCD9E_8D57 * u64::from(c[2]);
        c = [
            (product_1 >> 32) as u32 ^ c[1] ^ k[0],
            product_1 as u32,
            (product_0 >> 32) as u32 ^ c[3] ^ k[1],
            product_0 as u32,
        ];
    }
    ((u64::from(c[1]) << 32 | u64::from(c[0])) >> 11) as f64 * (-53_f64).exp2()
}
