//! Token ids to text, one at a time, never giving half a character.
//!
//! A token's text depends on the tokens before it (leading spaces, characters that span tokens), so each step decodes
//! a short window: the tokens of the last complete text as context, and those that are pending since then. What the
//! window's text has beyond the context's is new; U+FFFD at its end may be the beginning of a character, and waits.

use std::sync::Arc;

use proto::units::TokenId;

use super::tokenizer::Tokenizer;

/// Tokens of the prompt that the first generated token sees as context.
const PROMPT_CONTEXT_TOKENS: usize = 8;

/// Pending tokens at which the window starts anew: a character has at most 4 bytes, so this text is no text.
const MAX_PENDING_TOKENS: usize = 16;

const REPLACEMENT: char = '\u{fffd}';

/// Turns the generated tokens of one sequence into pieces of text. The pieces, put together, are what decoding all
/// tokens at once gives (special tokens left out).
pub(crate) struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    context: Vec<u32>,
    context_text: String,
    pending: Vec<u32>,
    /// Bytes of the pending tokens' text that were given out already.
    given: usize,
}

impl Detokenizer {
    /// Starts behind `prompt`.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, prompt: &[TokenId]) -> Self {
        let tail = &prompt[prompt.len().saturating_sub(PROMPT_CONTEXT_TOKENS)..];
        let context: Vec<u32> = tail.iter().map(|id| id.0).collect();
        let context_text = tokenizer.decode(&context);
        let mut detokenizer = Self { tokenizer, context, context_text, pending: Vec::new(), given: 0 };
        // A prompt that was cut within a character has no text to continue.
        if detokenizer.context_text.ends_with(REPLACEMENT) {
            detokenizer.forget_context();
        }
        detokenizer
    }

    /// The text that is certain with this token: often the token's, sometimes nothing yet, sometimes more.
    pub(crate) fn push(&mut self, id: TokenId) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        self.pending.push(id.0);
        let Some(text) = self.pending_text() else {
            if self.pending.len() <= MAX_PENDING_TOKENS {
                return String::new();
            }
            self.forget_context();
            let text = self.tokenizer.decode(&self.pending);
            return self.give_all(&text);
        };
        let complete = text.trim_end_matches(REPLACEMENT);
        if complete.len() == text.len() || self.pending.len() > MAX_PENDING_TOKENS {
            return self.give_all(&text);
        }
        let piece = text.get(self.given..complete.len()).unwrap_or_default().to_owned();
        self.given += piece.len();
        piece
    }

    /// What is left when the sequence has ended; a character that was never completed is U+FFFD.
    pub(crate) fn finish(&mut self) -> String {
        let text = self.pending_text().unwrap_or_else(|| self.tokenizer.decode(&self.pending));
        self.give_all(&text)
    }

    /// `None`: the pending bytes change how the context reads, as when a run of byte tokens is not valid as a whole.
    fn pending_text(&self) -> Option<String> {
        let window: Vec<u32> = self.context.iter().chain(&self.pending).copied().collect();
        self.tokenizer.decode(&window).strip_prefix(self.context_text.as_str()).map(str::to_owned)
    }

    fn give_all(&mut self, text: &str) -> String {
        let piece = text.get(self.given..).unwrap_or_default().to_owned();
        self.given = 0;
        if !self.pending.is_empty() {
            self.context = std::mem::take(&mut self.pending);
            self.context_text = self.tokenizer.decode(&self.context);
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
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), &prompt);
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
