//! What can go wrong between a message and its answer, by what the other side does about it.

/// Why the engine did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request breaks the contract; nothing was changed. The caller corrects the field.
    #[error("{field} {message}")]
    InvalidArgument {
        /// The field, with its path in the request: `admit[0].sampling.top_p`.
        field: String,
        /// What it must be, and what it is.
        message: String,
    },
    /// `Warmup` comes first.
    #[error("there is no KV cache yet: call Warmup before the first step")]
    NotWarmedUp,
    /// A step of the same `Run` stream was refused before this one, so the two sides no longer agree on the
    /// sequences' state. The caller opens a new stream.
    #[error("an earlier step of this Run stream was refused: open a new stream")]
    RunRefused,
    /// The KV cache does not fit. The operator gives memory or asks for less.
    #[error("{0}")]
    OutOfMemory(String),
    /// Ranks of one group computed different steps; the process must end.
    #[error(
        "rank {rank} computes step {step_id} with {num_entries} sequences, but rank 0 does not: \
         all ranks must get the same messages in the same order"
    )]
    RanksDisagree {
        /// This rank.
        rank: usize,
        /// The step that this rank computes.
        step_id: u64,
        /// Sequences that this rank computes in it.
        num_entries: usize,
    },
    /// An operation or a peer failed; the process must end.
    #[error(transparent)]
    Compute(#[from] kernels::Error),
}

impl Error {
    pub(crate) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidArgument { field: field.into(), message: message.into() }
    }

    /// Memory that is lacking at the start is no reason to end: the operator asks for less.
    pub(crate) fn of_warmup(self) -> Self {
        match self {
            Self::Compute(kernels::Error::OutOfMemory(message)) => Self::OutOfMemory(format!(
                "{message}: lower max_step_tokens (--max-batch-prefill-tokens), max_step_sequences (--max-batch-size) or \
                 --cuda-memory-fraction, or stop what else uses the GPU"
            )),
            other => other,
        }
    }

    /// Whether this process can no longer keep its promises and has to end.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::RanksDisagree { .. } | Self::Compute(_))
    }
}
