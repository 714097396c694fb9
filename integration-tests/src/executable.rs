//! What the tests start: the executable beside them, and the models in this directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use serde_json::Value;

/// A model to serve.
#[derive(Debug, Clone, Copy)]
pub enum Model {
    /// The one inside the executable.
    Demo,
    /// A directory of `goldens/`: a tiny model with random weights and what transformers computes with it.
    Golden(&'static str),
    /// A directory.
    Directory(&'static str),
}

impl Model {
    /// The flags that choose it.
    pub fn flags(self) -> Vec<String> {
        match self {
            Self::Demo => Vec::new(),
            Self::Golden(name) => vec!["--model-id".to_owned(), golden_directory(name).display().to_string()],
            Self::Directory(path) => vec!["--model-id".to_owned(), path.to_owned()],
        }
    }
}

/// What transformers computes with the model `goldens/{name}`.
pub fn golden(name: &str) -> Value {
    let path = golden_directory(name).join("golden.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A command that runs `lamplighter`, with none of the settings that the environment of the tests may hold.
pub fn lamplighter() -> Command {
    let mut command = Command::new(executable());
    command.env_clear();
    for name in ["PATH", "HOME", "TMPDIR", "RUST_BACKTRACE", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"] {
        #[expect(clippy::disallowed_methods, reason = "passes the surroundings on, and reads no setting")]
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// Where `goldens/{name}` is.
pub(crate) fn golden_directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name)
}

/// `target/release/lamplighter`, beside the directory of the test that runs.
fn executable() -> PathBuf {
    let test = std::env::current_exe().expect("a test that runs has an executable");
    let profile = test.ancestors().nth(2).expect("a test lies in target/release/deps");
    let executable = profile.join("lamplighter");
    assert!(executable.is_file(), "{} is missing: run `make test`, which builds it", executable.display());
    if let Some(source) = newer_source(&executable) {
        panic!("{} is older than {source}: run `make test`, which builds it", executable.display());
    }
    executable
}

/// A source of the executable that was changed after it was built. Cargo lists the sources beside what it builds.
fn newer_source(executable: &Path) -> Option<String> {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let built: SystemTime = modified(executable)?;
    let list = std::fs::read_to_string(executable.with_extension("d")).ok()?;
    let (_, sources) = list.split_once(": ")?;
    sources
        .split_whitespace()
        .find(|source| modified(Path::new(source)).is_some_and(|time| time > built))
        .map(str::to_owned)
}
