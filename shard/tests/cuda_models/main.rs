//! Models on a GPU (or on the emulated driver: `make test-cuda`).

#[cfg(test)]
mod models;
#[cfg(test)]
#[path = "../models/rank.rs"]
#[expect(dead_code, reason = "shared with the tests on the CPU, which use more of it")]
mod rank;
