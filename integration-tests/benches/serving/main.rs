//! What a user waits for and what a step costs, through the real executable over HTTP:
//!
//! `make bench-serving` (or `cargo bench -p integration-tests --bench serving -- [demo] [135m] [1b]`)
//!
//! For each model: seconds from start to ready, memory, time to first token, and decode speed with 1, 2, 4, 8 and 16
//! requests at once; beside it the floor, which is the rate at which this machine reads the weights' bytes, measured in
//! the same run. These machines are noisy: compare ratios of one run.
#![expect(clippy::print_stdout, reason = "a benchmark's report")]

mod synthetic;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::join_all;
use integration_tests::{Model, Stack};
use serde_json::{Value, json};

use synthetic::Shape;

/// Tokens generated for a measurement of decode speed.
const NEW_TOKENS: usize = 64;

fn main() -> anyhow::Result<()> {
    let chosen: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let wants = |name: &str| chosen.is_empty() || chosen.iter().any(|argument| argument == name);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!("| model | batch | tokens/s | tokens/s per request | ratio to batch 1 | of the read floor |");
    println!("|---|---|---|---|---|---|");
    if wants("demo") {
        runtime.block_on(measure("demo", Model::Demo, None));
    }
    for (name, shape) in [("135m", &synthetic::SMOLLM2_135M), ("1b", &synthetic::TINYLLAMA_1B)] {
        if wants(name) {
            let directory = shape.write(&work_directory(), &demo_checkpoint())?;
            let directory: &'static str = Box::leak(directory.display().to_string().into_boxed_str());
            runtime.block_on(measure(shape.name, Model::Directory(directory), Some(shape)));
        }
    }
    Ok(())
}

async fn measure(name: &str, model: Model, shape: Option<&Shape>) {
    let start = Instant::now();
    let stack = Stack::start(model, &["--max-total-tokens", "1024"]).await;
    let ready = start.elapsed();
    generate(&stack, 1, 32, 4).await;

    let mut single = 0.0;
    for batch in [1, 2, 4, 8, 16] {
        let bandwidth = read_bandwidth();
        let rate = decode_rate(&stack, batch).await;
        if batch == 1 {
            single = rate;
        }
        let floor = shape.map_or_else(
            || "–".to_owned(),
            |shape| {
                let steps = rate / batch as f64;
                format!(
                    "{:.0} % of {:.1} GB/s",
                    100.0 * steps * shape.bytes_per_step() as f64 / bandwidth,
                    bandwidth / 1e9
                )
            },
        );
        println!(
            "| {name} | {batch} | {rate:.1} | {:.1} | {:.2} | {floor} |",
            rate / batch as f64,
            rate / single
        );
    }
    for prompt in [16, 512] {
        let mut seconds = Vec::new();
        for _ in 0..5 {
            seconds.push(generate(&stack, 1, prompt, 1).await.as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        println!(
            "{name}: first token of a {prompt}-token prompt after {:.1} ms (median of 5)",
            seconds[2] * 1e3
        );
    }
    println!(
        "{name}: ready after {:.2} s; memory of all processes {} MB",
        ready.as_secs_f64(),
        memory_mb(&stack)
    );
}

/// Tokens per second of `batch` requests at once, the time for prompts and first tokens taken off.
async fn decode_rate(stack: &Stack, batch: usize) -> f64 {
    let mut best = 0.0_f64;
    for _ in 0..3 {
        let first = generate(stack, batch, 32, 1).await;
        let all = generate(stack, batch, 32, 1 + NEW_TOKENS).await;
        let seconds = all.saturating_sub(first).as_secs_f64();
        best = best.max((batch * NEW_TOKENS) as f64 / seconds);
    }
    best
}

/// Sends `batch` requests at once and returns when all are answered.
async fn generate(stack: &Stack, batch: usize, prompt_tokens: usize, new_tokens: usize) -> Duration {
    let start = Instant::now();
    let requests = (0..batch).map(|request| async move {
        let prompt: Vec<usize> = (0..prompt_tokens).map(|i| 100 + (request * 131 + i * 17) % 900).collect();
        let body = json!({
            "model": "bench", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": true,
        });
        let answer: Value = stack.post("/v1/completions", &body).await.ok();
        assert_eq!(answer["usage"]["completion_tokens"], new_tokens, "{answer}");
    });
    join_all(requests).await;
    start.elapsed()
}

/// Bytes per second at which the machine's cores together read memory that no cache holds.
fn read_bandwidth() -> f64 {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let words = vec![1_u64; (512 << 20) / 8];
    let mut best = 0.0_f64;
    for _ in 0..3 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(move || {
                    black_box(
                        part.chunks(8)
                            .map(|line| line.iter().copied().fold(0, u64::wrapping_add))
                            .fold(0, u64::wrapping_add),
                    )
                });
            }
        });
        best = best.max((words.len() * 8) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Memory of the launcher and its children, pages that they share counted once (PSS).
fn memory_mb(stack: &Stack) -> u64 {
    let launcher = stack.pid().as_raw().to_string();
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let Ok(processes) = std::fs::read_dir("/proc") else { return 0 };
    let kilobytes = processes.flatten().filter_map(|process| {
        let status = read(&process.path().join("status"));
        let field =
            |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
        if field("Pid:")? != launcher && field("PPid:")? != launcher {
            return None;
        }
        let smaps = read(&process.path().join("smaps_rollup"));
        let pss = smaps.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        pss.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    });
    kilobytes.sum::<u64>() / 1024
}

fn demo_checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-model/checkpoint")
}

/// `target/bench-models`.
fn work_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench-models")
}
