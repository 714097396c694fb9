//! How large grammars may be. All are looked at before llguidance sees a grammar: measured on hostile ones, its own limits
//! stop neither a stack overflow, which ends a process, nor seconds of work.

use std::time::Duration;

use llguidance::api::ParserLimits;

/// Bytes of a JSON schema.
pub const MAX_SCHEMA_BYTES: usize = 1 << 20;
/// Values in a schema's text, keys not counted.
pub const MAX_SCHEMA_VALUES: usize = 30_000;
/// Arrays and objects within each other in a schema's text.
pub const MAX_SCHEMA_DEPTH: usize = 64;
/// Schemas that are entered one from the other, by nesting or `$ref`, before one of them is done: the depth of the compiler's
/// stack. It overflowed 64 MiB at about 10,000 objects in a chain of `$ref`s.
pub const MAX_SCHEMA_PATH: usize = 256;
/// Entries of `$defs` and `definitions`.
pub const MAX_DEFINITIONS: usize = 4096;
/// Properties of one object that may be left out; what is merged by `allOf` counts as one object. With 500 a sequence fails
/// while it is decoded, with 5,000 a mask takes 166 ms.
pub const MAX_OPTIONAL_PROPERTIES: usize = 400;
/// Properties of all objects.
pub const MAX_PROPERTIES: usize = 5000;
/// Values of all `enum`s.
pub const MAX_ENUM_VALUES: usize = 10_000;
/// Bytes of all `enum`s' values as JSON.
pub const MAX_ENUM_BYTES: usize = 512 << 10;
/// Combinations of `anyOf` and `oneOf` branches that hold at the same time, as under one `allOf`. 4096 took a second
/// and 168 MB, to be refused then.
pub const MAX_BRANCHES: u64 = 256;
/// `allOf`, `anyOf` and `oneOf` within each other.
pub const MAX_COMBINATORS: usize = 10;
/// Of `multipleOf` without its decimal point; of several that hold at the same time, the product. 999,983 took 12 s and 393 MB.
pub const MAX_MULTIPLE: u64 = 1000;
/// Bytes of a regex or `pattern`.
pub const MAX_REGEX_BYTES: usize = 16 << 10;
/// Groups, classes and repetitions of a regex within each other.
pub const MAX_REGEX_DEPTH: u32 = 100;
/// Product of the bounds of repetitions within each other.
pub const MAX_REGEX_REPETITIONS: u64 = 1_000_000;
/// Of a thread's own time, for the first mask. Ordinary ones take 0.05 ms.
pub const MAX_FIRST_MASK: Duration = Duration::from_millis(50);
/// How long a client waits for a grammar to be compiled. The worst real schema of 11,305 took 0.9 s.
pub const MAX_COMPILE: Duration = Duration::from_secs(5);

/// Stack of a thread that compiles.
pub(crate) const STACK_BYTES: usize = 64 << 20;
/// Grammars that wait to be compiled.
pub(crate) const MAX_WAITING: usize = 256;
/// Compiled grammars that are kept.
pub(crate) const MAX_KEPT: usize = 1024;
/// Their estimated bytes.
pub(crate) const MAX_KEPT_BYTES: usize = 512 << 20;

/// What one grammar, and one mask of it, may cost llguidance.
pub(crate) fn parser_limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // A fifth of its default, which is half a gigabyte: one in 11,305 real schemas needs more.
        max_lexer_states: 50_000,
        max_grammar_size: 500_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}
