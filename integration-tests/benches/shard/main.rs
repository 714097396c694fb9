//! What one shard computes when its steps come without a pause, over the same stream that the router uses:
//!
//! `make bench-shard ARGS="8b bf16 decode=1,64,256 context=1024 prefill=8x1024 --device cuda"` (or `cargo bench -p
//! integration-tests --bench shard -- ...`)
//!
//! A shape (`135m`, `0.5b`, `1b`, `8b`), an element type (`bf16`, `f16`, `f32`), numbers of sequences that decode behind
//! `context` tokens each, numbers and lengths of prompts computed in one step; all that begins with `--` goes to the shard.
//! Weights are random. Two steps are in flight, as a router has them on a GPU; `in-flight=1` for one. `copy=4300` compares bytes
//! read with that many GB/s, which the machine's copies reach.
//!
//! This is what a shard gives at most: the difference to `make bench-serving` is what router, messages and HTTP cost.
#![expect(clippy::print_stdout, reason = "a benchmark's report")]

mod driver;
#[path = "../serving/synthetic.rs"]
mod synthetic;

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use driver::{Driver, Load, Rate};
use synthetic::{SHAPES, Shape, Stored};

const STORED: [Stored; 3] = [Stored::Bf16, Stored::F16, Stored::F32];

/// What the command line asks for.
struct Wishes {
    shape: &'static Shape,
    stored: Stored,
    decode: Vec<usize>,
    context: usize,
    /// Sequences and tokens of each.
    prefill: (usize, usize),
    in_flight: usize,
    copy_gb_per_s: Option<f64>,
    shard_flags: Vec<String>,
}

impl Wishes {
    fn parse(arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut wishes = Self {
            shape: SHAPES[0].1,
            stored: Stored::Bf16,
            decode: vec![1, 8],
            context: 256,
            prefill: (1, 512),
            in_flight: 2,
            copy_gb_per_s: None,
            shard_flags: Vec::new(),
        };
        let mut of_shard = false;
        // cargo adds `--bench`.
        for argument in arguments.filter(|argument| argument != "--bench") {
            of_shard |= argument.starts_with("--");
            if of_shard {
                wishes.shard_flags.push(argument);
            } else {
                wishes.take(&argument).with_context(|| format!("in {argument:?}"))?;
            }
        }
        Ok(wishes)
    }

    fn take(&mut self, argument: &str) -> anyhow::Result<()> {
        if let Some((_, shape)) = SHAPES.iter().find(|(name, _)| *name == argument) {
            self.shape = shape;
        } else if let Some(stored) =
            STORED.into_iter().find(|stored| argument.eq_ignore_ascii_case(stored.name()))
        {
            self.stored = stored;
        } else {
            match argument.split_once('=') {
                Some(("decode", batches)) => {
                    self.decode = batches.split(',').map(str::parse).collect::<Result<_, _>>()?;
                }
                Some(("context", tokens)) => self.context = tokens.parse()?,
                Some(("in-flight", steps)) => self.in_flight = steps.parse()?,
                Some(("copy", rate)) => self.copy_gb_per_s = Some(rate.parse()?),
                Some(("prefill", prompts)) => {
                    let (sequences, tokens) = prompts.split_once('x').context("expected 8x1024")?;
                    self.prefill = (sequences.parse()?, tokens.parse()?);
                }
                _ => anyhow::bail!(
                    "expected a shape, an element type, decode=, context=, prefill=, in-flight=, copy="
                ),
            }
        }
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let wishes = Wishes::parse(std::env::args().skip(1))?;
    let directory = wishes.shape.write(wishes.stored, &work_directory(), &demo_checkpoint())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(&wishes, &directory))
}

async fn measure(wishes: &Wishes, directory: &Path) -> anyhow::Result<()> {
    let most = wishes.decode.iter().copied().max().unwrap_or(1);
    let load = Load {
        max_sequences: most.max(wishes.prefill.0),
        max_len: (wishes.context + driver::DECODE_STEPS + 1).max(wishes.prefill.1 + 1),
        max_step_tokens: (wishes.prefill.0 * wishes.prefill.1).max(most),
        in_flight: wishes.in_flight,
    };
    let mut driver = Driver::start(directory, &wishes.shard_flags, load).await?;
    println!(
        "**{} {}**, flags {:?}; ready after {:.2} s, {} KV blocks, {} steps in flight\n",
        wishes.shape.name,
        wishes.stored.name(),
        wishes.shard_flags.join(" "),
        driver.ready_s,
        driver.num_blocks,
        wishes.in_flight,
    );
    let gb = driver.weight_bytes as f64 / 1e9;
    println!(
        "loading: {gb:.2} GB of weights in {:.2} s, {:.3} s per GB, the start of the process included\n",
        driver.loaded_s,
        driver.loaded_s / gb,
    );
    println!(
        "| work | tokens/s | ms a step | of that forward | sampling | GB/s of weights and cache | of a copy's rate |"
    );
    println!("|---|---|---|---|---|---|---|");
    for &batch in &wishes.decode {
        let rate = driver.decode(batch, wishes.context).await?;
        // Of an untied embedding single rows are read.
        let weights = wishes.shape.weights_per_step() * wishes.stored.size_in_bytes();
        let bytes = weights as f64 + driver.kv_bytes_per_token * (batch * wishes.context) as f64;
        let gb_per_s = bytes / rate.step_s / 1e9;
        let share = wishes
            .copy_gb_per_s
            .map_or_else(|| "–".to_owned(), |copy| format!("{:.0} %", 100.0 * gb_per_s / copy));
        row(&format!("decode, {batch} at {}", wishes.context), &rate, &format!("{gb_per_s:.1} | {share}"));
    }
    let (sequences, tokens) = wishes.prefill;
    let rate = driver.prefill(sequences, tokens).await?;
    row(&format!("prefill, {sequences} × {tokens}"), &rate, "– | –");
    driver.stop().await
}

fn row(work: &str, rate: &Rate, bytes: &str) {
    println!(
        "| {work} | {:.1} | {:.3} | {:.3} | {:.3} | {bytes} |",
        rate.tokens as f64 / rate.step_s,
        1e3 * rate.step_s,
        1e3 * rate.forward_s,
        1e3 * rate.sample_s,
    );
}

fn demo_checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-model/checkpoint")
}

/// Checkpoints are made there once.
fn work_directory() -> PathBuf {
    let target = std::env::current_exe().ok().and_then(|exe| Some(exe.ancestors().nth(3)?.to_owned()));
    target.unwrap_or_else(|| PathBuf::from("target")).join("bench-models")
}
