//! With `LAMPLIGHTER_EMULATED_TILES=1`, products of tiles are plain Rust: for tests of what uses them where the CPU has none, and for
//! sanitizers, which do not see assembly.
//!
//! With the feature `cuda`, compiles each `cuda/*.cu` to a fatbin, and writes the table that `src/cuda/device.rs` embeds.
//!
//! Compiled code is kept in cargo's folder under a hash of everything that it was made from, so that a change in one file
//! compiles that file only; that of each compiler in a folder of its own, so that the stand-in of `make check-cuda` does not cost
//! what took nvcc minutes.

#![expect(clippy::disallowed_methods, reason = "these variables are set for builds, not for servers")]
#![expect(clippy::print_stderr, reason = "cargo shows it where the build stops")]

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

/// f8 conversions and all that newer GPUs have.
const OLDEST_CUDA: (u32, u32) = (12, 8);

/// What code is made for, besides PTX of the oldest that later GPUs compile for themselves: A100, L4 and RTX 40, H100 and
/// H200. `LAMPLIGHTER_CUDA_ARCHS=90a` is for development on one of them.
const ARCHITECTURES: &str = "80,89,90a";
const OLDEST_ARCHITECTURE: &str = "80";

/// What nvcc reads by itself. `NVCC_APPEND_FLAGS=-lineinfo` shows profilers the lines of the sources.
const NVCC_VARIABLES: [&str; 3] = ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(emulated_tiles)");
    println!("cargo::rerun-if-env-changed=LAMPLIGHTER_EMULATED_TILES");
    if env::var_os("LAMPLIGHTER_EMULATED_TILES").is_some_and(|value| value == "1") {
        println!("cargo::rustc-cfg=emulated_tiles");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    for name in ["NVCC", "CUDA_HOME", "PATH", "LAMPLIGHTER_CUDA_ARCHS"].iter().chain(&NVCC_VARIABLES) {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo gives it"));
    let modules = Compiler::find().and_then(|compiler| {
        let sources = sources(Path::new("cuda"))?;
        let folder = compiler.folder(&out)?;
        let compiled = compiler.compile_all(&sources, &folder)?;
        write_table(&out.join("modules.rs"), &compiled, compiler.version)
    });
    if let Err(message) = modules {
        println!("cargo::error={}", message.replace('\n', " "));
        exit(1);
    }
}

type Result<T> = std::result::Result<T, String>;

struct Compiler {
    nvcc: PathBuf,
    version: (u32, u32),
    architectures: String,
}

/// A file of kernels.
struct Source {
    path: PathBuf,
    name: String,
    /// Of its text and of all headers.
    hash: u64,
}

/// Name and file of the compiled code.
type Compiled = (String, PathBuf);

impl Compiler {
    fn find() -> Result<Self> {
        let nvcc = find_nvcc().ok_or(
            "the feature `cuda` needs nvcc, and there is none (NVCC, $CUDA_HOME/bin, PATH): run `make cuda-toolkit`, \
             or install CUDA 12.8 or newer",
        )?;
        let output = Command::new(&nvcc)
            .arg("--version")
            .output()
            .map_err(|error| format!("{} --version: {error}", nvcc.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = release(&text)
            .ok_or_else(|| format!("{} --version names no release of CUDA: {text}", nvcc.display()))?;
        if version < OLDEST_CUDA {
            return Err(format!(
                "{} is of CUDA {}.{}, the kernels need {}.{} or newer: run `make cuda-toolkit`, or name a newer one with \
                 NVCC",
                nvcc.display(),
                version.0,
                version.1,
                OLDEST_CUDA.0,
                OLDEST_CUDA.1
            ));
        }
        let architectures = env::var("LAMPLIGHTER_CUDA_ARCHS").unwrap_or_else(|_| ARCHITECTURES.into());
        Ok(Self { nvcc, version, architectures })
    }

    fn arguments(&self) -> Vec<String> {
        // Compressed, it is a quarter of the size; the driver unpacks what it loads.
        let mut arguments: Vec<String> =
            ["--fatbin", "-std=c++17", "-O3", "-Icuda", "--expt-relaxed-constexpr", "--compress-mode=size"]
                .map(String::from)
                .into();
        let mut code_for = |compute: &str, code: String| {
            arguments.extend(["-gencode".into(), format!("arch=compute_{compute},code={code}")]);
        };
        for architecture in self.architectures.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            code_for(architecture, format!("sm_{architecture}"));
        }
        if self.architectures == ARCHITECTURES {
            code_for(OLDEST_ARCHITECTURE, format!("compute_{OLDEST_ARCHITECTURE}"));
        }
        arguments
    }

    /// For what this compiler makes with these arguments.
    fn folder(&self, out: &Path) -> Result<PathBuf> {
        let mut hasher = DefaultHasher::new();
        (&self.nvcc, self.version, self.arguments(), NVCC_VARIABLES.map(env::var_os)).hash(&mut hasher);
        let folder = out.join(format!("{:016x}", hasher.finish()));
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        Ok(folder)
    }

    /// As many at a time as cargo allows.
    fn compile_all(&self, sources: &[Source], out: &Path) -> Result<Vec<Compiled>> {
        let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1_usize);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push(self.compile(source, out)?);
            }
            Ok(done)
        };
        let results: Vec<Result<Vec<Compiled>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..jobs.clamp(1, sources.len())).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|thread| thread.join().expect("it does not panic")).collect()
        });
        let mut compiled = results.into_iter().collect::<Result<Vec<_>>>()?.concat();
        compiled.sort();
        Ok(compiled)
    }

    fn compile(&self, source: &Source, out: &Path) -> Result<Compiled> {
        let mut hasher = DefaultHasher::new();
        (source.hash, &self.nvcc, self.version, self.arguments()).hash(&mut hasher);
        NVCC_VARIABLES.map(env::var_os).hash(&mut hasher);
        let target = out.join(format!("{}-{:016x}.fatbin", source.name, hasher.finish()));
        if !target.exists() {
            forget_older(&source.name, out);
            let partial = target.with_extension("partial");
            let output = Command::new(&self.nvcc)
                .args(self.arguments())
                // Code for several GPUs at a time: most of the time goes into few files.
                .arg("--threads=0")
                .arg("-o")
                .arg(&partial)
                .arg(&source.path)
                .output()
                .map_err(|error| format!("{}: {error}", self.nvcc.display()))?;
            eprint!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            if !output.status.success() {
                return Err(format!(
                    "nvcc does not compile {} (its messages are above)",
                    source.path.display()
                ));
            }
            fs::rename(&partial, &target).map_err(|error| format!("{}: {error}", target.display()))?;
        }
        Ok((source.name.clone(), target))
    }
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(nvcc.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    // Where `make cuda-toolkit` puts it.
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-toolkit/bin");
    let folders = home.into_iter().chain(env::split_paths(&path)).chain([own]);
    folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// "Cuda compilation tools, release 13.0, V13.0.88": 13 and 0.
fn release(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("release ")?;
    let (major, minor) = rest.split(',').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.trim().parse().ok()?))
}

fn sources(folder: &Path) -> Result<Vec<Source>> {
    let error = |error| format!("reading {}: {error}", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(error)? {
        paths.push(entry.map_err(error)?.path());
    }
    paths.sort();
    let with = |extension: &str| -> Vec<&PathBuf> {
        paths.iter().filter(|path| path.extension().is_some_and(|own| own == extension)).collect()
    };
    let mut headers = DefaultHasher::new();
    for path in with("cuh") {
        (path, fs::read(path).map_err(error)?).hash(&mut headers);
    }
    let headers = headers.finish();
    let source = |path: &PathBuf| {
        let mut hasher = DefaultHasher::new();
        (headers, fs::read(path).map_err(error)?).hash(&mut hasher);
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Source { path: path.clone(), name, hash: hasher.finish() })
    };
    with("cu").into_iter().map(source).collect()
}

/// Code that was made from an older text, or by another compiler.
fn forget_older(name: &str, out: &Path) {
    let Ok(entries) = fs::read_dir(out) else { return };
    for entry in entries.flatten() {
        let file = entry.file_name();
        let hash = file
            .to_str()
            .and_then(|file| file.strip_suffix(".fatbin")?.strip_prefix(name)?.strip_prefix('-'));
        if hash.is_some_and(|hash| hash.len() == 16) {
            // If it stays, it only takes room.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn write_table(path: &Path, compiled: &[Compiled], (major, minor): (u32, u32)) -> Result<()> {
    let mut text = String::from(
        "/// The driver reads whole words.\n#[repr(C, align(16))]\nstruct Aligned<T: ?Sized>(T);\n\n\
         pub(super) static MODULES: &[(&str, &[u8])] = &[\n",
    );
    for (name, file) in compiled {
        let file = file.to_str().ok_or("the target folder's path is not UTF-8")?;
        writeln!(
            text,
            "    ({name:?}, {{ static CODE: &Aligned<[u8]> = &Aligned(*include_bytes!({file:?})); &CODE.0 }}),"
        )
        .expect("writing to a string");
    }
    let version = 1000 * major + 10 * minor;
    writeln!(text, "];\n\npub(super) const TOOLKIT_VERSION: i32 = {version};").expect("writing to a string");
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
