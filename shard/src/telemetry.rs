//! Log lines: one record a line, to stderr, where the launcher reads them.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::ShardPlacement;

/// Starts writing log lines. Prompts and generated tokens are never among them.
pub(crate) fn init(placement: &ShardPlacement) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&placement.log_level).map_err(|error| {
        anyhow::anyhow!("--log-level {:?} is neither a level nor a directive: {error}", placement.log_level)
    })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = if placement.json_output {
        lines.json().flatten_event(true).try_init()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).try_init()
    };
    started.map_err(|error| anyhow::anyhow!("starting the log: {error}"))
}
