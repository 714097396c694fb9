//! Every operation on operands of arbitrary shapes, strides and element types.
//!
//! A fixed number of cases by default (`FUZZ_CASES=n`). `FUZZ_SECONDS=600 cargo test --release -p kernels --test shapes`
//! goes on with fresh ones for as long; a failure names its seed, and `FUZZ_SEED=n` runs that one alone. `make check-asan`
//! and `make check-memory` watch this test's memory, and `make fuzz` searches for cases that reach further.

mod cases;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use cases::{Draws, OPERATIONS, levels};

/// Cases of each operation where nothing else is asked for.
const CASES: u64 = 25;

#[test]
fn operations_on_arbitrary_shapes_are_right_and_write_nothing_else() {
    #[expect(clippy::disallowed_methods, reason = "how long a test runs is no setting of the program")]
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let contexts = levels();
    let begin = Instant::now();
    let least = Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(0));
    let seeds = number("FUZZ_SEED").map_or(0..u64::MAX, |seed| seed..seed + 1);
    for seed in seeds {
        if seed >= number("FUZZ_CASES").unwrap_or(CASES)
            && begin.elapsed() >= least
            && number("FUZZ_SEED").is_none()
        {
            return;
        }
        for (name, run) in OPERATIONS {
            for context in &contexts {
                let run = AssertUnwindSafe(|| run(context, &mut Draws::new(&[], seed)));
                let outcome = catch_unwind(run);
                assert!(outcome.is_ok(), "{name} fails: FUZZ_SEED={seed}");
            }
        }
    }
}
