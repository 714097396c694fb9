//! Steps on a GPU: from token ids to chosen tokens in one queue of work, which the host does not wait for. Tokens that the
//! next step needs stay on the device.

use kernels::ops::attention::{BlockTables, NewBlocks};
use kernels::ops::embedding::resolve_ids;
use kernels::ops::lora::NO_ADAPTER;
use kernels::ops::sampling::{
    MAX_TOP_N, NONE, Sampled, SampledStatus, SamplingBuffers, SamplingInput, SamplingRow, TokenCounts,
    commit_tokens, sample,
};
use kernels::{Communicator, Context, DType, Error, Frozen, Graph, Readback, Result, Staging, Tensor, View};
use proto::v1::{NewSequence, SampledToken, SamplingParameters, TokenLogprob};

use super::device_sampling::DeviceSampling;
use super::graphs::{Adapters, Extent, Graphs, Shape};
use super::sequence::Sequence;
use super::validate::Limits;
use crate::decoder::{Decoder, ForwardInput, KvCache, MAX_LOGIT_BIASES, StepInput};
use crate::sampling::{NoToken, neutral_parameters};

/// Steps that may be in flight: while one is computed, the next is queued.
pub(super) const MAX_IN_FLIGHT: usize = 2;

/// Sequences that may be known beyond those of a step: they have ended, and are not released yet.
const SPARE_SLOTS: usize = 32;

/// What a device keeps between steps.
pub(super) struct DeviceState {
    steps: Steps,
    /// A row for each slot.
    tables: BlockTables,
    pub(super) graphs: Graphs,
    /// For tokens of new sequences.
    staging: Staging,
    /// For what tokens are chosen by, where that comes behind the rest of the step.
    choice_staging: Staging,
    free_slots: Vec<u32>,
    readbacks: Vec<Readback>,
    /// Whether steps must do with the memory that has been taken so far.
    is_settled: bool,
}

/// What is computed with.
pub(super) struct Parts<'a> {
    pub(super) context: &'a Context,
    pub(super) decoder: &'a mut Decoder,
    pub(super) communicator: &'a mut dyn Communicator,
    pub(super) cache: &'a mut KvCache,
}

/// How a step is queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Of decode rows, padded to the shape: as it was recorded.
    Recorded(Shape),
    /// Operation by operation.
    Direct,
}

/// The memory of a step beside that of the model.
struct Steps {
    sampling: SamplingBuffers,
    counts: TokenCounts,
    /// u32 `[1, slots]`.
    last_tokens: Tensor,
    /// u32 `[1, max_step_tokens]`: a step's ids with those of the last tokens.
    ids: Tensor,
    /// u32 `[max_step_tokens, Sampled::WORDS]`.
    sampled: Tensor,
    max_logit_rows: usize,
}

/// What a device limits beside [`Limits`]' other fields.
pub(super) fn device_limits(limits: Limits) -> Limits {
    Limits {
        max_sequences: limits.max_step_sequences + SPARE_SLOTS,
        max_top_n_tokens: limits.vocab_size.min(MAX_TOP_N),
        max_logit_biases: MAX_LOGIT_BIASES,
        ..limits
    }
}

impl DeviceState {
    pub(super) fn new(context: &Context, limits: &Limits, graphs: Graphs) -> Result<Self> {
        let (rows, slots) = (limits.max_step_tokens, limits.max_sequences);
        let words = rows * Sampled::WORDS;
        let steps = Steps {
            sampling: SamplingBuffers::new(context, limits.max_logit_rows(), limits.vocab_size)?,
            counts: TokenCounts::new(context, slots, limits.vocab_size)?,
            last_tokens: context.zeros(1, slots, DType::U32)?,
            ids: context.zeros(1, rows, DType::U32)?,
            sampled: context.zeros(rows, Sampled::WORDS, DType::U32)?,
            max_logit_rows: limits.max_logit_rows(),
        };
        let max_blocks = limits.max_total_tokens.div_ceil(limits.block_size);
        Ok(Self {
            steps,
            tables: BlockTables::new(context, slots, max_blocks, limits.max_step_sequences)?,
            graphs,
            staging: Staging::new(context, &[limits.max_total_tokens, limits.max_total_tokens])?,
            choice_staging: Staging::new(
                context,
                &[
                    rows,
                    rows * SamplingRow::WORDS,
                    rows,
                    2 * limits.max_step_sequences * MAX_LOGIT_BIASES,
                    limits.max_logit_rows() * limits.vocab_size.div_ceil(32),
                ],
            )?,
            free_slots: (0..slots as u32).rev().collect(),
            readbacks: (0..MAX_IN_FLIGHT).map(|_| Readback::new(context, words)).collect::<Result<_>>()?,
            is_settled: false,
        })
    }

    /// From here on steps of a group take no more memory: a rank that gets none would be missed by the others, whose devices
    /// wait for it. Whether a step needs more is the same on all of them, so all leave out the same sequences.
    pub(super) fn settle(&mut self, communicator: &dyn Communicator) {
        self.is_settled = communicator.world_size() > 1;
    }

    /// The same without a group: for tests of what steps do.
    pub(super) fn settle_alone(&mut self) {
        self.is_settled = true;
    }

    fn frozen<'a>(&self, context: &'a Context) -> Option<Frozen<'a>> {
        self.is_settled.then(|| context.freeze())
    }

    /// Bytes of device memory, without graphs.
    pub(super) fn size_in_bytes(&self) -> usize {
        let Steps { sampling, counts, last_tokens, ids, sampled, .. } = &self.steps;
        let tensors = [last_tokens, ids, sampled].map(Tensor::size_in_bytes);
        tensors.iter().sum::<usize>()
            + sampling.size_in_bytes()
            + counts.size_in_bytes()
            + self.tables.size_in_bytes()
    }

    /// Gives a new sequence its place on the device.
    pub(super) fn place(&mut self, new: &NewSequence) -> DeviceSampling {
        let slot = self.free_slots.pop().expect("validated: not more sequences than slots");
        let parameters = new.sampling.as_ref().expect("validated: sampling is set");
        DeviceSampling::new(slot, parameters, new.top_n_tokens)
    }

    /// Brings there what its place must hold before the first step.
    pub(super) fn admit(
        &mut self,
        context: &Context,
        sequence: &DeviceSampling,
        new: &NewSequence,
    ) -> Result<()> {
        let _frozen = self.frozen(context);
        sequence.count_tokens(context, &mut self.staging, &mut self.steps.counts, new)
    }

    /// Sends the blocks that sequences of the next step have got, no sequence twice.
    pub(super) fn send_blocks<'a>(
        &mut self,
        context: &Context,
        sequences: impl IntoIterator<Item = &'a Sequence>,
    ) -> Result<()> {
        let new = |sequence: &'a Sequence| {
            let on_device = sequence.on_device.as_ref()?;
            let (row, column) = (on_device.slot as usize, sequence.num_tabled);
            Some(NewBlocks { row, column, ids: &sequence.block_ids[column..] })
        };
        let _frozen = self.frozen(context);
        self.tables.append(context, sequences.into_iter().filter_map(new))
    }

    /// Loads what admissions use.
    pub(super) fn try_admission(&mut self, context: &Context) -> Result<()> {
        let sampling = SamplingParameters { repetition_penalty: 2.0, ..neutral_parameters() };
        let new = NewSequence {
            token_ids: vec![0],
            prompt_tokens: 1,
            sampling: Some(sampling),
            ..NewSequence::default()
        };
        let sequence = self.place(&new);
        let block = NewBlocks { row: sequence.slot as usize, column: 0, ids: &[0] };
        let tried = self.admit(context, &sequence, &new).and_then(|()| self.tables.append(context, [block]));
        self.release(sequence.slot);
        tried
    }

    /// Takes the place back. Steps in flight may still write there: whoever gets it next comes behind them.
    pub(super) fn release(&mut self, slot: u32) {
        self.free_slots.push(slot);
    }

    /// Queues a step, and asks for what comes of the first `num_results` rows of logits. All ranks make the same call.
    ///
    /// After an error for want of memory, the same sequences may be launched again, or some of them: what was queued has
    /// written keys and values where they belong, and nothing else that is read before it is written.
    pub(super) fn launch(
        &mut self,
        parts: &mut Parts<'_>,
        input: &ForwardInput,
        staging: &mut Staging,
        form: Form,
        num_results: usize,
    ) -> Result<Readback> {
        let context = parts.context;
        let _frozen = self.frozen(context);
        let step = input.send(context, staging)?.with_tables(&self.tables);
        let Self { steps, graphs, .. } = self;
        match form {
            Form::Recorded(shape) => {
                let step = recorded(step, shape);
                let record = || context.capture(|| steps.queue(parts, &step));
                if !replay(graphs.get(shape, Extent::Whole, record))? {
                    steps.queue(parts, &step)?;
                }
            }
            Form::Direct => steps.queue(parts, &step)?,
        }
        self.ask_for(context, num_results)
    }

    /// Queues a step up to the last layer: its tokens are chosen by [`Self::choose`], before another step is queued. After an error,
    /// as of [`Self::launch`].
    pub(super) fn launch_forward(
        &mut self,
        parts: &mut Parts<'_>,
        input: &ForwardInput,
        staging: &mut Staging,
        form: Form,
    ) -> Result<()> {
        let context = parts.context;
        let _frozen = self.frozen(context);
        let mut step = input.send(context, staging)?.with_tables(&self.tables);
        let Self { steps, graphs, .. } = self;
        if let Form::Recorded(shape) = form {
            step = recorded(step, shape);
            let record = || context.capture(|| steps.forward(parts, &step));
            if replay(graphs.get(shape, Extent::Forward, record))? {
                return Ok(());
            }
        }
        steps.forward(parts, &step)
    }

    /// Queues the choice of a step's tokens, which rows of `masks` limit, and asks for what comes of the first `num_results` rows of
    /// logits. All ranks make the same call.
    pub(super) fn choose(
        &mut self,
        parts: &mut Parts<'_>,
        input: &ForwardInput,
        masks: &[u32],
        num_results: usize,
    ) -> Result<Readback> {
        let context = parts.context;
        let _frozen = self.frozen(context);
        let sampling = &input.sampling;
        let arrays = [&*input.logit_rows, &sampling.rows, &sampling.slots, &sampling.biases, masks];
        let [logit_rows, rows, slots, biases, masks] = self.choice_staging.send(context, arrays)?;
        let words = parts.decoder.spec().vocab_size.div_ceil(32);
        let masks = Some(masks.reshape(masks.cols() / words, words));
        self.steps.choose(parts, Choice { logit_rows, rows, slots, biases, masks })?;
        self.ask_for(context, num_results)
    }

    fn ask_for(&mut self, context: &Context, num_results: usize) -> Result<Readback> {
        let mut readback = self.readbacks.pop().expect("one for each step in flight");
        let sampled = self.steps.sampled.view().narrow_rows(0, num_results);
        readback.start(context, sampled.reshape(1, num_results * Sampled::WORDS))?;
        Ok(readback)
    }

    /// Waits for what a step has chosen, and appends it to `results`.
    pub(super) fn collect(
        &mut self,
        mut readback: Readback,
        results: &mut Vec<Result<SampledToken, NoToken>>,
    ) -> Result<()> {
        let rows = readback.wait()?.chunks_exact(Sampled::WORDS);
        results.extend(rows.map(|words| result(&Sampled::from_words(words))));
        self.readbacks.push(readback);
        Ok(())
    }

    /// Does not wait for what a step has chosen.
    pub(super) fn discard(&mut self, readback: Readback) {
        self.readbacks.push(readback);
    }

    /// Forgets all sequences.
    pub(super) fn clear(&mut self) {
        self.free_slots = (0..self.steps.last_tokens.cols() as u32).rev().collect();
    }
}

/// A step as it is recorded: whatever depends on the batch alone is that of the shape.
fn recorded(mut step: StepInput<'_>, shape: Shape) -> StepInput<'_> {
    step.adapters.any = shape.adapters == Adapters::Any;
    step
}

/// Whether the step was launched as it was recorded. A driver may take memory for a graph when it is launched first; the
/// operations themselves take none.
fn replay(graph: Option<&Graph>) -> Result<bool> {
    match graph.map(Graph::launch) {
        None | Some(Err(Error::OutOfMemory(_))) => Ok(false),
        Some(launched) => launched.map(|()| true),
    }
}

/// By what a step's tokens are chosen.
#[derive(Clone, Copy)]
struct Choice<'a> {
    /// `[1, rows of logits]`.
    logit_rows: View<'a>,
    /// As of [`crate::decoder::SamplingInput`], each `[1, n]`.
    rows: View<'a>,
    slots: View<'a>,
    biases: View<'a>,
    /// See [`SamplingInput::masks`].
    masks: Option<View<'a>>,
}

impl Steps {
    /// Queues all of a step.
    fn queue(&mut self, parts: &mut Parts<'_>, step: &StepInput<'_>) -> Result<()> {
        self.forward(parts, step)?;
        let choice = Choice {
            logit_rows: step.logit_rows,
            rows: step.sampling_rows,
            slots: step.sampling_slots,
            biases: step.biases,
            masks: None,
        };
        self.choose(parts, choice)
    }

    /// Up to the last layer.
    fn forward(&mut self, parts: &mut Parts<'_>, step: &StepInput<'_>) -> Result<()> {
        let Parts { context, decoder, communicator, cache } = parts;
        let mut ids = self.ids.view_mut().narrow_cols(0, step.token_ids.cols());
        resolve_ids(context, step.token_ids, self.last_tokens.view(), ids.reborrow())?;
        let resolved = step.with_token_ids(ids.as_view());
        decoder.forward(context, &mut **communicator, &resolved, cache)
    }

    /// The rest: logits, and tokens by them.
    fn choose(&mut self, parts: &mut Parts<'_>, choice: Choice<'_>) -> Result<()> {
        let Parts { context, decoder, communicator, .. } = parts;
        let num_rows = choice.logit_rows.cols();
        if num_rows == 0 {
            return Ok(());
        }
        let rows = choice.rows.reshape(num_rows, SamplingRow::WORDS);
        for first in (0..num_rows).step_by(self.max_logit_rows) {
            let len = self.max_logit_rows.min(num_rows - first);
            let logit_rows = choice.logit_rows.narrow_cols(first, len);
            let logits = decoder.logits(context, &mut **communicator, logit_rows)?;
            let rows = rows.narrow_rows(first, len);
            let input = SamplingInput { logits, rows, biases: choice.biases, masks: choice.masks };
            let out = self.sampled.view_mut().narrow_rows(first, len);
            sample(context, &mut self.sampling, &input, Some(&self.counts), out)?;
        }
        let tokens = self.sampled.view().narrow_rows(0, num_rows);
        let last_tokens = self.last_tokens.view_mut();
        let vocab_size = decoder.spec().vocab_size;
        commit_tokens(context, tokens, choice.slots, last_tokens, Some(&mut self.counts), vocab_size)
    }
}

fn result(sampled: &Sampled) -> Result<SampledToken, NoToken> {
    match sampled.status {
        SampledStatus::Chosen if sampled.token_id != NONE => {}
        SampledStatus::NothingAllowed => return Err(NoToken::NothingAllowed),
        _ => return Err(NoToken::NotFinite),
    }
    let top = sampled.top.iter().map(|&(token_id, logprob)| TokenLogprob { token_id, logprob });
    Ok(SampledToken { token_id: sampled.token_id, logprob: sampled.logprob, top: top.collect() })
}

/// A step that is as large as the limits allow, which writes nothing: by it all memory is found that steps need.
pub(super) fn largest_prefill(limits: &Limits) -> ForwardInput {
    let rows_each = limits.max_step_tokens.min(limits.max_total_tokens);
    let num_rows = limits.max_step_tokens.min(rows_each * limits.max_step_sequences);
    largest(limits, num_rows, rows_each)
}

/// The same of decode rows.
pub(super) fn largest_decode(limits: &Limits) -> ForwardInput {
    largest(limits, limits.max_logit_rows(), 1)
}

fn largest(limits: &Limits, num_rows: usize, rows_each: usize) -> ForwardInput {
    let max_blocks = limits.max_total_tokens.div_ceil(limits.block_size);
    let mut input = ForwardInput { query_starts: vec![0], max_blocks, ..ForwardInput::default() };
    while input.token_ids.len() < num_rows {
        let rows = rows_each.min(num_rows - input.token_ids.len());
        let start = limits.max_total_tokens - rows;
        input.positions.extend((start..start + rows).map(|position| position as u32));
        input.token_ids.resize(input.positions.len(), 0);
        input.slot_mapping.resize(input.positions.len(), u32::MAX);
        input.adapters.resize(input.positions.len(), if limits.num_adapters > 0 { 0 } else { NO_ADAPTER });
        input.query_starts.push(input.positions.len() as u32);
        input.kv_lens.push(limits.max_total_tokens as u32);
        // All of one block.
        input.table_rows.push(0);
    }
    let row = SamplingRow {
        top_k: 50,
        top_p: 0.9,
        typical_p: 0.9,
        top_n: limits.max_top_n_tokens as u32,
        ..SamplingRow::default()
    };
    for row_index in 0..num_rows.min(limits.max_logit_rows()) {
        input.logit_rows.push(row_index as u32);
        input.sampling.rows.extend_from_slice(&row.to_words());
        input.sampling.slots.push(NONE);
    }
    input
}
