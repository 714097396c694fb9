//! The router's settings: each is declared here once, and is a flag and an environment variable of `lamplighter` too.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

/// Settings of the router. Flags and environment variables have the names that TGI gave them.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct RouterConfig {
    /// Address to listen on
    #[arg(long, env = "HOSTNAME", default_value = "0.0.0.0", value_parser = parse_hostname)]
    pub hostname: IpAddr,

    /// Port to listen on; 0 takes a free one
    #[arg(long, short, env = "PORT", default_value_t = 3000)]
    pub port: u16,

    /// Most requests in the house at once, waiting and running (each choice of `n` counts); further ones are answered 429
    #[arg(long, env = "MAX_CONCURRENT_REQUESTS", default_value_t = 128, value_parser = at_least_one)]
    pub max_concurrent_requests: usize,

    /// Longest prompt in tokens [default: max-total-tokens - 1]
    #[arg(long, env = "MAX_INPUT_TOKENS", value_parser = at_least_one)]
    pub max_input_tokens: Option<usize>,

    /// Longest sequence, prompt and output, in tokens [default: what the model's positions and the KV cache allow]
    #[arg(long, env = "MAX_TOTAL_TOKENS", value_parser = at_least_one)]
    pub max_total_tokens: Option<usize>,

    /// Most prompt tokens computed in one step; longer prompts are computed in chunks. Lower it to keep running streams
    /// even, raise it for throughput [default: 512 on a CPU, 4096 on a GPU]
    #[arg(long, env = "MAX_BATCH_PREFILL_TOKENS", value_parser = at_least_one)]
    pub max_batch_prefill_tokens: Option<usize>,

    /// Tokens of KV cache for all running sequences together [default: as many as the memory holds]
    #[arg(long, env = "MAX_BATCH_TOTAL_TOKENS", value_parser = at_least_one)]
    pub max_batch_total_tokens: Option<usize>,

    /// Most sequences computed in one step [default: 64 on a CPU, 256 on a GPU]
    #[arg(long, env = "MAX_BATCH_SIZE", value_parser = at_least_one)]
    pub max_batch_size: Option<usize>,

    /// Log lines as JSON objects
    #[arg(long, env = "JSON_OUTPUT")]
    pub json_output: bool,

    /// Which log lines to write: a level (error, warn, info, debug, trace), or directives such as `info,router=debug`
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,

    /// Seconds that running requests are given to finish after SIGTERM or SIGINT
    #[arg(long, short, env = "GRACEFUL_TERMINATION_TIMEOUT", default_value_t = 90)]
    pub graceful_termination_timeout: u64,
}

/// What the router must be told about its surroundings: set by the launcher, or by hand when started alone.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct RouterPlacement {
    /// Directory with tokenizer.json, tokenizer_config.json and config.json
    #[arg(long, env = "MODEL_ID")]
    pub model_dir: PathBuf,

    /// Name under which the model is served [default: the directory's name]
    #[arg(long)]
    pub model_name: Option<String>,

    /// Addresses of the shards in order of rank: socket paths, or http://host:port
    #[arg(long = "shard-address", required = true, num_args = 1..)]
    pub shard_addresses: Vec<String>,

    /// File to which the address that was bound is written
    #[arg(long, hide = true)]
    pub address_file: Option<PathBuf>,
}

fn at_least_one(value: &str) -> Result<usize, String> {
    match value.parse::<usize>() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(value) => Ok(value),
        Err(error) => Err(error.to_string()),
    }
}

fn parse_hostname(value: &str) -> Result<IpAddr, String> {
    match value {
        "localhost" => Ok(IpAddr::from([127, 0, 0, 1])),
        _ => value.parse().map_err(|_| {
            format!(
                "{value:?} is not an IP address: give the address of an interface, or 0.0.0.0 for all of them"
            )
        }),
    }
}
