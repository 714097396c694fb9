//! A model's tokens as llguidance wants them: each one's bytes in a trie, and a tokenizer for bytes that are forced.

use std::str::FromStr;

use serde_json::Value;
use tokenizers::Tokenizer;
use toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::error::Error;
use crate::pieces::{Piece, Pieces};

/// What a tokenizer that can be trusted with forced text gives back unchanged.
const SAMPLES: [&str; 4] = [
    "{\"name\": \"Ada\", \"born\": 1815, \"tags\": [\"a b\", \" c\", null, true]}",
    "{\n  \"x\": [1.5e-3, -20],\n    \"long key with words\": {}\n}",
    "The quick brown fox  jumps\tover the lazy dog.\n\n",
    "Zürich, 東京, naïve — “quoted” 🦊",
];

/// A model's tokens.
pub(crate) struct Vocabulary {
    trie: TokTrie,
    tokenizer: Tokenizer,
    is_canonical: bool,
}

impl Vocabulary {
    /// From the text of a `tokenizer.json`. `vocab_size`: the number of logits, which may be more or fewer than there are tokens;
    /// `eos`: tokens that end a sequence.
    pub(crate) fn new(tokenizer_json: &str, vocab_size: usize, eos: &[u32]) -> Result<Self, Error> {
        let broken = |error: String| Error::Model(format!("tokenizer.json is broken: {error}"));
        let mut json: Value =
            serde_json::from_str(tokenizer_json).map_err(|error| broken(error.to_string()))?;
        begin_in_the_middle(&mut json);
        let mut tokenizer =
            Tokenizer::from_str(&json.to_string()).map_err(|error| broken(error.to_string()))?;
        tokenizer.with_truncation(None).map_err(|error| broken(error.to_string()))?;
        tokenizer.with_padding(None);
        let words = bytes_of_tokens(&tokenizer, &json["decoder"], vocab_size)?;
        let eos: Vec<TokenId> = eos.iter().copied().filter(|id| (*id as usize) < vocab_size).collect();
        let info = TokRxInfo::new(vocab_size as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &words);
        if !eos.is_empty() {
            trie = trie.with_eos_tokens(&eos);
        }
        let mut vocabulary = Self { trie, tokenizer, is_canonical: true };
        vocabulary.is_canonical = SAMPLES.iter().all(|sample| vocabulary.keeps(sample));
        if !vocabulary.is_canonical {
            tracing::warn!(
                "the tokenizer does not give texts back as they were: grammars let the model choose the tokens of text that is forced"
            );
        }
        Ok(vocabulary)
    }

    /// Whether a text's tokens are that text.
    fn keeps(&self, text: &str) -> bool {
        let ids = self.encode(text);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.trie.token(id)).copied().collect();
        bytes == text.as_bytes()
    }

    fn encode(&self, text: &str) -> Vec<TokenId> {
        match self.tokenizer.encode_fast(text, false) {
            Ok(encoding) if encoding.get_ids().iter().all(|&id| (id as usize) < self.trie.vocab_size()) => {
                encoding.get_ids().to_vec()
            }
            // Tokens without a logit cannot be chosen.
            _ => self.trie.greedy_tokenize(text.as_bytes()),
        }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.encode(text))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.is_canonical
    }
}

/// Bytes of each token; none of a token that no grammar may choose, and a marker before those of a control token.
fn bytes_of_tokens(tokenizer: &Tokenizer, decoder: &Value, vocab_size: usize) -> Result<Vec<Vec<u8>>, Error> {
    let last_token = vocab_size.saturating_sub(1) as u32;
    let pieces = Pieces::new(decoder, last_token, |id| tokenizer.id_to_token(id)).ok_or_else(|| {
        Error::Model(format!(
            "its tokenizer's decoder, {}, is not one whose tokens are known as bytes",
            kind(decoder)
        ))
    })?;
    let added = tokenizer.get_added_tokens_decoder();
    let bytes = |id: u32| match (added.get(&id), pieces.get(id)) {
        (Some(token), _) if token.special => {
            [&[TokTrie::SPECIAL_TOKEN_MARKER], token.content.as_bytes()].concat()
        }
        (_, Piece::Bytes(bytes)) => bytes.to_vec(),
        (_, Piece::Fallback(byte)) => vec![byte],
    };
    Ok((0..=last_token).map(bytes).collect())
}

fn kind(decoder: &Value) -> &str {
    decoder["type"].as_str().unwrap_or("which is absent")
}

/// Makes a tokenizer treat a text as one in the middle of another: none puts a space before its first word.
fn begin_in_the_middle(tokenizer: &mut Value) {
    for step in steps(&mut tokenizer["normalizer"], "normalizers") {
        if step["type"] == "Prepend" {
            step["prepend"] = "".into();
        }
    }
    for step in steps(&mut tokenizer["pre_tokenizer"], "pretokenizers") {
        match step["type"].as_str() {
            Some("Metaspace") => step["prepend_scheme"] = "never".into(),
            Some("ByteLevel") => step["add_prefix_space"] = false.into(),
            _ => {}
        }
    }
}

/// A component's steps: itself, or those of a sequence.
fn steps<'a>(component: &'a mut Value, list: &str) -> Vec<&'a mut Value> {
    if component["type"] != "Sequence" {
        return if component.is_object() { vec![component] } else { Vec::new() };
    }
    component[list].as_array_mut().into_iter().flatten().collect()
}
