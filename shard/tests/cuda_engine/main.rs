//! The engine on a GPU (or on the emulated driver: `make test-cuda`).

#[cfg(test)]
#[path = "../serving/checkpoints.rs"]
#[expect(dead_code, reason = "shared with the tests on the CPU, which use more of it")]
mod checkpoints;
#[cfg(test)]
#[path = "../serving/driver.rs"]
#[expect(dead_code, reason = "shared with the tests on the CPU, which use more of it")]
mod driver;
#[cfg(test)]
mod engine;
