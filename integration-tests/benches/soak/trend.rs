//! Whether memory grows.

use std::fmt;
use std::time::Duration;

use anyhow::ensure;
use integration_tests::Memory;

/// Of all samples, the part that counts: its last half. Before that, buffers, caches and the allocator's pools find their
/// size, which takes some minutes.
const WARM_UP: f64 = 0.5;

/// What may lie between the beginning and the end of the trend by chance, as a share of the mean.
const TOLERANCE: f64 = 0.03;

/// Memory over time.
#[derive(Debug, Default)]
pub(crate) struct Trend {
    samples: Vec<(Duration, Memory)>,
}

/// A straight line through the samples of the last half.
struct Line {
    mean_bytes: f64,
    bytes_per_s: f64,
    seconds: f64,
}

impl Line {
    /// From the beginning to the end of the line.
    fn growth_bytes(&self) -> f64 {
        self.bytes_per_s * self.seconds
    }

    fn is_flat(&self) -> bool {
        self.growth_bytes() < TOLERANCE * self.mean_bytes
    }
}

impl Trend {
    pub(crate) fn push(&mut self, time: Duration, memory: Memory) {
        self.samples.push((time, memory));
    }

    /// Fails where the memory has grown.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.lines().iter().all(|(_, line)| line.is_flat()), "memory grows:\n{self}");
        Ok(())
    }

    fn lines(&self) -> [(&'static str, Line); 2] {
        [
            ("PSS", self.line(|memory| memory.proportional as f64)),
            ("RSS", self.line(|memory| memory.resident as f64)),
        ]
    }

    /// By least squares.
    fn line(&self, value: impl Fn(&Memory) -> f64) -> Line {
        let samples = &self.samples[(self.samples.len() as f64 * WARM_UP) as usize..];
        let times: Vec<f64> = samples.iter().map(|(time, _)| time.as_secs_f64()).collect();
        let values: Vec<f64> = samples.iter().map(|(_, memory)| value(memory)).collect();
        let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / numbers.len().max(1) as f64;
        let (mean_time, mean_bytes) = (mean(&times), mean(&values));
        let pairs = times.iter().zip(&values);
        let covariance = pairs.map(|(time, value)| (time - mean_time) * (value - mean_bytes)).sum::<f64>();
        let variance = times.iter().map(|time| (time - mean_time).powi(2)).sum::<f64>();
        let bytes_per_s = if variance > 0.0 { covariance / variance } else { 0.0 };
        let seconds = times.last().zip(times.first()).map_or(0.0, |(last, first)| last - first);
        Line { mean_bytes, bytes_per_s, seconds }
    }
}

impl fmt::Display for Trend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, line) in self.lines() {
            writeln!(
                f,
                "Memory {}: {name} over the last half, {:.0} s: {:.1} MB on average, {:+.1} kB a minute, {:+.2} % in all \
                 ({:.0} % is the most that counts as flat)",
                if line.is_flat() { "is flat" } else { "GROWS" },
                line.seconds,
                line.mean_bytes / 1e6,
                line.bytes_per_s * 60.0 / 1e3,
                line.growth_bytes() / line.mean_bytes.max(1.0) * 100.0,
                TOLERANCE * 100.0,
            )?;
        }
        Ok(())
    }
}
