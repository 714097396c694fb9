//! What a decoder-only transformer is made of: the vocabulary in which `models/` describes architectures.

/// One decoder. Sizes are those of the whole model; ranks, element types and devices are no concern of it.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent property of architectures")]
pub struct DecoderSpec {
    /// Rows of the embedding and of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the two halves of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads` (Ainslie et al. 2023, "GQA", arXiv:2305.13245).
    pub num_kv_heads: usize,
    /// Width of a head, even. `num_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Longest sequence in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in all norms.
    pub norm_eps: f32,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The projection behind attention has a bias.
    pub output_bias: bool,
    /// The MLP's projections have biases.
    pub mlp_bias: bool,
    /// Queries and keys are normalized head by head before rotation (Henry et al. 2020, arXiv:2010.04245).
    pub qk_norm: bool,
    /// The head multiplies with the embedding's table.
    pub tied_head: bool,
    /// How positions turn queries and keys.
    pub rotary: RotarySpec,
    /// From the embedding to the head.
    pub layers: Vec<LayerSpec>,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpec {
    /// A token attends to this many tokens at most, itself included (Beltagy et al. 2020, arXiv:2004.05150).
    pub window: Option<usize>,
}

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RotarySpec {
    /// Leading elements of each head that are turned, even; at most `head_dim`.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f32,
    /// How frequencies are changed for longer contexts.
    pub scaling: RotaryScaling,
}

/// How rotary frequencies are changed for contexts longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    Default,
    /// Low frequencies are divided by `factor`, high ones kept, those between interpolated (Llama 3.1; Grattafiori et
    /// al. 2024, arXiv:2407.21783).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f32,
        /// Context length of pre-training, in tokens.
        original_max_position_embeddings: f32,
    },
}

/// Names of a checkpoint's tensors, without `.weight` and `.bias`. Those of a layer stand behind `{layers}.{index}.`.
#[derive(Debug, Clone, Copy)]
pub struct TensorNames {
    /// Token embedding, `[vocab, hidden]`.
    pub embedding: &'static str,
    /// What stands before a layer's index.
    pub layers: &'static str,
    /// Norm before attention.
    pub attention_norm: &'static str,
    /// Query projection, `[heads * head_dim, hidden]`.
    pub query: &'static str,
    /// Key projection, `[kv_heads * head_dim, hidden]`.
    pub key: &'static str,
    /// Value projection, `[kv_heads * head_dim, hidden]`.
    pub value: &'static str,
    /// Norm of each query head.
    pub query_norm: &'static str,
    /// Norm of each key head.
    pub key_norm: &'static str,
    /// Projection behind attention, `[hidden, heads * head_dim]`.
    pub output: &'static str,
    /// Norm before the MLP.
    pub mlp_norm: &'static str,
    /// Gate of the MLP, `[intermediate, hidden]`.
    pub gate: &'static str,
    /// First half of the MLP, `[intermediate, hidden]`.
    pub up: &'static str,
    /// Second half of the MLP, `[hidden, intermediate]`.
    pub down: &'static str,
    /// Norm before the head.
    pub final_norm: &'static str,
    /// Head, `[vocab, hidden]`.
    pub head: &'static str,
    /// Ends of names of tensors that older checkpoints hold although they follow from config.json.
    pub redundant: &'static [&'static str],
}

/// Sizes that a number of ranks does not divide.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{size} is {value}, which {world_size} shards do not divide: use --num-shard {}", one_of(working))]
pub struct PartitionError {
    /// The size's name in config.json.
    pub size: &'static str,
    /// Its value.
    pub value: usize,
    /// The number of ranks asked for.
    pub world_size: usize,
    /// All numbers of ranks that work.
    pub working: Vec<usize>,
}

impl DecoderSpec {
    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// The window that all layers have, if they do; the largest, if they differ.
    pub fn sliding_window(&self) -> Option<usize> {
        self.layers.iter().map(|layer| layer.window).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// Whether heads and MLP can be dealt out to `world_size` ranks. (The vocabulary need not divide: then each rank holds
    /// all of it.)
    pub fn check_partition(&self, world_size: usize) -> Result<(), PartitionError> {
        let sizes = [
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("intermediate_size", self.intermediate_size),
        ];
        let divides = |ranks: usize| sizes.iter().all(|(_, value)| value.is_multiple_of(ranks));
        match sizes.iter().find(|(_, value)| world_size == 0 || !value.is_multiple_of(world_size)) {
            None => Ok(()),
            Some(&(size, value)) => Err(PartitionError {
                size,
                value,
                world_size,
                working: (1..=self.num_kv_heads).filter(|&ranks| divides(ranks)).collect(),
            }),
        }
    }
}

fn one_of(values: &[usize]) -> String {
    let values: Vec<_> = values.iter().map(usize::to_string).collect();
    match values.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => values.concat(),
    }
}
