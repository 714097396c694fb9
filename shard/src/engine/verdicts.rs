//! What all ranks must agree on: which token each sequence of a step got.

use kernels::Communicator;

use crate::error::Error;

/// Rank 0's verdicts, one for each entry of the batch, behind a head of two words.
pub(super) struct Verdicts {
    words: Vec<u32>,
}

/// What rank 0 says about an entry where it is not a token id.
pub(super) const NO_TOKEN: u32 = u32::MAX - 1;
pub(super) const INVALID_LOGITS: u32 = u32::MAX;
pub(super) const GRAMMAR_FAILED: u32 = u32::MAX - 2;
/// Added to a token with which the text is complete by its grammar.
pub(super) const IS_COMPLETE: u32 = 1 << 31;
/// Step id (its lower half) and number of entries, by which ranks notice that they compute different steps.
const HEAD_LEN: usize = 2;

impl Verdicts {
    pub(super) fn new(max_step_sequences: usize) -> Self {
        Self { words: vec![0; HEAD_LEN + max_step_sequences] }
    }

    /// One for each entry.
    pub(super) fn entries(&self) -> &[u32] {
        &self.words[HEAD_LEN..]
    }

    pub(super) fn entries_mut(&mut self) -> &mut [u32] {
        &mut self.words[HEAD_LEN..]
    }

    /// Gives rank 0's verdicts to all ranks, in one message of fixed length.
    pub(super) fn share(
        &mut self,
        step_id: u64,
        num_entries: usize,
        communicator: &mut dyn Communicator,
    ) -> Result<(), Error> {
        let head = [step_id as u32, num_entries as u32];
        self.words[..HEAD_LEN].copy_from_slice(&head);
        communicator.broadcast(&mut self.words)?;
        if self.words[..HEAD_LEN] == head {
            return Ok(());
        }
        Err(Error::RanksDisagree { rank: communicator.rank(), step_id, num_entries })
    }
}
