//! `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5) of config.json.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::ConfigError;
use crate::decoder::RotaryScaling;

/// Parameters of rotary position embedding. Which of them count depends on the type.
#[derive(Debug, Deserialize)]
pub(super) struct RopeParameters {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    pub(super) rope_theta: Option<f32>,
    pub(super) partial_rotary_factor: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
    /// All others.
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl RopeParameters {
    /// How frequencies are scaled; `field` is where this stands in config.json.
    pub(super) fn scaling(&self, field: &str) -> Result<RotaryScaling, ConfigError> {
        if let Some(name) = self.others.keys().next() {
            let message = "is not supported".to_owned();
            return Err(ConfigError::new(&format!("{field}.{name}"), message));
        }
        match self.rope_type.as_deref().unwrap_or("default") {
            "default" => Ok(RotaryScaling::Default),
            "llama3" => self.llama3(field),
            other => {
                let message = format!("{other} is not supported; supported are default and llama3");
                Err(ConfigError::new(&format!("{field}.rope_type"), message))
            }
        }
    }

    fn llama3(&self, field: &str) -> Result<RotaryScaling, ConfigError> {
        let positive = |name: &str, value: Option<f32>| match value {
            Some(value) if value > 0.0 && value.is_finite() => Ok(value),
            Some(value) => {
                Err(ConfigError::new(&format!("{field}.{name}"), format!("{value} is not positive")))
            }
            None => {
                let message = "is missing, but rope_type is llama3".to_owned();
                Err(ConfigError::new(&format!("{field}.{name}"), message))
            }
        };
        let low_freq_factor = positive("low_freq_factor", self.low_freq_factor)?;
        let high_freq_factor = positive("high_freq_factor", self.high_freq_factor)?;
        if high_freq_factor <= low_freq_factor {
            let message = format!("{high_freq_factor} is not above low_freq_factor {low_freq_factor}");
            return Err(ConfigError::new(&format!("{field}.high_freq_factor"), message));
        }
        Ok(RotaryScaling::Llama3 {
            factor: positive("factor", self.factor)?,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: positive(
                "original_max_position_embeddings",
                self.original_max_position_embeddings,
            )?,
        })
    }
}
