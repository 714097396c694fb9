//! Where checkpoints come from.

use std::path::{Path, PathBuf};

/// Of vocabulary 384; token 2 ends a sequence; 1024 positions.
pub(crate) fn llama() -> PathBuf {
    golden("llama")
}

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/goldens").join(name)
}

/// What transformers computed for a prompt.
#[derive(serde::Deserialize)]
pub(crate) struct Prompt {
    pub(crate) token_ids: Vec<u32>,
    /// Of each token after the ones before it; none for the first.
    pub(crate) logprobs: Vec<Option<f32>>,
    /// The tokens that follow, always the most likely, past any end of sequence.
    pub(crate) greedy: Vec<u32>,
}

pub(crate) fn golden_prompts(name: &str) -> Vec<Prompt> {
    #[derive(serde::Deserialize)]
    struct Golden {
        prompts: Vec<Prompt>,
    }
    let text = std::fs::read(golden(name).join("golden.json")).unwrap();
    serde_json::from_slice::<Golden>(&text).unwrap().prompts
}

/// A copy of [`llama`] in which the embedding of `token_id` is not a number, so that no sequence with this token has
/// finite logits, and all others have the ones of the original.
pub(crate) fn llama_with_broken_token(token_id: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json"] {
        std::fs::copy(llama().join(name), dir.path().join(name)).unwrap();
    }
    let mut bytes = std::fs::read(llama().join("model.safetensors")).unwrap();
    let (header_len, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let info = metadata.info("model.embed_tokens.weight").unwrap();
    let row_bytes = info.shape[1] * size_of::<f32>();
    let row = 8 + header_len + info.data_offsets.0 + token_id * row_bytes;
    bytes[row..row + size_of::<f32>()].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    dir
}
