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
mod rotary;
mod spec;

use kernels::ops::activation::add;
use kernels::{Communicator, Context, DType, Result, Tensor, View};

use attention::{Attention, AttentionBuffers, AttentionStep, HeadWidths};
use embedding::Embedding;
use head::{Head, HeadBuffers};
use mlp::{Mlp, MlpBuffers};
use norm::RmsNorm;
use rotary::RotaryTables;

use crate::weights::{Error, Partition, Weights};

pub use input::{ForwardInput, StepLimits};
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
    /// The residual stream, f32 `[max_step_tokens, hidden]`, as are the next two; at the end of a step, input of the head.
    residual: Tensor,
    /// Input of the current block.
    normed: Tensor,
    /// Output of the current block.
    branch: Tensor,
    attention: AttentionBuffers,
    mlp: MlpBuffers,
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

    /// Allocates the buffers for steps within `limits`; those of an earlier call are released.
    pub fn prepare(&mut self, limits: StepLimits) {
        let (spec, world_size) = (&self.spec, self.partition.world_size);
        let rows = limits.max_step_tokens;
        let hidden = || Tensor::zeros(rows, spec.hidden_size, DType::F32);
        self.workspace = Some(Workspace {
            rotary: RotaryTables::new(&spec.rotary, limits.max_position),
            residual: hidden(),
            normed: hidden(),
            branch: hidden(),
            attention: AttentionBuffers::new(HeadWidths::new(spec, world_size), rows),
            mlp: MlpBuffers::new(spec, world_size, rows),
            head: HeadBuffers::new(spec, &self.head, limits.max_logit_rows),
        });
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
        input: &ForwardInput,
        cache: &mut KvCache,
    ) -> Result<()> {
        let workspace = self.workspace.as_mut().expect("prepare comes before forward");
        let rows = input.token_ids.len();
        let mut residual = workspace.residual.view_mut().narrow_rows(0, rows);
        let mut normed = workspace.normed.view_mut().narrow_rows(0, rows);
        let mut branch = workspace.branch.view_mut().narrow_rows(0, rows);

        self.embedding.forward(context, communicator, &input.token_ids, residual.reborrow())?;
        if let Some(first) = self.layers.first() {
            first.attention_norm.forward(context, residual.as_view(), normed.reborrow())?;
        }
        for (index, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            let mut step = AttentionStep {
                context,
                communicator: &mut *communicator,
                input,
                rotary: &workspace.rotary,
                buffers: &mut workspace.attention,
            };
            layer.attention.forward(&mut step, normed.as_view(), cache, branch.reborrow())?;
            layer.mlp_norm.add_forward(context, residual.reborrow(), branch.as_view(), normed.reborrow())?;
            let mlp = &mut workspace.mlp;
            layer.mlp.forward(context, communicator, mlp, normed.as_view(), branch.reborrow())?;
            let (residual, branch) = (residual.reborrow(), branch.as_view());
            if let Some(next) = self.layers.get(index + 1) {
                next.attention_norm.add_forward(context, residual, branch, normed.reborrow())?;
            } else {
                // The last norm is for the rows that get logits.
                add(context, residual, branch)?;
            }
        }
        Ok(())
    }

    /// Logits, f32 `[rows.len(), vocab]`, of rows of the last step. All ranks make the same call and get the same.
    ///
    /// # Panics
    /// Where [`Decoder::prepare`] was not called, or there are more rows than its limits say.
    pub fn logits(
        &mut self,
        context: &Context,
        communicator: &mut dyn Communicator,
        rows: &[u32],
    ) -> Result<View<'_>> {
        let workspace = self.workspace.as_mut().expect("prepare comes before logits");
        let hidden = workspace.residual.view();
        self.head.forward(context, communicator, &self.final_norm, hidden, rows, &mut workspace.head)
    }
}

impl Workspace {
    fn size_in_bytes(&self) -> usize {
        let hidden = [&self.residual, &self.normed, &self.branch].map(Tensor::size_in_bytes);
        hidden.iter().sum::<usize>()
            + self.rotary.size_in_bytes()
            + self.attention.size_in_bytes()
            + self.mlp.size_in_bytes()
            + self.head.size_in_bytes()
    }
}
