//! What is measured, and what it costs at least.

use std::fmt;

use crate::synthetic::Shape;

/// One kind of step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    /// A prompt of this many tokens in one step, and the logits of its last token.
    Prefill(usize),
    /// One token for each of `batch` sequences that have `context` tokens.
    Decode { batch: usize, context: usize },
}

/// Tokens that each sequence has where the context is long.
pub(crate) const LONG_CONTEXT: usize = 8192;

impl Workload {
    pub(crate) const ALL: [Self; 8] = [
        Self::Prefill(512),
        Self::Decode { batch: 1, context: 0 },
        Self::Decode { batch: 2, context: 0 },
        Self::Decode { batch: 4, context: 0 },
        Self::Decode { batch: 8, context: 0 },
        Self::Decode { batch: 16, context: 0 },
        Self::Decode { batch: 1, context: LONG_CONTEXT },
        Self::Decode { batch: 4, context: LONG_CONTEXT },
    ];

    /// By which they are chosen.
    pub(crate) const KINDS: [&str; 3] = ["prefill", "decode", "long"];

    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Prefill(_) => Self::KINDS[0],
            Self::Decode { context: 0, .. } => Self::KINDS[1],
            Self::Decode { .. } => Self::KINDS[2],
        }
    }

    /// Tokens of a step.
    pub(crate) fn tokens(self) -> usize {
        match self {
            Self::Prefill(tokens) => tokens,
            Self::Decode { batch, .. } => batch,
        }
    }

    /// The same with one sequence.
    pub(crate) fn alone(self) -> Self {
        match self {
            Self::Prefill(_) => self,
            Self::Decode { context, .. } => Self::Decode { batch: 1, context },
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill(tokens) => write!(f, "prefill {tokens}"),
            Self::Decode { batch, context: 0 } => write!(f, "decode, batch {batch}"),
            Self::Decode { batch, context } => write!(f, "decode at {context}, batch {batch}"),
        }
    }
}

/// Bytes of a model as it lies in memory.
pub(crate) struct ModelBytes {
    /// Of the weights that a decode step reads.
    pub(crate) weights_per_step: usize,
    /// Of the keys and values of one token, all layers together.
    pub(crate) kv_per_token: usize,
}

/// What a step must at least do.
pub(crate) struct Work {
    /// Weights and cached keys and values, each read once.
    pub(crate) bytes: f64,
    /// Multiplications and additions of matrix products and attention.
    pub(crate) flops: f64,
}

impl Work {
    pub(crate) fn of(shape: &Shape, workload: Workload, bytes: &ModelBytes) -> Self {
        let head = shape.vocab * shape.hidden;
        let body = shape.weights_per_step() - head;
        // Of one query token over one cached token: a score and its share of the sum, for each head of each layer.
        let attention = 4 * shape.layers * shape.hidden;
        let (cached, flops) = match workload {
            Workload::Prefill(tokens) => {
                let pairs = tokens * (tokens + 1) / 2;
                (0, 2 * body * tokens + 2 * head + attention * pairs)
            }
            Workload::Decode { batch, context } => {
                let cached = batch * context;
                (cached, 2 * (body + head) * batch + attention * cached)
            }
        };
        Self { bytes: (bytes.weights_per_step + bytes.kv_per_token * cached) as f64, flops: flops as f64 }
    }
}
