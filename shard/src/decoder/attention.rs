//! Self-attention with grouped queries over the paged cache.

use kernels::ops::attention::{self, RotaryAndPages, paged_attention, rotary_write_kv};
use kernels::{AttentionParams, Communicator, Context, DType, KvLayer, Result, Tensor, View};

use super::StepInput;
use super::linear::{Adaptation, ColumnParallel, Projection, RowParallel, lora_cols};
use super::norm::RmsNorm;
use super::residual::Residual;
use super::rotary::RotaryTables;
use super::spec::{DecoderSpec, LayerSpec, TensorNames};
use crate::weights::{Error, Weights};

pub(super) struct Attention {
    qkv: ColumnParallel<3>,
    head_norms: Option<HeadNorms>,
    output: RowParallel,
    params: AttentionParams<'static>,
    widths: HeadWidths,
}

/// Norms of queries and keys, head by head.
struct HeadNorms {
    query: RmsNorm,
    key: RmsNorm,
}

/// Columns of this rank's queries and of its keys (or values).
#[derive(Clone, Copy)]
pub(super) struct HeadWidths {
    query: usize,
    key: usize,
}

impl HeadWidths {
    pub(super) fn new(spec: &DecoderSpec, world_size: usize) -> Self {
        let head_dim = spec.head_dim;
        Self { query: spec.num_heads / world_size * head_dim, key: spec.num_kv_heads / world_size * head_dim }
    }
}

/// Scratch space, shared by the layers.
pub(super) struct AttentionBuffers {
    qkv: Tensor,
    attended: Tensor,
}

impl AttentionBuffers {
    pub(super) fn new(context: &Context, widths: HeadWidths, max_rows: usize, dtype: DType) -> Result<Self> {
        Ok(Self {
            qkv: context.zeros(max_rows, widths.query + 2 * widths.key, dtype)?,
            attended: context.zeros(max_rows, widths.query, dtype)?,
        })
    }

    pub(super) fn size_in_bytes(&self) -> usize {
        self.qkv.size_in_bytes() + self.attended.size_in_bytes()
    }
}

impl Attention {
    pub(super) fn load(
        spec: &DecoderSpec,
        layer: &LayerSpec,
        names: &TensorNames,
        prefix: &str,
        weights: &mut Weights,
    ) -> Result<Self, Error> {
        let (queries, keys) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        let input = |name: &str, outputs: usize| Projection {
            name: format!("{prefix}{name}"),
            outputs,
            inputs: spec.hidden_size,
            has_bias: spec.qkv_bias,
        };
        let head_norm = |weights: &mut Weights, name: &str| {
            RmsNorm::load(weights, &format!("{prefix}{name}"), spec.head_dim, spec.norm_eps)
        };
        Ok(Self {
            qkv: ColumnParallel::load(
                weights,
                &[input(names.query, queries), input(names.key, keys), input(names.value, keys)],
            )?,
            head_norms: if spec.qk_norm {
                let query = head_norm(weights, names.query_norm)?;
                Some(HeadNorms { query, key: head_norm(weights, names.key_norm)? })
            } else {
                None
            },
            output: RowParallel::load(
                weights,
                Projection {
                    name: format!("{prefix}{}", names.output),
                    outputs: spec.hidden_size,
                    inputs: queries,
                    has_bias: spec.output_bias,
                },
            )?,
            params: AttentionParams {
                window: layer.window,
                ..AttentionParams::new((spec.head_dim as f32).powf(-0.5))
            },
            widths: HeadWidths::new(spec, weights.partition().world_size),
        })
    }

    /// Columns that what adapters change needs between its factors.
    pub(super) fn lora_cols(&self) -> usize {
        lora_cols([self.qkv.lora(), self.output.lora()])
    }

    /// `x`: `[rows, hidden]`. Writes this step's keys and values to `cache` first, then attends over it and adds what
    /// comes of it to the residual stream.
    pub(super) fn forward(
        &self,
        step: &mut AttentionStep<'_, '_>,
        x: View<'_>,
        cache: &mut KvLayer,
        residual: &mut Residual<'_>,
    ) -> Result<()> {
        let AttentionStep { context, communicator, input, rotary: tables, buffers, adaptation } = step;
        let query = self.widths.query;
        let mut qkv = buffers.qkv.view_mut().narrow_rows(0, x.rows());
        self.qkv.forward(context, adaptation, x, qkv.reborrow())?;
        let norms = self.head_norms.as_ref().map(|HeadNorms { query, key }| attention::HeadNorms {
            query: query.weight(),
            key: key.weight(),
            eps: query.eps(),
        });
        let places = RotaryAndPages { positions: input.positions, tables: tables.view(), slots: input.slots };
        rotary_write_kv(context, qkv.reborrow(), norms, places, cache)?;
        let qkv = qkv.as_view();
        let mut attended = buffers.attended.view_mut().narrow_rows(0, x.rows());
        let queries = qkv.narrow_cols(0, query);
        paged_attention(context, queries, cache, &input.batch, self.params, attended.reborrow())?;
        residual.add_projection(context, &mut **communicator, (&self.output, adaptation), attended.as_view())
    }
}

/// What is the same for all layers of a step.
pub(super) struct AttentionStep<'a, 'b> {
    pub(super) context: &'a Context,
    pub(super) communicator: &'a mut dyn Communicator,
    pub(super) input: &'a StepInput<'a>,
    pub(super) rotary: &'a RotaryTables,
    pub(super) buffers: &'a mut AttentionBuffers,
    pub(super) adaptation: &'a mut Adaptation<'b>,
}
