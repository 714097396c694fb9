//! What each token adds to a text, looked up instead of decoded: a decoder of the `tokenizers` library puts strings
//! together anew for each token of each stream, and that would be most of the router's work.
//!
//! This serves the two decoders that nearly all language models have. With others, texts are decoded by that library, and no grammar
//! can be enforced.

use serde_json::{Value, json};

/// A vocabulary beyond this is not real; a table for it would be.
const MAX_TOKENS: u32 = 4_000_000;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Bytes of text, which need not be whole characters.
    Bytes(&'a [u8]),
    /// One byte of a character that the vocabulary lacks. Bytes in a row are text only if all together are valid.
    Fallback(u8),
}

/// Pieces of all tokens.
pub struct Pieces {
    style: Style,
    bytes: Vec<u8>,
    /// Where each token's bytes end; they begin where those of the token before end.
    ends: Vec<u32>,
}

/// How pieces become a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// Pieces are bytes, written as printable characters (GPT-2's).
    ByteLevel,
    /// Pieces are text with U+2581 for spaces, or `<0xAB>` for a byte (SentencePiece's).
    ByteFallback {
        /// Whether a text loses a space at its beginning.
        strips_space: bool,
    },
}

impl Pieces {
    /// The pieces of a tokenizer with this decoder and these tokens, if both are of a kind that is known.
    pub fn new(decoder: &Value, last_token: u32, piece: impl Fn(u32) -> Option<String>) -> Option<Self> {
        let style = Style::of(decoder)?;
        if last_token > MAX_TOKENS {
            return None;
        }
        let mut pieces = Self { style, bytes: Vec::new(), ends: Vec::with_capacity(last_token as usize + 1) };
        for id in 0..=last_token {
            let piece = piece(id).unwrap_or_default();
            match style {
                Style::ByteLevel => match piece.chars().map(byte_of_char).collect::<Option<Vec<u8>>>() {
                    Some(bytes) => pieces.bytes.extend(bytes),
                    // A token that was added as plain text.
                    None => pieces.bytes.extend(piece.bytes()),
                },
                Style::ByteFallback { .. } => pieces.bytes.extend(piece.replace('\u{2581}', " ").bytes()),
            }
            pieces.ends.push(u32::try_from(pieces.bytes.len()).ok()?);
        }
        Some(pieces)
    }

    /// A token's piece; empty for an id outside of the vocabulary.
    pub fn get(&self, id: u32) -> Piece<'_> {
        let at = id as usize;
        let Some(&end) = self.ends.get(at) else { return Piece::Bytes(&[]) };
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        let bytes = &self.bytes[start as usize..end as usize];
        match self.style {
            Style::ByteFallback { .. } => fallback_byte(bytes).map_or(Piece::Bytes(bytes), Piece::Fallback),
            Style::ByteLevel => Piece::Bytes(bytes),
        }
    }

    /// Whether a text loses a space at its beginning.
    pub fn strips_space(&self) -> bool {
        self.style == Style::ByteFallback { strips_space: true }
    }
}

impl Style {
    /// Exactly those that are known: with one more step, pieces are something else.
    fn of(decoder: &Value) -> Option<Self> {
        if decoder["type"] == "ByteLevel" {
            return Some(Self::ByteLevel);
        }
        let steps = decoder["decoders"].as_array().filter(|_| decoder["type"] == "Sequence")?;
        let common = [
            json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        match steps.strip_prefix(&common)? {
            [] => Some(Self::ByteFallback { strips_space: false }),
            [last] if *last == strip => Some(Self::ByteFallback { strips_space: true }),
            _ => None,
        }
    }
}

/// The byte of `<0xAB>`.
fn fallback_byte(piece: &[u8]) -> Option<u8> {
    let &[b'<', b'0', b'x', high, low, b'>'] = piece else { return None };
    let digit = |digit: u8| char::from(digit).to_digit(16);
    Some((digit(high)? * 16 + digit(low)?) as u8)
}

/// Inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the other bytes were moved in order to
/// U+0100 and up. None for a character outside of this table.
pub fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    Some(byte as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_decoders_that_are_wholly_known_have_pieces() {
        let pieces = |decoder: Value| Pieces::new(&decoder, 1, |id| Some(format!("\u{2581}{id}"))).is_some();
        let replace = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
        let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let sequence = |steps: &[&Value]| json!({"type": "Sequence", "decoders": steps});
        assert!(pieces(json!({"type": "ByteLevel", "add_prefix_space": true})));
        assert!(pieces(sequence(&[&replace, &bytes, &fuse])));
        assert!(!pieces(sequence(&[&replace, &bytes])));
        assert!(!pieces(sequence(&[&replace, &bytes, &fuse, &fuse])));
        assert!(!pieces(json!({"type": "Metaspace", "replacement": "\u{2581}"})));
        assert!(!pieces(Value::Null));
        assert!(Pieces::new(&json!({"type": "ByteLevel"}), u32::MAX, |_| None).is_none());
    }

    #[test]
    fn a_token_is_its_bytes_and_one_outside_of_the_vocabulary_is_nothing() {
        let vocabulary = ["Ġthe", "", "<|x y|>"];
        let piece = |id: u32| vocabulary.get(id as usize).map(ToString::to_string);
        let pieces = Pieces::new(&json!({"type": "ByteLevel"}), 3, piece).unwrap();
        assert_eq!(pieces.get(0), Piece::Bytes(b" the"));
        assert_eq!(pieces.get(1), Piece::Bytes(b""));
        // A space is not in the table of characters, so this is plain text.
        assert_eq!(pieces.get(2), Piece::Bytes(b"<|x y|>"));
        assert_eq!(pieces.get(3), Piece::Bytes(b""));
        assert_eq!(pieces.get(u32::MAX), Piece::Bytes(b""));
    }
}
