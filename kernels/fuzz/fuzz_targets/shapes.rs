//! The cases of `kernels/tests/shapes` with a fuzzer's bytes for their choices: `make fuzz`.
//!
//! The first bytes choose the operation, the instruction set and the values of elements; the rest choose the shapes.

#![no_main]

#[path = "../../tests/shapes/cases.rs"]
mod cases;

use std::sync::LazyLock;

use cases::{Draws, OPERATIONS, levels};
use kernels::Context;
use libfuzzer_sys::{Corpus, fuzz_target};

static CONTEXTS: LazyLock<Vec<Context>> = LazyLock::new(levels);

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let [operation, level, seed, choices @ ..] = bytes else {
        return Corpus::Reject;
    };
    let (_, run) = OPERATIONS[usize::from(*operation) % OPERATIONS.len()];
    let context = &CONTEXTS[usize::from(*level) % CONTEXTS.len()];
    run(context, &mut Draws::new(choices, u64::from(*seed)));
    Corpus::Keep
});
