//! Self-attention with grouped queries over the paged cache.

use kernels::ops::attention::{paged_attention, write_kv};
use kernels::ops::rotary::rotary;
use kernels::{AttentionParams, Communicator, Context, DType, KvLayer, Result, Tensor, View, ViewMut};

use super::ForwardInput;
use super::linear::{ColumnParallel, Projection, RowParallel};
use super::norm::RmsNorm;
use super::rotary::RotaryTables;
use super::spec::{DecoderSpec, LayerSpec, TensorNames};
use crate::weights::{Error, Weights};

pub(super) struct Attention {
    qkv: ColumnParallel<3>,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    output: RowParallel,
    params: AttentionParams<'static>,
    widths: HeadWidths,
}

/// Columns of this rank's queries and of its keys (or values), and of one head.
#[derive(Clone, Copy)]
pub(super) struct HeadWidths {
    query: usize,
    key: usize,
    head_dim: usize,
}

impl HeadWidths {
    pub(super) fn new(spec: &DecoderSpec, world_size: usize) -> Self {
        let head_dim = spec.head_dim;
        Self {
            query: spec.num_heads / world_size * head_dim,
            key: spec.num_kv_heads / world_size * head_dim,
            head_dim,
        }
    }
}

/// Scratch space, shared by the layers.
pub(super) struct AttentionBuffers {
    qkv: Tensor,
    attended: Tensor,
}

impl AttentionBuffers {
    pub(super) fn new(widths: HeadWidths, max_rows: usize) -> Self {
        Self {
            qkv: Tensor::zeros(max_rows, widths.query + 2 * widths.key, DType::F32),
            attended: Tensor::zeros(max_rows, widths.query, DType::F32),
        }
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
            spec.qk_norm
                .then(|| RmsNorm::load(weights, &format!("{prefix}{name}"), spec.head_dim, spec.norm_eps))
                .transpose()
        };
        Ok(Self {
            qkv: ColumnParallel::load(
                weights,
                [input(names.query, queries), input(names.key, keys), input(names.value, keys)],
            )?,
            query_norm: head_norm(weights, names.query_norm)?,
            key_norm: head_norm(weights, names.key_norm)?,
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

    /// `x`, `out`: `[rows, hidden]`. Writes this step's keys and values to `cache` first, then attends over it.
    pub(super) fn forward(
        &self,
        step: &mut AttentionStep<'_>,
        x: View<'_>,
        cache: &mut KvLayer,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let AttentionStep { context, communicator, input, rotary: tables, buffers } = step;
        let HeadWidths { query, key, head_dim } = self.widths;
        let mut qkv = buffers.qkv.view_mut().narrow_rows(0, x.rows());
        self.qkv.forward(context, x, qkv.reborrow())?;
        if let Some(norm) = &self.query_norm {
            norm.forward_heads(context, qkv.reborrow().narrow_cols(0, query))?;
        }
        if let Some(norm) = &self.key_norm {
            norm.forward_heads(context, qkv.reborrow().narrow_cols(query, key))?;
        }
        let positions = View::from_slice(&input.positions, 1, input.positions.len());
        let queries_and_keys = qkv.reborrow().narrow_cols(0, query + key);
        rotary(context, queries_and_keys, head_dim, positions, tables.view())?;

        let qkv = qkv.as_view();
        let (keys, values) = (qkv.narrow_cols(query, key), qkv.narrow_cols(query + key, key));
        write_kv(context, keys, values, &input.slot_mapping, cache)?;
        let mut attended = buffers.attended.view_mut().narrow_rows(0, x.rows());
        let queries = qkv.narrow_cols(0, query);
        paged_attention(context, queries, cache, &input.attention_batch(), self.params, attended.reborrow())?;
        self.output.forward(context, &mut **communicator, attended.as_view(), out)
    }
}

/// What is the same for all layers of a step.
pub(super) struct AttentionStep<'a> {
    pub(super) context: &'a Context,
    pub(super) communicator: &'a mut dyn Communicator,
    pub(super) input: &'a ForwardInput,
    pub(super) rotary: &'a RotaryTables,
    pub(super) buffers: &'a mut AttentionBuffers,
}
