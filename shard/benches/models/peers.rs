//! Other programs on the same weights, each as its own process with its own benchmark: llama.cpp and transformers.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::ours::DECODE_STEPS;
use crate::repository;
use crate::workload::{LONG_CONTEXT, Workload};

/// Tokens per second by workload, the best of all that were added.
#[derive(Default)]
pub(crate) struct Rates(Vec<(Workload, f64)>);

impl Rates {
    pub(crate) fn add(&mut self, workload: Workload, rate: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == workload) {
            Some((_, best)) => *best = best.max(rate),
            None => self.0.push((workload, rate)),
        }
    }

    pub(crate) fn get(&self, workload: Workload) -> Option<f64> {
        self.0.iter().find(|(known, _)| *known == workload).map(|(_, rate)| *rate)
    }
}

/// llama.cpp, as `integration-tests/reference/setup_llama_cpp.sh` builds it.
pub(crate) struct LlamaCpp {
    directory: PathBuf,
}

impl LlamaCpp {
    pub(crate) fn find() -> Option<Self> {
        let directory = repository().join("target/llama-cpp");
        directory.join("bin/llama-batched-bench").is_file().then_some(Self { directory })
    }

    /// The checkpoint in `directory` as GGUF, made once.
    pub(crate) fn convert(&self, directory: &Path, element_type: &str) -> anyhow::Result<PathBuf> {
        let path = directory.join(format!("{element_type}.gguf"));
        if !path.is_file() {
            let unfinished = directory.join(format!("{element_type}.gguf.part"));
            let mut command = Command::new(self.directory.join("venv/bin/python"));
            command.arg(repository().join("integration-tests/reference/make_gguf.py"));
            output(command.arg(directory).arg(element_type).arg(&unfinished))?;
            std::fs::rename(&unfinished, &path)?;
        }
        Ok(path)
    }

    /// One sequence with `llama-bench`, several with `llama-batched-bench`. Behind a long context both compute all of it
    /// first, which takes longer than all else together.
    pub(crate) fn measure(
        &self,
        gguf: &Path,
        threads: usize,
        workloads: &[Workload],
        rates: &mut Rates,
    ) -> anyhow::Result<()> {
        let mut batches = Vec::new();
        for &workload in workloads {
            let is_known = rates.get(workload).is_some();
            match workload {
                Workload::Prefill(tokens) => {
                    let prompt = ["-p", &tokens.to_string(), "-n", "0", "-r", "1"];
                    rates.add(workload, self.single(gguf, threads, &prompt)?);
                }
                Workload::Decode { batch: 1, context: 0 } => {
                    let decode = ["-p", "0", "-n", &DECODE_STEPS.to_string(), "-r", "3"];
                    rates.add(workload, self.single(gguf, threads, &decode)?);
                    // Where one core reads all that memory gives, two only wait for each other.
                    if threads > 1 && !is_known {
                        rates.add(workload, self.single(gguf, 1, &decode)?);
                    }
                }
                Workload::Decode { batch, context: 0 } => batches.push(batch),
                Workload::Decode { .. } => {}
            }
        }
        self.batched(gguf, threads, (1, DECODE_STEPS), &batches, |batch, rate| {
            rates.add(Workload::Decode { batch, context: 0 }, rate);
        })?;
        // Not again in the next round.
        let long = workloads.iter().filter_map(|workload| match *workload {
            Workload::Decode { batch, context: LONG_CONTEXT } if rates.get(*workload).is_none() => {
                Some(batch)
            }
            _ => None,
        });
        let long: Vec<_> = long.collect();
        self.batched(gguf, threads, (LONG_CONTEXT, DECODE_STEPS), &long, |batch, rate| {
            rates.add(Workload::Decode { batch, context: LONG_CONTEXT }, rate);
        })
    }

    fn single(&self, gguf: &Path, threads: usize, work: &[&str]) -> anyhow::Result<f64> {
        let mut command = Command::new(self.directory.join("bin/llama-bench"));
        command.arg("-m").arg(gguf).args(["-t", &threads.to_string(), "-o", "json"]).args(work);
        let text = output(&mut command)?;
        let rows: Value = serde_json::from_str(&text).with_context(|| format!("reading {text}"))?;
        let samples = rows[0]["samples_ts"].as_array().context("llama-bench reports samples_ts")?;
        Ok(samples.iter().filter_map(Value::as_f64).fold(0.0, f64::max))
    }

    /// Reports the rate of decoding `tokens` tokens for each number of sequences behind a shared context.
    fn batched(
        &self,
        gguf: &Path,
        threads: usize,
        (context, tokens): (usize, usize),
        batches: &[usize],
        mut report: impl FnMut(usize, f64),
    ) -> anyhow::Result<()> {
        let Some(most) = batches.iter().max() else { return Ok(()) };
        let threads = threads.to_string();
        let list = batches.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        // Each sequence has its own part of the context, in which memory is given out in parts of 256.
        let total = (most * (context + tokens + 1).next_multiple_of(256)).to_string();
        let mut command = Command::new(self.directory.join("bin/llama-batched-bench"));
        command.arg("-m").arg(gguf).args(["-t", &threads, "-tb", &threads, "-c", &total, "-pps"]);
        command.args(["-npp", &context.to_string(), "-ntg", &tokens.to_string(), "-npl", &list]);
        let text = output(command.args(["--output-format", "jsonl"]))?;
        for line in text.lines().filter(|line| line.starts_with('{')) {
            let row: Value = serde_json::from_str(line).with_context(|| format!("reading {line}"))?;
            let (batch, rate) = (row["pl"].as_u64(), row["speed_tg"].as_f64());
            let (batch, rate) = batch.zip(rate).context("llama-batched-bench reports pl and speed_tg")?;
            report(batch as usize, rate);
        }
        Ok(())
    }
}

/// `transformers` on torch, as `integration-tests/reference/setup.sh` installs it.
pub(crate) struct Transformers {
    python: PathBuf,
}

impl Transformers {
    pub(crate) fn find() -> Option<Self> {
        let python = repository().join("target/reference-venv/bin/python");
        python.is_file().then_some(Self { python })
    }

    pub(crate) fn measure(
        &self,
        directory: &Path,
        dtype: &str,
        threads: usize,
        workloads: &[Workload],
        rates: &mut Rates,
    ) -> anyhow::Result<()> {
        let mut kinds: Vec<_> = workloads.iter().map(|workload| workload.kind()).collect();
        kinds.dedup();
        let mut command = Command::new(&self.python);
        command.arg(repository().join("integration-tests/reference/bench_transformers.py")).arg(directory);
        command.args(["--dtype", dtype, "--threads", &threads.to_string(), "--kinds"]).args(kinds);
        for line in output(&mut command)?.lines() {
            let row: Value = serde_json::from_str(line).with_context(|| format!("reading {line}"))?;
            let (batch, context) = (row["batch"].as_u64(), row["context"].as_u64());
            let (batch, context) = batch.zip(context).context("batch and context are numbers")?;
            let (batch, context) = (batch as usize, context as usize);
            let workload = match row["kind"].as_str() {
                Some("prefill") => Workload::Prefill(context),
                _ => Workload::Decode { batch, context },
            };
            rates.add(workload, row["tokens_per_s"].as_f64().context("a rate is a number")?);
        }
        Ok(())
    }
}

/// What a program prints; an error with its last words where it fails.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let last: Vec<_> = words.lines().rev().take(10).collect();
        bail!(
            "{command:?} ended with {}:\n{}",
            output.status,
            last.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
