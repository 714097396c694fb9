//! A router in a process of its own: this program once more, in another role.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use router::config::{RouterConfig, RouterPlacement};

/// The first argument of a process that is to be a router.
pub(crate) const ROLE: &str = "serve-as-router";

const START_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    config: RouterConfig,
    #[command(flatten)]
    placement: RouterPlacement,
}

/// Is a router until it is killed.
pub(crate) fn serve() -> anyhow::Result<()> {
    let Settings { config, placement } = Settings::parse_from(std::env::args().skip(1));
    router::run(config, placement)
}

/// A running router; killed when dropped.
pub(crate) struct RouterProcess {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl RouterProcess {
    /// Starts one before the shard at `socket`; its files are in `directory`.
    pub(crate) fn start(directory: &Path, socket: &Path, flags: &[&str]) -> anyhow::Result<Self> {
        let address_file = directory.join("address");
        // From a router before this one.
        let _ = std::fs::remove_file(&address_file);
        let child = Command::new(std::env::current_exe()?)
            .arg(ROLE)
            .args(["--hostname", "127.0.0.1", "--port", "0", "--log-level", "warn", "--model-dir"])
            .arg(checkpoint())
            .arg("--shard-address")
            .arg(socket)
            .arg("--address-file")
            .arg(&address_file)
            .args(flags)
            .env_clear()
            .stdin(Stdio::null())
            .spawn()
            .context("the router cannot be started")?;
        let mut router = Self { child, address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        let deadline = Instant::now() + START_TIMEOUT;
        router.address = loop {
            if let Ok(text) = std::fs::read_to_string(&address_file) {
                break text.trim().parse()?;
            }
            ensure!(router.child.try_wait()?.is_none(), "the router ended at its start");
            ensure!(Instant::now() < deadline, "the router did not listen within {START_TIMEOUT:?}");
            std::thread::sleep(Duration::from_millis(10));
        };
        Ok(router)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for RouterProcess {
    fn drop(&mut self) {
        // It holds nothing that would be lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its tokenizer is what is used of it.
fn checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/demo-model/checkpoint")
}
