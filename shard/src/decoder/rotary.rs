//! Cosines and sines of rotary position embedding, tabulated once for all positions of a step's longest sequence.

use kernels::{Context, Result, Tensor};

use super::spec::{RotaryScaling, RotarySpec};

/// f32 `[max_position, rotary dim / 2]` each.
pub(super) struct RotaryTables {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

impl RotaryTables {
    /// For positions `0 .. max_position`.
    pub(super) fn new(context: &Context, spec: &RotarySpec, max_position: usize) -> Result<Self> {
        let frequencies = inverse_frequencies(spec);
        // The angle is an f32 product, as in transformers: models were trained with its rounding.
        let angles = || (0..max_position).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let table = |function: fn(f64) -> f64| {
            let values: Vec<f32> = angles().map(|angle| function(f64::from(angle)) as f32).collect();
            context.upload(&Tensor::from_slice(&values, max_position, frequencies.len()))
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// Pairs lie half a head apart in the checkpoints of all architectures here.
    pub(super) fn view(&self) -> kernels::ops::rotary::RotaryTables<'_> {
        let pairs = kernels::ops::rotary::RotaryPairs::HalfApart;
        kernels::ops::rotary::RotaryTables { cos: &self.cos, sin: &self.sin, pairs }
    }

    pub(super) fn size_in_bytes(&self) -> usize {
        self.cos.size_in_bytes() + self.sin.size_in_bytes()
    }
}

/// Radians per token of each pair of a head's elements, fastest first.
fn inverse_frequencies(spec: &RotarySpec) -> Vec<f32> {
    let exponent = |pair: usize| 2.0 * pair as f32 / spec.dim as f32;
    (0..spec.dim / 2).map(|pair| scale(1.0 / spec.theta.powf(exponent(pair)), &spec.scaling)).collect()
}

fn scale(frequency: f32, scaling: &RotaryScaling) -> f32 {
    match *scaling {
        RotaryScaling::Default => frequency,
        RotaryScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            let periods = original_max_position_embeddings / wavelength;
            let smooth = ((periods - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RotaryScaling = RotaryScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };

    #[test]
    fn default_frequencies_are_powers_of_theta() {
        let spec = RotarySpec { dim: 8, theta: 10_000.0, scaling: RotaryScaling::Default };
        let expected = [1.0, 0.1, 0.01, 0.001];
        for (found, expected) in inverse_frequencies(&spec).iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-6, "{found} is not {expected}");
        }
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let frequency_of = |wavelength: f32| 2.0 * std::f32::consts::PI / wavelength;
        // Shorter than 8192 / 4 tokens, longer than 8192 / 1, and between: periods 2, smooth = 1/3.
        let cases = [(2000.0, 1.0), (8200.0, 1.0 / 8.0), (4096.0, 2.0 / 3.0 / 8.0 + 1.0 / 3.0)];
        for (wavelength, ratio) in cases {
            let found = scale(frequency_of(wavelength), &LLAMA3) / frequency_of(wavelength);
            assert!((found - ratio).abs() < 1e-5, "wavelength {wavelength}: {found} is not {ratio}");
        }
    }

    #[test]
    fn tables_hold_the_angle_of_each_position() {
        let spec = RotarySpec { dim: 4, theta: 100.0, scaling: RotaryScaling::Default };
        let tables = RotaryTables::new(&Context::cpu(1), &spec, 3).unwrap();
        assert_eq!((tables.cos.rows(), tables.cos.cols()), (3, 2));
        let expected = [1.0, 1.0, 1f32.cos(), 0.1f32.cos(), 2f32.cos(), 0.2f32.cos()];
        for (found, expected) in tables.cos.as_slice::<f32>().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6);
        }
        assert_eq!(tables.sin.as_slice::<f32>()[..2], [0.0, 0.0]);
    }
}
