//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//!
//! A number is a pure function of key and counter, so there is no generator state to keep, to restore after a
//! preemption or to share between ranks: the key is the request's seed, the counter the token's position.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// The golden ratio and sqrt(3) - 1, as 32-bit fractions.
const KEY_INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// A number in `[0, 1)` with 53 random bits for the token at `position` of a sequence with this `seed`.
pub(super) fn uniform(seed: u64, position: u64) -> f64 {
    let bits =
        philox4x32([position as u32, (position >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let high_53 = (u64::from(bits[1]) << 32 | u64::from(bits[0])) >> 11;
    high_53 as f64 * (-53f64).exp2()
}

fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for round in 0..ROUNDS {
        if round > 0 {
            k = [k[0].wrapping_add(KEY_INCREMENTS[0]), k[1].wrapping_add(KEY_INCREMENTS[1])];
        }
        let product_0 = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let product_1 = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [
            (product_1 >> 32) as u32 ^ c[1] ^ k[0],
            product_1 as u32,
            (product_0 >> 32) as u32 ^ c[3] ^ k[1],
            product_0 as u32,
        ];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer tests that the authors publish with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        let check = |counter, key, expected| assert_eq!(philox4x32(counter, key), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn uniform_numbers_lie_in_the_unit_interval_and_fill_it_evenly() {
        let mut bins = [0u32; 16];
        for position in 0..16_000 {
            let number = uniform(42, position);
            assert!((0.0..1.0).contains(&number));
            bins[(number * 16.0) as usize] += 1;
        }
        // 1000 expected with a standard deviation of 31: six of them are a failure by chance once in 1e8.
        assert!(bins.iter().all(|&count| (800..1200).contains(&count)), "{bins:?}");
    }

    #[test]
    fn all_bits_of_seed_and_position_matter() {
        let base = uniform(1, 1);
        for bit in 0..64 {
            assert_ne!(base.to_bits(), uniform(1 ^ (1 << bit), 1).to_bits(), "seed bit {bit}");
            assert_ne!(base.to_bits(), uniform(1, 1 ^ (1 << bit)).to_bits(), "position bit {bit}");
        }
    }
}
