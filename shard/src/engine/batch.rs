//! A step's schedule as the model's flat input: which rows there are, and which of them get logits.

use proto::v1::{SampledToken, ScheduledSequence};

use super::sequence::{Sequence, Sequences};
use crate::decoder::ForwardInput;
use crate::sampling::NoToken;

/// One step's batch. Its buffers are kept from step to step.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) input: ForwardInput,
    /// Sequences that are computed, in the order of the schedule.
    pub(super) entries: Vec<Entry>,
    /// What each of the input's `logit_rows` is for.
    pub(super) uses: Vec<LogitUse>,
    /// What came of each of them.
    pub(super) results: Vec<Result<SampledToken, NoToken>>,
    /// Sequences that had ended before and are not computed.
    pub(super) skipped: Vec<u64>,
    /// Sequences whose next token is held to a grammar, in order of their masks.
    pub(super) masked: Vec<u64>,
}

/// A sequence that is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) sequence_id: u64,
    pub(super) num_tokens: usize,
    /// Whether the next token is chosen.
    pub(super) samples: bool,
}

/// What a row of logits is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LogitUse {
    /// Choosing the next token of the sequence of this entry.
    Sample { entry: usize },
    /// The log-probability of the prompt token at this position.
    PromptToken { entry: usize, position: usize },
}

impl Batch {
    /// Fills the batch. The schedule has been validated, and its blocks appended to the sequences' tables.
    pub(super) fn fill(&mut self, schedule: &[ScheduledSequence], sequences: &Sequences, block_size: usize) {
        self.clear();
        for scheduled in schedule {
            let sequence = &sequences[&scheduled.sequence_id];
            if sequence.has_ended() {
                self.skipped.push(scheduled.sequence_id);
            } else {
                self.push(scheduled, sequence, block_size);
            }
        }
        self.fill_block_tables(sequences);
    }

    fn clear(&mut self) {
        let Self { input, entries, uses, results, skipped, masked } = self;
        input.token_ids.clear();
        input.positions.clear();
        input.slot_mapping.clear();
        input.query_starts.clear();
        input.query_starts.push(0);
        input.kv_lens.clear();
        input.block_tables.clear();
        input.table_rows.clear();
        input.logit_rows.clear();
        input.adapters.clear();
        input.sampling.rows.clear();
        input.sampling.slots.clear();
        input.sampling.biases.clear();
        entries.clear();
        uses.clear();
        results.clear();
        skipped.clear();
        masked.clear();
    }

    fn push(&mut self, scheduled: &ScheduledSequence, sequence: &Sequence, block_size: usize) {
        let (start, num_tokens) = (sequence.computed_len, scheduled.num_tokens as usize);
        let end = start + num_tokens;
        let entry = self.entries.len();
        for position in start..end {
            let block_id = sequence.block_ids[position / block_size] as usize;
            self.input.token_ids.push(sequence.token_at(position));
            self.input.positions.push(position as u32);
            self.input.adapters.push(sequence.adapter);
            self.input.slot_mapping.push((block_id * block_size + position % block_size) as u32);
            let next = position + 1;
            if next == sequence.len() {
                self.push_use(LogitUse::Sample { entry }, scheduled.sequence_id, sequence);
            } else if sequence.prompt_logprobs && next < sequence.prompt_len {
                let logit_use = LogitUse::PromptToken { entry, position: next };
                self.push_use(logit_use, scheduled.sequence_id, sequence);
            }
        }
        self.input.query_starts.push(self.input.token_ids.len() as u32);
        self.input.kv_lens.push(end as u32);
        self.input.table_rows.extend(sequence.on_device.as_ref().map(|device| device.slot));
        let samples = end == sequence.len();
        self.entries.push(Entry { sequence_id: scheduled.sequence_id, num_tokens, samples });
    }

    /// Of the row that was pushed last.
    fn push_use(&mut self, logit_use: LogitUse, sequence_id: u64, sequence: &Sequence) {
        self.input.logit_rows.push(self.input.token_ids.len() as u32 - 1);
        self.uses.push(logit_use);
        let mut mask = None;
        if sequence.grammar.is_some() && matches!(logit_use, LogitUse::Sample { .. }) {
            mask = Some(self.masked.len() as u32);
            self.masked.push(sequence_id);
        }
        if let Some(device) = &sequence.on_device {
            match logit_use {
                LogitUse::Sample { .. } => device.push_choice(sequence.len(), mask, &mut self.input.sampling),
                LogitUse::PromptToken { position, .. } => {
                    device.push_known(sequence.token_ids[position], &mut self.input.sampling);
                }
            }
        }
    }

    /// Whether each sequence has one row.
    pub(super) fn is_decode_only(&self) -> bool {
        self.input.token_ids.len() == self.entries.len()
    }

    /// Where the device does not keep them.
    fn fill_block_tables(&mut self, sequences: &Sequences) {
        let tables = || self.entries.iter().map(|entry| &sequences[&entry.sequence_id].block_ids);
        let max_blocks = tables().map(Vec::len).max().unwrap_or(0);
        self.input.max_blocks = max_blocks;
        if !self.input.table_rows.is_empty() {
            return;
        }
        for (index, table) in tables().enumerate() {
            self.input.block_tables.extend_from_slice(table);
            self.input.block_tables.resize((index + 1) * max_blocks, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::ops::lora::NO_ADAPTER;

    use super::super::device_sampling::DeviceSampling;
    use super::super::sequence::tests::new_sequence;
    use super::*;
    use crate::decoder::SamplingInput;

    const BLOCK_SIZE: usize = 4;

    fn sequence(token_ids: &[u32], computed_len: usize, block_ids: &[u32]) -> Sequence {
        let mut new = new_sequence(0, token_ids);
        new.computed_tokens = computed_len as u32;
        new.block_ids = block_ids.to_vec();
        Sequence::new(new)
    }

    fn place(sequence: &mut Sequence, slot: u32) {
        let parameters = crate::sampling::neutral_parameters();
        sequence.on_device = Some(DeviceSampling::new(slot, &parameters, 0));
    }

    fn scheduled(sequence_id: u64, num_tokens: u32) -> ScheduledSequence {
        ScheduledSequence { sequence_id, num_tokens, append_block_ids: vec![] }
    }

    fn batch(schedule: &[ScheduledSequence], sequences: &Sequences) -> Batch {
        let mut batch = Batch::default();
        // A batch before must leave nothing behind.
        batch.fill(&[scheduled(9, 2)], &Sequences::from([(9, sequence(&[1, 2, 3], 0, &[3]))]), BLOCK_SIZE);
        batch.fill(schedule, sequences, BLOCK_SIZE);
        batch
    }

    #[test]
    fn decode_rows_and_prefill_chunks_are_one_flat_batch() {
        let mut sequences = Sequences::from([
            // Decode: its last known token is the only one not computed.
            (1, sequence(&[10, 11, 12, 13, 14], 4, &[7, 2])),
            // A chunk in the middle of a prompt, over a block's border.
            (2, sequence(&[20, 21, 22, 23, 24, 25, 26], 2, &[5, 0])),
        ]);
        sequences.get_mut(&2).unwrap().adapter = 1;
        let batch = batch(&[scheduled(1, 1), scheduled(2, 3)], &sequences);
        assert_eq!(
            batch.input,
            ForwardInput {
                token_ids: vec![14, 22, 23, 24],
                positions: vec![4, 2, 3, 4],
                slot_mapping: vec![8, 22, 23, 0],
                query_starts: vec![0, 1, 4],
                kv_lens: vec![5, 5],
                block_tables: vec![7, 2, 5, 0],
                table_rows: vec![],
                max_blocks: 2,
                logit_rows: vec![0],
                adapters: vec![NO_ADAPTER, 1, 1, 1],
                sampling: SamplingInput::default(),
            }
        );
        assert_eq!(
            batch.entries,
            [
                Entry { sequence_id: 1, num_tokens: 1, samples: true },
                Entry { sequence_id: 2, num_tokens: 3, samples: false }
            ]
        );
        assert_eq!(batch.uses, [LogitUse::Sample { entry: 0 }]);
    }

    #[test]
    fn shorter_block_tables_are_filled_up() {
        let sequences =
            Sequences::from([(1, sequence(&[1], 0, &[6])), (2, sequence(&[1, 2, 3, 4, 5], 0, &[3, 4]))]);
        let batch = batch(&[scheduled(1, 1), scheduled(2, 5)], &sequences);
        assert_eq!(batch.input.block_tables, [6, 0, 3, 4]);
        assert_eq!(batch.input.logit_rows, [0, 5]);
    }

    #[test]
    fn sequences_on_a_device_name_their_tables_there() {
        let mut sequences =
            Sequences::from([(1, sequence(&[1], 0, &[6])), (2, sequence(&[1, 2, 3, 4, 5], 4, &[3, 4]))]);
        place(sequences.get_mut(&1).unwrap(), 9);
        place(sequences.get_mut(&2).unwrap(), 4);
        let batch = batch(&[scheduled(1, 1), scheduled(2, 1)], &sequences);
        assert_eq!(batch.input.table_rows, [9, 4]);
        assert_eq!((&batch.input.block_tables[..], batch.input.max_blocks), (&[][..], 2));
    }

    #[test]
    fn padding_adds_rows_that_write_read_and_choose_nothing() {
        let mut sequences = Sequences::from([(1, sequence(&[1, 2], 1, &[6]))]);
        place(sequences.get_mut(&1).unwrap(), 9);
        let mut batch = batch(&[scheduled(1, 1)], &sequences);
        assert!(batch.is_decode_only());
        batch.input.pad(3);
        let input = &batch.input;
        assert_eq!((&input.token_ids[1..], &input.kv_lens[..]), (&[0, 0][..], &[2, 0, 0][..]));
        assert_eq!(input.slot_mapping[1..], [u32::MAX; 2]);
        assert_eq!(input.adapters, [NO_ADAPTER; 3]);
        assert_eq!(input.query_starts, [0, 1, 2, 3]);
        assert_eq!((&input.table_rows[..], &input.logit_rows[..]), (&[9, 0, 0][..], &[0, 0, 0][..]));
        assert_eq!(input.sampling.slots[1..], [u32::MAX; 2]);
    }

    #[test]
    fn a_token_that_is_being_chosen_is_named_by_its_place_on_the_device() {
        let mut running = sequence(&[1, 2], 2, &[6]);
        place(&mut running, 9);
        running.num_pending = 1;
        let sequences = Sequences::from([(1, running)]);
        let batch = batch(&[scheduled(1, 1)], &sequences);
        assert_eq!(batch.input.token_ids, [kernels::ops::embedding::LAST_TOKEN_OF | 9]);
        assert_eq!(batch.input.positions, [2]);
        assert_eq!(batch.input.sampling.slots, [9]);
        // The position of the token to choose: behind the one that is being chosen.
        assert_eq!(batch.input.sampling.rows[7], 3);
    }

    #[test]
    fn prompt_logprobs_take_the_row_before_each_prompt_token() {
        let mut asked = sequence(&[1, 2, 3, 4], 0, &[0]);
        asked.prompt_logprobs = true;
        let sequences = Sequences::from([(1, asked)]);
        let uses = |num_tokens| batch(&[scheduled(1, num_tokens)], &sequences).uses;
        let prompt_token = |position| LogitUse::PromptToken { entry: 0, position };
        assert_eq!(uses(2), [prompt_token(1), prompt_token(2)]);
        assert_eq!(
            uses(4),
            [prompt_token(1), prompt_token(2), prompt_token(3), LogitUse::Sample { entry: 0 }]
        );
    }

    #[test]
    fn a_sequence_that_has_ended_is_skipped_and_reported() {
        let mut ended = sequence(&[1, 2], 1, &[0]);
        ended.finished = true;
        let sequences = Sequences::from([(1, ended), (2, sequence(&[1], 0, &[1]))]);
        let batch = batch(&[scheduled(1, 1), scheduled(2, 1)], &sequences);
        assert_eq!(batch.skipped, [1]);
        assert_eq!(batch.entries, [Entry { sequence_id: 2, num_tokens: 1, samples: true }]);
    }
}
