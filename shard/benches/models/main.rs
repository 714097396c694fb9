//! Models against the machine's limits and beside other programs, in one run on one machine:
//!
//! `make bench` (or `cargo bench --profile release -p shard --bench models -- [135m] [0.5b] [1b] [bf16] [f16] [f32] [int8] [prefill]
//! [decode] [long] [alone | llama.cpp | transformers] [Avx2] [prepare]`), which prints Markdown. Arguments leave out what they do
//! not name: shapes, weights, workloads, other programs; a level of instructions (`Portable`, `Avx2`, `Avx512`, ... as
//! [`kernels::Level`] has them) holds us, not the others, to it; `prepare` only makes the checkpoints, which takes minutes once.
//! `make bench-peers` installs the other programs.
//!
//! Weights are random, in published shapes: what a step costs does not depend on what the weights say. Each figure is the
//! best of several, taken in turns with the other programs', so that whatever else the machine does hits all of them.
#![expect(clippy::print_stdout, reason = "a benchmark's report")]

mod ours;
mod peers;
#[path = "../../../integration-tests/benches/serving/synthetic.rs"]
mod synthetic;
mod workload;

use std::path::{Path, PathBuf};

use kernels::probe::{ReadProbe, multiply_add_bf16_flops_per_s, multiply_add_flops_per_s};
use kernels::{Context, Level};

use ours::Ours;
use peers::{LlamaCpp, Rates, Transformers};
use synthetic::{SHAPES, Shape, Stored};
use workload::{Work, Workload};

/// Turns of each program.
const ROUNDS: usize = 2;

/// How weights are kept.
#[derive(Clone, Copy)]
struct Weights {
    name: &'static str,
    stored: Stored,
    /// Linear layers' weights become 8-bit integers.
    int8: bool,
    /// The same in llama.cpp.
    gguf: &'static str,
    /// The same in torch, where there is such a thing.
    torch: Option<&'static str>,
}

const WEIGHTS: [Weights; 4] = [
    Weights { name: "bf16", stored: Stored::Bf16, int8: false, gguf: "bf16", torch: Some("bfloat16") },
    Weights { name: "f16", stored: Stored::F16, int8: false, gguf: "f16", torch: Some("float16") },
    Weights { name: "f32", stored: Stored::F32, int8: false, gguf: "f32", torch: Some("float32") },
    Weights { name: "int8", stored: Stored::Bf16, int8: true, gguf: "q8_0", torch: None },
];

fn main() -> anyhow::Result<()> {
    let chosen: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let shapes = SHAPES.map(|(name, _)| name);
    let weights = WEIGHTS.map(|weights| weights.name);
    let kinds = Workload::KINDS;
    let peers = ["llama.cpp", "transformers", "alone"];
    let levels = Level::ALL.map(|level| format!("{level:?}"));
    let levels = levels.each_ref().map(String::as_str);
    if let Some(unknown) = chosen.iter().find(|name| {
        ![&shapes[..], &weights[..], &kinds[..], &peers[..], &levels[..], &["prepare"]]
            .iter()
            .any(|names| names.contains(&name.as_str()))
    }) {
        anyhow::bail!(
            "{unknown} is none of {}, {}, {}, {}, {}, prepare",
            shapes.join(", "),
            weights.join(", "),
            kinds.join(", "),
            peers.join(", "),
            levels.join(", ")
        );
    }
    let wants = |names: &[&str], name: &str| {
        chosen.iter().any(|choice| choice == name)
            || !chosen.iter().any(|choice| names.contains(&choice.as_str()))
    };
    let workloads: Vec<_> =
        Workload::ALL.into_iter().filter(|workload| wants(&kinds, workload.kind())).collect();

    let best = Level::detect();
    let level = Level::ALL.into_iter().find(|level| chosen.contains(&format!("{level:?}"))).unwrap_or(best);
    anyhow::ensure!(level.is_available(), "this CPU lacks {level:?}; its best is {best:?}");
    let context = Context::cpu_with_level(kernels::available_cores(), level);
    let llama_cpp = LlamaCpp::find().filter(|_| wants(&peers, peers[0]));
    let transformers = Transformers::find().filter(|_| wants(&peers, peers[1]));
    println!("{} threads, {:?}.", context.num_threads(), level);
    for (peer, is_there) in [("llama.cpp", llama_cpp.is_some()), ("transformers", transformers.is_some())] {
        if !is_there && wants(&peers, peer) {
            println!("{peer} is not installed: `make bench-peers` does it.");
        }
    }
    let largest = SHAPES.len() - 1;
    let shapes_wanted = SHAPES.into_iter().enumerate().filter(|(index, (name, _))| {
        wants(&shapes, name) && (*index < largest || chosen.iter().any(|choice| choice == name))
    });
    for (_, (name, shape)) in shapes_wanted {
        for weights in WEIGHTS.into_iter().filter(|choice| wants(&weights, choice.name)) {
            let directory = shape.write(weights.stored, &work_directory(), &demo_checkpoint())?;
            if chosen.iter().any(|choice| choice == "prepare") {
                llama_cpp.as_ref().map(|peer| peer.convert(&directory, weights.gguf)).transpose()?;
                continue;
            }
            let run = Run { shape, weights, directory: &directory, workloads: &workloads, context: &context };
            run.measure(name, llama_cpp.as_ref(), transformers.as_ref())?;
        }
    }
    Ok(())
}

/// One shape with one kind of weights.
struct Run<'a> {
    shape: &'a Shape,
    weights: Weights,
    directory: &'a Path,
    workloads: &'a [Workload],
    context: &'a Context,
}

/// The machine's limits, the best seen in the run.
#[derive(Default)]
struct Machine {
    read_bytes_per_s: f64,
    flops_per_s: f64,
}

impl Machine {
    fn probe(&mut self, context: &Context, read: &ReadProbe, weights: Weights) {
        self.read_bytes_per_s = self.read_bytes_per_s.max(read.bytes_per_s(context));
        // Of the products that linear layers are made of.
        let probe = match weights.stored {
            Stored::Bf16 if !weights.int8 => multiply_add_bf16_flops_per_s,
            _ => multiply_add_flops_per_s,
        };
        self.flops_per_s = self.flops_per_s.max(probe(context));
    }
}

impl Run<'_> {
    fn measure(
        &self,
        name: &str,
        llama_cpp: Option<&LlamaCpp>,
        transformers: Option<&Transformers>,
    ) -> anyhow::Result<()> {
        let threads = self.context.num_threads();
        let gguf = llama_cpp.map(|peer| peer.convert(self.directory, self.weights.gguf)).transpose()?;
        let torch = transformers.zip(self.weights.torch);
        let read = ReadProbe::new();
        let mut machine = Machine::default();
        let mut ours = Rates::default();
        let (mut theirs, mut hugging_face) = (Rates::default(), Rates::default());
        let mut model = Ours::load(self.context, self.directory, self.weights.int8)?;
        for _ in 0..ROUNDS {
            machine.probe(self.context, &read, self.weights);
            for &workload in self.workloads {
                ours.add(workload, model.tokens_per_s(self.context, workload)?);
            }
            if let Some((peer, gguf)) = llama_cpp.zip(gguf.as_deref()) {
                peer.measure(gguf, threads, self.workloads, &mut theirs)?;
            }
        }
        if let Some((peer, dtype)) = torch {
            peer.measure(self.directory, dtype, threads, self.workloads, &mut hugging_face)?;
        }
        machine.probe(self.context, &read, self.weights);

        println!(
            "\n**{} ({name}), {}**: {:.1} GB/s read, {:.0} GFLOP/s multiply-add\n",
            self.shape.name,
            self.weights.name,
            machine.read_bytes_per_s / 1e9,
            machine.flops_per_s / 1e9,
        );
        println!(
            "| work | tokens/s | × batch 1 | GB/s | of the read rate | GFLOP/s | of the multiply-add peak | llama.cpp {} | ratio \
             | transformers | ratio |",
            self.weights.gguf,
        );
        println!("|---|---|---|---|---|---|---|---|---|---|---|");
        for &workload in self.workloads {
            let Some(rate) = ours.get(workload) else { continue };
            let work = Work::of(self.shape, workload, &model.bytes());
            let steps_per_s = rate / workload.tokens() as f64;
            let (bytes, flops) = (work.bytes * steps_per_s, work.flops * steps_per_s);
            let single =
                ours.get(workload.alone()).map_or_else(|| "–".to_owned(), |one| format!("{:.2}", rate / one));
            println!(
                "| {workload} | {rate:.1} | {single} | {:.1} | {:.0} % | {:.0} | {:.0} % | {} | {} |",
                bytes / 1e9,
                100.0 * bytes / machine.read_bytes_per_s,
                flops / 1e9,
                100.0 * flops / machine.flops_per_s,
                beside(rate, theirs.get(workload)),
                beside(rate, hugging_face.get(workload)),
            );
        }
        Ok(())
    }
}

/// A peer's rate, and ours in terms of it.
fn beside(ours: f64, theirs: Option<f64>) -> String {
    theirs.map_or_else(|| "– | –".to_owned(), |rate| format!("{rate:.1} | {:.2}", ours / rate))
}

fn demo_checkpoint() -> PathBuf {
    repository().join("integration-tests/demo-model/checkpoint")
}

/// Checkpoints are made there once.
fn work_directory() -> PathBuf {
    repository().join("target/bench-models")
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
