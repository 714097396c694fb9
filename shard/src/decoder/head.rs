//! From hidden states to logits, the vocabulary dealt out to the ranks where it divides.

use kernels::ops::embedding::gather_rows;
use kernels::ops::linear::{LinearPart, Weight, linear};
use kernels::{Communicator, Context, DType, Result, Tensor, View};

use super::embedding::{Embedding, vocab_slice};
use super::norm::RmsNorm;
use super::spec::{DecoderSpec, TensorNames};
use crate::weights::{Error, Weights};

pub(super) struct Head {
    /// `[this rank's vocabulary, hidden]`; where it is tied, the embedding's table.
    weight: Tensor,
}

/// Scratch space and result.
pub(super) struct HeadBuffers {
    hidden: Tensor,
    normed: Tensor,
    /// This rank's columns, where the vocabulary is partitioned.
    part: Option<Tensor>,
    logits: Tensor,
}

impl HeadBuffers {
    pub(super) fn new(
        context: &Context,
        spec: &DecoderSpec,
        head: &Head,
        max_rows: usize,
        dtype: DType,
    ) -> Result<Self> {
        let zeros = |cols: usize, dtype: DType| context.zeros(max_rows, cols, dtype);
        let part_cols = head.weight.rows();
        Ok(Self {
            hidden: zeros(spec.hidden_size, DType::F32)?,
            normed: zeros(spec.hidden_size, dtype)?,
            part: (part_cols < spec.vocab_size).then(|| zeros(part_cols, DType::F32)).transpose()?,
            logits: zeros(spec.vocab_size, DType::F32)?,
        })
    }

    pub(super) fn size_in_bytes(&self) -> usize {
        let part = self.part.as_ref().map_or(0, Tensor::size_in_bytes);
        self.hidden.size_in_bytes() + self.normed.size_in_bytes() + part + self.logits.size_in_bytes()
    }
}

impl Head {
    pub(super) fn load(
        spec: &DecoderSpec,
        names: &TensorNames,
        embedding: &Embedding,
        weights: &mut Weights,
    ) -> Result<Self, Error> {
        if spec.tied_head {
            return Ok(Self { weight: embedding.table.clone() });
        }
        let shape = [spec.vocab_size, spec.hidden_size];
        let slice = vocab_slice(spec, weights.partition());
        Ok(Self { weight: weights.take_matrix(&format!("{}.weight", names.head), shape, slice)? })
    }

    /// Logits `[n, vocab]` of the `n` rows of `hidden` that `rows` (u32 `[1, n]`) names, which `norm` has not seen yet, the same on all ranks.
    pub(super) fn forward<'a>(
        &self,
        context: &Context,
        communicator: &mut dyn Communicator,
        norm: &RmsNorm,
        hidden: View<'_>,
        rows: View<'_>,
        buffers: &'a mut HeadBuffers,
    ) -> Result<View<'a>> {
        let num_rows = rows.cols();
        let mut gathered = buffers.hidden.view_mut().narrow_rows(0, num_rows);
        gather_rows(context, hidden, rows, gathered.reborrow())?;
        let mut normed = buffers.normed.view_mut().narrow_rows(0, num_rows);
        norm.forward(context, gathered.as_view(), normed.reborrow())?;
        let weight = [LinearPart { weight: Weight::Dense(&self.weight), bias: None }];
        let mut logits = buffers.logits.view_mut().narrow_rows(0, num_rows);
        if let Some(part) = &mut buffers.part {
            let mut part = part.view_mut().narrow_rows(0, num_rows);
            linear(context, normed.as_view(), &weight, part.reborrow())?;
            communicator.all_gather_cols(part.as_view(), logits)?;
        } else {
            linear(context, normed.as_view(), &weight, logits.reborrow())?;
        }
        Ok(buffers.logits.view().narrow_rows(0, num_rows))
    }
}
