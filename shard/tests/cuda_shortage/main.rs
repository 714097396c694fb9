//! What happens on a GPU (or on the emulated driver: `make test-cuda`) when there is no memory left. On its own, because it takes
//! all of the device's.

#[cfg(test)]
#[path = "../serving/checkpoints.rs"]
#[expect(dead_code, reason = "shared with the tests on the CPU, which use more of it")]
mod checkpoints;
#[cfg(test)]
#[path = "../serving/driver.rs"]
#[expect(dead_code, reason = "shared with the tests on the CPU, which use more of it")]
mod driver;
#[cfg(test)]
mod shortage;
