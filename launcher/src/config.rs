//! The launcher's own settings, and the command line: the settings of router and shard are theirs, flattened in here.

use std::ffi::OsString;
use std::net::IpAddr;

use anyhow::ensure;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use router::config::{RouterConfig, RouterPlacement};
use shard::{DeviceChoice, ShardConfig, ShardPlacement};

/// Settings of the launcher, and with them those of all that it starts.
#[derive(Debug, Clone, Args)]
pub(crate) struct LauncherConfig {
    /// Directory of the model: config.json, *.safetensors, tokenizer.json [default: the small model inside this executable]
    #[arg(long, env = "MODEL_ID")]
    pub(crate) model_id: Option<String>,

    /// Number of shards that the model is split over (tensor parallelism), on all hosts together [default: the GPUs that CUDA
    /// shows, times the hosts; 1 on the CPU]
    #[arg(long, env = "NUM_SHARD", value_parser = num_shard)]
    pub(crate) num_shard: Option<usize>,

    /// Prefix of the shards' sockets, PREFIX-0, PREFIX-1, ... [default: in a private directory]
    #[arg(long, env = "SHARD_UDS_PATH")]
    pub(crate) shard_uds_path: Option<String>,

    /// Hosts that the shards are spread over evenly (GPUs only). Each has a launcher, started with the same flags but for
    /// --node-rank [env: LWS_GROUP_SIZE or GROUP_WORLD_SIZE, where NUM_NODES is not set]
    #[arg(long, env = "NUM_NODES", default_value_t = 1)]
    pub(crate) num_nodes: usize,

    /// Which of the hosts this is, from 0. Node 0 has the first shards, and the router [env: LWS_WORKER_INDEX or GROUP_RANK,
    /// where NODE_RANK is not set]
    #[arg(long, env = "NODE_RANK", default_value_t = 0)]
    pub(crate) node_rank: usize,

    /// Name or address of node 0, for the others [env: LWS_LEADER_ADDRESS, where MASTER_ADDR is not set]
    #[arg(long, env = "MASTER_ADDR")]
    pub(crate) master_addr: Option<String>,

    /// Port of node 0 at which the shards of all hosts meet; their launchers meet at the next one. Whoever reaches these can
    /// take a node's place: they belong into a private network
    #[arg(long, env = "MASTER_PORT", default_value_t = 29500)]
    pub(crate) master_port: u16,

    /// First port at which this host's shards listen for the router, where it is not node 0: the second shard at the next
    /// one, and so on
    #[arg(long, env = "SHARD_PORT", default_value_t = 29600)]
    pub(crate) shard_port: u16,

    #[command(flatten)]
    pub(crate) router: RouterConfig,

    #[command(flatten)]
    pub(crate) shard: ShardConfig,
}

/// The hosts that a launch spans, as its launchers agree on them.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) num_nodes: usize,
    pub(crate) node_rank: usize,
    /// On all of them, as many on each.
    pub(crate) num_shard: usize,
    pub(crate) master_addr: Option<String>,
    pub(crate) master_port: u16,
    pub(crate) shard_port: u16,
}

impl Span {
    pub(crate) fn shards_per_node(&self) -> usize {
        self.num_shard / self.num_nodes
    }

    /// The ranks of this host.
    pub(crate) fn ranks(&self) -> std::ops::Range<usize> {
        let first = self.node_rank * self.shards_per_node();
        first..first + self.shards_per_node()
    }

    /// Where node 0's launcher waits for the others.
    pub(crate) fn launcher_port(&self) -> u16 {
        self.master_port.saturating_add(1)
    }
}

impl LauncherConfig {
    /// The hosts. Of a [`LauncherConfig::resolved`] configuration.
    pub(crate) fn span(&self) -> Span {
        Span {
            num_nodes: self.num_nodes,
            node_rank: self.node_rank,
            num_shard: self.num_shard.unwrap_or(1),
            master_addr: self.master_addr.clone(),
            master_port: self.master_port,
            shard_port: self.shard_port,
        }
    }

    /// With what is to be found out on this machine: which device computes, and how many shards there are.
    pub(crate) fn resolved(&self) -> anyhow::Result<Self> {
        let device = shard::resolve_device(&self.shard)?;
        let Self { num_nodes, node_rank, .. } = *self;
        ensure!(num_nodes > 0, "--num-nodes is 0: there must be at least 1 host");
        ensure!(
            node_rank < num_nodes,
            "--node-rank is {node_rank} but must be below --num-nodes, which is {num_nodes} (NODE_RANK, LWS_WORKER_INDEX and \
             GROUP_RANK set the one, NUM_NODES, LWS_GROUP_SIZE and GROUP_WORLD_SIZE the other)"
        );
        let num_shard =
            self.num_shard.unwrap_or_else(|| shard::default_num_shards(device).saturating_mul(num_nodes));
        if num_nodes > 1 {
            ensure!(
                device == DeviceChoice::Cuda,
                "--num-nodes is {num_nodes}, and shards on CPUs meet on one host only: use GPUs, or leave --num-nodes out"
            );
            ensure!(
                num_shard.is_multiple_of(num_nodes),
                "--num-shard is {num_shard} but must be a multiple of --num-nodes, which is {num_nodes}: each host has as many"
            );
            ensure!(
                node_rank == 0 || self.master_addr.is_some(),
                "node {node_rank} must know where node 0 is: give --master-addr (or MASTER_ADDR, or LWS_LEADER_ADDRESS)"
            );
            ensure!(
                self.master_port < u16::MAX,
                "--master-port is {}, and the port behind it is needed too: give a lower one",
                u16::MAX
            );
            ensure!(
                self.shard_uds_path.is_none() || node_rank == 0,
                "--shard-uds-path is for shards beside the router; those of node {node_rank} listen from --shard-port on: leave \
                 it out there"
            );
        }
        let shard = ShardConfig { device, ..self.shard.clone() };
        Ok(Self { num_shard: Some(num_shard), shard, ..self.clone() })
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
        reason = "only to see which variables are there for a flag, and whether HOSTNAME is meant for --hostname"
    )]
    let environment = |name: &str| std::env::var(name).ok();
    match try_parse(arguments, &environment) {
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

/// Variables by which others than we and `torchrun` say where a process is among others: Kubernetes' LeaderWorkerSet, and
/// `torchrun` for whole hosts. Each is read where those before it in its list are not set.
const LAUNCHER_VARIABLES: [(&str, &[&str]); 3] = [
    ("num_nodes", &["NUM_NODES", "LWS_GROUP_SIZE", "GROUP_WORLD_SIZE"]),
    ("node_rank", &["NODE_RANK", "LWS_WORKER_INDEX", "GROUP_RANK"]),
    ("master_addr", &["MASTER_ADDR", "LWS_LEADER_ADDRESS"]),
];
/// The same for a shard that is a whole host's, started by hand.
const SHARD_VARIABLES: [(&str, &[&str]); 3] = [
    ("rank", &["RANK", "LWS_WORKER_INDEX"]),
    ("world_size", &["WORLD_SIZE", "LWS_GROUP_SIZE"]),
    ("master_addr", &["MASTER_ADDR", "LWS_LEADER_ADDRESS"]),
];

/// The value of a variable, where it is set.
type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

fn try_parse(arguments: Vec<OsString>, environment: Environment<'_>) -> Result<Invocation, clap::Error> {
    let matches = command(environment).try_get_matches_from(arguments)?;
    let CommandLine { launcher, role } = CommandLine::from_arg_matches(&matches)?;
    Ok(match role {
        None => Invocation::Launch(Box::new(launcher)),
        Some(Role::Router { config, placement }) => Invocation::Router(config, placement),
        Some(Role::Shard { config, placement }) => Invocation::Shard(config, placement),
    })
}

/// The command line, with the variables that are there for each flag.
fn command(environment: Environment<'_>) -> clap::Command {
    let command = with_variables(CommandLine::command(), &LAUNCHER_VARIABLES, environment)
        .mut_subcommand("shard", |shard| with_variables(shard, &SHARD_VARIABLES, environment));
    // TGI reads the listening address from `HOSTNAME`, and so do we. But container runtimes put the container's *name*
    // there, which is nobody's wish for a listening address: then the variable is not read.
    let is_address = |name: String| name == "localhost" || name.parse::<IpAddr>().is_ok();
    if environment("HOSTNAME").is_none_or(is_address) {
        return command;
    }
    let without_variable = |arg: clap::Arg| arg.env(None::<&str>);
    command
        .mut_arg("hostname", without_variable)
        .mut_subcommand("router", |router| router.mut_arg("hostname", without_variable))
}

fn with_variables(
    command: clap::Command,
    variables: &[(&'static str, &[&'static str])],
    environment: Environment<'_>,
) -> clap::Command {
    variables.iter().fold(command, |command, (flag, names)| {
        let first_set = names.iter().find(|name| environment(name).is_some());
        match first_set {
            Some(&name) => command.mut_arg(flag, |arg| arg.env(name)),
            None => command,
        }
    })
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
        try_parse(line.split_whitespace().map(OsString::from).collect(), &|_| None)
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
        command(&|_| None).debug_assert();
        command(&|_| Some("4f5c2a".to_owned())).debug_assert();
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

    /// The variable that a flag is read from.
    fn variable_of(command: &clap::Command, flag: &str) -> Option<String> {
        let argument = command.get_arguments().find(|argument| argument.get_id() == flag).unwrap();
        argument.get_env().map(|name| name.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_container_name_in_the_environment_is_no_listening_address() {
        let hostname_env = |host_name: Option<&str>| {
            let host_name = host_name.map(ToOwned::to_owned);
            variable_of(&command(&|name| host_name.clone().filter(|_| name == "HOSTNAME")), "hostname")
        };
        assert_eq!(hostname_env(Some("4f5c2a")), None);
        assert_eq!(hostname_env(Some("127.0.0.1")).as_deref(), Some("HOSTNAME"));
        assert_eq!(hostname_env(None).as_deref(), Some("HOSTNAME"));
    }

    #[test]
    fn variables_of_leader_worker_sets_and_of_torchrun_are_read_where_ours_are_not_set() {
        let check = |set: &[&str], expected: [&str; 3], of_shard: [&str; 3]| {
            let command = command(&|name| set.contains(&name).then(|| "1".to_owned()));
            let flags = ["num_nodes", "node_rank", "master_addr"];
            assert_eq!(flags.map(|flag| variable_of(&command, flag).unwrap()), expected, "{set:?}");
            let shard = command.find_subcommand("shard").unwrap();
            let flags = ["rank", "world_size", "master_addr"];
            assert_eq!(flags.map(|flag| variable_of(shard, flag).unwrap()), of_shard, "{set:?}");
        };
        let ours = ["NUM_NODES", "NODE_RANK", "MASTER_ADDR"];
        let torchrun = ["RANK", "WORLD_SIZE", "MASTER_ADDR"];
        check(&[], ours, torchrun);
        check(
            &["LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"],
            ["LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"],
            ["LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS"],
        );
        let both = [
            "LWS_WORKER_INDEX",
            "NODE_RANK",
            "RANK",
            "WORLD_SIZE",
            "LWS_GROUP_SIZE",
            "NUM_NODES",
            "MASTER_ADDR",
        ];
        check(&both, ours, torchrun);
        let of_torchrun = [&torchrun[..], &["GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_PORT"]].concat();
        check(&of_torchrun, ["GROUP_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"], torchrun);
    }

    #[test]
    fn hosts_that_cannot_be_a_group_are_refused_with_the_flag_to_change() {
        let check = |line: &str, part: &str| {
            let message =
                launch(&format!("lamplighter --device cpu {line}")).resolved().unwrap_err().to_string();
            assert!(message.contains(part), "{line}: {message}");
        };
        check("--num-nodes 0", "at least 1 host");
        check("--node-rank 1", "--node-rank is 1 but must be below --num-nodes, which is 1");
        check("--num-nodes 2", "shards on CPUs meet on one host only");
    }

    #[test]
    fn ranks_are_dealt_out_host_by_host() {
        let config = launch("lamplighter --num-shard 8 --num-nodes 2 --node-rank 1 --master-port 4000");
        let span = config.span();
        assert_eq!((span.ranks(), span.launcher_port()), (4..8, 4001));
    }
}
