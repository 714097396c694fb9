//! `config.json` as transformers writes it: the fields that decoders have in common, under the names of its fourth and its
//! fifth version (`rope_theta` and `rope_scaling`, or `rope_parameters`).

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::rope::RopeParameters;
use super::{ConfigError, LoadError};
use crate::decoder::{DecoderSpec, LayerSpec, RotaryScaling, RotarySpec};

/// More layers than any decoder has; a damaged file must not ask for all memory.
const MAX_LAYERS: u32 = 4096;

/// Fields that say nothing about what is computed at inference (or repeat what another field says).
const FIELDS_WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation_autoset",
    "_name_or_path",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "initializer_range",
    "pad_token_id",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// The fields of `config.json` that the architectures read. What is absent has transformers' default.
#[derive(Debug, Deserialize)]
pub(super) struct ModelConfig {
    #[serde(default)]
    pub(super) architectures: Vec<String>,
    pub(super) model_type: Option<String>,

    pub(super) vocab_size: u32,
    pub(super) hidden_size: u32,
    pub(super) intermediate_size: u32,
    pub(super) num_hidden_layers: u32,
    pub(super) num_attention_heads: u32,
    pub(super) num_key_value_heads: Option<u32>,
    pub(super) head_dim: Option<u32>,
    pub(super) max_position_embeddings: u32,
    pub(super) rms_norm_eps: Option<f32>,
    pub(super) hidden_act: Option<String>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) attention_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,

    pub(super) rope_theta: Option<f32>,
    pub(super) rope_scaling: Option<RopeParameters>,
    pub(super) rope_parameters: Option<RopeParameters>,
    pub(super) partial_rotary_factor: Option<f32>,

    /// `Some(Null)` where the file says null, which is not the same as absent.
    #[serde(default, deserialize_with = "present")]
    pub(super) sliding_window: Option<Value>,
    pub(super) use_sliding_window: Option<bool>,
    pub(super) max_window_layers: Option<u32>,
    pub(super) layer_types: Option<Vec<String>>,

    pub(super) eos_token_id: Option<Value>,
    pub(super) quantization_config: Option<Value>,

    /// All others.
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json` in `model_dir`.
    pub(super) fn read(model_dir: &Path) -> Result<Self, LoadError> {
        let path = model_dir.join("config.json");
        let text = std::fs::read(&path).map_err(|source| LoadError::Io { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|source| LoadError::Json { path, source })
    }

    /// What follows from the common fields: no biases, no norms of heads, full attention. An architecture states what
    /// is different.
    pub(super) fn decoder_spec(&self) -> Result<DecoderSpec, ConfigError> {
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1));
        self.decoder_spec_with_head_dim(head_dim)
    }

    /// The same with a head width that does not follow from the others.
    pub(super) fn decoder_spec_with_head_dim(&self, head_dim: u32) -> Result<DecoderSpec, ConfigError> {
        let layer = LayerSpec { window: None };
        Ok(DecoderSpec {
            vocab_size: self.vocab_size as usize,
            hidden_size: self.hidden_size as usize,
            intermediate_size: self.intermediate_size as usize,
            num_heads: self.num_attention_heads as usize,
            num_kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads) as usize,
            head_dim: head_dim as usize,
            max_position_embeddings: self.max_position_embeddings as usize,
            norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied_head: self.tie_word_embeddings.unwrap_or(false),
            rotary: self.rotary(head_dim)?,
            layers: vec![layer; self.num_hidden_layers as usize],
        })
    }

    /// Refuses a field that the architecture has no use for, unless it is absent or has the value that changes nothing.
    pub(super) fn refuse<T: PartialEq + std::fmt::Debug>(
        &self,
        field: &str,
        value: Option<&T>,
        neutral: &T,
    ) -> Result<(), ConfigError> {
        match value {
            Some(value) if value != neutral => {
                let architecture = self.architectures.first().or(self.model_type.as_ref());
                let architecture = architecture.map_or("this architecture", String::as_str);
                Err(ConfigError::new(field, format!("{value:?} is not supported for {architecture}")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what no architecture can have; to be called before anything is made of the fields.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.num_hidden_layers > MAX_LAYERS {
            let message = format!("{} is more than {MAX_LAYERS}", self.num_hidden_layers);
            return Err(ConfigError::new("num_hidden_layers", message));
        }
        let activation = self.hidden_act.as_deref().unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(ConfigError::new("hidden_act", format!("{activation} is not supported; silu is")));
        }
        if let Some(quantization) = self.quantization_config.as_ref().filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            let message = format!(
                "quantized weights ({method}) are not supported; use the float32, float16 or bfloat16 checkpoint"
            );
            return Err(ConfigError::new("quantization_config", message));
        }
        // A field of the model's own code that we do not know may change what it computes: worth a word to the operator.
        let has_effect = |name: &&String| {
            let value = &self.others[name.as_str()];
            !FIELDS_WITHOUT_EFFECT.contains(&name.as_str())
                && !value.is_null()
                && *value != Value::Bool(false)
        };
        let unknown: Vec<_> = self.others.keys().filter(has_effect).map(String::as_str).collect();
        if !unknown.is_empty() {
            tracing::warn!(fields = unknown.join(", "), "config.json has fields that are not used");
        }
        Ok(())
    }

    fn rotary(&self, head_dim: u32) -> Result<RotarySpec, ConfigError> {
        if !head_dim.is_multiple_of(2) {
            let message = format!("{head_dim} is odd, but rotary embedding turns pairs of elements");
            return Err(ConfigError::new("head_dim", message));
        }
        // transformers 5 writes everything into one object; before, theta stood by itself and scaling was optional.
        let (field, parameters) = match (&self.rope_parameters, &self.rope_scaling) {
            (Some(parameters), _) => ("rope_parameters", Some(parameters)),
            (None, scaling) => ("rope_scaling", scaling.as_ref()),
        };
        let theta = parameters.and_then(|p| p.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 0.0) {
            return Err(ConfigError::new("rope_theta", format!("{theta} is not a positive number")));
        }
        let fraction = parameters.and_then(|p| p.partial_rotary_factor).or(self.partial_rotary_factor);
        let fraction = fraction.unwrap_or(1.0);
        let dim = (head_dim as f32 * fraction) as usize;
        if !(dim.is_multiple_of(2) && dim > 0 && dim <= head_dim as usize) && head_dim > 0 {
            let message = format!("{fraction} of head_dim {head_dim} is not an even part of it");
            return Err(ConfigError::new("partial_rotary_factor", message));
        }
        let scaling = parameters.map_or(Ok(RotaryScaling::Default), |p| p.scaling(field))?;
        Ok(RotarySpec { dim, theta, scaling })
    }
}

fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}
