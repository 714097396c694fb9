//! Choosing tokens from logits on the CPU, rows spread over the threads.

use std::sync::{Mutex, PoisonError};

use kernels::{Context, View};
use proto::v1::SampledToken;

use super::batch::{Batch, Entry, LogitUse};
use super::grammars::{Constraint, Mask};
use super::sequence::{Sequence, Sequences};
use crate::sampling::{LogSoftmax, NoToken, Scratch};

/// Chooses tokens.
pub(super) struct Chooser {
    /// One for each thread.
    workers: Vec<Mutex<Worker>>,
}

#[derive(Default)]
struct Worker {
    scratch: Scratch,
    results: Vec<(usize, Result<SampledToken, NoToken>)>,
}

impl Chooser {
    pub(super) fn new(num_threads: usize) -> Self {
        Self { workers: (0..num_threads).map(|_| Mutex::default()).collect() }
    }

    /// Appends to the batch's results one for each row of `logits`, which are those of its uses from `first` on.
    pub(super) fn choose(
        &mut self,
        context: &Context,
        logits: View<'_>,
        batch: &mut Batch,
        first: usize,
        sequences: &Sequences,
    ) {
        let Batch { uses, entries, results, .. } = batch;
        let uses = &uses[first..first + logits.rows()];
        let workers = &self.workers;
        let num_workers = workers.len().min(uses.len());
        context.parallel_for(num_workers, |index| {
            // Only this task locks this worker: the lock is there for the compiler.
            let mut worker = workers[index].lock().unwrap_or_else(PoisonError::into_inner);
            let Worker { scratch, results } = &mut *worker;
            for row in (index..uses.len()).step_by(num_workers) {
                let result = token_of(uses[row], logits.row::<f32>(row), entries, sequences, scratch);
                results.push((row, result));
            }
        });
        let first = results.len();
        results.resize(first + uses.len(), Err(NoToken::NotFinite));
        for worker in &mut self.workers {
            let worker = worker.get_mut().unwrap_or_else(PoisonError::into_inner);
            for (row, result) in worker.results.drain(..) {
                results[first + row] = result;
            }
        }
    }
}

/// The token that a row of logits is for: chosen, or known and looked up.
fn token_of(
    logit_use: LogitUse,
    logits: &[f32],
    entries: &[Entry],
    sequences: &Sequences,
    scratch: &mut Scratch,
) -> Result<SampledToken, NoToken> {
    let sequence = |entry: usize| &sequences[&entries[entry].sequence_id];
    match logit_use {
        LogitUse::Sample { entry } => {
            let Sequence { sampler, token_ids, top_n_tokens, constraint, .. } = sequence(entry);
            let mask = constraint.as_ref().map(Constraint::mask).transpose();
            // Why there is none is asked for when the failure is told.
            let mask = mask.map_err(|_| NoToken::NothingAllowed)?;
            let mask = mask.as_ref().map(Mask::words);
            sampler.sample(logits, token_ids.len() as u64, mask, *top_n_tokens, scratch)
        }
        LogitUse::PromptToken { entry, position } => {
            let Sequence { token_ids, top_n_tokens, .. } = sequence(entry);
            let softmax = LogSoftmax::of(logits)?;
            let token_id = token_ids[position];
            Ok(SampledToken {
                token_id,
                logprob: softmax.logprob(logits[token_id as usize]),
                top: softmax.most_likely(logits, *top_n_tokens),
            })
        }
    }
}
