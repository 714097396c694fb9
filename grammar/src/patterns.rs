//! Regexes: what they may be, before llguidance sees them.

use regex_syntax::ast::{self, Ast, RepetitionKind, RepetitionRange};

use crate::error::Error;
use crate::limits::{MAX_REGEX_BYTES, MAX_REGEX_DEPTH, MAX_REGEX_REPETITIONS};

/// Refuses a regex that is beyond a limit, or is none. `whose`: as in "`pattern` at /properties/a".
pub(crate) fn check(regex: &str, whose: &str) -> Result<(), Error> {
    if regex.len() > MAX_REGEX_BYTES {
        let message = format!(
            "{whose} is a regex of {} bytes, but at most {MAX_REGEX_BYTES} are taken: shorten it",
            regex.len()
        );
        return Err(Error::grammar(message));
    }
    let mut parser = ast::parse::ParserBuilder::new().nest_limit(MAX_REGEX_DEPTH).build();
    let ast = parser.parse(regex).map_err(|error| {
        let offset = error.span().start.offset;
        Error::grammar(format!(
            "{whose} is not a regex that can be enforced, at byte {offset}: {}",
            error.kind()
        ))
    })?;
    let repetitions = repetitions(&ast);
    if repetitions > MAX_REGEX_REPETITIONS {
        let message = format!(
            "{whose} repeats what is repeated, {repetitions} times in all, but at most {MAX_REGEX_REPETITIONS} are \
             taken: lower the bounds of its {{m,n}}"
        );
        return Err(Error::grammar(message));
    }
    Ok(())
}

/// A regex without the anchors at its ends, which it has by itself where the whole text must match. An alternation keeps
/// them: there they belong to one branch.
pub(crate) fn without_anchors(regex: &str) -> &str {
    let Ok(Ast::Concat(ref parts)) = ast::parse::Parser::new().parse(regex) else { return regex };
    let anchor = |part: Option<&Ast>, kinds: &[ast::AssertionKind]| matches!(part, Some(Ast::Assertion(assertion)) if kinds.contains(&assertion.kind));
    let mut rest = regex;
    if anchor(parts.asts.last(), &[ast::AssertionKind::EndLine]) {
        rest = &rest[..rest.len() - 1];
    }
    if anchor(parts.asts.first(), &[ast::AssertionKind::StartLine]) {
        rest = &rest[1..];
    }
    rest
}

/// The greatest product of bounds along a path into the regex.
fn repetitions(ast: &Ast) -> u64 {
    let most = |parts: &[Ast]| parts.iter().map(repetitions).max().unwrap_or(1);
    match ast {
        Ast::Repetition(repetition) => {
            let bound = match &repetition.op.kind {
                RepetitionKind::Range(
                    RepetitionRange::Exactly(most)
                    | RepetitionRange::AtLeast(most)
                    | RepetitionRange::Bounded(_, most),
                ) => u64::from(*most).max(1),
                RepetitionKind::ZeroOrOne | RepetitionKind::ZeroOrMore | RepetitionKind::OneOrMore => 1,
            };
            bound.saturating_mul(repetitions(&repetition.ast))
        }
        Ast::Group(group) => repetitions(&group.ast),
        Ast::Alternation(alternation) => most(&alternation.asts),
        Ast::Concat(concat) => most(&concat.asts),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(regex: &str, parts: &[&str]) {
        let error = check(regex, "the regex").expect_err("it is beyond a limit").to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }

    #[test]
    fn what_cannot_be_enforced_is_named_with_its_place() {
        refused("a(?=b)", &["at byte 1", "look-around"]);
        refused(r"(a)\1", &["at byte 3", "backreferences"]);
        refused("a)", &["at byte 1"]);
        refused(&"(".repeat(60_000), &["16384"]);
        refused(&format!("{}a{}", "(".repeat(200), ")".repeat(200)), &["nest"]);
        refused("((a{1,100}){1,100}){1,101}", &["1010000", "1000000"]);
    }

    #[test]
    fn ordinary_regexes_pass() {
        for regex in
            ["", "[a-z]+@[a-z]+", r"\d{4}-\d\d", ".*a.{200}b.{200}", r"\w{1,5000}\d{1,5000}", "(?i)a|b"]
        {
            check(regex, "it").unwrap();
        }
    }

    #[test]
    fn anchors_at_the_ends_are_dropped_and_others_are_not() {
        let cases = [
            ("^ab$", "ab"),
            ("^ab", "ab"),
            (r"ab\$", r"ab\$"),
            ("^a|b$", "^a|b$"),
            ("(^a$)", "(^a$)"),
            ("a", "a"),
            ("", ""),
        ];
        for (regex, expected) in cases {
            assert_eq!(without_anchors(regex), expected);
        }
    }
}
