//! The range of each sampling parameter, in one place. Messages have TGI's wording.

use proto::units::TokenId;

use crate::error::RequestError;
use crate::scheduler::Sampling;

/// Most entries of `logit_bias`: each is looked at in every step.
const MAX_LOGIT_BIAS: usize = 1024;

/// Whose API a request uses: fields have other names, and a few values another meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `/v1/...`: temperature 0 is greedy, `top_k` 0 or -1 is off.
    OpenAi,
    /// `/generate`: temperature and `top_k` are strictly positive.
    Tgi,
}

impl Dialect {
    pub(super) fn max_new_tokens(self) -> &'static str {
        match self {
            Self::OpenAi => "max_tokens",
            Self::Tgi => "max_new_tokens",
        }
    }

    pub(super) fn top_n_tokens(self) -> &'static str {
        match self {
            Self::OpenAi => "top_logprobs",
            Self::Tgi => "top_n_tokens",
        }
    }
}

/// As the client gave them.
#[derive(Debug, Clone, Default)]
pub(crate) struct SamplingParameters {
    /// `Some(false)`: greedy, unless a parameter below narrows the distribution (as TGI has it).
    pub(crate) do_sample: Option<bool>,
    /// Absent: 1.
    pub(crate) temperature: Option<f32>,
    /// Absent: off.
    pub(crate) top_k: Option<i64>,
    /// Absent: 1, off.
    pub(crate) top_p: Option<f32>,
    /// Absent: 0, off.
    pub(crate) min_p: Option<f32>,
    /// Absent: 1, off.
    pub(crate) typical_p: Option<f32>,
    /// Absent: a random one.
    pub(crate) seed: Option<u64>,
    /// Absent: 1, off.
    pub(crate) repetition_penalty: Option<f32>,
    /// Absent: 0, off.
    pub(crate) frequency_penalty: Option<f32>,
    /// Absent: 0, off.
    pub(crate) presence_penalty: Option<f32>,
    /// Token ids and what is added to their logits.
    pub(crate) logit_bias: Vec<(u32, f32)>,
}

impl SamplingParameters {
    /// Checks each range and fills in what is absent.
    pub(super) fn check(&self, dialect: Dialect, vocab_size: usize) -> Result<Sampling, RequestError> {
        let temperature = self.temperature(dialect)?;
        let top_k = self.top_k(dialect)?;
        let top_p = self.top_p.unwrap_or(1.0);
        ensure(top_p > 0.0 && top_p <= 1.0, "top_p", "must be > 0.0 and <= 1.0", top_p)?;
        let min_p = self.min_p.unwrap_or(0.0);
        ensure((0.0..=1.0).contains(&min_p), "min_p", "must be >= 0.0 and <= 1.0", min_p)?;
        let typical_p = self.typical_p.unwrap_or(1.0);
        ensure(typical_p > 0.0 && typical_p <= 1.0, "typical_p", "must be > 0.0 and <= 1.0", typical_p)?;
        let repetition_penalty = self.repetition_penalty.unwrap_or(1.0);
        let positive = repetition_penalty > 0.0 && repetition_penalty.is_finite();
        ensure(positive, "repetition_penalty", "must be strictly positive", repetition_penalty)?;
        let frequency_penalty = self.frequency_penalty.unwrap_or(0.0);
        let in_range = (-2.0..=2.0).contains(&frequency_penalty);
        ensure(in_range, "frequency_penalty", "must be >= -2.0 and <= 2.0", frequency_penalty)?;
        let presence_penalty = self.presence_penalty.unwrap_or(0.0);
        let in_range = (-2.0..=2.0).contains(&presence_penalty);
        ensure(in_range, "presence_penalty", "must be >= -2.0 and <= 2.0", presence_penalty)?;

        // As TGI: who narrows the distribution wants to sample from it.
        #[expect(
            clippy::float_cmp,
            reason = "exactly 1, the default, is what a client that sets nothing has"
        )]
        let tempered = temperature != 1.0;
        let warped = tempered || top_k > 0 || top_p < 1.0 || typical_p < 1.0 || min_p > 0.0;
        let greedy = self.do_sample == Some(false) && !warped;
        Ok(Sampling {
            temperature: if greedy { 0.0 } else { temperature },
            top_k,
            top_p,
            min_p,
            typical_p,
            seed: self.seed.unwrap_or_else(rand::random),
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias: self.logit_bias(vocab_size)?,
        })
    }

    fn temperature(&self, dialect: Dialect) -> Result<f32, RequestError> {
        let temperature = self.temperature.unwrap_or(1.0);
        let (in_range, range) = match dialect {
            Dialect::OpenAi => (temperature >= 0.0, "must be >= 0.0"),
            Dialect::Tgi => (temperature > 0.0, "must be strictly positive"),
        };
        ensure(in_range && temperature.is_finite(), "temperature", range, temperature)?;
        Ok(temperature)
    }

    fn top_k(&self, dialect: Dialect) -> Result<u32, RequestError> {
        match (self.top_k, dialect) {
            (None, _) | (Some(-1 | 0), Dialect::OpenAi) => Ok(0),
            // More than any vocabulary has is all of it.
            (Some(top_k), _) if top_k > 0 => Ok(u32::try_from(top_k).unwrap_or(0)),
            (Some(top_k), Dialect::Tgi) => Err(RequestError::invalid(
                "top_k",
                format!("`top_k` must be strictly positive. Given: {top_k}"),
            )),
            (Some(top_k), Dialect::OpenAi) => Err(RequestError::invalid(
                "top_k",
                format!("`top_k` must be -1 or 0 (off) or more. Given: {top_k}"),
            )),
        }
    }

    fn logit_bias(&self, vocab_size: usize) -> Result<Vec<(TokenId, f32)>, RequestError> {
        let given = self.logit_bias.len();
        if given > MAX_LOGIT_BIAS {
            let message = format!("`logit_bias` supports up to {MAX_LOGIT_BIAS} tokens. Given: {given}");
            return Err(RequestError::invalid("logit_bias", message));
        }
        for (id, bias) in &self.logit_bias {
            ensure((-100.0..=100.0).contains(bias), "logit_bias", "must be >= -100 and <= 100", *bias)?;
            if *id as usize >= vocab_size {
                let message = format!(
                    "`logit_bias`: token id {id} is outside of the model's vocabulary of {vocab_size} tokens"
                );
                return Err(RequestError::invalid("logit_bias", message));
            }
        }
        Ok(self.logit_bias.iter().map(|(id, bias)| (TokenId(*id), *bias)).collect())
    }
}

fn ensure(in_range: bool, param: &'static str, range: &str, given: f32) -> Result<(), RequestError> {
    if in_range {
        return Ok(());
    }
    Err(RequestError::invalid(param, format!("`{param}` {range}. Given: {given}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(parameters: &SamplingParameters, dialect: Dialect) -> Result<Sampling, RequestError> {
        parameters.check(dialect, 100)
    }

    #[test]
    fn nothing_given_is_plain_sampling_with_a_random_seed() {
        let sampling = check(&SamplingParameters::default(), Dialect::OpenAi).unwrap();
        assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (1.0, 0, 1.0));
        assert_ne!(sampling.seed, check(&SamplingParameters::default(), Dialect::OpenAi).unwrap().seed);
    }

    #[test]
    fn greedy_is_temperature_zero_or_no_sampling() {
        let is_greedy =
            |parameters: &SamplingParameters, dialect| check(parameters, dialect).unwrap().temperature <= 0.0;
        let zero = SamplingParameters { temperature: Some(0.0), ..Default::default() };
        assert!(is_greedy(&zero, Dialect::OpenAi));
        assert!(check(&zero, Dialect::Tgi).is_err());
        let greedy = SamplingParameters { do_sample: Some(false), ..Default::default() };
        assert!(is_greedy(&greedy, Dialect::Tgi));
        let warped = SamplingParameters { top_p: Some(0.9), ..greedy };
        assert!(!is_greedy(&warped, Dialect::Tgi));
    }

    #[test]
    fn ranges_are_kept_and_errors_name_the_field() {
        let refused = |parameters: SamplingParameters, param: &str| {
            for dialect in [Dialect::OpenAi, Dialect::Tgi] {
                let error = check(&parameters, dialect).unwrap_err().to_string();
                assert!(error.contains(&format!("`{param}`")), "{error}");
            }
        };
        let default = SamplingParameters::default;
        refused(SamplingParameters { temperature: Some(-0.1), ..default() }, "temperature");
        refused(SamplingParameters { temperature: Some(f32::INFINITY), ..default() }, "temperature");
        refused(SamplingParameters { top_k: Some(-2), ..default() }, "top_k");
        for value in [0.0, 1.1, -1.0] {
            refused(SamplingParameters { top_p: Some(value), ..default() }, "top_p");
            refused(SamplingParameters { typical_p: Some(value), ..default() }, "typical_p");
        }
        refused(SamplingParameters { min_p: Some(1.1), ..default() }, "min_p");
        refused(SamplingParameters { repetition_penalty: Some(0.0), ..default() }, "repetition_penalty");
        refused(
            SamplingParameters { repetition_penalty: Some(f32::INFINITY), ..default() },
            "repetition_penalty",
        );
        refused(SamplingParameters { frequency_penalty: Some(2.1), ..default() }, "frequency_penalty");
        refused(SamplingParameters { presence_penalty: Some(-2.1), ..default() }, "presence_penalty");
        refused(SamplingParameters { logit_bias: vec![(1, 101.0)], ..default() }, "logit_bias");
        refused(SamplingParameters { logit_bias: vec![(100, 1.0)], ..default() }, "logit_bias");
        refused(SamplingParameters { logit_bias: vec![(1, 1.0); 1025], ..default() }, "logit_bias");
    }

    #[test]
    fn the_ends_of_the_ranges_are_in_them() {
        let parameters = SamplingParameters {
            top_p: Some(1.0),
            typical_p: Some(1.0),
            min_p: Some(0.0),
            frequency_penalty: Some(-2.0),
            presence_penalty: Some(2.0),
            top_k: Some(i64::MAX),
            logit_bias: vec![(99, -100.0)],
            ..Default::default()
        };
        let sampling = check(&parameters, Dialect::Tgi).unwrap();
        assert_eq!(sampling.logit_bias, [(TokenId(99), -100.0)]);
        assert_eq!(
            check(&SamplingParameters { top_k: Some(-1), ..parameters }, Dialect::OpenAi).unwrap().top_k,
            0
        );
    }
}
