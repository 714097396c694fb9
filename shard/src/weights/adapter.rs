//! LoRA adapters as PEFT writes them: `adapter_config.json` beside `adapter_model.safetensors`. Only headers are read here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kernels::ops::lora::MAX_RANK;

use super::adapter_config::AdapterConfig;
use super::safetensors::{self, StoredTensor};
use super::{AdapterError, Error};

const TENSORS: &str = "adapter_model.safetensors";

/// What stands before a module's name in PEFT's files.
const PREFIX: &str = "base_model.model.";

/// An adapter whose tensors are to be taken, each once, by the layers that they change.
pub struct Adapter {
    dir: PathBuf,
    config: AdapterConfig,
    tensors: BTreeMap<String, StoredTensor>,
}

/// What an adapter does to a layer, as it is stored.
pub(super) struct StoredLowRank {
    /// `[rank, inputs]`.
    pub(super) a: (String, StoredTensor),
    /// `[outputs, rank]`.
    pub(super) b: (String, StoredTensor),
    pub(super) rank: usize,
    pub(super) scale: f32,
}

impl Adapter {
    /// Reads the configuration in `dir`, and maps the tensors. What cannot be served is refused.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let config = AdapterConfig::read(&dir.join("adapter_config.json"))?;
        let file = dir.join(TENSORS);
        if !file.is_file() {
            return Err(AdapterError::NoTensors { path: file }.into());
        }
        Ok(Self { dir: dir.to_owned(), config, tensors: safetensors::read_file(file)?.collect() })
    }

    /// What it does to the linear layer `layer`, a weight `[outputs, inputs]`; `None`: nothing.
    pub(super) fn take(
        &mut self,
        layer: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Option<StoredLowRank>, AdapterError> {
        let name = |factor: &str| format!("{PREFIX}{layer}.{factor}.weight");
        let (name_a, name_b) = (name("lora_A"), name("lora_B"));
        let (a, b) = match (self.tensors.remove(&name_a), self.tensors.remove(&name_b)) {
            (None, None) => return Ok(None),
            (Some(a), Some(b)) => (a, b),
            (a, _) => {
                let name = if a.is_none() { name_a } else { name_b };
                return Err(self.refusal(&name, "is not there, but the other factor is".to_owned()));
            }
        };
        let rank = self.config.rank(layer);
        if rank > MAX_RANK {
            let message = format!("has rank {rank}; the most that is supported is {MAX_RANK}");
            return Err(self.refusal(&name_a, message));
        }
        for (name, stored, expected) in [(&name_a, &a, [rank, inputs]), (&name_b, &b, [outputs, rank])] {
            if stored.shape != expected {
                let message = format!(
                    "has shape {:?}, but by adapter_config.json and the base model it is {expected:?}: is the adapter \
                     of another model?",
                    stored.shape
                );
                return Err(self.refusal(name, message));
            }
        }
        let scale = self.config.scale(layer);
        Ok(Some(StoredLowRank { a: (name_a, a), b: (name_b, b), rank, scale }))
    }

    /// Refuses an adapter that changes what no layer has taken, and one that changes nothing.
    pub(super) fn finish(&self, took_any: bool) -> Result<(), AdapterError> {
        if let Some(name) = self.tensors.keys().next() {
            let message = "belongs to nothing that an adapter may change here, the linear layers of attention and MLP \
                           (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj): merge the adapter into its \
                           base model (PEFT: merge_and_unload), and serve that";
            return Err(self.refusal(name, message.to_owned()));
        }
        if took_any {
            return Ok(());
        }
        Err(self.refusal(TENSORS, "has no tensors".to_owned()))
    }

    fn refusal(&self, name: &str, message: String) -> AdapterError {
        AdapterError::Tensor { dir: self.dir.clone(), name: name.to_owned(), message }
    }
}
