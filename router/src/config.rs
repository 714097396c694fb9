//! The router's settings: each is declared here once, and is a flag and an environment variable of `lamplighter` too.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args};
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

    /// Most sequences of which an answer may be the best (`best_of`)
    #[arg(long, env = "MAX_BEST_OF", default_value_t = 2, value_parser = at_least_one)]
    pub max_best_of: usize,

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

    /// Steps that may be on their way to the shards at once, 1 or 2. With 2 the shards have the next step when they
    /// finish one; the tokens are the same [default: 1 on a CPU, whose cores plan the next step themselves; 2 on a GPU]
    #[arg(long, env = "STEPS_IN_FLIGHT", value_parser = steps_in_flight)]
    pub steps_in_flight: Option<usize>,

    /// Share computed KV blocks between requests that begin alike (true or false). The tokens are the same; turn it off
    /// where not even timing may tell that a prompt was seen before
    #[arg(
        long,
        env = "PREFIX_CACHING",
        default_value_t = true,
        action = ArgAction::Set,
        num_args = 1,
        value_parser = BoolishValueParser::new()
    )]
    pub prefix_caching: bool,

    /// Milliseconds between two tokens of a running stream that are to be held: prompts are computed in chunks so small
    /// that a step, as measured, takes no longer. The first token of long prompts then comes later [default: off]
    #[arg(long, env = "TARGET_ITL_MS", value_parser = at_least_one)]
    pub target_itl_ms: Option<usize>,

    /// TGI's; refused, since it could have no effect
    #[arg(long, env = "MAX_WAITING_TOKENS", hide = true, value_parser = nobody_is_paused)]
    #[serde(skip)]
    pub max_waiting_tokens: Option<Refused>,

    /// TGI's; refused, since it could have no effect
    #[arg(long, env = "WAITING_SERVED_RATIO", hide = true, value_parser = nobody_is_paused)]
    #[serde(skip)]
    pub waiting_served_ratio: Option<Refused>,

    /// Milliseconds of waiting that are worth one unit of `priority`: a request that waits catches up with those of a
    /// better priority. Named classes are 100 units apart, so that a class is worth a minute. Lower it where background
    /// requests wait too long, raise it where they get in the way
    #[arg(long, env = "PRIORITY_AGEING_MS", default_value_t = 600, value_parser = at_least_one)]
    pub priority_ageing_ms: usize,

    /// Seconds that a request may take, waiting included; it may be a fraction, and a request can ask for less with
    /// `timeout` [default: no limit]
    #[arg(long, env = "REQUEST_TIMEOUT", value_parser = timeout_seconds)]
    pub request_timeout: Option<f64>,

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

/// A setting that is known, and has no value that could be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {}

/// Longest time that a request may be given: a day.
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_hours(24);

impl RouterConfig {
    /// `--request-timeout`.
    #[must_use]
    pub fn request_timeout(&self) -> Option<Duration> {
        self.request_timeout.and_then(timeout)
    }
}

/// A time that a request may take, if it is one: above 0, and a day at most.
pub(crate) fn timeout(seconds: f64) -> Option<Duration> {
    let duration = Duration::try_from_secs_f64(seconds).ok()?;
    (duration > Duration::ZERO && duration <= MAX_TIMEOUT).then_some(duration)
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

fn steps_in_flight(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(steps @ 1..=2) => Ok(steps),
        _ => Err("must be 1 or 2".to_owned()),
    }
}

/// TGI's settings of when running requests are paused for the prompts of waiting ones.
fn nobody_is_paused(_: &str) -> Result<Refused, String> {
    Err("nobody is paused for another's prompt here, prompts are computed beside running requests in every step, so \
         this could have no effect: leave it out; --max-batch-prefill-tokens and --target-itl-ms say how much of a step \
         prompts get"
        .to_owned())
}

fn timeout_seconds(value: &str) -> Result<f64, String> {
    value
        .parse()
        .ok()
        .filter(|seconds| timeout(*seconds).is_some())
        .ok_or_else(|| format!("must be a number of seconds, > 0 and <= {}", MAX_TIMEOUT.as_secs()))
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        config: RouterConfig,
    }

    fn config(line: &str) -> Result<RouterConfig, clap::Error> {
        Ok(Cli::try_parse_from(line.split_whitespace())?.config)
    }

    #[test]
    fn prefix_caching_is_on_until_it_is_turned_off() {
        assert!(config("router").unwrap().prefix_caching);
        for (value, on) in [("true", true), ("false", false), ("1", true), ("0", false)] {
            assert_eq!(config(&format!("router --prefix-caching {value}")).unwrap().prefix_caching, on);
        }
    }

    #[test]
    fn a_timeout_is_a_number_of_seconds_within_a_day() {
        let timeout =
            |value: &str| Ok::<_, clap::Error>(config(&format!("router {value}"))?.request_timeout());
        assert_eq!(timeout("").unwrap(), None);
        assert_eq!(timeout("--request-timeout 2.5").unwrap(), Some(Duration::from_millis(2500)));
        for value in ["0", "1e-12", "-1", "nan", "inf", "86401", "soon"] {
            let error = timeout(&format!("--request-timeout={value}")).unwrap_err().to_string();
            assert!(error.contains("--request-timeout") && error.contains("86400"), "{error}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused_with_the_flag_and_the_range() {
        let check = |line: &str, parts: [&str; 2]| {
            let error = config(&format!("router {line}")).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        check("--steps-in-flight 3", ["--steps-in-flight", "1 or 2"]);
        check("--steps-in-flight 0", ["--steps-in-flight", "1 or 2"]);
        check("--priority-ageing-ms 0", ["--priority-ageing-ms", "at least 1"]);
        check("--target-itl-ms 0", ["--target-itl-ms", "at least 1"]);
        check("--waiting-served-ratio 0.3", ["--waiting-served-ratio", "leave it out"]);
        check("--max-waiting-tokens 20", ["--max-waiting-tokens", "nobody is paused"]);
        check("--prefix-caching maybe", ["--prefix-caching", "maybe"]);
    }
}
