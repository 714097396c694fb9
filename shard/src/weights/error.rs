//! What can be wrong with a checkpoint's files.

use std::path::PathBuf;

use kernels::DType;

/// Why weights cannot be used: which file, which tensor, what was expected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory has no weights that can be read.
    #[error(
        "{}: neither model.safetensors nor model.safetensors.index.json is there; \
         convert other formats to safetensors first (transformers: save_pretrained)",
        dir.display()
    )]
    NoFiles {
        /// The model's directory.
        dir: PathBuf,
    },
    /// A file is there but cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file's content is not what its format says.
    #[error("{}: {message}; download the file again", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The architecture needs a tensor that no file has.
    #[error("{}: there is no tensor {name} of shape {expected:?}, which config.json calls for", dir.display())]
    Missing {
        /// The model's directory.
        dir: PathBuf,
        /// The tensor's name.
        name: String,
        /// Its shape by config.json.
        expected: Vec<usize>,
    },
    /// A tensor's shape is not the one that follows from config.json.
    #[error("{}: tensor {name} has shape {found:?}, but by config.json it is {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// Its shape by config.json.
        expected: Vec<usize>,
        /// Its shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is stored in a type that we cannot multiply with.
    #[error("{}: tensor {name} is stored as {found}; supported are F32, F16 and BF16", path.display())]
    StoredType {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// Its element type in the file.
        found: String,
    },
    /// A tensor has values that the format asked for cannot hold.
    #[error("{}: tensor {name} cannot be quantized: {message}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// Which value.
        message: String,
    },
    /// A value is too large for the element type that was asked for.
    #[error("tensor {name} has values that {dtype:?} cannot hold: use --dtype bfloat16 or float32")]
    Overflow {
        /// The tensor's name.
        name: String,
        /// The element type asked for.
        dtype: DType,
    },
    /// The checkpoint has tensors that the model would ignore, so its answers would be wrong.
    #[error(
        "{}: {num_tensors} tensors are not used by the architecture that config.json names, for example {example}; \
         is the checkpoint of another architecture?",
        dir.display()
    )]
    Unused {
        /// The model's directory.
        dir: PathBuf,
        /// How many there are.
        num_tensors: usize,
        /// The first of them by name.
        example: String,
    },
    /// An adapter cannot be used.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Mapping or converting.
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
}

/// Why an adapter cannot be used: which file, which field or tensor, and what works.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The configuration is not there or not readable.
    #[error("{}: {source}; an adapter is a directory as PEFT's save_pretrained writes it", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The configuration is not the JSON that it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The configuration asks for what cannot be served.
    #[error("{}: {field} {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value, and what works.
        message: String,
    },
    /// There are no tensors, or in another format.
    #[error("{} is not there; convert other formats first (PEFT: save_pretrained)", path.display())]
    NoTensors {
        /// The file that was looked for.
        path: PathBuf,
    },
    /// A tensor does not fit the base model, or is missing, or is not used.
    #[error("{}: {name} {message}", dir.display())]
    Tensor {
        /// The adapter's directory.
        dir: PathBuf,
        /// The tensor's name.
        name: String,
        /// What is wrong with it, and what to do.
        message: String,
    },
}
