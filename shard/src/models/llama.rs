//! Llama 1 to 3.3 and its many relatives (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024,
//! arXiv:2407.21783): pre-norm, rotary positions, grouped queries, gated MLP, optional biases.

use super::config::ModelConfig;
use super::{Architecture, ConfigError, LLAMA_TENSOR_NAMES, window};
use crate::decoder::DecoderSpec;

pub(super) const ARCHITECTURE: Architecture =
    Architecture { class: "LlamaForCausalLM", model_type: "llama", spec, tensor_names: LLAMA_TENSOR_NAMES };

fn spec(config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    // No window is neutral: transformers does not look at the field here, so a number in it is a mistake.
    config.refuse("sliding_window", window::tokens(config, None)?.as_ref(), &usize::MAX)?;
    config.refuse("use_sliding_window", config.use_sliding_window.as_ref(), &false)?;
    let attention_bias = config.attention_bias.unwrap_or(false);
    Ok(DecoderSpec {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: config.mlp_bias.unwrap_or(false),
        layers: window::layers(config, None, |_| false)?,
        ..config.decoder_spec()?
    })
}
