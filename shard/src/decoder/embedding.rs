//! Token embedding, its vocabulary dealt out to the ranks where it divides.

use kernels::{Communicator, Context, Result, Tensor, View, ViewMut};

use super::spec::{DecoderSpec, TensorNames};
use crate::weights::{Error, Partition, Slice, Weights};

pub(super) struct Embedding {
    /// `[this rank's vocabulary, hidden]`.
    pub(super) table: Tensor,
    first_id: u32,
    is_partitioned: bool,
}

/// The ranks share a vocabulary that they divide; otherwise each holds all of it.
pub(super) fn vocab_slice(spec: &DecoderSpec, partition: Partition) -> Slice {
    if spec.vocab_size.is_multiple_of(partition.world_size) { Slice::Rows } else { Slice::Whole }
}

impl Embedding {
    pub(super) fn load(
        spec: &DecoderSpec,
        names: &TensorNames,
        weights: &mut Weights,
    ) -> Result<Self, Error> {
        let partition = weights.partition();
        let slice = vocab_slice(spec, partition);
        let shape = [spec.vocab_size, spec.hidden_size];
        let table = weights.take_matrix(&format!("{}.weight", names.embedding), shape, slice)?;
        let is_partitioned = slice == Slice::Rows && partition.world_size > 1;
        let first_id = if is_partitioned { partition.range(spec.vocab_size).start as u32 } else { 0 };
        Ok(Self { table, first_id, is_partitioned })
    }

    /// `out`: `[ids, hidden]`, the same on all ranks.
    pub(super) fn forward(
        &self,
        context: &Context,
        communicator: &mut dyn Communicator,
        ids: View<'_>,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        kernels::ops::embedding::embedding(context, ids, &self.table, self.first_id, out.reborrow())?;
        if self.is_partitioned { communicator.all_reduce_sum(out) } else { Ok(()) }
    }
}
