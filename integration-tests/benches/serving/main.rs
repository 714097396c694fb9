//! What a user waits for and what a step costs, through the real executable over HTTP:
//!
//! `make bench-serving` (or `cargo bench -p integration-tests --bench serving -- [demo] [135m] [0.5b] [1b] [8b] [bf16] [f16] [f32]
//! [batches=1,64,256] [prompt=1024] [--flags-of-lamplighter ...]`)
//!
//! `prompt=1024`: requests have so many tokens (32), which come from the prefix cache: what is decoded stands behind a context as
//! in `make bench-shard`, and prompts cost nothing. The difference between the two is what router, messages and HTTP cost.
//!
//! For each model: seconds from start to ready, memory, time to first token, and decode speed with 1, 2, 4, 8 and 16
//! requests at once; beside it the floor, which is the rate at which this machine reads the weights' bytes, measured in
//! the same run, and what router and messages cost. These machines are noisy: compare ratios of one run.
#![expect(clippy::print_stdout, reason = "a benchmark's report")]

mod synthetic;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::join_all;
use integration_tests::{Model, Stack};
use serde_json::{Value, json};

use synthetic::{SHAPES, Shape, Stored};

/// Tokens of a request's prompt, where the command line does not say.
const PROMPT_TOKENS: usize = 32;
/// Tokens generated for a measurement of decode speed.
const NEW_TOKENS: usize = 64;

/// Element types of weights that can be asked for.
const STORED: [Stored; 3] = [Stored::Bf16, Stored::F16, Stored::F32];

fn main() -> anyhow::Result<()> {
    // cargo adds `--bench`.
    let mut chosen: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let first_flag = chosen.iter().position(|argument| argument.starts_with("--")).unwrap_or(chosen.len());
    let mut flags = chosen.split_off(first_flag);
    let prompt = chosen.iter().find_map(|argument| argument.strip_prefix("prompt="));
    let prompt = prompt.map(str::parse::<usize>).transpose()?;
    // The prompts are alike: without the cache, each is computed.
    let max_total_tokens = prompt.map_or(1024, |tokens| (tokens + NEW_TOKENS + 1).max(1024)).to_string();
    let is_cached = prompt.is_some().to_string();
    let fixed = ["--max-total-tokens", &max_total_tokens, "--prefix-caching", &is_cached];
    flags.extend(fixed.map(str::to_owned));
    let prompt = prompt.unwrap_or(PROMPT_TOKENS);
    let batches = chosen.iter().find_map(|argument| argument.strip_prefix("batches="));
    let batches: Vec<usize> =
        batches.unwrap_or("1,2,4,8,16").split(',').map(str::parse).collect::<Result<_, _>>()?;
    chosen.retain(|argument| !argument.starts_with("batches=") && !argument.starts_with("prompt="));
    let wanted_type =
        |stored: &Stored| chosen.iter().any(|argument| argument.eq_ignore_ascii_case(stored.name()));
    let stored = STORED.into_iter().find(wanted_type).unwrap_or(Stored::Bf16);
    let is_model =
        |argument: &String| !STORED.iter().any(|stored| argument.eq_ignore_ascii_case(stored.name()));
    let chosen: Vec<_> = chosen.iter().filter(|argument| is_model(argument)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!(
        "| model | batch | tokens/s | tokens/s per request | ratio to the first | of the read floor | outside of the model |"
    );
    println!("|---|---|---|---|---|---|---|");
    if chosen.is_empty() || chosen.iter().any(|argument| *argument == "demo") {
        runtime.block_on(measure("demo", Model::Demo, None, &flags, (&batches, prompt)));
    }
    for (index, (name, shape)) in SHAPES.into_iter().enumerate() {
        let named = chosen.iter().any(|argument| *argument == name);
        if named || chosen.is_empty() && index + 1 < SHAPES.len() {
            let directory = shape.write(stored, &work_directory(), &demo_checkpoint())?;
            let directory: &'static str = Box::leak(directory.display().to_string().into_boxed_str());
            let model = Model::Directory(directory);
            runtime.block_on(measure(shape.name, model, Some((shape, stored)), &flags, (&batches, prompt)));
        }
    }
    Ok(())
}

async fn measure(
    name: &str,
    model: Model,
    shape: Option<(&Shape, Stored)>,
    flags: &[String],
    (batches, prompt_tokens): (&[usize], usize),
) {
    let start = Instant::now();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let stack = Stack::start(model, &flags).await;
    let ready = start.elapsed();
    generate(&stack, 1, 32, 4).await;

    let mut single = 0.0;
    for &batch in batches {
        let bandwidth = read_bandwidth();
        let Decode { rate, outside } = decode(&stack, batch, prompt_tokens).await;
        if single == 0.0 {
            single = rate;
        }
        let floor = shape.map_or_else(
            || "–".to_owned(),
            |(shape, stored)| {
                let steps = rate / batch as f64;
                format!(
                    "{:.0} % of {:.1} GB/s",
                    100.0 * steps * (shape.weights_per_step() * stored.size_in_bytes()) as f64 / bandwidth,
                    bandwidth / 1e9
                )
            },
        );
        println!(
            "| {name} | {batch} at {prompt_tokens} | {rate:.1} | {:.1} | {:.2} | {floor} | {:.1} % |",
            rate / batch as f64,
            rate / single,
            100.0 * outside
        );
    }
    // What is in the cache says nothing about prompts.
    let is_cached = flags.windows(2).any(|pair| pair == ["--prefix-caching", "true"]);
    let uncached: &[usize] = if is_cached { &[] } else { &[16, 512] };
    for &prompt in uncached {
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
        stack.memory().proportional >> 20
    );
}

/// How `batch` requests at once are decoded.
struct Decode {
    /// Tokens per second, the time for prompts and first tokens taken off.
    rate: f64,
    /// Share of the whole time in which the shard computed neither logits nor tokens: HTTP, text, scheduling, and the way
    /// of messages to the shard and back.
    outside: f64,
}

/// The best of three.
async fn decode(stack: &Stack, batch: usize, prompt_tokens: usize) -> Decode {
    let mut best = Decode { rate: 0.0, outside: 1.0 };
    // What may be cached is, from here on.
    generate(stack, batch, prompt_tokens, 1).await;
    for _ in 0..3 {
        let first = generate(stack, batch, prompt_tokens, 1).await;
        let before = seconds_in_model(stack).await;
        let all = generate(stack, batch, prompt_tokens, 1 + NEW_TOKENS).await;
        let in_model = seconds_in_model(stack).await - before;
        let rate = (batch * NEW_TOKENS) as f64 / all.saturating_sub(first).as_secs_f64();
        if rate > best.rate {
            best = Decode { rate, outside: 1.0 - in_model / all.as_secs_f64() };
        }
    }
    best
}

/// Of all steps so far, as the shard reported them.
async fn seconds_in_model(stack: &Stack) -> f64 {
    stack.metric("tgi_batch_forward_duration_sum").await
        + stack.metric("lamplighter_batch_sampling_duration_sum").await
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

fn demo_checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-model/checkpoint")
}

/// `target/bench-models`.
fn work_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench-models")
}
