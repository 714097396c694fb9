//! A child of the launcher, seen from both sides: what it is told, and how it makes sure to die with the launcher.
//!
//! The launcher hands the parsed settings over in a file (`lamplighter shard --settings FILE`), so that a setting is
//! declared once and no command line is rebuilt flag by flag.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use router::config::{RouterConfig, RouterPlacement};
use serde::{Deserialize, Serialize};
use shard::{ShardConfig, ShardPlacement};
use tokio::process::Command;

/// What a child is to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ChildSettings {
    /// Be a router.
    Router { config: RouterConfig, placement: RouterPlacement },
    /// Be a shard.
    Shard { config: ShardConfig, placement: ShardPlacement },
}

/// Why a child's settings cannot be handed over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("{}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("a path in the settings is not UTF-8: {0}")]
    NotUtf8(serde_json::Error),
}

/// The content of a settings file.
#[derive(Serialize, Deserialize)]
struct SettingsFile {
    /// The launcher's process id: a child whose parent is another one has outlived its launcher.
    launcher_pid: i32,
    child: ChildSettings,
}

impl ChildSettings {
    /// Writes the settings below `directory` and returns the command that runs this very executable with them.
    pub(crate) fn command(self, name: &str, directory: &Path) -> Result<Command, SettingsError> {
        let role = match self {
            Self::Router { .. } => "router",
            Self::Shard { .. } => "shard",
        };
        let path = directory.join(format!("{name}.json"));
        let launcher_pid = Pid::this().as_raw();
        let content = serde_json::to_vec_pretty(&SettingsFile { launcher_pid, child: self })
            .map_err(SettingsError::NotUtf8)?;
        std::fs::write(&path, content)
            .map_err(|source| SettingsError::Write { path: path.clone(), source })?;
        // Not the path: the file there may have been replaced by a newer build since the launcher was started.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("lamplighter").arg(role).arg("--settings").arg(path);
        Ok(command)
    }
}

/// The file in `lamplighter (router|shard) --settings FILE`. Such a line is taken before any other parsing, because the
/// environment, which the flags would read, has been read by the launcher already.
pub(crate) fn settings_file(arguments: &[OsString]) -> Option<&OsStr> {
    match arguments {
        [_, role, flag, file] if (role == "router" || role == "shard") && flag == "--settings" => Some(file),
        _ => None,
    }
}

/// Is the child that the settings in `file` describe, until it ends or the launcher does.
pub(crate) fn run(file: &Path) -> anyhow::Result<()> {
    let content = std::fs::read(file).with_context(|| file.display().to_string())?;
    let SettingsFile { launcher_pid, child } =
        serde_json::from_slice(&content).with_context(|| file.display().to_string())?;
    die_with(Pid::from_raw(launcher_pid))?;
    match child {
        ChildSettings::Router { config, placement } => router::run(config, placement),
        ChildSettings::Shard { config, placement } => shard::run(config, placement),
    }
}

/// Has the kernel kill this process when its launcher ends, however that ends. The launcher may have ended before the
/// kernel was asked; then the parent is another process already.
fn die_with(launcher: Pid) -> anyhow::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
    ensure!(getppid() == launcher, "the launcher (process {launcher}) has ended");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_the_way_through_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let placement = RouterPlacement {
            model_dir: "/models/tiny".into(),
            model_name: Some("tiny".to_owned()),
            shard_addresses: vec!["/run/shard-0".to_owned()],
            address_file: None,
        };
        let config = RouterConfig {
            hostname: [127, 0, 0, 1].into(),
            port: 0,
            max_concurrent_requests: 7,
            max_best_of: 3,
            max_input_tokens: None,
            max_total_tokens: Some(99),
            max_batch_prefill_tokens: None,
            max_batch_total_tokens: None,
            max_batch_size: None,
            steps_in_flight: Some(2),
            prefix_caching: false,
            target_itl_ms: None,
            max_waiting_tokens: None,
            waiting_served_ratio: None,
            priority_ageing_ms: 50,
            request_timeout: Some(2.5),
            json_output: true,
            log_level: "info".to_owned(),
            graceful_termination_timeout: 3,
        };
        let command =
            ChildSettings::Router { config, placement }.command("router", directory.path()).unwrap();
        let arguments: Vec<OsString> = std::iter::once("lamplighter".into())
            .chain(command.as_std().get_args().map(ToOwned::to_owned))
            .collect();
        let file = settings_file(&arguments).unwrap();
        let SettingsFile { launcher_pid, child } =
            serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(launcher_pid, std::process::id() as i32);
        let ChildSettings::Router { config, placement } = child else { panic!("not a router") };
        assert_eq!((config.max_total_tokens, config.max_concurrent_requests), (Some(99), 7));
        assert_eq!((config.prefix_caching, config.request_timeout), (false, Some(2.5)));
        assert_eq!(placement.model_name.as_deref(), Some("tiny"));
    }

    #[test]
    fn only_the_launchers_own_line_skips_the_command_line_parser() {
        let is_settings =
            |line: &str| settings_file(&line.split(' ').map(OsString::from).collect::<Vec<_>>()).is_some();
        assert!(is_settings("lamplighter shard --settings /run/shard-0.json"));
        assert!(!is_settings("lamplighter shard --settings /run/shard-0.json --dtype float16"));
        assert!(!is_settings("lamplighter --settings x y"));
    }

    #[test]
    fn a_child_of_another_parent_refuses_to_run() {
        let error = die_with(Pid::from_raw(i32::MAX)).unwrap_err().to_string();
        assert!(error.contains("has ended"), "{error}");
    }
}
