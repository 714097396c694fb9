//! Stop strings: found over the borders of tokens, and never shown in part.

/// What becomes of the stop string itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopText {
    /// The text ends before it (OpenAI).
    Cut,
    /// It stays, with whatever its last token has behind it (TGI).
    Keep,
}

/// Watches the text of one sequence for its stop strings.
#[derive(Debug, Clone)]
pub(crate) struct StopStrings {
    strings: Vec<String>,
    stop_text: StopText,
    /// Text that is still needed: not yet shown (`Cut`), or shown but possibly the beginning of a match (`Keep`).
    held: String,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Watched {
    /// Text that can be shown now.
    pub(crate) text: String,
    /// Whether a stop string was found: the sequence ends here.
    pub(crate) stopped: bool,
}

impl StopStrings {
    /// `strings`: none of them empty.
    pub(crate) fn new(strings: Vec<String>, stop_text: StopText) -> Self {
        debug_assert!(strings.iter().all(|string| !string.is_empty()), "an empty string is found everywhere");
        Self { strings, stop_text, held: String::new() }
    }

    /// Whether there is nothing to watch for.
    pub(crate) fn is_empty(&self) -> bool {
        self.strings.is_empty()
    }

    /// Takes the next piece. Nothing may be pushed once it has stopped.
    ///
    /// Of several stop strings the one that is complete first counts, so that the borders of tokens make no difference.
    pub(crate) fn push(&mut self, piece: String) -> Watched {
        if self.strings.is_empty() {
            return Watched { text: piece, stopped: false };
        }
        self.held.push_str(&piece);
        let stop = self.first_match();
        let stopped = stop.is_some();
        let text = match self.stop_text {
            StopText::Keep => {
                let keep_from = self.unfinished_match();
                self.held.drain(..keep_from);
                piece
            }
            StopText::Cut => {
                let show = stop.unwrap_or_else(|| self.unfinished_match());
                let shown = self.held.drain(..show).collect();
                if stopped {
                    self.held.clear();
                }
                shown
            }
        };
        Watched { text, stopped }
    }

    /// The text that waited for a stop string which did not come.
    pub(crate) fn finish(&mut self) -> String {
        match self.stop_text {
            StopText::Cut => std::mem::take(&mut self.held),
            StopText::Keep => String::new(),
        }
    }

    /// Where the match begins that ends first in the held text (of those, the longest).
    fn first_match(&self) -> Option<usize> {
        self.strings
            .iter()
            .filter_map(|string| self.held.find(string).map(|start| (start + string.len(), start)))
            .min()
            .map(|(_, start)| start)
    }

    /// Where the longest end of the held text begins that could become a stop string; its length if none could.
    fn unfinished_match(&self) -> usize {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let earliest = self.held.len().saturating_sub(longest.saturating_sub(1));
        (earliest..self.held.len())
            .filter(|start| self.held.is_char_boundary(*start))
            .find(|start| self.strings.iter().any(|string| string.starts_with(&self.held[*start..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], stop_text: StopText, pieces: &[&str]) -> (Vec<String>, bool) {
        let mut watcher = StopStrings::new(stops.iter().map(ToString::to_string).collect(), stop_text);
        let mut shown = Vec::new();
        for piece in pieces {
            let watched = watcher.push((*piece).to_owned());
            shown.push(watched.text);
            if watched.stopped {
                return (shown, true);
            }
        }
        shown.push(watcher.finish());
        (shown, false)
    }

    #[test]
    fn a_stop_string_is_found_over_the_borders_of_pieces() {
        assert_eq!(run(&["</end>"], StopText::Cut, &["Hi <", "/e", "nd", "> there"]).0.concat(), "Hi ");
        assert_eq!(
            run(&["</end>"], StopText::Keep, &["Hi <", "/e", "nd", "> there"]).0.concat(),
            "Hi </end> there"
        );
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let (shown, stopped) = run(&["\n\n"], StopText::Cut, &["a\n", "b", "\n", "c"]);
        assert_eq!(shown, ["a", "\nb", "", "\nc", ""]);
        assert!(!stopped);
    }

    #[test]
    fn what_was_held_back_comes_at_the_end() {
        assert_eq!(run(&["stop"], StopText::Cut, &["one st", "o"]).0, ["one ", "", "sto"]);
    }

    #[test]
    fn a_false_start_within_a_stop_string_does_not_hide_the_real_one() {
        assert_eq!(run(&["aab"], StopText::Cut, &["a", "a", "a", "b"]).0.concat(), "a");
        assert_eq!(
            run(&["aab"], StopText::Keep, &["a", "a", "a", "b"]),
            (vec!["a".into(), "a".into(), "a".into(), "b".into()], true)
        );
    }

    #[test]
    fn the_stop_string_that_is_complete_first_counts() {
        let check =
            |pieces: &[&str]| assert_eq!(run(&["abcd", "bc"], StopText::Cut, pieces).0.concat(), "xa");
        check(&["xabcd"]);
        check(&["x", "a", "b", "c", "d"]);
        check(&["xab", "cd"]);
    }

    proptest! {
        #[test]
        fn the_shown_text_does_not_depend_on_the_borders(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 1..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let mut borders: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
            borders.extend([0, text.len()]);
            borders.sort_unstable();
            let pieces: Vec<&str> = borders.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let (shown, stopped) = run(&stops, StopText::Cut, &pieces);
            let shown = shown.concat();
            let end = stops.iter().filter_map(|stop| text.find(stop).map(|at| (at + stop.len(), at))).min();
            prop_assert_eq!(stopped, end.is_some());
            prop_assert_eq!(shown, &text[..end.map_or(text.len(), |(_, at)| at)]);
            prop_assert_eq!(run(&stops, StopText::Keep, &pieces).1, end.is_some());
        }
    }
}
