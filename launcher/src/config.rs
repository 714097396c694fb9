//! The launcher's own settings, and the command line: the settings of router and shard are theirs, flattened in here.

use std::ffi::OsString;
use std::net::IpAddr;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use router::config::{RouterConfig, RouterPlacement};
use shard::{ShardConfig, ShardPlacement};

/// Settings of the launcher, and with them those of all that it starts.
#[derive(Debug, Clone, Args)]
pub(crate) struct LauncherConfig {
    /// Directory of the model: config.json, *.safetensors, tokenizer.json [default: the small model inside this executable]
    #[arg(long, env = "MODEL_ID")]
    pub(crate) model_id: Option<String>,

    /// Number of shards that the model is split over (tensor parallelism) [default: the GPUs that CUDA shows; 1 on the
    /// CPU]
    #[arg(long, env = "NUM_SHARD", value_parser = num_shard)]
    pub(crate) num_shard: Option<usize>,

    /// Prefix of the shards' sockets, PREFIX-0, PREFIX-1, ... [default: in a private directory]
    #[arg(long, env = "SHARD_UDS_PATH")]
    pub(crate) shard_uds_path: Option<String>,

    #[command(flatten)]
    pub(crate) router: RouterConfig,

    #[command(flatten)]
    pub(crate) shard: ShardConfig,
}

impl LauncherConfig {
    /// With what is to be found out on this machine: which device computes, and how many shards there are.
    pub(crate) fn resolved(&self) -> anyhow::Result<Self> {
        let device = shard::resolve_device(&self.shard)?;
        let num_shard = Some(self.num_shard.unwrap_or_else(|| shard::default_num_shards(device)));
        Ok(Self { num_shard, shard: ShardConfig { device, ..self.shard.clone() }, ..self.clone() })
    }
}

/// What the command line asks for.
pub(crate) enum Invocation {
    /// Launch everything.
    Launch(Box<LauncherConfig>),
    /// Be a router.
    Router(RouterConfig, RouterPlacement),
    /// Be a shard.
    Shard(ShardConfig, ShardPlacement),
}

/// Parses the command line and the environment; ends the process with a message (code 2) where they are wrong.
pub(crate) fn parse(arguments: Vec<OsString>) -> Invocation {
    #[expect(
        clippy::disallowed_methods,
        reason = "only to see whether the variable that --hostname names is meant for it"
    )]
    let host_name = std::env::var("HOSTNAME").ok();
    match try_parse(arguments, host_name.as_deref()) {
        Ok(invocation) => invocation,
        Err(error) => error.exit(),
    }
}

/// A server for large language models.
#[derive(Parser)]
#[command(name = "lamplighter", version, args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(flatten)]
    launcher: LauncherConfig,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// Only the router: HTTP in front of shards that run already
    Router {
        #[command(flatten)]
        config: RouterConfig,
        #[command(flatten)]
        placement: RouterPlacement,
    },
    /// Only one shard
    Shard {
        #[command(flatten)]
        config: ShardConfig,
        #[command(flatten)]
        placement: ShardPlacement,
    },
}

fn try_parse(arguments: Vec<OsString>, host_name: Option<&str>) -> Result<Invocation, clap::Error> {
    let matches = command(host_name).try_get_matches_from(arguments)?;
    let CommandLine { launcher, role } = CommandLine::from_arg_matches(&matches)?;
    Ok(match role {
        None => Invocation::Launch(Box::new(launcher)),
        Some(Role::Router { config, placement }) => Invocation::Router(config, placement),
        Some(Role::Shard { config, placement }) => Invocation::Shard(config, placement),
    })
}

/// TGI reads the listening address from `HOSTNAME`, and so do we. But container runtimes put the container's *name*
/// there, which is nobody's wish for a listening address: then the variable is not read.
fn command(host_name: Option<&str>) -> clap::Command {
    let is_address = |name: &str| name == "localhost" || name.parse::<IpAddr>().is_ok();
    if host_name.is_none_or(is_address) {
        return CommandLine::command();
    }
    let without_variable = |arg: clap::Arg| arg.env(None::<&str>);
    CommandLine::command()
        .mut_arg("hostname", without_variable)
        .mut_subcommand("router", |router| router.mut_arg("hostname", without_variable))
}

fn num_shard(value: &str) -> Result<usize, String> {
    match value.parse::<usize>() {
        Ok(0) => Err("there must be at least 1 shard".to_owned()),
        Ok(count) => Ok(count),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Invocation, clap::Error> {
        try_parse(line.split_whitespace().map(OsString::from).collect(), None)
    }

    fn launch(line: &str) -> LauncherConfig {
        match parse_line(line) {
            Ok(Invocation::Launch(config)) => *config,
            Ok(_) => panic!("{line}: not a launch"),
            Err(error) => panic!("{line}: {error}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        command(None).debug_assert();
        command(Some("4f5c2a")).debug_assert();
    }

    #[test]
    fn settings_of_router_and_shard_are_flags_of_the_launcher() {
        let config =
            launch("lamplighter --num-shard 2 --max-batch-prefill-tokens 16 --dtype bfloat16 -p 8080");
        assert_eq!(config.num_shard, Some(2));
        assert_eq!(config.router.max_batch_prefill_tokens, Some(16));
        assert_eq!(config.router.port, 8080);
        assert!(config.shard.dtype.is_some());
    }

    #[test]
    fn no_shards_at_all_is_an_error_that_names_the_flag() {
        let error = parse_line("lamplighter --num-shard 0").err().unwrap().to_string();
        assert!(error.contains("--num-shard") && error.contains("at least 1"), "{error}");
    }

    #[test]
    fn what_is_not_said_is_found_out() {
        let config = launch("lamplighter --device cpu").resolved().unwrap();
        assert_eq!((config.num_shard, config.shard.device), (Some(1), shard::DeviceChoice::Cpu));
        let config =
            launch("lamplighter --device cpu --num-shard 2 --disable-custom-kernels").resolved().unwrap();
        assert_eq!(config.num_shard, Some(2));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_needs_another_build() {
        let error = launch("lamplighter --device cuda").resolved().unwrap_err().to_string();
        assert!(error.contains("without CUDA") && error.contains("--features cuda"), "{error}");
        let auto = launch("lamplighter").resolved().unwrap();
        assert_eq!(auto.shard.device, shard::DeviceChoice::Cpu);
    }

    #[test]
    fn a_shard_can_be_started_by_hand() {
        let line = "lamplighter shard --model-dir /models/x --uds-path /tmp/s";
        let Ok(Invocation::Shard(_, placement)) = parse_line(line) else { panic!("not a shard") };
        assert_eq!(placement.world_size, 1);
    }

    #[test]
    fn a_router_can_be_started_by_hand() {
        let line = "lamplighter router --model-dir /models/x --shard-address /tmp/s --port 0";
        let Ok(Invocation::Router(config, placement)) = parse_line(line) else { panic!("not a router") };
        assert_eq!(config.port, 0);
        assert_eq!(placement.shard_addresses, ["/tmp/s"]);
    }

    #[test]
    fn a_container_name_in_the_environment_is_no_listening_address() {
        let hostname_env = |host_name| {
            let command = command(host_name);
            let argument = command.get_arguments().find(|argument| argument.get_id() == "hostname").unwrap();
            argument.get_env().map(ToOwned::to_owned)
        };
        assert_eq!(hostname_env(Some("4f5c2a")), None);
        assert_eq!(hostname_env(Some("127.0.0.1")), Some("HOSTNAME".into()));
        assert_eq!(hostname_env(None), Some("HOSTNAME".into()));
    }
}
