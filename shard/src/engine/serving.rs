//! Steps on their way: from a validated `StepRequest` to its answer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use grammar::GrammarId;
use kernels::ops::lora::NO_ADAPTER;
use kernels::{Place, Readback, Staging};
use proto::v1::{FinishReason, NewSequence, SequenceOutput, StepRequest, StepResponse};

use super::batch::{Batch, LogitUse};
use super::chooser::Chooser;
use super::device::{DeviceState, Form, MAX_IN_FLIGHT, Parts, largest_decode, largest_prefill};
use super::grammars::{Constraint, Grammars, MaskTimes, Standing};
use super::graphs::{Adapters, Graphs};
use super::rank::RankModel;
use super::sequence::{Complete, Sequence, Sequences};
use super::shortage::{LeftOut, Uncomputed, victims, without_memory};
use super::validate::{Limits, StepValidator};
use super::verdicts::{GRAMMAR_FAILED, INVALID_LOGITS, IS_COMPLETE, NO_TOKEN, Verdicts};
use crate::decoder::{ForwardInput, KvCache, SamplingInput, StepLimits};
use crate::error::Error;
use crate::sampling::{LogSoftmax, NoToken};

/// What `Warmup` makes.
pub(super) struct Serving {
    pub(super) limits: Limits,
    pub(super) cache: KvCache,
    pub(super) sequences: Sequences,
    pub(super) validator: StepValidator,
    /// On rank 0, where the model's tokens are known.
    pub(super) grammars: Option<Arc<Grammars>>,
    staging: Staging,
    chooser: Chooser,
    /// What chooses tokens instead, on a GPU.
    device: Option<DeviceState>,
    verdicts: Verdicts,
    uncomputed: Uncomputed,
    /// Those of a step, on their way to a device.
    masks: Vec<u32>,
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
    /// Whether the device is still to be told how to choose, since masks depend on tokens of the step before.
    needs_masks: bool,
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
    masks: MaskTimes,
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
            grammars: None,
            staging: ForwardInput::staging(context, &limits.step_limits())?,
            chooser: Chooser::new(context.num_threads()),
            device,
            verdicts: Verdicts::new(limits.max_step_sequences),
            uncomputed: Uncomputed::default(),
            masks: Vec::new(),
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

    /// See [`super::Engine::freeze_steps`].
    pub(super) fn freeze_steps(&mut self) {
        if let Some(device) = &mut self.device {
            device.settle_alone();
        }
    }

    /// Records the decode steps of all shapes. Returns how many there are.
    pub(super) fn record_graphs(&mut self, rank: &mut RankModel) -> Result<usize, Error> {
        let Some(device) = &mut self.device else { return Ok(0) };
        let mut parts = rank.parts(&mut self.cache);
        for shape in device.graphs.shapes() {
            let mut input = ForwardInput { query_starts: vec![0], ..ForwardInput::default() };
            input.pad(shape.rows);
            if shape.adapters == Adapters::Any {
                input.adapters[0] = 0;
            }
            // Directly first: a kernel that is loaded, or an algorithm that is looked for, would end the recording.
            for form in [Form::Direct, Form::Recorded(shape)] {
                let readback = device.launch(&mut parts, &input, &mut self.staging, form, 0)?;
                device.collect(readback, &mut Vec::new())?;
            }
            device.launch_forward(&mut parts, &input, &mut self.staging, Form::Recorded(shape))?;
        }
        Ok(device.graphs.len())
    }

    /// How many [`Self::record_graphs`] will record.
    pub(super) fn num_graphs(&self) -> usize {
        self.device.as_ref().map_or(0, |device| device.graphs.num_planned())
    }

    /// See [`super::Engine::recorded_launches`].
    pub(super) fn recorded_launches(&self) -> Vec<(usize, bool, usize)> {
        let launches = self.device.iter().flat_map(|device| device.graphs.launches());
        launches.map(|(shape, launches)| (shape.rows, shape.adapters == Adapters::Any, launches)).collect()
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
            table_rows: Vec::new(),
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
        self.proceed(rank)?;
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
        let needs_masks = self.device.is_some() && !batch.masked.is_empty();
        self.in_flight.push_back(InFlight {
            step_id,
            batch,
            started,
            times,
            readback,
            needs_masks,
            released,
            left_out,
        });
        self.proceed(rank)
    }

    /// Tells the device how to choose the tokens of the oldest step in flight, if it is still to be told: all tokens before are
    /// known, and the masks are there or soon will be. Meanwhile it computes the step. All ranks make the same calls.
    pub(super) fn proceed(&mut self, rank: &mut RankModel) -> Result<(), Error> {
        let Some(device) = &mut self.device else { return Ok(()) };
        let Some(step) = self.in_flight.front_mut().filter(|step| step.needs_masks) else { return Ok(()) };
        step.needs_masks = false;
        let words = self.limits.vocab_size.div_ceil(32);
        self.masks.clear();
        // What has ended, or was released, may choose what it likes: nobody reads it.
        self.masks.resize(step.batch.masked.len() * words, u32::MAX);
        if rank.communicator.rank() == 0 {
            let since = Instant::now();
            let times = &mut step.times.masks;
            for (sequence_id, row) in step.batch.masked.iter().zip(self.masks.chunks_exact_mut(words)) {
                let sequence = self.sequences.get(sequence_id).filter(|sequence| !sequence.finished);
                match sequence.and_then(|sequence| sequence.constraint.as_ref()).map(Constraint::mask) {
                    Some(Ok(mask)) => {
                        row.copy_from_slice(mask.words());
                        times.add(mask.time());
                    }
                    // Nothing is allowed: the sequence has no token.
                    Some(Err(_)) => row.fill(0),
                    None => {}
                }
            }
            times.waiting += since.elapsed();
        }
        if rank.communicator.world_size() > 1 {
            rank.communicator.broadcast(&mut self.masks)?;
        }
        let mut parts = rank.parts(&mut self.cache);
        let Batch { input, uses, .. } = &step.batch;
        step.readback = Some(device.choose(&mut parts, input, &self.masks, uses.len())?);
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
        let sequences = &mut self.sequences;
        device
            .send_blocks(&rank.context, batch.entries.iter().map(|entry| &sequences[&entry.sequence_id]))?;
        for entry in &batch.entries {
            let sequence = sequences.get_mut(&entry.sequence_id).expect("it is in the batch");
            sequence.num_tabled = sequence.block_ids.len();
        }
        let readback = queue(device, batch, &mut self.staging, &mut rank.parts(&mut self.cache))?;
        rank.communicator.watch(true);
        Ok(readback)
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
            let constraint = (rank.communicator.rank() == 0 && new.grammar_id != 0).then(|| {
                let generated = &new.token_ids[new.prompt_tokens as usize..];
                match &self.grammars {
                    Some(grammars) => grammars.follow(GrammarId(new.grammar_id), generated),
                    None => Constraint::failed("this shard has no grammars".to_owned()),
                }
            });
            let (sequence_id, mut sequence) = (new.sequence_id, Sequence::new(new));
            sequence.on_device = on_device;
            sequence.constraint = constraint;
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
        if communicator.rank() == 0 {
            times.masks = masks_of(batch, &self.sequences);
        }
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
        self.proceed(rank)?;
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
            num_masks: times.masks.num_masks,
            mask_us: times.masks.computing.as_micros() as u64,
            mask_wait_us: times.masks.waiting.as_micros() as u64,
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
        if rank.communicator.rank() == 0 && !batch.masked.is_empty() {
            self.tell_grammars(batch, &mut outputs);
        }
        self.verdicts.share(step_id, batch.entries.len(), rank.communicator.as_mut())?;
        self.advance(batch, &mut outputs, &rank.model.eos_token_ids);
        outputs.retain(|output| {
            !output.tokens.is_empty() || !output.prompt_tokens.is_empty() || output.finish_reason != 0
        });
        Ok(outputs)
    }

    /// Grammars take up what was chosen, and say what ends with it.
    fn tell_grammars(&mut self, batch: &Batch, outputs: &mut [SequenceOutput]) {
        let verdicts = self.verdicts.entries_mut();
        for (entry, verdict) in batch.entries.iter().zip(&*verdicts) {
            let sequence = self.sequences.get_mut(&entry.sequence_id).filter(|sequence| !sequence.finished);
            let Some(sequence) = sequence.filter(|_| is_token(*verdict)) else { continue };
            let wants_mask = !sequence.ends_with_next();
            if let Some(constraint) = &mut sequence.constraint {
                constraint.advance(*verdict, wants_mask);
            }
        }
        for ((entry, verdict), output) in batch.entries.iter().zip(verdicts).zip(outputs) {
            let sequence = self.sequences.get(&entry.sequence_id).filter(|sequence| !sequence.finished);
            let Some(constraint) = sequence.and_then(|sequence| sequence.constraint.as_ref()) else {
                continue;
            };
            if !is_token(*verdict) && *verdict != GRAMMAR_FAILED {
                continue;
            }
            match constraint.standing() {
                Standing::Open if is_token(*verdict) => {}
                Standing::Complete if is_token(*verdict) => *verdict |= IS_COMPLETE,
                Standing::Failed(reason) => {
                    *verdict = GRAMMAR_FAILED;
                    output.tokens.clear();
                    output.failure = reason;
                }
                Standing::Open | Standing::Complete => {
                    "the model gives no probability to any token that the grammar allows"
                        .clone_into(&mut output.failure);
                }
            }
        }
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
                GRAMMAR_FAILED => {
                    sequence.finished = true;
                    FinishReason::Grammar
                }
                word => {
                    let is_complete = if word & IS_COMPLETE == 0 { Complete::No } else { Complete::Yes };
                    sequence.push(word & !IS_COMPLETE, is_complete, eos_token_ids)
                }
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

/// Waits for the masks of a batch's sequences, which threads compute since their last tokens are known.
fn masks_of(batch: &Batch, sequences: &Sequences) -> MaskTimes {
    let mut times = MaskTimes::default();
    if batch.masked.is_empty() {
        return times;
    }
    let since = Instant::now();
    for sequence_id in &batch.masked {
        let constraint = sequences.get(sequence_id).and_then(|sequence| sequence.constraint.as_ref());
        // Who has none gets no token.
        if let Some(Ok(mask)) = constraint.map(Constraint::mask) {
            times.add(mask.time());
        }
    }
    times.waiting = since.elapsed();
    times
}

/// Whether a verdict that grammars have not seen is a token.
fn is_token(verdict: u32) -> bool {
    verdict & IS_COMPLETE == 0
}

/// Hands a batch to the device: all of it, or up to where its masks are needed.
fn queue(
    device: &mut DeviceState,
    batch: &mut Batch,
    staging: &mut Staging,
    parts: &mut Parts<'_>,
) -> Result<Option<Readback>, Error> {
    let num_results = batch.uses.len();
    let mut form = Form::Direct;
    let has_adapter = batch.input.adapters.iter().any(|&adapter| adapter != NO_ADAPTER);
    let adapters = if has_adapter { Adapters::Any } else { Adapters::None };
    if batch.is_decode_only()
        && let Some(shape) = device.graphs.shape(batch.entries.len(), adapters)
    {
        batch.input.pad(shape.rows);
        form = Form::Recorded(shape);
    }
    if batch.masked.is_empty() {
        return Ok(Some(device.launch(parts, &batch.input, staging, form, num_results)?));
    }
    device.launch_forward(parts, &batch.input, staging, form)?;
    Ok(None)
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
                if verdicts[entry] == NO_TOKEN {
                    verdicts[entry] = token.token_id;
                    outputs[entry].tokens.push(token);
                }
            }
            (Ok(token), LogitUse::PromptToken { entry, .. }) => outputs[entry].prompt_tokens.push(token),
            (Err(NoToken::NotFinite), LogitUse::Sample { entry } | LogitUse::PromptToken { entry, .. }) => {
                verdicts[entry] = INVALID_LOGITS;
            }
            (
                Err(NoToken::NothingAllowed),
                LogitUse::Sample { entry } | LogitUse::PromptToken { entry, .. },
            ) => {
                verdicts[entry] = GRAMMAR_FAILED;
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
