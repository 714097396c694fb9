//! A step that memory does not suffice for: which sequences it is computed without, and which blocks are then not computed.
//!
//! Warmup computes the largest steps, so that steps take no memory later; what may still be asked for is little, such as code
//! that a driver loads when it is first used. Who is left out follows from the step alone, so that all ranks agree.

use std::collections::HashSet;

use proto::v1::FinishReason;

use super::batch::Entry;
use crate::error::Error;

/// A sequence that its step was computed without, and why.
pub(super) type LeftOut = (u64, FinishReason);

/// Blocks that sequences were to compute which were left out. Whoever is admitted over one of them came too early.
#[derive(Debug, Default)]
pub(super) struct Uncomputed(HashSet<u32>);

impl Uncomputed {
    pub(super) fn insert(&mut self, block_ids: &[u32]) {
        self.0.extend(block_ids);
    }

    /// Notes that a sequence got blocks to compute, and whether it is left out and does not.
    pub(super) fn assign(&mut self, block_ids: &[u32], left_out: bool) {
        if left_out {
            self.insert(block_ids);
        } else if !self.0.is_empty() {
            for block_id in block_ids {
                self.0.remove(block_id);
            }
        }
    }

    pub(super) fn contain_any(&self, block_ids: &[u32]) -> bool {
        !self.0.is_empty() && block_ids.iter().any(|block_id| self.0.contains(block_id))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Of a batch that memory does not suffice for, the sequences to leave out before it is tried again, at least one: those that
/// are new in this step (the ones before were computed without them), else the youngest prompt, else the younger half.
/// Younger ones have higher ids.
pub(super) fn victims(entries: &[Entry], admitted: &[u64]) -> Vec<u64> {
    let ids = || entries.iter().map(|entry| entry.sequence_id);
    let new: Vec<u64> = ids().filter(|id| admitted.contains(id)).collect();
    if !new.is_empty() {
        return new;
    }
    let prompts = entries.iter().filter(|entry| entry.num_tokens > 1);
    if let Some(youngest) = prompts.map(|entry| entry.sequence_id).max() {
        return vec![youngest];
    }
    let mut by_age: Vec<u64> = ids().collect();
    by_age.sort_unstable();
    by_age.split_off(by_age.len() / 2)
}

/// Why memory does not suffice, where that is the error and all ranks of the group have met it.
///
/// A rank that alone lacks memory has to end: the devices of the others wait for what it did not queue.
pub(super) fn without_memory(error: Error, world_size: usize) -> Result<kernels::Error, Error> {
    match error {
        Error::Compute(why @ kernels::Error::Frozen { .. }) => Ok(why),
        Error::Compute(why @ kernels::Error::OutOfMemory(_)) if world_size == 1 => Ok(why),
        Error::Compute(kernels::Error::OutOfMemory(message)) => {
            Err(Error::Compute(kernels::Error::OutOfMemory(format!(
                "{message}, on one rank of {world_size} in the middle of a step: lower --cuda-memory-fraction, or stop what \
                 else uses the GPU"
            ))))
        }
        other => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(tokens: &[(u64, usize)]) -> Vec<Entry> {
        let entry = |&(sequence_id, num_tokens)| Entry { sequence_id, num_tokens, samples: true };
        tokens.iter().map(entry).collect()
    }

    #[test]
    fn new_sequences_are_left_out_first_then_the_youngest_prompt_then_the_younger_half() {
        let check = |tokens: &[(u64, usize)], admitted: &[u64], expected: &[u64]| {
            assert_eq!(victims(&entries(tokens), admitted), expected);
        };
        check(&[(1, 1), (9, 1), (4, 8), (7, 8)], &[7, 9, 100], &[9, 7]);
        check(&[(1, 1), (9, 1), (7, 8), (4, 8)], &[], &[7]);
        check(&[(5, 1), (2, 1), (9, 1), (4, 1)], &[], &[5, 9]);
        check(&[(5, 1), (2, 1), (9, 1)], &[], &[5, 9]);
        check(&[(5, 1)], &[], &[5]);
    }

    #[test]
    fn a_block_is_uncomputed_until_somebody_gets_it_who_computes_it() {
        let mut uncomputed = Uncomputed::default();
        assert!(!uncomputed.contain_any(&[1, 2]));
        uncomputed.insert(&[2, 3]);
        uncomputed.assign(&[4], true);
        for block_id in [2, 3, 4] {
            assert!(uncomputed.contain_any(&[1, block_id]));
        }
        uncomputed.assign(&[2, 9], false);
        assert!(!uncomputed.contain_any(&[1, 2, 9]) && uncomputed.contain_any(&[3]));
    }

    #[test]
    fn memory_that_one_rank_lacks_alone_ends_its_group() {
        let lacks = || Error::Compute(kernels::Error::OutOfMemory("none".to_owned()));
        let frozen = || Error::Compute(kernels::Error::Frozen { call: "alloc", bytes: 1 });
        assert!(without_memory(lacks(), 1).is_ok() && without_memory(frozen(), 1).is_ok());
        assert!(without_memory(frozen(), 2).is_ok());
        let error = without_memory(lacks(), 2).unwrap_err();
        assert!(error.is_fatal() && error.to_string().starts_with("none, on one rank of 2"), "{error}");
    }
}
