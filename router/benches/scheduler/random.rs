//! Numbers that look random and are the same in every run.

/// A generator of its own, so that traces never change with a library. Steele et al. 2014, "SplitMix".
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform, 0 <= x < 1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Between two events of a Poisson process, for example.
    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// A length. `sigma` is the standard deviation of the logarithm.
    pub(crate) fn length(&mut self, Lengths { median, sigma, most }: Lengths) -> usize {
        let normal = (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos();
        ((median * (sigma * normal).exp()) as usize).clamp(1, most)
    }

    /// 0 .. `count`, the first ones more often: the probability of `k` is proportional to 1 / (k + 1).
    pub(crate) fn zipf(&mut self, count: usize) -> usize {
        let total = (1..=count).map(|k| 1.0 / k as f64).sum::<f64>();
        let mut left = self.unit() * total;
        for k in 0..count {
            left -= 1.0 / (k + 1) as f64;
            if left < 0.0 {
                return k;
            }
        }
        count - 1
    }
}

/// A log-normal distribution of lengths in tokens, cut off at 1 and `most`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lengths {
    pub(crate) median: f64,
    pub(crate) sigma: f64,
    pub(crate) most: usize,
}
