//! The life of the processes: start, drain, death, and nothing left behind.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use integration_tests::{Model, Stack, lamplighter};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const EXIT_TIMEOUT: Duration = Duration::from_secs(20);

/// Processes whose parent is `parent`, with the first argument after the program's name.
fn children(parent: Pid) -> Vec<(Pid, String)> {
    let processes = std::fs::read_dir("/proc").expect("a /proc");
    let child = |path: PathBuf| {
        let stat = std::fs::read_to_string(path.join("stat")).ok()?;
        // After the name, which is in parentheses: state, then the parent.
        let parent_pid: i32 = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        let command_line = std::fs::read_to_string(path.join("cmdline")).ok()?;
        let role = command_line.split('\0').nth(1)?.to_owned();
        let pid = Pid::from_raw(path.file_name()?.to_str()?.parse().ok()?);
        (parent_pid == parent.as_raw()).then_some((pid, role))
    };
    processes.flatten().filter_map(|entry| child(entry.path())).collect()
}

/// Ended: not there at all, or a zombie that nobody has waited for.
fn has_ended(pid: Pid) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')),
        Err(_) => true,
    }
}

/// The process that has `role`.
fn child(stack: &Stack, role: &str) -> Pid {
    let all = children(stack.pid());
    all.iter().find(|(_, name)| name == role).unwrap_or_else(|| panic!("no {role} among {all:?}")).0
}

/// The private directory of a launch, found in the settings file that its router was given.
fn run_directory(stack: &Stack) -> PathBuf {
    let router = child(stack, "router");
    let command_line = std::fs::read_to_string(format!("/proc/{router}/cmdline")).expect("the router runs");
    let settings = command_line.split('\0').nth(3).expect("--settings FILE").to_owned();
    Path::new(&settings).parent().expect("a directory").to_owned()
}

/// Half a second of work and more.
fn long_stream() -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": true, "stream": true})
}

#[tokio::test]
async fn sigterm_lets_running_streams_finish_and_exits_with_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut stack = Stack::start(Model::Demo, &[]).await;
        let mut stream = stack.stream("/v1/completions", &long_stream()).await;
        stream.next().await.expect("a first event");
        stack.signal(signal);
        // From now on nobody else is let in.
        let deadline = Instant::now() + EXIT_TIMEOUT;
        while let Some(answer) =
            stack.try_post("/v1/completions", &json!({"prompt": "a", "max_tokens": 1})).await
        {
            match answer.status {
                503 => break,
                status => assert_eq!(status, 200, "{}", answer.body),
            }
            assert!(Instant::now() < deadline, "new requests are still served");
        }
        let events = stream.all().await;
        assert_eq!(events.last().expect("events")["choices"][0]["finish_reason"], "length");
        let status = stack.exit(EXIT_TIMEOUT).await;
        assert_eq!(status.code(), Some(0), "{}", stack.log());
    }
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let mut stack = Stack::start(Model::Demo, &[]).await;
    let mut stream = stack.stream("/v1/completions", &long_stream()).await;
    stream.next().await.expect("a first event");
    let processes = children(stack.pid());
    stack.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(50)).await;
    stack.signal(Signal::SIGTERM);
    assert_eq!(stack.exit(Duration::from_secs(5)).await.code(), Some(1), "{}", stack.log());
    assert!(processes.iter().all(|(pid, _)| has_ended(*pid)));
}

#[tokio::test]
async fn a_drain_that_takes_too_long_is_cut_off() {
    let mut stack = Stack::start(Model::Demo, &["--graceful-termination-timeout", "0"]).await;
    let mut stream = stack.stream("/v1/completions", &long_stream()).await;
    stream.next().await.expect("a first event");
    stack.signal(Signal::SIGTERM);
    stack.exit(EXIT_TIMEOUT).await;
}

#[tokio::test]
async fn children_die_with_a_launcher_that_is_killed() {
    let mut stack = Stack::start(Model::Golden("llama"), &["--num-shard", "2"]).await;
    let processes = children(stack.pid());
    assert_eq!(processes.len(), 3, "{processes:?}");
    stack.signal(Signal::SIGKILL);
    stack.exit(EXIT_TIMEOUT).await;
    let deadline = Instant::now() + Duration::from_secs(5);
    while !processes.iter().all(|(pid, _)| has_ended(*pid)) {
        assert!(Instant::now() < deadline, "left behind: {processes:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_child_that_dies_ends_the_launcher_with_its_status() {
    for (role, name) in [("shard", "shard-0"), ("router", "router")] {
        let mut stack = Stack::start(Model::Golden("llama"), &[]).await;
        let processes = children(stack.pid());
        kill(child(&stack, role), Signal::SIGKILL).expect("the child runs");
        let status = stack.exit(EXIT_TIMEOUT).await;
        assert_eq!(status.code(), Some(1));
        let log = stack.log();
        assert!(log.contains(&format!("{name} died (signal: 9 (SIGKILL))")), "{log}");
        assert!(processes.iter().all(|(pid, _)| has_ended(*pid)));
    }
}

#[tokio::test]
async fn nothing_is_left_behind() {
    let mut stack = Stack::start(Model::Demo, &[]).await;
    let directory = run_directory(&stack);
    assert!(directory.join("shard-0").exists());
    stack.signal(Signal::SIGTERM);
    stack.exit(EXIT_TIMEOUT).await;
    assert!(!directory.exists(), "{} is left behind", directory.display());
}

#[tokio::test]
async fn sockets_are_where_they_were_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let prefix = directory.path().join("socket").display().to_string();
    let _stack =
        Stack::start(Model::Golden("llama"), &["--num-shard", "2", "--shard-uds-path", &prefix]).await;
    for rank in 0..2 {
        assert!(Path::new(&format!("{prefix}-{rank}")).exists());
    }
}

#[tokio::test]
async fn every_line_is_a_json_object_that_names_its_process() {
    let mut stack = Stack::start(Model::Golden("llama"), &["--json-output"]).await;
    stack.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 2})).await.ok();
    stack.signal(Signal::SIGTERM);
    stack.exit(EXIT_TIMEOUT).await;
    let log = stack.log();
    for line in log.lines() {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let process = object["process"].as_str().unwrap_or_else(|| panic!("no process: {line}"));
        assert!(["launcher", "router", "shard-0"].contains(&process), "{line}");
        assert!(object["message"].is_string(), "{line}");
    }
}

/// Runs `lamplighter` with flags that it must refuse; returns exit code and what it printed.
fn refused(flags: &[&str]) -> (Option<i32>, String) {
    let output = lamplighter().args(flags).output().expect("the executable can be started");
    let printed = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code(), printed.concat())
}

#[test]
fn what_cannot_be_started_is_told_with_the_remedy() {
    let llama = concat!(env!("CARGO_MANIFEST_DIR"), "/goldens/llama");
    let check = |flags: &[&str], code: i32, words: &[&str]| {
        let (got, printed) = refused(flags);
        assert_eq!(got, Some(code), "{flags:?}: {printed}");
        for word in words {
            assert!(printed.contains(word), "{flags:?}: no {word:?} in: {printed}");
        }
    };
    check(&["--num-shard", "0"], 2, &["--num-shard"]);
    check(&["--max-batch-size", "none"], 2, &["--max-batch-size"]);
    check(&["--model-id", "org/name"], 1, &["org/name", "hf download"]);
    check(&["--model-id", "/no/such/model"], 1, &["/no/such/model"]);
    // Four heads do not divide by three.
    check(&["--model-id", llama, "--num-shard", "3"], 1, &["shard-", "3"]);
    check(&["--model-id", llama, "--max-total-tokens", "100000"], 1, &["max-total-tokens", "1024"]);
    check(&["--log-level", "router=loud"], 1, &["--log-level"]);
    let shard =
        |cores| ["shard", "--model-dir", llama, "--uds-path", "/no/such/directory/shard-0", "--cores", cores];
    check(&shard("3-1"), 2, &["--cores", "3-1", "write the lower core first"]);
    // The last of more cores than any machine has.
    check(&shard("8191"), 1, &["--cores", "core 8191", "may only use", "leave --cores out"]);
}

#[test]
fn an_address_in_use_is_told() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("an address").port().to_string();
    let (code, printed) = refused(&["--hostname", "127.0.0.1", "--port", &port]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains(&port), "{printed}");
}
