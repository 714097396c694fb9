//! The shard's settings: each is declared here once, and is a flag and an environment variable of `lamplighter` too.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// Settings of all shards of a group. Flags and environment variables have the names that TGI gave them.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct ShardConfig {
    /// Element type of weights, and precision in which they are multiplied. Weights that it represents exactly are still
    /// used in place as they are stored. Where the CPU multiplies bfloat16 by itself, activations are rounded to it before
    /// they meet bfloat16 weights; float32 keeps them whole [default: the checkpoint's]
    #[arg(long, env = "DTYPE", value_enum)]
    pub dtype: Option<Dtype>,

    /// Element type of keys and values. Half as wide, twice as many tokens fit the memory and a long context is read
    /// twice as fast [default: bfloat16, but float32 where the weights' type is float32]
    #[arg(long, env = "KV_CACHE_DTYPE", value_enum)]
    pub kv_cache_dtype: Option<Dtype>,

    /// Quantize the linear layers' weights, all but the head's, when the model is loaded. Less memory is read for each
    /// token, at the price of some accuracy [default: as they are stored]
    #[arg(long, env = "QUANTIZE", value_enum)]
    pub quantize: Option<Quantization>,
}

/// What a shard must be told about its surroundings: set by the launcher, or by hand when started alone.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct ShardPlacement {
    /// Directory with config.json and safetensors files
    #[arg(long, env = "MODEL_ID")]
    pub model_dir: PathBuf,

    /// Socket to listen on
    #[arg(long)]
    pub uds_path: PathBuf,

    /// This shard's rank in its tensor-parallel group
    #[arg(long, env = "RANK", default_value_t = 0)]
    pub rank: usize,

    /// Number of ranks in the group
    #[arg(long, env = "WORLD_SIZE", default_value_t = 1)]
    pub world_size: usize,

    /// File in shared memory where the ranks of one host meet; needed where world-size > 1
    #[arg(long)]
    pub rendezvous: Option<PathBuf>,

    /// Threads for computing [default: the cores given to this process, divided by world-size]
    #[arg(long)]
    pub num_threads: Option<usize>,

    /// Log lines as JSON objects
    #[arg(long, env = "JSON_OUTPUT")]
    pub json_output: bool,

    /// Which log lines to write: a level (error, warn, info, debug, trace), or directives such as `info,shard=debug`
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,

    /// Set by the launcher: it ends its shards with SIGTERM, so the SIGINT that a terminal sends to all is ignored
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// Element type of weights or KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit float.
    #[value(alias = "f32")]
    Float32,
    /// IEEE 754 half precision.
    #[value(alias = "f16")]
    Float16,
    /// bfloat16.
    #[value(alias = "bf16")]
    Bfloat16,
}

/// Formats in which linear layers' weights are kept, where it is not the checkpoint's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 8-bit integers with one scale for each output; activations stay in float.
    Eetq,
}
