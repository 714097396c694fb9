//! Why a model cannot be loaded.

use std::path::PathBuf;

use crate::decoder::PartitionError;
use crate::weights;

/// Why a model cannot be loaded, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is not there or not readable.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The configuration asks for what cannot be served.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Which field.
        source: ConfigError,
    },
    /// The model cannot be dealt out to that many ranks.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// There are no kernels for the element type.
    #[error(
        "--kv-cache-dtype fp8_e4m3fn needs a GPU: the CPU keeps keys and values in float32, float16 or bfloat16"
    )]
    KvDtype,
    /// The weights' files are not what config.json says, or are damaged.
    #[error(transparent)]
    Weights(#[from] weights::Error),
}

/// A field of config.json with a value that cannot be served.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ConfigError {
    /// The field.
    pub field: String,
    /// What is wrong, and what works.
    pub message: String,
}

impl ConfigError {
    pub(super) fn new(field: &str, message: String) -> Self {
        Self { field: field.to_owned(), message }
    }
}
