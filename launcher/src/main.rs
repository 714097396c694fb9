//! `lamplighter`: one executable in three roles.
//!
//! - `lamplighter [flags]` is the **launcher**: it resolves a model ([`model`]), decides how many shards there are and
//!   where they listen ([`topology`]) and on which cores they run ([`numa`]), starts shards and router, and keeps them alive ([`supervisor`]); on several hosts there is
//!   one on each, and they meet first ([`nodes`]).
//! - `lamplighter shard` and `lamplighter router` are what it starts; people may start them too, with flags.
//! - `lamplighter shard --settings FILE` and `lamplighter router --settings FILE` are how the launcher starts them
//!   ([`child`]): the parsed settings travel in a file, so no command line is built by hand.

mod child;
mod config;
mod model;
mod nodes;
mod numa;
mod output;
mod process;
mod readiness;
mod supervisor;
mod topology;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use crate::config::{Invocation, LauncherConfig};
use crate::nodes::Nodes;
use crate::output::Output;
use crate::supervisor::{Outcome, Supervisor};
use crate::topology::RunDirectory;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let result = match child::settings_file(&arguments) {
        Some(file) => child::run(Path::new(file)).map(|()| ExitCode::SUCCESS),
        None => match config::parse(arguments) {
            Invocation::Launch(config) => launch(&config),
            Invocation::Router(config, placement) => {
                router::run(config, placement).map(|()| ExitCode::SUCCESS)
            }
            Invocation::Shard(config, placement) => shard::run(config, placement).map(|()| ExitCode::SUCCESS),
        },
    };
    result.unwrap_or_else(|error| {
        report(&error);
        ExitCode::FAILURE
    })
}

fn launch(config: &LauncherConfig) -> anyhow::Result<ExitCode> {
    let why_no_gpu = shard::why_no_gpu(&config.shard);
    let config = &config.resolved()?;
    let run_directory = RunDirectory::create()?;
    let model = model::resolve(config.model_id.as_deref(), run_directory.path())?;
    let (output, writer) = Output::start(config.router.json_output, std::io::stdout());
    output.install_tracing(&config.router.log_level)?;
    if let Some(why) = why_no_gpu {
        tracing::warn!("serving on the CPU (--device cpu asks for it): {why}");
    }

    // Children are killed by the kernel when the *thread* that started them ends: all of them are started by this
    // one, which lives as long as the process.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("no async runtime")?;
    let outcome = runtime.block_on(async {
        let signals = supervisor::termination_signals().context("SIGTERM and SIGINT cannot be awaited")?;
        let mut signals = signals;
        let span = config.span();
        let nodes = tokio::select! {
            nodes = Nodes::meet(&span) => nodes?,
            Some(signal) = signals.recv() => {
                tracing::info!("{signal} before all nodes were there");
                return Ok(Outcome::Stopped);
            }
        };
        let group = topology::arrange(config, &model, &run_directory, &nodes)?;
        Supervisor::start(group, nodes, signals, output.clone())?.run().await
    });
    output.finish(writer);
    Ok(match outcome? {
        Outcome::Stopped => ExitCode::SUCCESS,
        Outcome::Failed => ExitCode::FAILURE,
    })
}

#[expect(
    clippy::print_stderr,
    reason = "the error that ends the process; a child's is shown by the launcher"
)]
fn report(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}
