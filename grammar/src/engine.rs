//! Grammars to masks: which tokens may come next.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory};
use nix::time::{ClockId, clock_gettime};

use crate::error::Error;
use crate::limits::{MAX_FIRST_MASK, parser_limits};
use crate::source::{Kind, Source};
use crate::vocabulary::Vocabulary;
use crate::{patterns, schema};

/// Compiles grammars for one model.
pub struct Engine {
    factory: ParserFactory,
    vocab_size: usize,
}

/// A grammar, compiled. What its sequences find out about it is shared by them.
pub struct Compiled {
    /// At its beginning, with the first mask computed.
    beginning: Mutex<Matcher>,
    mask_words: usize,
}

/// How a sequence stands in its grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Something may come.
    Open,
    /// The text is complete: its end was chosen, or nothing else can follow.
    Complete,
}

/// One sequence's way through a grammar.
pub struct Matching {
    matcher: Matcher,
    mask_words: usize,
}

impl Engine {
    /// For a model with this `tokenizer.json`, so many logits, and these tokens that end a sequence.
    pub fn new(tokenizer_json: &str, vocab_size: usize, eos: &[u32]) -> Result<Self, Error> {
        let vocabulary: TokEnv = Arc::new(Vocabulary::new(tokenizer_json, vocab_size, eos)?);
        let slices = SlicedBiasComputer::json_slices();
        let mut factory = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), &slices)
            .map_err(|error| Error::Model(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = parser_limits();
        Ok(Self { factory, vocab_size })
    }

    /// Words of a mask: a bit for each token, from the lowest on.
    pub fn mask_words(&self) -> usize {
        self.vocab_size.div_ceil(32)
    }

    /// Bytes of a token, a control token's behind a marker of 0xff; for tests.
    #[doc(hidden)]
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        self.factory.tok_env().tok_trie().token(token)
    }

    /// Checks and compiles a grammar, up to its first mask. Needs a large stack: see [`crate::Compiler`].
    pub fn compile(&self, source: &Source) -> Result<Compiled, Error> {
        let grammar = match source.kind {
            Kind::JsonSchema => TopLevelGrammar::from_json_schema(schema::prepare(&source.text)?),
            Kind::Regex => {
                patterns::check(&source.text, "the regex")?;
                let regex = patterns::without_anchors(&source.text);
                if regex.is_empty() {
                    let message = "the regex is empty: no text but the empty one would match it";
                    return Err(Error::grammar(message));
                }
                TopLevelGrammar::from_regex(regex)
            }
        };
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(Error::of_engine(&anyhow::anyhow!(error)));
        }
        let before = thread_time();
        let first = matcher.clone().compute_mask().map_err(|error| Error::of_engine(&error))?;
        let took = thread_time().saturating_sub(before);
        if took > MAX_FIRST_MASK {
            let message = format!(
                "finding out which tokens may come first took {} ms, but at most {} are given to it: simplify it",
                took.as_millis(),
                MAX_FIRST_MASK.as_millis()
            );
            return Err(Error::grammar(message));
        }
        if first.is_zero() {
            return Err(Error::grammar("it allows no text that the model could write"));
        }
        Ok(Compiled { beginning: Mutex::new(matcher), mask_words: self.mask_words() })
    }
}

impl Compiled {
    /// A sequence at the grammar's beginning.
    pub fn begin(&self) -> Matching {
        let beginning = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        Matching { matcher: beginning.clone(), mask_words: self.mask_words }
    }

    /// The same grammar once more. All sequences of one wait for each other while their masks are computed, so each thread that
    /// computes masks is to have its own.
    #[must_use]
    pub fn separate(&self) -> Self {
        let beginning = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        Self { beginning: Mutex::new(beginning.deep_clone()), mask_words: self.mask_words }
    }
}

impl Matching {
    /// Words of a mask.
    pub fn mask_words(&self) -> usize {
        self.mask_words
    }

    /// Takes up tokens that were chosen. An error ends this matching.
    pub fn advance(&mut self, tokens: &[u32]) -> Result<Progress, Error> {
        if !tokens.is_empty() {
            self.matcher.consume_tokens(tokens).map_err(|error| Error::of_engine(&error))?;
        }
        Ok(if self.matcher.is_stopped() { Progress::Complete } else { Progress::Open })
    }

    /// Writes which tokens may come next, a bit each: at least one. An error ends this matching.
    ///
    /// # Panics
    /// Where `mask` is not [`Engine::mask_words`] long.
    pub fn write_mask(&mut self, mask: &mut [u32]) -> Result<(), Error> {
        assert_eq!(mask.len(), self.mask_words, "a bit for each token");
        let allowed = self.matcher.compute_mask().map_err(|error| Error::of_engine(&error))?;
        mask.copy_from_slice(&allowed.as_slice()[..mask.len()]);
        Ok(())
    }

    /// How many of `tokens` could be taken up one after the other.
    pub fn num_allowed(&mut self, tokens: &[u32]) -> Result<usize, Error> {
        self.matcher.validate_tokens(tokens).map_err(|error| Error::of_engine(&error))
    }

    /// Whether the text so far is complete, whatever may follow.
    pub fn is_accepting(&mut self) -> Result<bool, Error> {
        self.matcher.is_accepting().map_err(|error| Error::of_engine(&error))
    }
}

/// What this thread has computed so far: other than a clock's, this time does not grow while other programs have their turn.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}
