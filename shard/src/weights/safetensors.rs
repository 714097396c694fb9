//! The safetensors format: one file, or several behind `model.safetensors.index.json`. Only headers are read here.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::DType;
use kernels::mmap::MappedFile;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as StoredType, TensorInfo};
use serde::Deserialize;

use super::Error;

/// Bytes before the header: its length.
const LENGTH_BYTES: usize = 8;

/// Where a tensor lies. Nothing of it has been read yet.
pub(super) struct StoredTensor {
    pub(super) path: Arc<PathBuf>,
    pub(super) file: Arc<MappedFile>,
    pub(super) stored_type: StoredType,
    pub(super) shape: Vec<usize>,
    /// Bytes from the file's start; with the tensor's bytes behind it, inside the file.
    pub(super) offset: usize,
}

impl StoredTensor {
    /// The element type, where it is one that kernels multiply with.
    pub(super) fn dtype(&self) -> Option<DType> {
        match self.stored_type {
            StoredType::F32 => Some(DType::F32),
            StoredType::F16 => Some(DType::F16),
            StoredType::BF16 => Some(DType::BF16),
            _ => None,
        }
    }
}

/// All tensors of the checkpoint in `dir`, by name.
pub(super) fn open(dir: &Path) -> Result<BTreeMap<String, StoredTensor>, Error> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(read_file(single)?.collect());
    }
    let index = dir.join("model.safetensors.index.json");
    if index.is_file() {
        return read_sharded(dir, &index);
    }
    Err(Error::NoFiles { dir: dir.to_owned() })
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

fn read_sharded(dir: &Path, index_path: &Path) -> Result<BTreeMap<String, StoredTensor>, Error> {
    let corrupt = |message: String| Error::Corrupt { path: index_path.to_owned(), message };
    let text =
        std::fs::read(index_path).map_err(|source| Error::Io { path: index_path.to_owned(), source })?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
    let mut file_names: Vec<_> = index.weight_map.values().collect();
    file_names.sort();
    file_names.dedup();
    let mut tensors = BTreeMap::new();
    for file_name in file_names {
        if Path::new(file_name).file_name() != Some(file_name.as_ref()) {
            return Err(corrupt(format!("{file_name:?} is not the name of a file beside it")));
        }
        // A tensor counts only where the index says it is, as in transformers.
        tensors.extend(
            read_file(dir.join(file_name))?
                .filter(|(name, _)| index.weight_map.get(name).is_some_and(|file| file == file_name)),
        );
    }
    if let Some(name) = index.weight_map.keys().filter(|name| !tensors.contains_key(*name)).min() {
        return Err(corrupt(format!("tensor {name} is not in the file that the index names for it")));
    }
    Ok(tensors)
}

/// All tensors of one file, by name.
pub(super) fn read_file(path: PathBuf) -> Result<impl Iterator<Item = (String, StoredTensor)>, Error> {
    let file = Arc::new(MappedFile::open(&path)?);
    let corrupt = |message: String| Error::Corrupt { path: path.clone(), message };
    let (header_len, metadata) =
        SafeTensors::read_metadata(file.bytes()).map_err(|error| corrupt(error.to_string()))?;
    let data_start = LENGTH_BYTES + header_len;
    let data_len = file.bytes().len() - data_start;
    let mut entries = Vec::new();
    for (name, info) in metadata.tensors() {
        let TensorInfo { dtype, shape, data_offsets: (start, end) } = info.clone();
        // The parser compares the sum of the lengths with the file's; a sum that wraps around would deceive it.
        if start > end || end > data_len {
            return Err(corrupt(format!("tensor {name} lies outside of the file")));
        }
        entries.push((name, dtype, shape, data_start + start));
    }
    let path = Arc::new(path);
    Ok(entries.into_iter().map(move |(name, stored_type, shape, offset)| {
        (name, StoredTensor { path: path.clone(), file: file.clone(), stored_type, shape, offset })
    }))
}
