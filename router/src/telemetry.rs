//! Logs: to standard error, one record a line, as text or as JSON.

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::RouterConfig;

/// Sets up logging for the process. Panics become log records too, so that they are single lines.
pub(crate) fn init(config: &RouterConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log_level).with_context(|| {
        format!(
            "--log-level {:?} is neither a level nor a list of directives such as info,router=debug",
            config.log_level
        )
    })?;
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    let installed = if config.json_output {
        subscriber.json().flatten_event(true).try_init()
    } else {
        subscriber.with_target(false).try_init()
    };
    installed.map_err(|error| anyhow::anyhow!("logging cannot be set up: {error}"))?;
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("without a message");
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(location, panic = message, "a thread met a defect and panicked");
    }));
    Ok(())
}
