//! Mistral 7B and its dense successors (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window, which later
//! releases turn off.

use super::config::ModelConfig;
use super::{Architecture, ConfigError, LLAMA_TENSOR_NAMES, window};
use crate::decoder::DecoderSpec;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    class: "MistralForCausalLM",
    model_type: "mistral",
    spec,
    tensor_names: LLAMA_TENSOR_NAMES,
};

/// The window of the first release, which transformers takes where the field is absent.
const DEFAULT_WINDOW: usize = 4096;

fn spec(config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    config.refuse("attention_bias", config.attention_bias.as_ref(), &false)?;
    config.refuse("mlp_bias", config.mlp_bias.as_ref(), &false)?;
    config.refuse("use_sliding_window", config.use_sliding_window.as_ref(), &true)?;
    let window = window::tokens(config, Some(DEFAULT_WINDOW))?;
    Ok(DecoderSpec { layers: window::layers(config, window, |_| true)?, ..config.decoder_spec()? })
}
