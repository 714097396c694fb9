//! The one decoder: it runs what a [`DecoderSpec`] describes, over paged keys and values, on one rank of a
//! tensor-parallel group.
//!
//! [`Decoder::load`] takes this rank's tensors, [`Decoder::prepare`] allocates all buffers, and then each step is one
//! [`Decoder::forward`] and any number of [`Decoder::logits`], which allocate nothing.

mod attention;
mod embedding;
mod head;
mod input;
mod kv_cache;
mod linear;
mod mlp;
mod norm;
mod residual;
mod rotary;
mod spec;

use kernels::{Communicator, Context, DType, Result, Tensor, View};

use attention::{Attention, AttentionBuffers, AttentionStep, HeadWidths};
use embedding::Embedding;
use head::{Head, HeadBuffers};
use linear::Adaptation;
use mlp::{Mlp, MlpBuffers};
use norm::RmsNorm;
use residual::Residual;
use rotary::RotaryTables;

use crate::weights::{Error, Partition, Weights};

pub use input::{ForwardInput, MAX_LOGIT_BIASES, SamplingInput, StepInput, StepLimits};
pub use kv_cache::KvCache;
pub use spec::{DecoderSpec, LayerSpec, PartitionError, RotaryScaling, RotarySpec, TensorNames};

/// A decoder-only transformer with its weights, on one rank.
pub struct Decoder {
    spec: DecoderSpec,
    partition: Partition,
    embedding: Embedding,
    layers: Vec<Layer>,
    final_norm: RmsNorm,
    head: Head,
    workspace: Option<Workspace>,
}

struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: Mlp,
}

/// The buffers of a step.
struct Workspace {
    rotary: RotaryTables,
    /// The residual stream, f32 `[max_step_tokens, hidden]`; at the end of a step, input of the head.
    residual: Tensor,
    /// Input of the current block, of the same shape in the type of activations.
    normed: Tensor,
    /// Output of the current block, likewise, where it is not added to the residual stream at once.
    branch: Tensor,
    attention: AttentionBuffers,
    mlp: MlpBuffers,
    /// f32 `[max_step_tokens, n]`: what is between the two factors of an adapter's change.
    lora: Tensor,
    head: HeadBuffers,
}

impl Decoder {
    /// Takes from `weights` what this rank needs of `spec`, whose partition has been checked
    /// ([`DecoderSpec::check_partition`]).
    pub fn load(spec: DecoderSpec, names: &TensorNames, weights: &mut Weights) -> Result<Self, Error> {
        let embedding = Embedding::load(&spec, names, weights)?;
        let layers = spec.layers.iter().enumerate().map(|(index, layer)| {
            let prefix = format!("{}.{index}.", names.layers);
            let norm = |weights: &mut Weights, name: &str| {
                RmsNorm::load(weights, &format!("{prefix}{name}"), spec.hidden_size, spec.norm_eps)
            };
            Ok(Layer {
                attention_norm: norm(weights, names.attention_norm)?,
                attention: Attention::load(&spec, layer, names, &prefix, weights)?,
                mlp_norm: norm(weights, names.mlp_norm)?,
                mlp: Mlp::load(&spec, names, &prefix, weights)?,
            })
        });
        let layers = layers.collect::<Result<_, Error>>()?;
        let final_norm = RmsNorm::load(weights, names.final_norm, spec.hidden_size, spec.norm_eps)?;
        let head = Head::load(&spec, names, &embedding, weights)?;
        let partition = weights.partition();
        Ok(Self { spec, partition, embedding, layers, final_norm, head, workspace: None })
    }

    /// What it computes.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Key and value heads of this rank.
    pub fn kv_heads(&self) -> usize {
        self.spec.num_kv_heads / self.partition.world_size
    }

    /// Bytes of keys and values of one token on this rank, all layers together.
    pub fn kv_bytes_per_token(&self, dtype: DType) -> usize {
        2 * self.spec.num_layers() * self.kv_heads() * self.spec.head_dim * dtype.size_in_bytes()
    }

    /// The element type in which the embedding is used: that of the checkpoint, or the one asked for.
    pub fn dtype(&self) -> DType {
        self.embedding.table.dtype()
    }

    /// Allocates the buffers for steps within `limits`; those of an earlier call are released first.
    pub fn prepare(&mut self, context: &Context, limits: StepLimits) -> Result<()> {
        self.workspace = None;
        let (spec, world_size) = (&self.spec, self.partition.world_size);
        let rows = limits.max_step_tokens;
        let dtype = context.activation_dtype(self.dtype());
        let branch_rows = if world_size == 1 { 0 } else { rows };
        let heads = HeadWidths::new(spec, world_size);
        let lora_cols = |layer: &Layer| layer.attention.lora_cols().max(layer.mlp.lora_cols());
        let lora_cols = self.layers.iter().map(lora_cols).max().unwrap_or(0);
        self.workspace = Some(Workspace {
            rotary: RotaryTables::new(context, &spec.rotary, limits.max_position)?,
            residual: context.zeros(rows, spec.hidden_size, DType::F32)?,
            normed: context.zeros(rows, spec.hidden_size, dtype)?,
            branch: context.zeros(branch_rows, spec.hidden_size, dtype)?,
            attention: AttentionBuffers::new(context, heads, rows, dtype)?,
            mlp: MlpBuffers::new(context, spec.intermediate_size / world_size, rows, dtype)?,
            lora: context.zeros(rows, lora_cols, DType::F32)?,
            head: HeadBuffers::new(context, spec, &self.head, limits.max_logit_rows, dtype)?,
        });
        Ok(())
    }

    /// Bytes of the buffers of a step; zero before [`Decoder::prepare`].
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.as_ref().map_or(0, Workspace::size_in_bytes)
    }

    /// Computes one step: writes keys and values of all rows to `cache` and keeps the rows' hidden states for
    /// [`Decoder::logits`]. All ranks make the same call.
    ///
    /// # Panics
    /// Where [`Decoder::prepare`] was not called, or the step is larger than its limits.
    pub fn forward(
        &mut self,
        context: &Context,
        communicator: &mut dyn Communicator,
        input: &StepInput<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        let workspace = self.workspace.as_mut().expect("prepare comes before forward");
        let rows = input.token_ids.cols();
        let mut normed = workspace.normed.view_mut().narrow_rows(0, rows);
        let branch_rows = rows.min(workspace.branch.rows());
        let mut residual = Residual {
            stream: workspace.residual.view_mut().narrow_rows(0, rows),
            branch: workspace.branch.view_mut().narrow_rows(0, branch_rows),
            is_pending: false,
        };
        let mut adaptation = Adaptation { rows: input.adapters, hidden: workspace.lora.view_mut() };
        self.embedding.forward(context, communicator, input.token_ids, residual.stream.reborrow())?;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            residual.normalize(context, &layer.attention_norm, normed.reborrow())?;
            let mut step = AttentionStep {
                context,
                communicator: &mut *communicator,
                input,
                rotary: &workspace.rotary,
                buffers: &mut workspace.attention,
                adaptation: &mut adaptation,
            };
            layer.attention.forward(&mut step, normed.as_view(), cache, &mut residual)?;
            residual.normalize(context, &layer.mlp_norm, normed.reborrow())?;
            let mlp = (&mut workspace.mlp, &mut adaptation);
            layer.mlp.forward(context, communicator, mlp, normed.as_view(), &mut residual)?;
        }
        // The last norm is for the rows that get logits.
        residual.finish(context)
    }

    /// Logits, f32 `[n, vocab]`, of the rows of the last step that `rows` (u32 `[1, n]`) names. All ranks make the same
    /// call and get the same.
    ///
    /// # Panics
    /// Where [`Decoder::prepare`] was not called, or there are more rows than its limits say.
    pub fn logits(
        &mut self,
        context: &Context,
        communicator: &mut dyn Communicator,
        rows: View<'_>,
    ) -> Result<View<'_>> {
        let workspace = self.workspace.as_mut().expect("prepare comes before logits");
        let hidden = workspace.residual.view();
        self.head.forward(context, communicator, &self.final_norm, hidden, rows, &mut workspace.head)
    }
}

impl Workspace {
    fn size_in_bytes(&self) -> usize {
        let hidden = [&self.residual, &self.normed, &self.branch, &self.lora].map(Tensor::size_in_bytes);
        hidden.iter().sum::<usize>()
            + self.rotary.size_in_bytes()
            + self.attention.size_in_bytes()
            + self.mlp.size_in_bytes()
            + self.head.size_in_bytes()
    }
}
