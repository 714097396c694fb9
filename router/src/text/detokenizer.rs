//! Token ids to text, one at a time, never giving half a character.
//!
//! A token's text depends on the tokens before it: characters span tokens, and a space at the beginning may be none.
//! With the usual decoders that is all, and a token is looked up and put behind the unfinished character. With others
//! a short window of tokens is decoded.

use std::sync::Arc;

use grammar::pieces::Piece;
use proto::units::TokenId;

use super::tokenizer::Tokenizer;

/// Tokens of the prompt that the first generated token sees as context.
const PROMPT_CONTEXT_TOKENS: usize = 8;

/// Pending tokens at which the window starts anew: a character has at most 4 bytes, so this text is no text.
const MAX_PENDING_TOKENS: usize = 16;

/// UTF-8's longest.
const MAX_CHARACTER_BYTES: usize = 4;

const REPLACEMENT: char = '\u{fffd}';

/// Turns the generated tokens of one sequence into pieces of text. The pieces, put together, are what decoding all
/// tokens at once gives (special tokens left out).
pub(crate) struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    way: Way,
}

enum Way {
    /// Tokens are looked up.
    Lookup(Unfinished),
    /// Tokens are decoded.
    Window(Window),
}

impl Detokenizer {
    /// Starts behind `prompt`.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, prompt: &[TokenId]) -> Self {
        let way = match tokenizer.pieces() {
            Some(pieces) => Way::Lookup(Unfinished {
                bytes: Vec::new(),
                fallback: false,
                strips_space: prompt.is_empty() && pieces.strips_space(),
            }),
            None => Way::Window(Window::new(&tokenizer, prompt)),
        };
        Self { tokenizer, way }
    }

    /// The text that is certain with this token: often the token's, sometimes nothing yet, sometimes more.
    pub(crate) fn push(&mut self, id: TokenId) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        match (&mut self.way, self.tokenizer.pieces()) {
            (Way::Lookup(unfinished), Some(pieces)) => unfinished.push(pieces.get(id.0)),
            (Way::Window(window), _) => window.push(&self.tokenizer, id),
            (Way::Lookup(_), None) => unreachable!("a tokenizer keeps its pieces"),
        }
    }

    /// What is left when the sequence has ended; a character that was never completed is U+FFFD.
    pub(crate) fn finish(&mut self) -> String {
        match &mut self.way {
            Way::Lookup(unfinished) => unfinished.give_up(),
            Way::Window(window) => window.finish(&self.tokenizer),
        }
    }
}

/// The beginning of a character.
struct Unfinished {
    bytes: Vec<u8>,
    /// Whether they are fallback bytes, which are valid together or not at all.
    fallback: bool,
    /// Whether the next text loses a space at its beginning.
    strips_space: bool,
}

impl Unfinished {
    fn push(&mut self, piece: Piece<'_>) -> String {
        let text = match piece {
            Piece::Bytes(bytes) if self.bytes.is_empty() || !self.fallback => self.push_bytes(bytes),
            Piece::Bytes(bytes) => self.give_up() + &self.push_bytes(bytes),
            Piece::Fallback(byte) => self.push_fallback(byte),
        };
        self.stripped(text)
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.fallback = false;
        if self.bytes.is_empty()
            && let Ok(text) = str::from_utf8(bytes)
        {
            return text.to_owned();
        }
        self.bytes.extend_from_slice(bytes);
        let mut text = String::new();
        let mut unfinished = 0;
        for chunk in self.bytes.utf8_chunks() {
            if unfinished > 0 {
                text.push(REPLACEMENT);
            }
            text.push_str(chunk.valid());
            // An error without a length is a character of which more may come, if nothing else came behind it.
            unfinished = match str::from_utf8(chunk.invalid()) {
                Err(error) if error.error_len().is_none() => chunk.invalid().len(),
                Err(_) => {
                    text.push(REPLACEMENT);
                    0
                }
                Ok(_) => 0,
            };
        }
        self.bytes.drain(..self.bytes.len() - unfinished);
        text
    }

    fn push_fallback(&mut self, byte: u8) -> String {
        self.fallback = true;
        self.bytes.push(byte);
        if let Ok(text) = str::from_utf8(&self.bytes) {
            let text = text.to_owned();
            self.bytes.clear();
            return text;
        }
        if self.bytes.len() < MAX_CHARACTER_BYTES { String::new() } else { self.give_up() }
    }

    /// The bytes will not become a character.
    fn give_up(&mut self) -> String {
        let num_marks = if self.fallback { self.bytes.len() } else { self.bytes.len().min(1) };
        self.bytes.clear();
        std::iter::repeat_n(REPLACEMENT, num_marks).collect()
    }

    fn stripped(&mut self, mut text: String) -> String {
        if self.strips_space && !text.is_empty() {
            self.strips_space = false;
            if text.starts_with(' ') {
                text.remove(0);
            }
        }
        text
    }
}

/// For decoders of any kind: a short window of tokens is decoded, those of the last complete text as context, and those
/// that are pending since then. What the window's text has beyond the context's is new; U+FFFD at its end may be the
/// beginning of a character, and waits.
#[derive(Default)]
struct Window {
    context: Vec<u32>,
    context_text: String,
    pending: Vec<u32>,
    /// Bytes of the pending tokens' text that were given out already.
    given: usize,
}

impl Window {
    fn new(tokenizer: &Tokenizer, prompt: &[TokenId]) -> Self {
        let tail = &prompt[prompt.len().saturating_sub(PROMPT_CONTEXT_TOKENS)..];
        let context: Vec<u32> = tail.iter().map(|id| id.0).collect();
        let context_text = tokenizer.decode(&context);
        let mut window = Self { context, context_text, ..Self::default() };
        // A prompt that was cut within a character has no text to continue.
        if window.context_text.ends_with(REPLACEMENT) {
            window.forget_context();
        }
        window
    }

    fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> String {
        self.pending.push(id.0);
        let Some(text) = self.pending_text(tokenizer) else {
            if self.pending.len() <= MAX_PENDING_TOKENS {
                return String::new();
            }
            self.forget_context();
            let text = tokenizer.decode(&self.pending);
            return self.give_all(tokenizer, &text);
        };
        let complete = text.trim_end_matches(REPLACEMENT);
        if complete.len() == text.len() || self.pending.len() > MAX_PENDING_TOKENS {
            return self.give_all(tokenizer, &text);
        }
        let piece = text.get(self.given..complete.len()).unwrap_or_default().to_owned();
        self.given += piece.len();
        piece
    }

    fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let text = self.pending_text(tokenizer).unwrap_or_else(|| tokenizer.decode(&self.pending));
        self.give_all(tokenizer, &text)
    }

    /// `None`: the pending bytes change how the context reads, as when a run of byte tokens is not valid as a whole.
    fn pending_text(&self, tokenizer: &Tokenizer) -> Option<String> {
        let window: Vec<u32> = self.context.iter().chain(&self.pending).copied().collect();
        tokenizer.decode(&window).strip_prefix(self.context_text.as_str()).map(str::to_owned)
    }

    fn give_all(&mut self, tokenizer: &Tokenizer, text: &str) -> String {
        let piece = text.get(self.given..).unwrap_or_default().to_owned();
        self.given = 0;
        if !self.pending.is_empty() {
            self.context = std::mem::take(&mut self.pending);
            self.context_text = tokenizer.decode(&self.context);
        }
        piece
    }

    fn forget_context(&mut self) {
        self.context.clear();
        self.context_text.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tokenizer::tests::{byte_fallback, byte_level};

    fn pieces(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let prompt: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
        let detokenizer = Detokenizer::new(Arc::clone(tokenizer), &prompt);
        assert!(matches!(detokenizer.way, Way::Lookup(_)), "the tests' tokenizers have the usual decoders");
        pieces_of(detokenizer, ids)
    }

    fn decoded_pieces(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let prompt: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
        let way = Way::Window(Window::new(tokenizer, &prompt));
        pieces_of(Detokenizer { tokenizer: Arc::clone(tokenizer), way }, ids)
    }

    fn pieces_of(mut detokenizer: Detokenizer, ids: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(TokenId(*id))).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    #[test]
    fn a_character_comes_when_its_last_byte_has_come() {
        let tokenizer = Arc::new(byte_level());
        assert_eq!(
            pieces(&tokenizer, &[], &[u32::from(b'a'), 260, 0xa0, u32::from(b'b')]),
            ["a", "", "你", "b", ""]
        );
        let tokenizer = Arc::new(byte_fallback());
        assert_eq!(
            pieces(&tokenizer, &[], &[0xe4, 0xbd, 0xa0, 0xe5, 0xa5, 0xbd].map(|byte| byte + 3)),
            ["", "", "你", "", "", "好", ""]
        );
    }

    #[test]
    fn a_character_that_is_never_completed_is_marked_at_the_end_only() {
        let tokenizer = Arc::new(byte_level());
        assert_eq!(pieces(&tokenizer, &[], &[u32::from(b'a'), 260]), ["a", "", "\u{fffd}"]);
        let tokenizer = Arc::new(byte_fallback());
        assert_eq!(
            pieces(&tokenizer, &[], &[0xe4, 0xbd, 0xa0, 0xe5].map(|byte| byte + 3)),
            ["", "", "你", "", "\u{fffd}"]
        );
    }

    #[test]
    fn the_first_word_keeps_its_space_behind_a_prompt_and_loses_it_at_the_beginning() {
        let tokenizer = Arc::new(byte_fallback());
        assert_eq!(pieces(&tokenizer, &[262, 261], &[262, 261]).concat(), " hi");
        assert_eq!(pieces(&tokenizer, &[], &[262, 261]).concat(), "hi");
    }

    #[test]
    fn special_tokens_have_no_text() {
        let tokenizer = Arc::new(byte_level());
        assert_eq!(pieces(&tokenizer, &[263], &[257, 262, 257]).concat(), "thethe");
    }

    #[test]
    fn bytes_that_are_no_character_do_not_hold_up_the_text() {
        let tokenizer = Arc::new(byte_level());
        assert_eq!(pieces(&tokenizer, &[], &[0xff, 0xe4, 0x61]), ["\u{fffd}", "", "\u{fffd}a", ""]);
        let tokenizer = Arc::new(byte_fallback());
        let bytes = [0xff, 0xff, 0xff, 0xff, 0xff].map(|byte| byte + 3);
        assert_eq!(pieces(&tokenizer, &[], &bytes).concat(), "\u{fffd}".repeat(5));
        assert_eq!(pieces(&tokenizer, &[], &[0xff + 3, 261]), ["", "\u{fffd}i", ""]);
    }

    proptest! {
        #[test]
        fn pieces_of_any_byte_level_tokens_are_the_whole_text(
            prompt in prop::collection::vec(0u32..261, 0..12),
            ids in prop::collection::vec(0u32..261, 0..40),
        ) {
            let tokenizer = Arc::new(byte_level());
            // A prompt that ends within a character would give its first bytes to the output's first character.
            let prompt = if tokenizer.decode(&prompt).ends_with(REPLACEMENT) { Vec::new() } else { prompt };
            prop_assert_eq!(pieces(&tokenizer, &prompt, &ids).concat(), tokenizer.decode(&ids));
            prop_assert_eq!(decoded_pieces(&tokenizer, &prompt, &ids).concat(), tokenizer.decode(&ids));
        }

        #[test]
        fn pieces_of_any_text_are_that_text(text in "\\PC{0,40}", prompt in "[a-z ]{0,12}") {
            for tokenizer in [byte_level(), byte_fallback()] {
                let tokenizer = Arc::new(tokenizer);
                let prompt: Vec<u32> = tokenizer.encode(&prompt, false).unwrap().iter().map(|id| id.0).collect();
                let ids: Vec<u32> = tokenizer.encode(&text, false).unwrap().iter().map(|id| id.0).collect();
                let whole = tokenizer.decode(&[prompt.as_slice(), &ids].concat());
                let expected = whole.strip_prefix(&tokenizer.decode(&prompt)).unwrap();
                prop_assert_eq!(pieces(&tokenizer, &prompt, &ids).concat(), expected);
                prop_assert_eq!(decoded_pieces(&tokenizer, &prompt, &ids).concat(), expected);
            }
        }

        #[test]
        fn no_piece_but_the_last_has_half_a_character(text in "\\PC{1,40}") {
            let tokenizer = Arc::new(byte_level());
            let ids: Vec<u32> = tokenizer.encode(&text, false).unwrap().iter().map(|id| id.0).collect();
            for piece in pieces(&tokenizer, &[], &ids) {
                prop_assert!(!piece.contains(REPLACEMENT) || text.contains(REPLACEMENT));
            }
        }
    }
}
