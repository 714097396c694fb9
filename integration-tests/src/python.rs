//! Clients that other people wrote, in the virtual environment that `make test` sets up.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs `clients/{script}` with `arguments` and returns its standard output; panics with all that it printed where it
/// fails.
pub fn run(script: &str, arguments: &[&str]) -> String {
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let output = Command::new(interpreter())
        .arg(clients.join(script))
        .args(arguments)
        .output()
        .expect("the interpreter can be started");
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{script} failed ({}):\n{out}{err}", output.status);
    out
}

fn interpreter() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a member of the workspace");
    let interpreter = root.join("target/clients-venv/bin/python");
    assert!(
        interpreter.is_file(),
        "{} is missing: run `make test`, or `make target/clients-venv/installed` once",
        interpreter.display()
    );
    interpreter
}
