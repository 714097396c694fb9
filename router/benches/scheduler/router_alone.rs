//! What the router costs, whatever the model: processor time and memory of its process alone, in front of a shard that
//! answers without computing. Clients and shard share one thread of this process.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use futures::future::try_join_all;
use serde_json::json;
use tempfile::TempDir;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep};

use crate::http_client::Client;
use crate::null_shard::{Counts, NullShard};
use crate::processor_time::{ProcessorTime, memory_bytes};
use crate::router_process::RouterProcess;

/// How long processor time is counted.
const WINDOW: Duration = Duration::from_secs(4);

/// Sequences in a step, and connections for requests in one piece.
const NUM_STREAMS: usize = 256;

/// A step of so many sequences on a fast GPU.
const STEP_TIME: Duration = Duration::from_millis(16);

/// Streams that are open while memory is looked at.
const NUM_IDLE_STREAMS: usize = 2000;

/// Longer than any stream is looked at.
const ENDLESS: u32 = 60_000;

/// Measures everything and prints it.
pub(crate) fn run() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        println!("\n## The router alone\n\n| what | processor time of the router | in the program | in the kernel | a second of one core |");
        println!("|---|---|---|---|---|");
        requests().await?;
        streams("streamed tokens, steps without a pause", Duration::ZERO, true).await?;
        streams("streamed tokens", STEP_TIME, true).await?;
        streams("tokens of answers in one piece", STEP_TIME, false).await?;
        memory().await
    })
}

/// A shard, a router, and what they are measured by.
struct Bench {
    shard: NullShard,
    router: RouterProcess,
    _directory: TempDir,
}

/// What a window of time has cost.
struct Cost {
    processor: ProcessorTime,
    counts: Counts,
    /// Seconds of the router's work for steps, by its own account: what it did, and for how long.
    stages_s: BTreeMap<String, f64>,
}

impl Bench {
    async fn start(flags: &[&str]) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let shard = NullShard::default();
        let socket = directory.path().join("shard");
        shard.listen(&socket)?;
        let router = start_router(directory.path(), &socket, flags).await?;
        let bench = Self { shard, router, _directory: directory };
        bench.until_ready().await?;
        Ok(bench)
    }

    async fn until_ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut client = self.client().await?;
            match client.post(&body(0, 8, false)).await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context("the router is not ready"));
                }
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn client(&self) -> anyhow::Result<Client> {
        Client::connect(self.router.address).await
    }

    /// Opens `count` streams that never end, and returns when each has had its first token.
    async fn open(&self, count: usize) -> anyhow::Result<Vec<Client>> {
        let streams = (0..count).map(|index| async move {
            let mut client = self.client().await?;
            client.stream(&body(index, ENDLESS, true)).await?;
            client.next_events().await?.context("a stream does not end here")?;
            anyhow::Ok(client)
        });
        try_join_all(streams).await
    }

    async fn cost_of(&self, window: Duration) -> anyhow::Result<Cost> {
        let before = (self.stages_s().await?, self.shard.counts(), ProcessorTime::of(self.router.pid())?);
        sleep(window).await;
        let (processor, counts) = (ProcessorTime::of(self.router.pid())?, self.shard.counts());
        let mut stages_s = self.stages_s().await?;
        for (stage, seconds) in &mut stages_s {
            *seconds -= before.0.get(stage).copied().unwrap_or_default();
        }
        let counts = Counts { steps: counts.steps - before.1.steps, rows: counts.rows - before.1.rows };
        Ok(Cost { processor: processor.since(before.2), counts, stages_s })
    }

    async fn stages_s(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let page = self.client().await?.get("/metrics").await?;
        let name = "lamplighter_router_step_duration_sum{stage=\"";
        let stages = page.lines().filter_map(|line| line.strip_prefix(name)?.split_once("\"} "));
        stages.map(|(stage, seconds)| Ok((stage.to_owned(), seconds.parse()?))).collect()
    }
}

/// Requests that are answered with one token.
async fn requests() -> anyhow::Result<()> {
    let bench = Bench::start(&["--max-batch-size", "256", "--max-concurrent-requests", "300"]).await?;
    let done = std::rc::Rc::new(std::cell::Cell::new(0_u64));
    let clients: Vec<_> = (0..NUM_STREAMS)
        .map(|index| {
            let (done, address) = (std::rc::Rc::clone(&done), bench.router.address);
            tokio::task::spawn_local(async move {
                let mut client = Client::connect(address).await?;
                for round in 0.. {
                    client.post(&body(index + round * NUM_STREAMS, 1, false)).await?;
                    done.set(done.get() + 1);
                }
                anyhow::Ok(())
            })
        })
        .collect();
    sleep(Duration::from_millis(500)).await;
    let before = done.get();
    let cost = bench.cost_of(WINDOW).await?;
    line("request with a prompt of 60 tokens, answered with one token", done.get() - before, cost.processor);
    clients.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(())
}

/// 256 sequences that are generated at once.
async fn streams(what: &str, step_time: Duration, streamed: bool) -> anyhow::Result<()> {
    let bench = Bench::start(&["--max-batch-size", "256", "--max-concurrent-requests", "300"]).await?;
    bench.shard.set_step_time(step_time);
    let mut readers = Vec::new();
    if streamed {
        for mut client in bench.open(NUM_STREAMS).await? {
            readers.push(tokio::task::spawn_local(async move {
                while client.next_events().await?.is_some() {}
                anyhow::Ok(())
            }));
        }
    } else {
        for index in 0..NUM_STREAMS {
            let mut client = bench.client().await?;
            readers.push(tokio::task::spawn_local(async move {
                client.post(&body(index, ENDLESS, false)).await?;
                Ok(())
            }));
        }
        sleep(Duration::from_secs(1)).await;
    }
    let cost = bench.cost_of(WINDOW).await?;
    let (steps, rows) = (cost.counts.steps, cost.counts.rows);
    let rows_per_step = rows as f64 / steps as f64;
    let pause =
        if step_time.is_zero() { String::new() } else { format!(", a step in {} ms", step_time.as_millis()) };
    line(&format!("{what}{pause}: a token"), rows, cost.processor);
    line(&format!("… a step of {rows_per_step:.0} sequences"), steps, cost.processor);
    let stages =
        cost.stages_s.iter().map(|(stage, seconds)| format!("{stage} {:.0}", seconds / steps as f64 * 1e6));
    let stages = stages.collect::<Vec<_>>().join(", ");
    println!("| … of that by the router's own clocks, µs | {stages} | | | |");
    readers.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(())
}

/// Streams that are open and get a token once in a while.
async fn memory() -> anyhow::Result<()> {
    let flags = [
        ("--max-batch-size", "2048"),
        ("--max-concurrent-requests", "2048"),
        // So that all are let in soon.
        ("--max-batch-prefill-tokens", "8192"),
    ];
    let flags: Vec<&str> = flags.iter().flat_map(|&(name, value)| [name, value]).collect();
    let bench = Bench::start(&flags).await?;
    let before = memory_bytes(bench.router.pid())?;
    bench.shard.set_step_time(Duration::from_millis(50));
    let streams = bench.open(NUM_IDLE_STREAMS).await?;
    bench.shard.set_step_time(Duration::from_millis(500));
    sleep(Duration::from_secs(1)).await;
    let during = memory_bytes(bench.router.pid())?;
    println!(
        "\nMemory of the router with {} open streams: {:.1} MB, {:.1} MB before them: {:.1} kB for each.",
        streams.len(),
        during as f64 / 1e6,
        before as f64 / 1e6,
        during.saturating_sub(before) as f64 / streams.len() as f64 / 1e3,
    );
    Ok(())
}

fn line(what: &str, count: u64, processor: ProcessorTime) {
    let each = |time: Duration| time.as_secs_f64() * 1e6 / count as f64;
    println!(
        "| {what} | {:.1} µs | {:.1} µs | {:.1} µs | {:.0} |",
        each(processor.total()),
        each(processor.user),
        each(processor.kernel),
        count as f64 / processor.total().as_secs_f64(),
    );
}

/// Starts the router without holding up the shard, which answers it on this very thread.
async fn start_router(directory: &Path, socket: &Path, flags: &[&str]) -> anyhow::Result<RouterProcess> {
    let (directory, socket) = (directory.to_owned(), socket.to_owned());
    let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
    tokio::task::spawn_blocking(move || {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        RouterProcess::start(&directory, &socket, &flags)
    })
    .await?
}

/// A request of its own, so that nothing is found in a cache.
fn body(index: usize, max_tokens: u32, stream: bool) -> String {
    let prompt = format!(
        "Letter number {index}. The lamplighter went from lamp to lamp, as on every evening, and told each of them a story \
         before it was lit, for he thought that a lamp which knows a story gives a warmer light than one that knows none."
    );
    json!({
        "model": "bench", "prompt": prompt, "max_tokens": max_tokens, "stream": stream, "ignore_eos": true, "seed": index,
    })
    .to_string()
}
