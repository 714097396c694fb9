//! What the machine gives: rates to compare kernels with, measured in the same run.

use std::time::{Duration, Instant};

use kernels::Context;
use kernels::probe::{ReadProbe, multiply_add_bf16_flops_per_s, multiply_add_flops_per_s};

/// What the time of a run is read from.
#[derive(Clone, Copy)]
pub(crate) enum Clock {
    Wall,
    Cpu,
}

impl Clock {
    pub(crate) fn for_threads(threads: usize) -> Self {
        if threads == 1 { Self::Cpu } else { Self::Wall }
    }

    fn now_seconds(self) -> f64 {
        let clock = match self {
            Self::Wall => libc::CLOCK_MONOTONIC,
            Self::Cpu => libc::CLOCK_PROCESS_CPUTIME_ID,
        };
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes to a `timespec`.
        assert_eq!(unsafe { libc::clock_gettime(clock, &raw mut time) }, 0, "these clocks exist");
        time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
    }

    /// The best of the runs that `least` has time for, in seconds; three at least, since the
    /// first meets memory that it has not touched yet.
    pub(crate) fn best_seconds(self, least: Duration, mut run: impl FnMut()) -> f64 {
        let (begin, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
        while runs < 3 || begin.elapsed() < least {
            let start = self.now_seconds();
            run();
            best = best.min(self.now_seconds() - start);
            runs += 1;
        }
        best
    }
}

/// Bytes per second that the threads read together, from memory far larger than the caches.
pub(crate) fn read_gb_per_s(context: &Context) -> f64 {
    ReadProbe::new().bytes_per_s(context) / 1e9
}

/// Multiply-adds on registers alone, on all threads: the most that this arithmetic can do at the context's level.
pub(crate) fn multiply_add_gflop_per_s(context: &Context) -> f64 {
    multiply_add_flops_per_s(context) / 1e9
}

/// The same of products of bf16, where the level has them.
pub(crate) fn multiply_add_bf16_gflop_per_s(context: &Context) -> f64 {
    multiply_add_bf16_flops_per_s(context) / 1e9
}
