//! Qwen 3, dense (Yang et al. 2025, arXiv:2505.09388): Qwen 2 with norms of query and key heads in place of the biases, and
//! a head width of its own.

use super::config::ModelConfig;
use super::{Architecture, ConfigError, LLAMA_TENSOR_NAMES, qwen2};
use crate::decoder::DecoderSpec;

pub(super) const ARCHITECTURE: Architecture =
    Architecture { class: "Qwen3ForCausalLM", model_type: "qwen3", spec, tensor_names: LLAMA_TENSOR_NAMES };

/// What transformers takes where `head_dim` is absent.
const DEFAULT_HEAD_DIM: u32 = 128;

fn spec(config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    config.refuse("mlp_bias", config.mlp_bias.as_ref(), &false)?;
    let attention_bias = config.attention_bias.unwrap_or(false);
    Ok(DecoderSpec {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        qk_norm: true,
        layers: qwen2::layers(config)?,
        ..config.decoder_spec_with_head_dim(config.head_dim.unwrap_or(DEFAULT_HEAD_DIM))?
    })
}
