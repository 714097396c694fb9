//! Steps on their way: from a validated `StepRequest` to its answer.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use kernels::ops::lora::NO_ADAPTER;
use kernels::{Place, Readback, Staging};
use proto::v1::{FinishReason, NewSequence, SequenceOutput, StepRequest, StepResponse};

use super::batch::{Batch, LogitUse};
use super::chooser::Chooser;
use super::device::{DeviceState, Form, MAX_IN_FLIGHT, Parts, largest_decode, largest_prefill};
use super::graphs::Graphs;
use super::rank::RankModel;
use super::sequence::{Sequence, Sequences};
use super::shortage::{LeftOut, Uncomputed, victims, without_memory};
use super::validate::{Limits, StepValidator};
use super::verdicts::{INVALID_LOGITS, NO_TOKEN, Verdicts};
use crate::decoder::{ForwardInput, KvCache, SamplingInput, StepLimits};
use crate::error::Error;
use crate::sampling::{LogSoftmax, NotFinite};

/// What `Warmup` makes.
pub(super) struct Serving {
    pub(super) limits: Limits,
    pub(super) cache: KvCache,
    pub(super) sequences: Sequences,
    pub(super) validator: StepValidator,
    staging: Staging,
    chooser: Chooser,
    /// What chooses tokens instead, on a GPU.
    device: Option<DeviceState>,
    verdicts: Verdicts,
    uncomputed: Uncomputed,
    in_flight: VecDeque<InFlight>,
    /// Batches whose buffers are used again.
    idle: Vec<Batch>,
    /// When the device's last step was.
    last_collected: Option<Instant>,
}

/// A step that was launched.
struct InFlight {
    step_id: u64,
    batch: Batch,
    started: Instant,
    times: Times,
    /// What a device chooses.
    readback: Option<Readback>,
    /// What it released while other steps were in flight, which may still choose tokens of these.
    released: Vec<(u64, Sequence)>,
    /// What it was computed without, though it was to be in it.
    left_out: Vec<LeftOut>,
}

/// Time spent in the parts of a step.
#[derive(Debug, Default)]
struct Times {
    forward: Duration,
    sample: Duration,
}

impl Serving {
    /// With a decoder that has been prepared for the limits. `graph_sizes`: rows of decode steps that are recorded, on a GPU.
    pub(super) fn new(
        limits: Limits,
        cache: KvCache,
        rank: &RankModel,
        graph_sizes: &[usize],
    ) -> Result<Self, Error> {
        let context = &rank.context;
        let device = match context.place() {
            Place::Host => None,
            Place::Device => Some(DeviceState::new(context, &limits, Graphs::new(graph_sizes, &limits))?),
        };
        Ok(Self {
            limits,
            cache,
            sequences: Sequences::new(),
            validator: StepValidator::default(),
            staging: ForwardInput::staging(context, &limits.step_limits())?,
            chooser: Chooser::new(context.num_threads()),
            device,
            verdicts: Verdicts::new(limits.max_step_sequences),
            uncomputed: Uncomputed::default(),
            in_flight: VecDeque::new(),
            idle: Vec::new(),
            last_collected: None,
        })
    }

    /// Computes steps as large as the limits allow, so that all memory is taken that steps take: on a GPU, before the cache
    /// is made of the rest.
    pub(super) fn try_largest(&mut self, rank: &mut RankModel) -> Result<(), Error> {
        let Some(device) = &mut self.device else { return Ok(()) };
        let mut parts = rank.parts(&mut self.cache);
        for input in [largest_prefill(&self.limits), largest_decode(&self.limits)] {
            let num_rows = input.logit_rows.len();
            let readback = device.launch(&mut parts, &input, &mut self.staging, Form::Direct, num_rows)?;
            device.collect(readback, &mut Vec::new())?;
        }
        Ok(device.try_admission(parts.context)?)
    }

    /// See [`DeviceState::settle`].
    pub(super) fn settle(&mut self, rank: &RankModel) {
        if let Some(device) = &mut self.device {
            device.settle(rank.communicator.as_ref());
        }
    }

    /// Records the decode steps of short contexts; others are recorded when they come. Returns how many there are.
    pub(super) fn record_graphs(&mut self, rank: &mut RankModel) -> Result<usize, Error> {
        let Some(device) = &mut self.device else { return Ok(0) };
        let mut parts = rank.parts(&mut self.cache);
        for shape in device.graphs.first_shapes() {
            let mut input = ForwardInput {
                query_starts: vec![0],
                max_blocks: shape.max_blocks,
                ..ForwardInput::default()
            };
            input.pad(shape.rows);
            let form = Form::Recorded(shape);
            let readback = device.launch(&mut parts, &input, &mut self.staging, form, 0)?;
            device.collect(readback, &mut Vec::new())?;
        }
        Ok(device.graphs.len())
    }

    /// Bytes of the buffers of steps beside the model's.
    pub(super) fn workspace_bytes(&self) -> usize {
        self.device.as_ref().map_or(0, DeviceState::size_in_bytes)
    }

    /// Computes a few tokens in the first blocks. Whoever gets these blocks later writes them before reading.
    pub(super) fn try_out(&mut self, rank: &mut RankModel) -> Result<(), Error> {
        let num_tokens =
            self.limits.max_step_tokens.min(self.limits.max_total_tokens).min(self.limits.block_size) as u32;
        let input = ForwardInput {
            token_ids: (0..num_tokens).map(|index| index % self.limits.vocab_size as u32).collect(),
            positions: (0..num_tokens).collect(),
            slot_mapping: (0..num_tokens).collect(),
            query_starts: vec![0, num_tokens],
            kv_lens: vec![num_tokens],
            block_tables: vec![0],
            max_blocks: 1,
            logit_rows: vec![num_tokens - 1],
            // The first adapter, where there is one.
            adapters: vec![if self.limits.num_adapters > 0 { 0 } else { NO_ADAPTER }; num_tokens as usize],
            sampling: SamplingInput::default(),
        };
        let input = input.send(&rank.context, &mut self.staging)?;
        let Parts { context, decoder, communicator, cache } = rank.parts(&mut self.cache);
        decoder.forward(context, communicator, &input, cache)?;
        let logits = decoder.logits(context, communicator, input.logit_rows)?;
        let mut row = vec![0.0; logits.cols()];
        context.download(logits, &mut row)?;
        if LogSoftmax::of(&row).is_err() {
            tracing::warn!(
                "the logits of a test step are not finite: is the checkpoint or the chosen dtype broken?"
            );
        }
        self.verdicts.share(0, 0, communicator)
    }

    /// Steps that were launched and not collected.
    pub(super) fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Forgets all sequences, and what steps in flight choose.
    pub(super) fn clear(&mut self) {
        for InFlight { readback, .. } in self.in_flight.drain(..) {
            if let (Some(device), Some(readback)) = (&mut self.device, readback) {
                device.discard(readback);
            }
        }
        self.sequences.clear();
        self.uncomputed.clear();
        if let Some(device) = &mut self.device {
            device.clear();
        }
    }

    /// Whether a step may be launched before those in flight are collected: where a device keeps the tokens that it needs.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight.len() < if self.device.is_some() { MAX_IN_FLIGHT } else { 1 }
    }

    /// Begins to compute a step that has been validated.
    ///
    /// Where memory does not suffice for it, it is computed without some of its sequences, which end with it.
    pub(super) fn launch(&mut self, request: StepRequest, rank: &mut RankModel) -> Result<(), Error> {
        let started = Instant::now();
        let released = self.release(&request.release_sequence_ids);
        let admitted: Vec<u64> = request.admit.iter().map(|new| new.sequence_id).collect();
        let mut left_out = self.admit(request.admit, rank)?;
        for scheduled in &request.schedule {
            let sequence = self.sequences.get_mut(&scheduled.sequence_id).expect("validated: it is known");
            sequence.block_ids.extend_from_slice(&scheduled.append_block_ids);
            self.uncomputed.assign(&scheduled.append_block_ids, sequence.left_out);
        }
        let mut batch = self.idle.pop().unwrap_or_default();
        let mut times = Times::default();
        let readback = loop {
            batch.fill(&request.schedule, &self.sequences, self.limits.block_size);
            match self.begin(&mut batch, rank, &mut times) {
                Ok(readback) => break readback,
                Err(error) => {
                    let why = without_memory(error, rank.communicator.world_size())?;
                    let victims = victims(&batch.entries, &admitted);
                    let num_left_out = victims.len();
                    tracing::warn!(step_id = request.step_id, num_left_out, %why, "memory does not suffice for a step");
                    for sequence_id in victims {
                        left_out.push(self.leave_out(sequence_id, FinishReason::OutOfMemory));
                    }
                }
            }
        };
        // They ended in this step, not before.
        batch.skipped.retain(|skipped| left_out.iter().all(|(sequence_id, _)| sequence_id != skipped));
        for entry in &batch.entries {
            let sequence = self.sequences.get_mut(&entry.sequence_id).expect("it is in the batch");
            sequence.computed_len += entry.num_tokens;
            sequence.num_pending += usize::from(entry.samples);
        }
        let step_id = request.step_id;
        self.in_flight.push_back(InFlight { step_id, batch, started, times, readback, released, left_out });
        Ok(())
    }

    /// Has steps computed without a sequence, this one and all further ones.
    fn leave_out(&mut self, sequence_id: u64, reason: FinishReason) -> LeftOut {
        let sequence = self.sequences.get_mut(&sequence_id).expect("it is scheduled or was just admitted");
        sequence.left_out = true;
        self.uncomputed.insert(&sequence.block_ids[sequence.computed_len / self.limits.block_size..]);
        (sequence_id, reason)
    }

    /// Hands a batch to the device, or computes it here.
    fn begin(
        &mut self,
        batch: &mut Batch,
        rank: &mut RankModel,
        times: &mut Times,
    ) -> Result<Option<Readback>, Error> {
        if batch.entries.is_empty() {
            return Ok(None);
        }
        let Some(device) = &mut self.device else { return self.compute(batch, rank, times).map(|()| None) };
        let readback = queue(device, batch, &mut self.staging, &mut rank.parts(&mut self.cache))?;
        rank.communicator.watch(true);
        Ok(Some(readback))
    }

    /// Returns what steps in flight may still choose tokens of.
    fn release(&mut self, sequence_ids: &[u64]) -> Vec<(u64, Sequence)> {
        let mut released = Vec::new();
        for sequence_id in sequence_ids {
            let Some(sequence) = self.sequences.remove(sequence_id) else { continue };
            if let (Some(device), Some(sampling)) = (&mut self.device, &sequence.on_device) {
                device.release(sampling.slot);
            }
            if !self.in_flight.is_empty() {
                released.push((*sequence_id, sequence));
            }
        }
        released
    }

    /// Returns those that no step can compute.
    fn admit(&mut self, admit: Vec<NewSequence>, rank: &RankModel) -> Result<Vec<LeftOut>, Error> {
        let mut left_out = Vec::new();
        for new in admit {
            let num_acquired = (new.computed_tokens as usize).div_ceil(self.limits.block_size);
            let (acquired, own) = new.block_ids.split_at(num_acquired);
            let mut reason = self.uncomputed.contain_any(acquired).then_some(FinishReason::MissingPrefix);
            self.uncomputed.assign(own, false);
            let on_device = self.device.as_mut().map(|device| device.place(&new));
            if let (Some(device), Some(sampling), None) = (&mut self.device, &on_device, reason)
                && let Err(error) = device.admit(&rank.context, sampling, &new)
            {
                let why = without_memory(error.into(), rank.communicator.world_size())?;
                tracing::warn!(%why, "memory does not suffice for a new sequence");
                reason = Some(FinishReason::OutOfMemory);
            }
            let (sequence_id, mut sequence) = (new.sequence_id, Sequence::new(new));
            sequence.on_device = on_device;
            self.sequences.insert(sequence_id, sequence);
            left_out.extend(reason.map(|reason| self.leave_out(sequence_id, reason)));
        }
        Ok(left_out)
    }

    /// On the CPU.
    fn compute(&mut self, batch: &mut Batch, rank: &mut RankModel, times: &mut Times) -> Result<(), Error> {
        let started = Instant::now();
        let input = std::mem::take(&mut batch.input);
        let step = input.send(&rank.context, &mut self.staging)?;
        let Parts { context, decoder, communicator, cache } = rank.parts(&mut self.cache);
        decoder.forward(context, communicator, &step, cache)?;
        times.forward += started.elapsed();
        // Pieces bound the memory of logits, whatever number of prompt tokens wants theirs.
        let piece_len = self.limits.max_logit_rows();
        let num_rows = batch.uses.len();
        for first in (0..num_rows).step_by(piece_len) {
            let started = Instant::now();
            let rows = step.logit_rows.narrow_cols(first, piece_len.min(num_rows - first));
            let logits = decoder.logits(context, communicator, rows)?;
            times.forward += started.elapsed();
            if communicator.rank() == 0 {
                let started = Instant::now();
                self.chooser.choose(context, logits, batch, first, &self.sequences);
                times.sample += started.elapsed();
            }
        }
        batch.input = input;
        Ok(())
    }

    /// Whether the oldest step in flight can be collected without waiting.
    pub(super) fn is_done(&self) -> Result<bool, Error> {
        match self.in_flight.front() {
            Some(InFlight { readback: Some(readback), .. }) => Ok(readback.is_done()?),
            // Steps on the CPU are done when they are launched.
            oldest => Ok(oldest.is_some()),
        }
    }

    /// Waits for the oldest step in flight, and answers it.
    ///
    /// # Panics
    /// Where none is.
    pub(super) fn collect(&mut self, rank: &mut RankModel) -> Result<StepResponse, Error> {
        let InFlight { step_id, mut batch, started, mut times, readback, left_out, .. } =
            self.in_flight.pop_front().expect("launch comes before collect");
        if let (Some(device), Some(readback)) = (&mut self.device, readback) {
            device.collect(readback, &mut batch.results)?;
            rank.communicator.check()?;
            rank.communicator.watch(!self.in_flight.is_empty());
            // The device began when it was done with the step before.
            let now = Instant::now();
            times.forward = now - self.last_collected.map_or(started, |last| last.max(started));
            self.last_collected = Some(now);
        }
        let mut outputs = self.outputs(step_id, &mut batch, rank)?;
        for (sequence_id, reason) in left_out {
            let sequence = find(&mut self.sequences, &mut self.in_flight, sequence_id);
            if std::mem::replace(&mut sequence.finished, true) {
                // By a token that the step before had chosen.
                batch.skipped.push(sequence_id);
            } else {
                let finish_reason = reason.into();
                outputs.push(SequenceOutput { sequence_id, finish_reason, ..SequenceOutput::default() });
            }
        }
        if rank.communicator.rank() != 0 {
            outputs.clear();
        }
        let step_us = started.elapsed().as_micros() as u64;
        tracing::trace!(
            step_id,
            num_sequences = batch.entries.len(),
            num_tokens = batch.entries.iter().map(|entry| entry.num_tokens).sum::<usize>(),
            step_us,
            "step"
        );
        let response = StepResponse {
            step_id,
            outputs,
            skipped_sequence_ids: batch.skipped.clone(),
            step_us,
            forward_us: times.forward.as_micros() as u64,
            sample_us: times.sample.as_micros() as u64,
        };
        self.idle.push(batch);
        Ok(response)
    }

    fn outputs(
        &mut self,
        step_id: u64,
        batch: &mut Batch,
        rank: &mut RankModel,
    ) -> Result<Vec<SequenceOutput>, Error> {
        if batch.entries.is_empty() {
            return Ok(Vec::new());
        }
        let mut outputs = gather(batch, self.verdicts.entries_mut());
        self.verdicts.share(step_id, batch.entries.len(), rank.communicator.as_mut())?;
        self.advance(batch, &mut outputs, &rank.model.eos_token_ids);
        outputs.retain(|output| {
            !output.tokens.is_empty() || !output.prompt_tokens.is_empty() || output.finish_reason != 0
        });
        Ok(outputs)
    }

    /// Moves all sequences of the batch on by the verdicts, the same way on all ranks.
    fn advance(&mut self, batch: &mut Batch, outputs: &mut [SequenceOutput], eos_token_ids: &[u32]) {
        let Batch { entries, skipped, .. } = batch;
        for ((entry, verdict), output) in entries.iter().zip(self.verdicts.entries()).zip(outputs) {
            let sequence = find(&mut self.sequences, &mut self.in_flight, entry.sequence_id);
            if sequence.finished {
                // It ended in the step before, which was not known when this one was launched.
                *output = SequenceOutput::default();
                skipped.push(entry.sequence_id);
                continue;
            }
            let reason = match *verdict {
                NO_TOKEN => FinishReason::Unspecified,
                INVALID_LOGITS => {
                    sequence.finished = true;
                    FinishReason::InvalidLogits
                }
                token_id => sequence.push(token_id, eos_token_ids),
            };
            output.finish_reason = reason.into();
        }
    }
}

/// A sequence of a step that is answered, also where one launched later has released it.
fn find<'a>(
    sequences: &'a mut Sequences,
    in_flight: &'a mut VecDeque<InFlight>,
    sequence_id: u64,
) -> &'a mut Sequence {
    let mut released = in_flight.iter_mut().flat_map(|step| &mut step.released);
    let known = sequences.get_mut(&sequence_id);
    let known = known.or_else(|| released.find(|(id, _)| *id == sequence_id).map(|(_, sequence)| sequence));
    known.expect("released by no step before this one")
}

/// Hands a batch to the device.
fn queue(
    device: &mut DeviceState,
    batch: &mut Batch,
    staging: &mut Staging,
    parts: &mut Parts<'_>,
) -> Result<Readback, Error> {
    let num_results = batch.uses.len();
    let mut form = Form::Direct;
    if batch.is_decode_only()
        && let Some(shape) = device.graphs.shape(batch.entries.len(), batch.input.max_blocks)
    {
        batch.widen_block_tables(shape.max_blocks);
        batch.input.pad(shape.rows);
        form = Form::Recorded(shape);
    }
    Ok(device.launch(parts, &batch.input, staging, form, num_results)?)
}

/// Gathers by entry what was chosen by row, and notes the verdict on each entry.
fn gather(batch: &mut Batch, verdicts: &mut [u32]) -> Vec<SequenceOutput> {
    let Batch { entries, uses, results, .. } = batch;
    let new = |sequence_id| SequenceOutput { sequence_id, ..SequenceOutput::default() };
    let mut outputs: Vec<_> = entries.iter().map(|entry| new(entry.sequence_id)).collect();
    verdicts.fill(NO_TOKEN);
    for (result, logit_use) in results.drain(..).zip(uses) {
        match (result, *logit_use) {
            (Ok(token), LogitUse::Sample { entry }) => {
                if verdicts[entry] != INVALID_LOGITS {
                    verdicts[entry] = token.token_id;
                    outputs[entry].tokens.push(token);
                }
            }
            (Ok(token), LogitUse::PromptToken { entry, .. }) => outputs[entry].prompt_tokens.push(token),
            (Err(NotFinite), LogitUse::Sample { entry } | LogitUse::PromptToken { entry, .. }) => {
                verdicts[entry] = INVALID_LOGITS;
            }
        }
    }
    outputs
}

impl Limits {
    /// Rows of one logits computation: enough for all sequences of a step to choose a token.
    pub(super) fn max_logit_rows(&self) -> usize {
        self.max_step_sequences.min(self.max_step_tokens)
    }

    pub(super) fn step_limits(&self) -> StepLimits {
        StepLimits {
            max_step_tokens: self.max_step_tokens,
            max_step_sequences: self.max_step_sequences,
            max_logit_rows: self.max_logit_rows(),
            max_position: self.max_total_tokens,
            block_size: self.block_size,
        }
    }
}
