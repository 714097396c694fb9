//! The shard's settings: each is declared here once, and is a flag and an environment variable of `lamplighter` too.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::cores::Cores;

/// Settings of all shards of a group. Flags and environment variables have the names that TGI gave them.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct ShardConfig {
    /// Element type of weights, and precision in which they are multiplied. Weights that it represents exactly are still
    /// used in place as they are stored. Where the CPU multiplies bfloat16 by itself, activations are rounded to it before
    /// they meet bfloat16 weights; float32 keeps them whole [default: the checkpoint's]
    #[arg(long, env = "DTYPE", value_enum)]
    pub dtype: Option<Dtype>,

    /// Element type of keys and values. Half as wide, twice as many tokens fit the memory and a long context is read
    /// twice as fast; fp8_e4m3fn needs a GPU, and stores them as they are, with a scale of 1: what is beyond 448 becomes
    /// 448 [default: that of the weights on a GPU; on the CPU bfloat16, but float32 where the weights' type is float32]
    #[arg(long, env = "KV_CACHE_DTYPE", value_enum)]
    pub kv_cache_dtype: Option<KvCacheDtype>,

    /// Quantize the linear layers' weights, all but the head's, when the model is loaded. Less memory is read for each
    /// token, at the price of some accuracy [default: as they are stored]
    #[arg(long, env = "QUANTIZE", value_enum)]
    pub quantize: Option<Quantization>,

    /// LoRA adapters that requests may name, as PEFT writes them: NAME=DIRECTORY, or DIRECTORY, which is the name too,
    /// separated by commas. Each takes memory for its factors, and is loaded at the start
    #[arg(long, env = "LORA_ADAPTERS", default_value = "", hide_default_value = true, value_parser = lora_adapters)]
    #[serde(default)]
    pub lora_adapters: LoraAdapters,

    /// What computes. auto: the GPUs that CUDA shows, where this executable was built for them and there are any, else the
    /// CPU
    #[arg(long, env = "LAMPLIGHTER_DEVICE", value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Batch sizes for which decode steps are recorded as CUDA graphs, to which smaller batches are padded; 0: none. Without
    /// graphs a step of a small model waits for the host [default: 1,2,4,8,16,24,32, ... 256]
    #[arg(long, env = "CUDA_GRAPHS", value_delimiter = ',')]
    pub cuda_graphs: Option<Vec<usize>>,

    /// Share of the GPU's memory left beside weights and buffers that keys and values take. Less leaves room for other
    /// programs on the same GPU
    #[arg(long, env = "CUDA_MEMORY_FRACTION", default_value_t = 1.0, value_parser = fraction)]
    pub cuda_memory_fraction: f64,

    /// Whether weights that a CPU uses as they lie in the checkpoint's files are copied into huge pages, after the start and beside
    /// serving, where four fifths of the available memory hold them and keys and values: tokens come up to a quarter faster.
    /// never: they stay in the page cache, which all servers of one checkpoint share
    #[arg(long, env = "HUGE_PAGES", value_enum, default_value_t = HugePages::Auto)]
    #[serde(default)]
    pub huge_pages: HugePages,

    /// Compute without the kernels that are tuned for this machine, where their results are in doubt; slower. On a GPU,
    /// products are cuBLASLt's alone; attention, experts' products and LoRA each have the one kernel that is for any size;
    /// norms, rotary embedding and cache writes are not fused; sampling and what else has no alternative stay. On the CPU,
    /// what the compiler makes of plain Rust, without AVX or NEON
    #[arg(long, env = "DISABLE_CUSTOM_KERNELS")]
    pub disable_custom_kernels: bool,
}

impl Default for ShardConfig {
    /// As without any flag.
    fn default() -> Self {
        Self {
            dtype: None,
            kv_cache_dtype: None,
            quantize: None,
            lora_adapters: LoraAdapters::default(),
            device: DeviceChoice::Auto,
            cuda_graphs: None,
            cuda_memory_fraction: 1.0,
            huge_pages: HugePages::Auto,
            disable_custom_kernels: false,
        }
    }
}

/// The adapters of `--lora-adapters`, no two of one name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoraAdapters(pub Vec<LoraAdapter>);

/// A LoRA adapter that requests may name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoraAdapter {
    /// What requests call it.
    pub name: String,
    /// Its directory: `adapter_config.json` and `adapter_model.safetensors`.
    pub path: PathBuf,
}

/// TGI's form, `NAME[=PATH][@REVISION]`, but that nothing is downloaded here, so there are no revisions.
fn lora_adapters(value: &str) -> Result<LoraAdapters, String> {
    let mut adapters: Vec<LoraAdapter> = Vec::new();
    for entry in value.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
        let (name, path) = entry.split_once('=').unwrap_or((entry, entry));
        if name.is_empty() || path.is_empty() || path.contains('=') {
            return Err(format!("{entry:?} is not NAME=DIRECTORY, or DIRECTORY"));
        }
        if entry.contains('@') {
            return Err(format!(
                "{entry:?} names a revision, but adapters are not downloaded: give a directory"
            ));
        }
        if adapters.iter().any(|adapter| adapter.name == name) {
            return Err(format!("two adapters are called {name:?}: give each its own name"));
        }
        adapters.push(LoraAdapter { name: name.to_owned(), path: path.into() });
    }
    Ok(LoraAdapters(adapters))
}

fn fraction(value: &str) -> Result<f64, String> {
    match value.parse::<f64>() {
        Ok(fraction) if fraction > 0.0 && fraction <= 1.0 => Ok(fraction),
        Ok(_) => Err("must be above 0 and at most 1".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn cores(value: &str) -> Result<Cores, String> {
    match value.parse::<Cores>() {
        Ok(cores) if cores.is_empty() => {
            Err("there is no core in it: write them as in 0-15,32-47".to_owned())
        }
        Ok(cores) => Ok(cores),
        Err(error) => Err(error.to_string()),
    }
}

/// What a shard must be told about its surroundings: set by the launcher, or by hand when started alone.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct ShardPlacement {
    /// Directory with config.json and safetensors files
    #[arg(long, env = "MODEL_ID")]
    pub model_dir: PathBuf,

    /// Socket to listen on
    #[arg(long, required_unless_present = "listen")]
    pub uds_path: Option<PathBuf>,

    /// Address and port to listen on instead, for a router on another host. Whoever reaches it can use the shard: it belongs
    /// into a private network
    #[arg(long, conflicts_with = "uds_path")]
    pub listen: Option<SocketAddr>,

    /// This shard's rank in its tensor-parallel group [env: LWS_WORKER_INDEX, where RANK is not set]
    #[arg(long, env = "RANK", default_value_t = 0)]
    pub rank: usize,

    /// Number of ranks in the group [env: LWS_GROUP_SIZE, where WORLD_SIZE is not set]
    #[arg(long, env = "WORLD_SIZE", default_value_t = 1)]
    pub world_size: usize,

    /// File in shared memory where the ranks of one host meet; needed where world-size > 1
    #[arg(long)]
    pub rendezvous: Option<PathBuf>,

    /// Host of rank 0, where the ranks of several hosts meet (GPUs only) [env: LWS_LEADER_ADDRESS, where MASTER_ADDR is not set]
    #[arg(long, env = "MASTER_ADDR")]
    pub master_addr: Option<String>,

    /// Port at which rank 0 waits for the others there
    #[arg(long, env = "MASTER_PORT", default_value_t = 29500)]
    pub master_port: u16,

    /// Which of the GPUs that CUDA shows to this process is used [default: the rank, where all ranks are on one host]
    #[arg(long, env = "LOCAL_RANK")]
    pub local_rank: Option<usize>,

    /// Cores that this process binds itself to, in the form of Linux's cpulist files: 0-15,32-47. With those of one NUMA node,
    /// weights, keys and values lie in that node's memory, which it reads fastest [default: the system moves threads as it
    /// likes]
    #[arg(long, value_parser = cores)]
    pub cores: Option<Cores>,

    /// Threads for computing [default: one for each of --cores, as far as the container's CPU quota allows; without --cores,
    /// the cores given to this process, divided by world-size]
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

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// GPUs where there are any.
    Auto,
    /// The CPU.
    Cpu,
    /// NVIDIA GPUs; an error where there are none.
    Cuda,
}

/// When weights in files are copied into huge pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Where the system gives huge pages, the files are not in such, and memory suffices.
    #[default]
    Auto,
    /// They are used as they lie in the files.
    Never,
}

/// Element type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// 32-bit float.
    #[value(alias = "f32")]
    Float32,
    /// IEEE 754 half precision.
    #[value(alias = "f16")]
    Float16,
    /// bfloat16.
    #[value(alias = "bf16")]
    Bfloat16,
    /// 8 bits, of which 4 are the exponent's and 3 the mantissa's, without infinities (Micikevicius et al. 2022,
    /// arXiv:2209.05433).
    #[value(name = "fp8_e4m3fn")]
    #[serde(rename = "fp8_e4m3fn")]
    Fp8E4m3fn,
}

/// Element type of weights.
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

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};

    use super::*;

    fn parse(line: &str) -> Result<ShardConfig, clap::Error> {
        let command = ShardConfig::augment_args(clap::Command::new("shard").no_binary_name(true));
        ShardConfig::from_arg_matches(&command.try_get_matches_from(line.split_whitespace())?)
    }

    #[test]
    fn settings_of_gpus_have_the_values_that_tgi_gave_them() {
        let config =
            parse("--cuda-graphs 1,4,16 --kv-cache-dtype fp8_e4m3fn --cuda-memory-fraction 0.8").unwrap();
        assert_eq!(config.cuda_graphs, Some(vec![1, 4, 16]));
        assert_eq!(config.kv_cache_dtype, Some(KvCacheDtype::Fp8E4m3fn));
        let text = serde_json::to_string(&config).unwrap();
        let again: ShardConfig = serde_json::from_str(&text).unwrap();
        assert_eq!((again.kv_cache_dtype, again.device), (config.kv_cache_dtype, DeviceChoice::Auto));
    }

    #[test]
    fn adapters_are_listed_with_their_names_or_are_called_by_their_directories() {
        assert_eq!(parse("").unwrap().lora_adapters, LoraAdapters::default());
        let given = parse("--lora-adapters tone=/a/tone,/a/form").unwrap().lora_adapters.0;
        let names: Vec<_> = given.iter().map(|a| (&*a.name, a.path.to_str().unwrap())).collect();
        assert_eq!(names, [("tone", "/a/tone"), ("/a/form", "/a/form")]);
        for (value, part) in
            [("a=b=c", "NAME=DIRECTORY"), ("a=/b@main", "revision"), ("a=/b,a=/c", "two adapters")]
        {
            let message = parse(&format!("--lora-adapters {value}")).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn cores_are_given_as_in_cpulist_files() {
        let parse = |line: &str| {
            let command = ShardPlacement::augment_args(clap::Command::new("shard").no_binary_name(true));
            let line = format!("--model-dir /models/x --uds-path /tmp/s {line}");
            let matches = command.try_get_matches_from(line.split(' ').filter(|word| !word.is_empty()))?;
            ShardPlacement::from_arg_matches(&matches)
        };
        assert_eq!(parse("").unwrap().cores, None);
        let placement = parse("--cores 0-15,32-47").unwrap();
        let text = serde_json::to_string(&placement).unwrap();
        let again: ShardPlacement = serde_json::from_str(&text).unwrap();
        assert_eq!(again.cores.unwrap().to_string(), "0-15,32-47");
        for (value, part) in [("7-3", "lower core first"), ("", "no core"), ("all", "0-15,32-47")] {
            let message = parse(&format!("--cores={value}")).unwrap_err().to_string();
            assert!(message.contains("--cores") && message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_fraction_of_the_memory_is_above_0_and_at_most_1() {
        for value in ["0", "1.1", "-1", "NaN"] {
            let message = parse(&format!("--cuda-memory-fraction={value}")).unwrap_err().to_string();
            assert!(message.contains("must be above 0 and at most 1"), "{message}");
        }
    }
}
