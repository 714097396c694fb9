//! Model directory -> [`Model`]. One architecture is one file here and one line in [`ARCHITECTURES`]: it maps `config.json`
//! and tensor names to a [`DecoderSpec`], and knows no element type, rank or device.

mod config;
mod error;
mod generation_config;
mod rope;
mod window;

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use std::path::Path;
use std::time::Instant;

use kernels::{Context, DType, Place};

use crate::config::{Dtype, KvCacheDtype, LoraAdapter, Quantization};
use crate::decoder::{Decoder, DecoderSpec, TensorNames};
use crate::weights::{self, Adapter, MappedWeights, Partition, WeightTypes, Weights};

use config::ModelConfig;

pub use error::{ConfigError, LoadError};

/// All architectures that can be served.
const ARCHITECTURES: &[Architecture] =
    &[llama::ARCHITECTURE, mistral::ARCHITECTURE, qwen2::ARCHITECTURE, qwen3::ARCHITECTURE];

/// How one architecture's checkpoints are read.
struct Architecture {
    /// Its class in transformers, as in `architectures` of config.json.
    class: &'static str,
    /// Its `model_type` in config.json.
    model_type: &'static str,
    /// config.json -> what the decoder is made of; refuses what this architecture cannot do.
    spec: fn(&ModelConfig) -> Result<DecoderSpec, ConfigError>,
    tensor_names: TensorNames,
}

/// The names that Llama's checkpoints brought up, and most others use.
const LLAMA_TENSOR_NAMES: TensorNames = TensorNames {
    embedding: "model.embed_tokens",
    layers: "model.layers",
    attention_norm: "input_layernorm",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    query_norm: "self_attn.q_norm",
    key_norm: "self_attn.k_norm",
    output: "self_attn.o_proj",
    mlp_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    final_norm: "model.norm",
    head: "lm_head",
    redundant: &["rotary_emb.inv_freq"],
};

/// A model on one rank, ready to be prepared.
pub struct Model {
    /// What computes.
    pub decoder: Decoder,
    /// Ids that end a sequence; empty where the checkpoint names none.
    pub eos_token_ids: Vec<u32>,
    /// Parameters of the whole model.
    pub num_parameters: u64,
    /// Bytes of this rank's weights, mapped or copied.
    pub weight_bytes: u64,
    /// Those that are used as they lie in the files.
    pub mapped: MappedWeights,
    /// Element type of weights: the one asked for, or the checkpoint's.
    pub dtype: DType,
    /// Element type of keys and values.
    pub kv_dtype: DType,
    /// Names of the adapters, in the order in which sequences number them.
    pub adapter_names: Vec<String>,
}

/// How a checkpoint is loaded.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// Element type of weights that are not quantized; `None`: the checkpoint's.
    pub dtype: Option<Dtype>,
    /// Element type of keys and values; `None`: the weights' on a GPU, on the CPU bfloat16, but float32 where the weights' is.
    pub kv_cache_dtype: Option<KvCacheDtype>,
    /// Format of linear layers' weights; `None`: as they are stored.
    pub quantize: Option<Quantization>,
    /// Whose share of the weights.
    pub partition: Partition,
}

/// Maps the checkpoint in `model_dir` (config.json, safetensors files, maybe generation_config.json), and quantizes its
/// weights on `context` if that is asked for. All that config.json can rule out is refused before a weight file is opened.
pub fn load(context: &Context, model_dir: &Path, options: LoadOptions) -> Result<Model, LoadError> {
    load_with_adapters(context, model_dir, options, &[])
}

/// As [`load`], with LoRA adapters of which each sequence may have one.
pub fn load_with_adapters(
    context: &Context,
    model_dir: &Path,
    options: LoadOptions,
    adapters: &[LoraAdapter],
) -> Result<Model, LoadError> {
    let LoadOptions { dtype, kv_cache_dtype, quantize: quantization, partition } = options;
    let config = ModelConfig::read(model_dir)?;
    let invalid = |source| LoadError::Config { path: model_dir.join("config.json"), source };
    let architecture = find(&config).map_err(invalid)?;
    config.check().map_err(invalid)?;
    let spec = (architecture.spec)(&config).and_then(checked).map_err(invalid)?;
    spec.check_partition(partition.world_size)?;
    let eos_token_ids = generation_config::eos_token_ids(model_dir, &config)?;

    let dtype = dtype.map(element_type);
    let names = &architecture.tensor_names;
    let types = WeightTypes { dtype, quantization };
    let started = Instant::now();
    let adapter_names = adapters.iter().map(|adapter| adapter.name.clone()).collect();
    let adapters: Vec<_> =
        adapters.iter().map(|adapter| Adapter::open(&adapter.path)).collect::<Result<_, _>>()?;
    let mut weights = Weights::open(context, model_dir, types, partition)?.with_adapters(adapters);
    if context.place() == Place::Device {
        // A GPU multiplies only what has one type.
        weights.settle_dtype(&format!("{}.weight", names.embedding));
    }
    let decoder = Decoder::load(spec, names, &mut weights)?;
    let (num_parameters, weight_bytes) = (weights.num_parameters(), weights.size_in_bytes());
    let mapped = weights.take_mapped();
    let tied_head = decoder.spec().tied_head.then(|| format!("{}.weight", names.head));
    weights.finish(|name| {
        tied_head.as_deref() == Some(name) || names.redundant.iter().any(|end| name.ends_with(end))
    })?;
    let dtype = dtype.unwrap_or_else(|| decoder.dtype());
    let kv_dtype = match (kv_cache_dtype.map(kv_element_type), context.place()) {
        (Some(DType::F8E4M3), Place::Host) => return Err(LoadError::KvDtype),
        (Some(kv_dtype), _) => kv_dtype,
        (None, Place::Host) => default_kv_dtype(dtype),
        (None, Place::Device) => dtype,
    };
    if context.place() == Place::Device {
        context.synchronize().map_err(weights::Error::from)?;
        let seconds = started.elapsed().as_secs_f64();
        let gb = weight_bytes as f64 / 1e9;
        tracing::info!(gb, seconds, seconds_per_gb = seconds / gb, "weights copied to the GPU");
    }
    Ok(Model { decoder, eos_token_ids, num_parameters, weight_bytes, mapped, dtype, kv_dtype, adapter_names })
}

/// 16 bits, of which bfloat16 has the range of f32: keys and values are computed in f32 and may be beyond f16. Whoever
/// has f32 weights, or asks for them, wants results that agree with others in f32.
fn default_kv_dtype(dtype: DType) -> DType {
    if dtype == DType::F32 { DType::F32 } else { DType::BF16 }
}

fn find(config: &ModelConfig) -> Result<&'static Architecture, ConfigError> {
    let class = config.architectures.first();
    let is_meant = |architecture: &&Architecture| match class {
        Some(class) => architecture.class == class,
        None => config.model_type.as_deref() == Some(architecture.model_type),
    };
    ARCHITECTURES.iter().find(is_meant).ok_or_else(|| {
        let supported: Vec<_> = ARCHITECTURES.iter().map(|architecture| architecture.class).collect();
        let (field, found) = match (class, &config.model_type) {
            (Some(class), _) => ("architectures", class.as_str()),
            (None, Some(model_type)) => ("model_type", model_type.as_str()),
            (None, None) => ("architectures", "absent"),
        };
        ConfigError::new(field, format!("{found} is not supported; supported are {}", supported.join(", ")))
    })
}

/// Refuses sizes that make no decoder, whatever the architecture.
fn checked(spec: DecoderSpec) -> Result<DecoderSpec, ConfigError> {
    let positive = [
        ("vocab_size", spec.vocab_size),
        ("hidden_size", spec.hidden_size),
        ("intermediate_size", spec.intermediate_size),
        ("num_attention_heads", spec.num_heads),
        ("num_key_value_heads", spec.num_kv_heads),
        ("head_dim", spec.head_dim),
        ("max_position_embeddings", spec.max_position_embeddings),
        ("num_hidden_layers", spec.num_layers()),
    ];
    if let Some((field, _)) = positive.iter().find(|(_, value)| *value == 0) {
        return Err(ConfigError::new(field, "must be at least 1".to_owned()));
    }
    if !spec.num_heads.is_multiple_of(spec.num_kv_heads) {
        let message = format!("{} does not divide num_attention_heads {}", spec.num_kv_heads, spec.num_heads);
        return Err(ConfigError::new("num_key_value_heads", message));
    }
    Ok(spec)
}

fn kv_element_type(dtype: KvCacheDtype) -> DType {
    match dtype {
        KvCacheDtype::Float32 => DType::F32,
        KvCacheDtype::Float16 => DType::F16,
        KvCacheDtype::Bfloat16 => DType::BF16,
        KvCacheDtype::Fp8E4m3fn => DType::F8E4M3,
    }
}

fn element_type(dtype: Dtype) -> DType {
    match dtype {
        Dtype::Float32 => DType::F32,
        Dtype::Float16 => DType::F16,
        Dtype::Bfloat16 => DType::BF16,
    }
}
