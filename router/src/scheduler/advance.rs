//! What an answer does: sequences move on by their tokens, or end.

use std::collections::HashMap;
use std::time::Instant;

use super::answer::{Outcome, SequenceOutput, StepAnswer, StepTimes, WrongAnswer};
use super::entry::Running;
use super::event::RequestId;
use super::in_flight::InFlightRow;
use super::request::{EndReason, Failure, Token};
use super::state::Scheduler;
use crate::metrics::{self, StepDurations};

impl Scheduler {
    pub(super) fn step_done(&mut self, answer: StepAnswer, now: Instant) -> Result<(), WrongAnswer> {
        if self.failure.is_some() {
            return Ok(());
        }
        let step = self.in_flight.pop_front();
        let step = step.ok_or(WrongAnswer::Step { expected: None, got: answer.step })?;
        if answer.step != step.id {
            return Err(WrongAnswer::Step { expected: Some(step.id), got: answer.step });
        }
        if let Some(method) = step.method {
            let total = now.saturating_duration_since(step.sent_at);
            let StepTimes { forward, sampling, masks } = answer.times;
            if masks.num_masks > 0 {
                metrics::record_masks(masks.computing / masks.num_masks, masks.waiting);
            }
            metrics::record_step_done(method, &StepDurations { total, forward, sampling });
        }
        // The shards begin a step when it is there and the one before is done.
        let answered_at = self.answered_at.replace(now);
        let begun_at = answered_at.map_or(step.sent_at, |answered_at| answered_at.max(step.sent_at));
        if let Some(pace) = &mut self.pace {
            pace.observe(step.work, now.saturating_duration_since(begun_at));
        }

        let unknown = |sequence| WrongAnswer::UnknownSequence { step: step.id, sequence };
        let mut outputs = HashMap::with_capacity(answer.outputs.len());
        for output in answer.outputs {
            let sequence = output.sequence;
            if outputs.insert(sequence, output).is_some() {
                return Err(unknown(sequence));
            }
        }
        for row in &step.rows {
            let output = outputs.remove(&row.sequence);
            let skipped = answer.skipped.contains(&row.sequence);
            self.row_done(step.id, row, output, skipped)?;
        }
        outputs.into_keys().next().map_or(Ok(()), |sequence| Err(unknown(sequence)))
    }

    /// Moves one sequence on by what a step gave for it.
    fn row_done(
        &mut self,
        step: u64,
        row: &InFlightRow,
        output: Option<SequenceOutput>,
        skipped: bool,
    ) -> Result<(), WrongAnswer> {
        let sequence = row.sequence;
        let failure = output.as_ref().and_then(|output| failure_of(&output.outcome));
        if let Some(RowFailure::OutOfMemory | RowFailure::MissingPrefix) = failure {
            self.forget_uncomputed(row);
        }
        let running = self.running.get_mut(&row.request).filter(|running| running.sequence.id == sequence);
        // Cancelled, preempted, or ended in an earlier step while this one was on its way.
        let Some(running) = running else { return Ok(()) };
        if skipped {
            return Err(WrongAnswer::Skipped { step, sequence });
        }
        if let Some(failure) = failure {
            self.failed(row.request, failure);
            return Ok(());
        }
        if let Some(SequenceOutput { outcome: Outcome::GrammarFailed(reason), .. }) = output {
            if let Some(entry) = self.end(row.request) {
                entry.events.fail(Failure::Grammar(reason));
            }
            return Ok(());
        }
        running.sequence.steps_in_flight -= 1;
        running.sequence.sampling -= usize::from(row.samples);
        running.sequence.answered = row.first + row.num_tokens;
        let (prompt, outcome) =
            output.map_or((Vec::new(), Outcome::Nothing), |output| (output.prompt, output.outcome));
        let expected = row.prompt_tokens(running);
        let got = prompt.len();
        if !prompt.iter().map(|token| token.id).eq(expected.iter().copied()) {
            return Err(WrongAnswer::Prompt { step, sequence, expected: expected.len(), got });
        }
        running.entry.report_prompt(row.first + 1, prompt, &mut self.wakes);

        let ended = matches!(outcome, Outcome::Ended(..));
        match (outcome, row.samples) {
            (Outcome::Sampled(_) | Outcome::Ended(..), false) => {
                return Err(WrongAnswer::EarlyToken { step, sequence });
            }
            (Outcome::Sampled(tokens), true) => self.sampled(step, row, tokens, None)?,
            (Outcome::Ended(tokens, end), true) => self.sampled(step, row, tokens, Some(end))?,
            (_, true) => return Err(WrongAnswer::NoToken { step, sequence }),
            (_, false) => {}
        }
        self.share(row.request);
        if ended {
            self.headroom.ended();
            self.end(row.request);
        }
        Ok(())
    }

    /// Ends a request whose row was not computed as it was to be, or sends it back to the queue.
    fn failed(&mut self, request: RequestId, failure: RowFailure) {
        let failure = match failure {
            RowFailure::InvalidLogits => {
                self.forget_computed(request);
                Failure::InvalidLogits
            }
            RowFailure::OutOfMemory => Failure::OutOfMemory,
            // Nobody takes its place: it comes again, over blocks that are there.
            RowFailure::MissingPrefix => return self.preempt(request),
        };
        if let Some(entry) = self.end(request) {
            entry.events.fail(failure);
        }
    }

    /// Takes the tokens that a row has sampled. Keys and values of all of them but the last are computed too.
    fn sampled(
        &mut self,
        step: u64,
        row: &InFlightRow,
        tokens: Vec<Token>,
        end: Option<EndReason>,
    ) -> Result<(), WrongAnswer> {
        let running = self.running.get_mut(&row.request).expect("a row that is done is of a running request");
        let Running { entry, sequence } = running;
        let slots = sequence.table.blocks().len() * self.limits.budget.block_size;
        let remaining = entry.request.max_new_tokens as usize - entry.generated.len();
        let limit = self.limits.max_sampled_tokens.min(slots - sequence.answered + 1).min(remaining);
        let got = tokens.len();
        if !(1..=limit).contains(&got) {
            return Err(WrongAnswer::TooManyTokens { step, sequence: row.sequence, got, limit });
        }
        if got == remaining && end.is_none() {
            return Err(WrongAnswer::NotEnded { step, sequence: row.sequence });
        }
        let at = self.answered_at.expect("the time of an answer is noted before its tokens are taken");
        let cost = entry.report_tokens(tokens, end, at, &mut self.wakes);
        self.fairness.charge(entry.place.account, cost);
        sequence.answered += got - 1;
        sequence.computed = sequence.computed.max(sequence.answered);
        if end.is_some() {
            // A step in flight that was to go on skips it.
            sequence.computed = sequence.answered;
        }
        Ok(())
    }
}

/// What may become of a row instead of tokens.
#[derive(Debug, Clone, Copy)]
enum RowFailure {
    InvalidLogits,
    OutOfMemory,
    MissingPrefix,
}

fn failure_of(outcome: &Outcome) -> Option<RowFailure> {
    match outcome {
        Outcome::InvalidLogits => Some(RowFailure::InvalidLogits),
        Outcome::OutOfMemory => Some(RowFailure::OutOfMemory),
        Outcome::MissingPrefix => Some(RowFailure::MissingPrefix),
        Outcome::Nothing | Outcome::Sampled(_) | Outcome::Ended(..) | Outcome::GrammarFailed(_) => None,
    }
}
