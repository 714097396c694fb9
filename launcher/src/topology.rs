//! From the number of shards to places: ranks, threads, sockets, and the files by which the processes find each other.

use std::fs::{File, Permissions};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use router::config::RouterPlacement;
use shard::{DeviceChoice, ShardPlacement};
use tempfile::TempDir;

use crate::child::ChildSettings;
use crate::config::LauncherConfig;
use crate::model::Model;
use crate::nodes::Nodes;
use crate::numa::HostCores;
use crate::supervisor::{Group, Member};

/// Longest path of a Unix socket: `sun_path` has 108 bytes, the last of them zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Locked while the launcher of a run directory lives; the kernel unlocks it however that ends.
const LOCK_FILE: &str = "lock";

/// Of all run directories.
const PREFIX: &str = "lamplighter-";

/// Private directories (mode 0700) of this launch, removed when it ends.
pub(crate) struct RunDirectory {
    directory: LockedDirectory,
    /// Where the ranks of a tensor-parallel group share memory; in /dev/shm where there is one, so that their
    /// traffic never reaches a disk.
    shared_memory: Option<LockedDirectory>,
}

struct LockedDirectory {
    directory: TempDir,
    _lock: File,
}

impl RunDirectory {
    /// Makes the directories, and removes those that killed launchers left behind.
    pub(crate) fn create() -> Result<Self, TopologyError> {
        let directory = private_directory(&std::env::temp_dir())
            .map_err(|source| TopologyError::RunDirectory { parent: std::env::temp_dir(), source })?;
        let shared_memory = private_directory(Path::new("/dev/shm")).ok();
        Ok(Self { directory, shared_memory })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.directory.path()
    }

    fn rendezvous(&self) -> PathBuf {
        self.shared_memory.as_ref().unwrap_or(&self.directory).directory.path().join("rendezvous")
    }
}

/// Why the processes cannot be placed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TopologyError {
    #[error("no private directory can be made in {}: {source}; set TMPDIR to a writable directory", parent.display())]
    RunDirectory { parent: PathBuf, source: std::io::Error },
    #[error(
        "the socket path {} has {} bytes but a Unix socket's holds {SOCKET_PATH_BYTES_MAX}: give a shorter \
         --shard-uds-path, or set TMPDIR to a shorter directory",
        path.display(), path.as_os_str().len()
    )]
    SocketPathTooLong { path: PathBuf },
    #[error("{} is the socket of a server that is running: give another --shard-uds-path", path.display())]
    SocketInUse { path: PathBuf },
    #[error("{} exists and is no socket: give another --shard-uds-path", path.display())]
    NotASocket { path: PathBuf },
    #[error("{}: {source}: give a --shard-uds-path in a writable directory", path.display())]
    Socket { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Settings(#[from] crate::child::SettingsError),
}

fn private_directory(parent: &Path) -> std::io::Result<LockedDirectory> {
    remove_abandoned(parent);
    let permissions = Permissions::from_mode(0o700);
    let directory = tempfile::Builder::new().prefix(PREFIX).permissions(permissions).tempdir_in(parent)?;
    // Locked before it has its name: whoever finds the lock file free has found a launcher that has ended.
    let unnamed = directory.path().join("locking");
    let lock = File::create(&unnamed)?;
    lock.try_lock()?;
    std::fs::rename(unnamed, directory.path().join(LOCK_FILE))?;
    Ok(LockedDirectory { directory, _lock: lock })
}

/// Removes the run directories whose launcher was killed. What cannot be removed belongs to somebody else.
fn remove_abandoned(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().as_bytes().starts_with(PREFIX.as_bytes());
        let is_abandoned =
            || File::open(entry.path().join(LOCK_FILE)).is_ok_and(|lock| lock.try_lock().is_ok());
        if is_ours && is_abandoned() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Places all processes, and writes down for each what it is to do.
pub(crate) fn arrange(
    config: &LauncherConfig,
    model: &Model,
    run: &RunDirectory,
    nodes: &Nodes,
) -> Result<Group, TopologyError> {
    let span = config.span();
    let (mut shards, mut sockets) = (Vec::new(), Vec::new());
    for placement in place_shards(config, model, run, nodes.own_address, &HostCores::read()) {
        let name = format!("shard-{}", placement.rank);
        if let Some(cores) = &placement.cores {
            tracing::info!(shard = name, %cores, "cores of its own, as this host has several NUMA nodes");
        }
        if let Some(socket) = &placement.uds_path {
            clear_socket(socket)?;
            sockets.push(socket.clone());
        }
        let settings = ChildSettings::Shard { config: config.shard.clone(), placement };
        shards.push(Member { command: settings.command(&name, run.path())?, name });
    }
    let address_file = run.path().join("router-address");
    let of_other_nodes = nodes.shard_addresses.iter().map(|address| format!("http://{address}"));
    let placement = RouterPlacement {
        model_dir: model.directory.clone(),
        model_name: Some(model.name.clone()),
        shard_addresses: sockets
            .iter()
            .map(|socket| socket.display().to_string())
            .chain(of_other_nodes)
            .collect(),
        address_file: Some(address_file.clone()),
    };
    let settings = ChildSettings::Router { config: config.router.clone(), placement };
    let router = (span.node_rank == 0)
        .then(|| {
            settings
                .command("router", run.path())
                .map(|command| Member { command, name: "router".to_owned() })
        })
        .transpose()?;
    let drain_timeout = Duration::from_secs(config.router.graceful_termination_timeout);
    Ok(Group { shards, sockets, router, address_file, drain_timeout, span })
}

/// `own_address`: of this host, where its shards listen for the router of another.
fn place_shards(
    config: &LauncherConfig,
    model: &Model,
    run: &RunDirectory,
    own_address: Option<IpAddr>,
    host: &HostCores,
) -> Vec<ShardPlacement> {
    let span = config.span();
    // A GPU's shard computes next to nothing on the CPU.
    let is_on_cpu = config.shard.device != DeviceChoice::Cuda;
    let mut dealt = is_on_cpu.then(|| host.deal(span.shards_per_node())).flatten().map(Vec::into_iter);
    let is_alone = span.num_nodes == 1;
    let prefix = config.shard_uds_path.clone().map_or_else(|| run.path().join("shard"), PathBuf::from);
    // Not by its name on its own host, which may not be resolved there yet.
    let master_addr = span.master_addr.clone().filter(|_| span.node_rank > 0);
    let master_addr = || master_addr.clone().unwrap_or_else(|| "localhost".to_owned());
    (0..)
        .zip(span.ranks())
        .map(|(local_rank, rank)| {
            let port = |address| SocketAddr::new(address, span.shard_port + local_rank as u16);
            let listen = own_address.map(port);
            let cores = dealt.as_mut().and_then(Iterator::next);
            // A shard with cores of its own has as many threads, which it knows itself.
            let num_threads = cores.is_none().then(|| (host.available / span.shards_per_node()).max(1));
            ShardPlacement {
                model_dir: model.directory.clone(),
                uds_path: listen.is_none().then(|| with_rank(&prefix, rank)),
                listen,
                rank,
                world_size: span.num_shard,
                rendezvous: (is_alone && span.num_shard > 1).then(|| run.rendezvous()),
                master_addr: (!is_alone).then(master_addr),
                master_port: span.master_port,
                local_rank: (!is_alone).then_some(local_rank),
                cores,
                num_threads,
                json_output: config.router.json_output,
                log_level: config.router.log_level.clone(),
                supervised: true,
            }
        })
        .collect()
}

/// TGI's meaning of `--shard-uds-path`: a prefix, to which a dash and the rank are added.
fn with_rank(prefix: &Path, rank: usize) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(format!("-{rank}"));
    PathBuf::from(path)
}

/// Removes the socket that an earlier server left behind, and nothing else.
fn clear_socket(path: &Path) -> Result<(), TopologyError> {
    let path_buf = || path.to_owned();
    if path.as_os_str().as_bytes().len() > SOCKET_PATH_BYTES_MAX {
        return Err(TopologyError::SocketPathTooLong { path: path_buf() });
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(TopologyError::Socket { path: path_buf(), source }),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(TopologyError::NotASocket { path: path_buf() })
        }
        Ok(_) if UnixStream::connect(path).is_ok() => Err(TopologyError::SocketInUse { path: path_buf() }),
        Ok(_) => {
            std::fs::remove_file(path).map_err(|source| TopologyError::Socket { path: path_buf(), source })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use clap::{Args, FromArgMatches};

    use super::*;

    fn config(arguments: &[&str]) -> LauncherConfig {
        let command = LauncherConfig::augment_args(clap::Command::new("lamplighter").no_binary_name(true));
        LauncherConfig::from_arg_matches(&command.get_matches_from(arguments)).unwrap()
    }

    fn model() -> Model {
        Model { directory: PathBuf::from("/models/tiny"), name: "tiny".to_owned() }
    }

    /// A host that is one NUMA node.
    fn host(available: usize) -> HostCores {
        HostCores { available, by_numa_node: vec![(0..available).collect()] }
    }

    #[test]
    fn shards_share_the_cores_and_meet_in_one_file() {
        let run = RunDirectory::create().unwrap();
        let shards = place_shards(&config(&["--num-shard", "3"]), &model(), &run, None, &host(8));
        assert_eq!(shards.iter().map(|shard| shard.rank).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(shards.iter().all(|shard| shard.world_size == 3 && shard.num_threads == Some(2)));
        assert!(shards.iter().all(|shard| shard.rendezvous == Some(run.rendezvous())));
        assert!(shards.iter().all(|shard| shard.cores.is_none()));
    }

    #[test]
    fn shards_on_several_numa_nodes_have_cores_of_their_own_and_a_thread_for_each() {
        let run = RunDirectory::create().unwrap();
        let host = HostCores { available: 16, by_numa_node: vec![(0..8).collect(), (8..16).collect()] };
        let place = |flags: &[&str]| place_shards(&config(flags), &model(), &run, None, &host);
        let cores = |shard: &ShardPlacement| shard.cores.as_ref().map(ToString::to_string);
        let shards = place(&["--num-shard", "3", "--device", "cpu"]);
        let of_ranks: Vec<String> = shards.iter().filter_map(cores).collect();
        assert_eq!(of_ranks, ["0-3", "4-7", "8-15"]);
        assert!(shards.iter().all(|shard| shard.num_threads.is_none()));
        for flags in [&["--num-shard", "1"][..], &["--num-shard", "2", "--device", "cuda"]] {
            let shards = place(flags);
            assert!(shards.iter().all(|shard| shard.cores.is_none()), "{flags:?}");
            assert_eq!(shards[0].num_threads, Some(16 / shards.len()), "{flags:?}");
        }
    }

    #[test]
    fn more_shards_than_cores_still_have_a_thread_each() {
        let run = RunDirectory::create().unwrap();
        let shards = place_shards(&config(&["--num-shard", "4"]), &model(), &run, None, &host(2));
        assert!(shards.iter().all(|shard| shard.num_threads == Some(1)));
    }

    #[test]
    fn one_shard_has_nobody_to_meet() {
        let run = RunDirectory::create().unwrap();
        let shards = place_shards(&config(&[]), &model(), &run, None, &host(2));
        assert_eq!(shards[0].rendezvous, None);
    }

    #[test]
    fn the_socket_prefix_is_tgis() {
        let run = RunDirectory::create().unwrap();
        let shards = place_shards(
            &config(&["--num-shard", "2", "--shard-uds-path", "/tmp/text-generation-server"]),
            &model(),
            &run,
            None,
            &host(2),
        );
        assert_eq!(shards[1].uds_path.as_deref(), Some(Path::new("/tmp/text-generation-server-1")));
    }

    #[test]
    fn shards_of_another_host_listen_at_its_ports_and_meet_at_node_0() {
        let run = RunDirectory::create().unwrap();
        let place = |node: &str, own_address| {
            let flags =
                ["--num-shard", "4", "--num-nodes", "2", "--master-addr", "head", "--node-rank", node];
            place_shards(&config(&flags), &model(), &run, own_address, &host(8))
        };
        let first = place("0", None);
        assert!(first.iter().all(|shard| shard.uds_path.is_some() && shard.listen.is_none()));
        assert!(first.iter().all(|shard| shard.master_addr.as_deref() == Some("localhost")));
        let second = place("1", Some(IpAddr::from([10, 0, 0, 2])));
        let listen: Vec<String> = second.iter().map(|shard| shard.listen.unwrap().to_string()).collect();
        assert_eq!(listen, ["10.0.0.2:29600", "10.0.0.2:29601"]);
        for (local_rank, shard) in second.iter().enumerate() {
            assert_eq!(
                (shard.rank, shard.local_rank, shard.world_size),
                (2 + local_rank, Some(local_rank), 4)
            );
            assert_eq!((shard.master_addr.as_deref(), shard.master_port), (Some("head"), 29500));
            assert_eq!((&shard.uds_path, &shard.rendezvous, shard.num_threads), (&None, &None, Some(4)));
        }
    }

    #[test]
    fn run_directories_are_private_and_removed() {
        let run = RunDirectory::create().unwrap();
        let directories = [run.path().to_owned(), run.rendezvous().parent().unwrap().to_owned()];
        for directory in &directories {
            assert_eq!(directory.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        }
        drop(run);
        assert!(directories.iter().all(|directory| !directory.exists()));
    }

    #[test]
    fn directories_of_killed_launchers_are_removed_and_those_of_running_ones_are_not() {
        let parent = tempfile::tempdir().unwrap();
        let running = private_directory(parent.path()).unwrap();
        let abandoned = parent.path().join("lamplighter-killed");
        std::fs::create_dir(&abandoned).unwrap();
        std::fs::write(abandoned.join(LOCK_FILE), "").unwrap();
        let foreign = parent.path().join("lamplighter-notes");
        std::fs::create_dir(&foreign).unwrap();
        remove_abandoned(parent.path());
        assert!(!abandoned.exists());
        assert!(running.directory.path().exists() && foreign.exists());
    }

    #[test]
    fn a_socket_left_behind_is_removed_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shard-0");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(clear_socket(&path), Err(TopologyError::SocketInUse { .. })));
        drop(listener);
        clear_socket(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(clear_socket(&path), Err(TopologyError::NotASocket { .. })));
    }

    #[test]
    fn a_socket_path_that_the_kernel_refuses_is_refused_with_the_remedy() {
        let path = Path::new("/tmp").join("x".repeat(120));
        let error = clear_socket(&path).unwrap_err().to_string();
        assert!(error.contains("125 bytes") && error.contains("--shard-uds-path"), "{error}");
    }
}
