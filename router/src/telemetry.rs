//! Logs: to standard error, one record a line, as text or as JSON.

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::config::RouterConfig;

/// Sets up logging for the process. Panics become log records too, so that they are single lines.
pub(crate) fn init(config: &RouterConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(directives(&config.log_level)).with_context(|| {
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

/// A bare level is about this program: at `debug` its libraries log each frame on each connection.
fn directives(log_level: &str) -> String {
    match log_level.parse::<LevelFilter>() {
        Ok(_) => format!("{log_level},h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn"),
        Err(_) => log_level.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_for_this_program_and_directives_are_taken_as_they_are() {
        assert_eq!(directives("debug"), "debug,h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn");
        assert_eq!(directives("info,router=debug"), "info,router=debug");
        assert!(EnvFilter::try_new(directives("off")).is_ok());
        assert!(EnvFilter::try_new(directives("router=loud")).is_err());
    }
}
