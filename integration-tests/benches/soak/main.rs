//! Whether the server stays as it is under everything that clients do for some minutes:
//!
//! `make soak` (or `make soak ARGS="MINUTES SEED"`, 10 and 1 where nothing is said; an hour is ARGS=60)
//!
//! The real executable with the demo model and little memory for its cache; clients of all endpoints with random requests,
//! of which a third leave at a random moment. At the end nothing may be left: no KV block, no sequence, no place in the
//! house; each request that was read has come to its end; memory has not grown. Otherwise the exit status is not 0.
#![expect(clippy::print_stdout, reason = "a report")]

mod clients;
mod trend;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::future::join_all;
use integration_tests::{Model, Stack};
use nix::sys::signal::Signal;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;

use clients::{Client, Tally};
use trend::Trend;

/// With several choices for some requests, more than there are places for now and then: those are refused.
const NUM_CLIENTS: u64 = 40;

const PLACES: usize = 40;

/// Between two looks at the memory.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);

/// Between two lines of the report.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let minutes: f64 = arguments.next().map_or(Ok(10.0), |minutes| minutes.parse())?;
    let seed: u64 = arguments.next().map_or(Ok(1), |seed| seed.parse())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(soak(Duration::from_secs_f64(minutes * 60.0), seed))
}

async fn soak(duration: Duration, seed: u64) -> anyhow::Result<()> {
    let places = PLACES.to_string();
    let flags = [
        ("--max-concurrent-requests", places.as_str()),
        // Room for a few long sequences: much is preempted and evicted.
        ("--max-batch-total-tokens", "1280"),
        ("--max-total-tokens", "1024"),
        ("--max-batch-size", "12"),
        ("--max-batch-prefill-tokens", "128"),
        ("--steps-in-flight", "2"),
    ];
    let flags: Vec<&str> = flags.iter().flat_map(|&(name, value)| [name, value]).collect();
    let mut stack = Stack::start(Model::Demo, &flags).await;
    println!("seed {seed}, {:.1} minutes, flags: {}\n", duration.as_secs_f64() / 60.0, flags.join(" "));

    let (tally, trend) = load(&stack, duration, seed).await;
    println!("\n{tally}\n{trend}");
    let problems = tally.problems();
    ensure!(problems.is_empty(), "requests did not end as they should:\n{}", problems.join("\n"));
    check_nothing_is_left(&stack).await?;
    check_log(&stack.log())?;
    trend.check()?;

    stack.signal(Signal::SIGTERM);
    let status = stack.exit(Duration::from_secs(20)).await;
    ensure!(status.success(), "the server did not end well when told to stop: {status}");
    println!("\nNothing is left, and the server has ended well.");
    Ok(())
}

/// Random requests until the time is over and the last of them has ended.
async fn load(stack: &Stack, duration: Duration, seed: u64) -> (Tally, Trend) {
    let tally = Arc::new(Tally::default());
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..NUM_CLIENTS)
        .map(|index| {
            let random = StdRng::seed_from_u64(seed * 1000 + index);
            let client = Client::new(stack.url(), random, Arc::clone(&tally));
            tokio::spawn(client.ask_until(Arc::clone(&over)))
        })
        .collect();
    let begin = Instant::now();
    let mut trend = Trend::default();
    let mut next_report = Duration::ZERO;
    println!("| s | requests | PSS, MB | RSS, MB | blocks held | blocks cached | waiting | preemptions |");
    println!("|---|---|---|---|---|---|---|---|");
    while begin.elapsed() < duration {
        let (elapsed, memory) = (begin.elapsed(), stack.memory());
        trend.push(elapsed, memory);
        if elapsed >= next_report {
            next_report += REPORT_INTERVAL;
            let [held, cached, waiting, preemptions] = join_all(
                [
                    "lamplighter_kv_blocks_used",
                    "lamplighter_kv_blocks_cached",
                    "tgi_queue_size",
                    "lamplighter_preemptions",
                ]
                .map(|name| stack.metric(name)),
            )
            .await
            .try_into()
            .expect("four metrics");
            println!(
                "| {:.0} | {} | {:.1} | {:.1} | {held} | {cached} | {waiting} | {preemptions} |",
                elapsed.as_secs_f64(),
                tally.total(),
                memory.proportional as f64 / 1e6,
                memory.resident as f64 / 1e6,
            );
        }
        tokio::time::sleep(SAMPLE_INTERVAL.min(duration.saturating_sub(begin.elapsed()))).await;
    }
    over.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.expect("a client does not panic");
    }
    (Arc::into_inner(tally).expect("all clients have gone"), trend)
}

/// Blocks, sequences and places are all given back, and all serve again.
async fn check_nothing_is_left(stack: &Stack) -> anyhow::Result<()> {
    for name in ["lamplighter_kv_blocks_used", "lamplighter_running_sequences", "tgi_queue_size"] {
        stack.until_metric(name, |value| value == 0.0).await;
    }
    let failed_steps = stack.metric("tgi_batch_inference_failure").await;
    ensure!(failed_steps == 0.0, "{failed_steps} steps have failed");
    let request = json!({"prompt": "Once", "max_tokens": 8, "ignore_eos": true});
    let answers = join_all((0..PLACES).map(|_| stack.post("/v1/completions", &request))).await;
    for answer in answers {
        ensure!(answer.status == 200, "a place is lost: {}", answer.body);
    }
    Ok(())
}

/// Panics and failed shards would be there.
fn check_log(log: &str) -> anyhow::Result<()> {
    let error = log.lines().find(|line| line.contains("ERROR") || line.contains("panicked"));
    error.map_or(Ok(()), |error| Err(anyhow::anyhow!("{error}")).context("the log has an error"))
}
