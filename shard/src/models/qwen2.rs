//! Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases on query, key and value, and a sliding window in
//! the upper layers if it is turned on.

use super::config::ModelConfig;
use super::{Architecture, ConfigError, LLAMA_TENSOR_NAMES, window};
use crate::decoder::{DecoderSpec, LayerSpec};

pub(super) const ARCHITECTURE: Architecture =
    Architecture { class: "Qwen2ForCausalLM", model_type: "qwen2", spec, tensor_names: LLAMA_TENSOR_NAMES };

/// What transformers takes where `max_window_layers` is absent.
const DEFAULT_MAX_WINDOW_LAYERS: u32 = 28;
/// What transformers takes where `sliding_window` is absent but used.
const DEFAULT_WINDOW: usize = 4096;

fn spec(config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    config.refuse("attention_bias", config.attention_bias.as_ref(), &true)?;
    config.refuse("mlp_bias", config.mlp_bias.as_ref(), &false)?;
    Ok(DecoderSpec { qkv_bias: true, layers: layers(config)?, ..config.decoder_spec()? })
}

/// Qwen's windows: off unless `use_sliding_window`, and then from layer `max_window_layers` upwards.
pub(super) fn layers(config: &ModelConfig) -> Result<Vec<LayerSpec>, ConfigError> {
    let is_used = config.use_sliding_window.unwrap_or(false);
    let window = if is_used { window::tokens(config, Some(DEFAULT_WINDOW))? } else { None };
    let first = config.max_window_layers.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS) as usize;
    window::layers(config, window, |layer| layer >= first)
}
