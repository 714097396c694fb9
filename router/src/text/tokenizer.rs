//! The model's `tokenizer.json`: text to ids, single ids to text and bytes.

use std::collections::HashSet;
use std::path::Path;
use std::str::FromStr;

use grammar::pieces::{Pieces, byte_of_char};
use proto::units::TokenId;

use super::LoadError;

/// A tokenizer of the `tokenizers` library, without its truncation and padding: both are for training.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
    byte_level: bool,
    pieces: Option<Pieces>,
}

/// The tokenizer could not encode a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the tokenizer cannot encode this text: {0}")]
pub(crate) struct EncodeError(String);

impl Tokenizer {
    /// Reads `tokenizer.json` in `model_dir`.
    pub(crate) fn load(model_dir: &Path) -> Result<Self, LoadError> {
        let path = model_dir.join("tokenizer.json");
        let named = path.display().to_string();
        let json =
            std::fs::read_to_string(&path).map_err(|error| LoadError::Read { path: named.clone(), error })?;
        Self::parse(&json).map_err(|reason| LoadError::Broken { path: named, reason })
    }

    /// Parses the content of a `tokenizer.json`.
    pub(crate) fn parse(json: &str) -> Result<Self, String> {
        let mut inner = tokenizers::Tokenizer::from_str(json).map_err(|error| error.to_string())?;
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .collect();
        let decoder = inner.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok());
        let decoder = decoder.unwrap_or_default();
        let byte_level = decoder.to_string().contains("\"type\":\"ByteLevel\"");
        let last_token = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let pieces = Pieces::new(&decoder, last_token, |id| inner.id_to_token(id));
        Ok(Self { inner, special, byte_level, pieces })
    }

    /// Ids of `text`. `add_special_tokens`: also those that the tokenizer puts around a text (a BOS, usually); a
    /// templated chat has them already.
    pub(crate) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, EncodeError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| EncodeError(error.to_string()))?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// Text of `ids`, special tokens included; half characters become U+FFFD. Ids outside of the vocabulary have no
    /// text.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).unwrap_or_default()
    }

    /// What each token adds to a text, where that can be looked up.
    pub(super) fn pieces(&self) -> Option<&Pieces> {
        self.pieces.as_ref()
    }

    /// Whether `id` is a control token, which is no part of a text.
    pub(crate) fn is_special(&self, id: TokenId) -> bool {
        self.special.contains(&id.0)
    }

    /// Text of one token by itself; half a character is U+FFFD.
    pub(crate) fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// Bytes of one token, which need not be whole characters. Empty for an id outside of the vocabulary.
    pub(crate) fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        let Some(piece) = self.inner.id_to_token(id.0) else {
            return Vec::new();
        };
        if self.inner.get_added_vocabulary().simple_id_to_token(id.0).is_some() {
            return piece.into_bytes();
        }
        if self.byte_level {
            let bytes = |character: char| match byte_of_char(character) {
                Some(byte) => vec![byte],
                None => character.to_string().into_bytes(),
            };
            return piece.chars().flat_map(bytes).collect();
        }
        if let Some(hex) = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'))
            && let Ok(byte) = u8::from_str_radix(hex, 16)
        {
            return vec![byte];
        }
        // SentencePiece writes a space as U+2581; its decoders drop it at the beginning of a text, but this is not one.
        if piece.contains('\u{2581}') {
            return piece.replace('\u{2581}', " ").into_bytes();
        }
        self.decode(&[id.0]).into_bytes()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// A byte-level BPE tokenizer with the 256 bytes, a few merges, and a BOS, an EOS and two ChatML tokens.
    pub(crate) fn byte_level() -> Tokenizer {
        let mut vocab = String::new();
        for byte in 0..=255u8 {
            let character = (0..0x144u32)
                .filter_map(char::from_u32)
                .find(|c| *c as u32 > 0x20 && byte_of_char(*c) == Some(byte))
                .expect("each byte has a character");
            write!(vocab, "{}:{byte},", serde_json::to_string(&character.to_string()).unwrap()).unwrap();
        }
        let json = format!(
            r#"{{"version":"1.0","truncation":{{"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0}},"padding":null,
            "added_tokens":[{}],"normalizer":null,
            "pre_tokenizer":{{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}},
            "post_processor":null,"decoder":{{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}},
            "model":{{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,
            "fuse_unk":false,"byte_fallback":false,"vocab":{{{vocab}"th":256,"the":257,"Ġt":258,"Ġthe":259,"ä½":260}},
            "merges":["t h","th e","Ġ the","ä ½"]}}}}"#,
            [(261, "<s>"), (262, "</s>"), (263, "<|im_start|>"), (264, "<|im_end|>")]
                .map(|(id, content)| added_token(id, content))
                .join(",")
        );
        Tokenizer::parse(&json).expect("the test's tokenizer is valid")
    }

    /// A SentencePiece-like tokenizer as Llama 2's: spaces are U+2581, unknown characters become bytes.
    pub(crate) fn byte_fallback() -> Tokenizer {
        let mut vocab = String::from(r#""<unk>":0,"<s>":1,"</s>":2,"#);
        for byte in 0..=255u16 {
            write!(vocab, r#""<0x{byte:02X}>":{},"#, byte + 3).unwrap();
        }
        let json = format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{}],
            "normalizer":{{"type":"Sequence","normalizers":[{{"type":"Prepend","prepend":"▁"}},{{"type":"Replace","pattern":{{"String":" "}},"content":"▁"}}]}},
            "pre_tokenizer":null,"post_processor":null,
            "decoder":{{"type":"Sequence","decoders":[{{"type":"Replace","pattern":{{"String":"▁"}},"content":" "}},{{"type":"ByteFallback"}},{{"type":"Fuse"}},{{"type":"Strip","content":" ","start":1,"stop":0}}]}},
            "model":{{"type":"BPE","dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,"end_of_word_suffix":null,
            "fuse_unk":true,"byte_fallback":true,"vocab":{{{vocab}"▁":259,"h":260,"i":261,"▁h":262}},"merges":["▁ h"]}}}}"#,
            [(0, "<unk>"), (1, "<s>"), (2, "</s>")].map(|(id, content)| added_token(id, content)).join(",")
        );
        Tokenizer::parse(&json).expect("the test's tokenizer is valid")
    }

    fn added_token(id: u32, content: &str) -> String {
        format!(
            r#"{{"id":{id},"content":"{content}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#
        )
    }

    #[test]
    fn truncation_of_the_file_is_ignored() {
        let tokenizer = byte_level();
        assert_eq!(tokenizer.encode("much longer than four tokens", false).unwrap().len(), 27);
    }

    #[test]
    fn tokens_have_text_and_bytes_even_when_they_are_half_a_character() {
        let check = |tokenizer: &Tokenizer, id: u32, bytes: &[u8]| {
            assert_eq!(tokenizer.token_bytes(TokenId(id)), bytes, "token {id}");
        };
        let tokenizer = byte_level();
        check(&tokenizer, 259, b" the");
        check(&tokenizer, 260, &[0xe4, 0xbd]);
        check(&tokenizer, 0x0a, b"\n");
        check(&tokenizer, 0xad, &[0xad]);
        check(&tokenizer, 262, b"</s>");
        check(&tokenizer, 100_000, b"");
        assert_eq!(tokenizer.token_text(TokenId(260)), "\u{fffd}");
        let tokenizer = byte_fallback();
        check(&tokenizer, 3 + 0xe4, &[0xe4]);
        check(&tokenizer, 262, b" h");
        check(&tokenizer, 260, b"h");
    }

    #[test]
    fn only_control_tokens_are_special() {
        let tokenizer = byte_level();
        assert!(tokenizer.is_special(TokenId(262)));
        assert!(!tokenizer.is_special(TokenId(259)));
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).err().expect("there is no file").to_string();
        assert!(error.contains("tokenizer.json cannot be read"), "{error}");
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        let error = Tokenizer::load(dir.path()).err().expect("the file is no JSON").to_string();
        assert!(error.contains("tokenizer.json is broken"), "{error}");
    }
}
