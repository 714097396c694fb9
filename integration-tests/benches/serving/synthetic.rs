//! Checkpoints of a published shape with random weights: what a step costs does not depend on what the weights say.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, json};

/// The shape of a published model.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) ffn: usize,
    pub(crate) vocab: usize,
    pub(crate) tied: bool,
    /// Query, key and value have biases: Qwen 2's architecture, else Llama's.
    pub(crate) qkv_bias: bool,
    pub(crate) rope_theta: f64,
    pub(crate) max_positions: usize,
}

/// The shape of SmolLM2-135M.
const SMOLLM2_135M: Shape = Shape {
    name: "SmolLM2-135M shape",
    hidden: 576,
    layers: 30,
    heads: 9,
    kv_heads: 3,
    ffn: 1536,
    vocab: 49152,
    tied: true,
    qkv_bias: false,
    rope_theta: 10_000.0,
    max_positions: 2048,
};

/// The shape of Qwen2.5-0.5B.
const QWEN25_05B: Shape = Shape {
    name: "Qwen2.5-0.5B shape",
    hidden: 896,
    layers: 24,
    heads: 14,
    kv_heads: 2,
    ffn: 4864,
    vocab: 151_936,
    tied: true,
    qkv_bias: true,
    rope_theta: 10_000.0,
    max_positions: 2048,
};

/// The shape of TinyLlama-1.1B.
const TINYLLAMA_1B: Shape = Shape {
    name: "TinyLlama-1.1B shape",
    hidden: 2048,
    layers: 22,
    heads: 32,
    kv_heads: 4,
    ffn: 5632,
    vocab: 32000,
    tied: false,
    qkv_bias: false,
    rope_theta: 10_000.0,
    max_positions: 2048,
};

/// The shape of Llama-3.1-8B, for GPUs. Its frequencies are not scaled: that costs nothing in a step.
const LLAMA31_8B: Shape = Shape {
    name: "Llama-3.1-8B shape",
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    ffn: 14336,
    vocab: 128_256,
    tied: false,
    qkv_bias: false,
    rope_theta: 500_000.0,
    max_positions: 131_072,
};

/// By the names that command lines know them by. The last is too large for what is measured without being named.
pub(crate) const SHAPES: [(&str, &Shape); 4] =
    [("135m", &SMOLLM2_135M), ("0.5b", &QWEN25_05B), ("1b", &TINYLLAMA_1B), ("8b", &LLAMA31_8B)];

/// Random weights are made once and then taken from this many again and again: what a step costs does not depend on it,
/// and a file of 16 GB is made at the speed of the disk.
const RANDOM_WEIGHTS: usize = (8 << 20) - 9;

/// Element type of stored weights. All hold the same numbers, those of bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    Bf16,
    F16,
    F32,
}

impl Stored {
    /// As in a safetensors header.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    /// As in config.json.
    fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }

    pub(crate) fn size_in_bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn write(self, file: &mut impl Write, value: bf16) -> std::io::Result<()> {
        match self {
            Self::Bf16 => file.write_all(&value.to_le_bytes()),
            Self::F16 => file.write_all(&f16::from_f32(value.to_f32()).to_le_bytes()),
            Self::F32 => file.write_all(&value.to_f32().to_le_bytes()),
        }
    }
}

impl Shape {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let head_dim = self.hidden / self.heads;
        let (q, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            let mut push = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
                if self.qkv_bias && ["q_proj", "k_proj", "v_proj"].iter().any(|end| name.ends_with(end)) {
                    tensors.push((format!("model.layers.{layer}.{name}.bias"), shape[..1].to_vec()));
                }
            };
            push("input_layernorm", &[self.hidden]);
            push("self_attn.q_proj", &[q, self.hidden]);
            push("self_attn.k_proj", &[kv, self.hidden]);
            push("self_attn.v_proj", &[kv, self.hidden]);
            push("self_attn.o_proj", &[self.hidden, q]);
            push("post_attention_layernorm", &[self.hidden]);
            push("mlp.gate_proj", &[self.ffn, self.hidden]);
            push("mlp.up_proj", &[self.ffn, self.hidden]);
            push("mlp.down_proj", &[self.hidden, self.ffn]);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        }
        tensors
    }

    /// Weights that a decode step reads: all but an untied embedding table, of which it reads single rows.
    pub(crate) fn weights_per_step(&self) -> usize {
        let elements: usize = self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let embedding = if self.tied { 0 } else { self.vocab * self.hidden };
        elements - embedding
    }

    /// Writes the checkpoint below `parent` (once) with the tokenizer of `tokenizer_from`, and returns its directory.
    pub(crate) fn write(
        &self,
        stored: Stored,
        parent: &Path,
        tokenizer_from: &Path,
    ) -> anyhow::Result<PathBuf> {
        let directory = parent.join(format!("{}-{}", self.name.replace(' ', "-"), stored.name()));
        if directory.join("complete").exists() {
            return Ok(directory);
        }
        fs::create_dir_all(&directory)?;
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(tokenizer_from.join(file), directory.join(file))?;
        }
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "torch_dtype": stored.torch_name(), "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn, "vocab_size": self.vocab, "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta, "max_position_embeddings": self.max_positions, "tie_word_embeddings": self.tied,
        });
        if self.qkv_bias {
            config["architectures"] = json!(["Qwen2ForCausalLM"]);
            config["model_type"] = json!("qwen2");
        }
        fs::write(directory.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
        self.write_weights(stored, &directory.join("model.safetensors"))?;
        fs::write(directory.join("complete"), "")?;
        Ok(directory)
    }

    fn write_weights(&self, stored: Stored, path: &Path) -> anyhow::Result<()> {
        let mut header = Map::new();
        let mut end = 0;
        for (name, shape) in self.tensors() {
            let begin = end;
            end += shape.iter().product::<usize>() * stored.size_in_bytes();
            header
                .insert(name, json!({"dtype": stored.name(), "shape": shape, "data_offsets": [begin, end]}));
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(64) + 56, b' ');
        let mut file = BufWriter::new(fs::File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        let random = self.random_weights(stored)?;
        let mut one = Vec::new();
        stored.write(&mut one, bf16::ONE)?;
        let mut at = 0;
        for (name, shape) in self.tensors() {
            let mut left = shape.iter().product::<usize>() * stored.size_in_bytes();
            if name.ends_with("norm.weight") {
                file.write_all(&one.repeat(left / one.len()))?;
                continue;
            }
            while left > 0 {
                let piece = &random[at..random.len().min(at + left)];
                file.write_all(piece)?;
                left -= piece.len();
                at = (at + piece.len()) % random.len();
            }
        }
        file.flush()?;
        Ok(())
    }

    /// Uniform in -0.035 .. 0.035: the variance of the usual initialization.
    fn random_weights(&self, stored: Stored) -> std::io::Result<Vec<u8>> {
        let elements = self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes = Vec::new();
        for _ in 0..RANDOM_WEIGHTS.min(elements) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.07;
            stored.write(&mut bytes, bf16::from_bits((value.to_bits() >> 16) as u16))?;
        }
        Ok(bytes)
    }
}
