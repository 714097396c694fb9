//! What the shard promises to refuse: messages that break the contract in `shard.proto`.
//!
//! A request is checked as a whole before it changes anything, so a refused step leaves all sequences as they were.
//! The verdict depends on nothing but messages before, so all ranks reach the same one.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;

use proto::v1::{
    NewSequence, SamplingParameters, ScheduledSequence, StepRequest, StoppingParameters, WarmupRequest,
};

use super::sequence::{Sequence, Sequences};
use crate::error::Error;

/// What warmup has fixed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) vocab_size: usize,
    pub(super) block_size: usize,
    pub(super) num_blocks: usize,
    pub(super) max_step_tokens: usize,
    pub(super) max_step_sequences: usize,
    pub(super) max_total_tokens: usize,
    /// Sequences that may be known at once.
    pub(super) max_sequences: usize,
    pub(super) max_top_n_tokens: usize,
    /// Entries of one sequence.
    pub(super) max_logit_biases: usize,
    pub(super) num_adapters: usize,
}

/// Checks steps. Its buffers are kept, so checking a steady decode step allocates nothing.
#[derive(Debug, Default)]
pub(super) struct StepValidator {
    released: HashSet<u64>,
    admitted: HashMap<u64, Place>,
    scheduled: HashSet<u64>,
}

/// How far a sequence is.
#[derive(Debug, Clone, Copy)]
struct Place {
    len: usize,
    computed_len: usize,
    num_blocks: usize,
    finished: bool,
}

/// Refuses limits that no cache could be made for.
pub(super) fn check_warmup(request: &WarmupRequest, max_position_embeddings: usize) -> Result<(), Error> {
    let at_least_1 = |field: &str, value: u32| match value {
        0 => Err(Error::invalid(field, "must be at least 1 but is 0")),
        _ => Ok(()),
    };
    at_least_1("max_step_tokens", request.max_step_tokens)?;
    at_least_1("max_step_sequences", request.max_step_sequences)?;
    at_least_1("max_total_tokens", request.max_total_tokens)?;
    if request.max_total_tokens as usize > max_position_embeddings {
        return Err(Error::invalid(
            "max_total_tokens",
            format!(
                "is {} but the model has positions for {max_position_embeddings} tokens: lower it",
                request.max_total_tokens
            ),
        ));
    }
    match request.kv_cache_tokens {
        Some(tokens) if tokens < u64::from(request.max_total_tokens) => Err(Error::invalid(
            "kv_cache_tokens",
            format!(
                "is {tokens} but one sequence of max_total_tokens needs {}: raise it, lower max_total_tokens, or \
                 leave it out to let the shard measure",
                request.max_total_tokens
            ),
        )),
        _ => Ok(()),
    }
}

impl StepValidator {
    /// Refuses what breaks the contract. `previous_step_id`: of the same `Run` stream.
    pub(super) fn check(
        &mut self,
        request: &StepRequest,
        previous_step_id: Option<u64>,
        sequences: &Sequences,
        limits: &Limits,
    ) -> Result<(), Error> {
        if let Some(previous) = previous_step_id.filter(|previous| request.step_id <= *previous) {
            let message =
                format!("must be above {previous}, that of the step before, but is {}", request.step_id);
            return Err(Error::invalid("step_id", message));
        }
        self.released.clear();
        self.released.extend(&request.release_sequence_ids);
        self.check_admit(&request.admit, sequences, limits)?;
        self.check_schedule(&request.schedule, sequences, limits)
    }

    fn check_admit(
        &mut self,
        admit: &[NewSequence],
        sequences: &Sequences,
        limits: &Limits,
    ) -> Result<(), Error> {
        self.admitted.clear();
        let num_released = self.released.iter().filter(|id| sequences.contains_key(id)).count();
        let num_known = sequences.len() - num_released + admit.len();
        if num_known > limits.max_sequences {
            let message = format!(
                "makes {num_known} sequences known, but there is room for {}: release some",
                limits.max_sequences
            );
            return Err(Error::invalid("admit", message));
        }
        for (index, new) in admit.iter().enumerate() {
            let in_entry = |error: Error| within(&format!("admit[{index}]"), error);
            let id = new.sequence_id;
            let known = sequences.contains_key(&id) && !self.released.contains(&id);
            if known || self.admitted.contains_key(&id) {
                let message = format!("{id} is in use: ids are never used twice within a stream");
                return Err(in_entry(Error::invalid("sequence_id", message)));
            }
            check_new_sequence(new, limits).map_err(in_entry)?;
            self.admitted.insert(id, Place::of_new(new));
        }
        Ok(())
    }

    fn check_schedule(
        &mut self,
        schedule: &[ScheduledSequence],
        sequences: &Sequences,
        limits: &Limits,
    ) -> Result<(), Error> {
        at_most("schedule", "sequences", schedule.len(), "max_step_sequences", limits.max_step_sequences)?;
        let tokens = schedule.iter().map(|scheduled| u64::from(scheduled.num_tokens)).sum::<u64>();
        at_most("schedule", "tokens", tokens as usize, "max_step_tokens", limits.max_step_tokens)?;
        self.scheduled.clear();
        let mut seen_chunk = false;
        for (index, scheduled) in schedule.iter().enumerate() {
            let in_entry = |error: Error| within(&format!("schedule[{index}]"), error);
            let id = scheduled.sequence_id;
            let admitted = self.admitted.get(&id).copied();
            let known = sequences.get(&id).filter(|_| !self.released.contains(&id)).map(Place::of);
            let Some(place) = admitted.or(known) else {
                let message = format!("{id} is not known: admit it, in this step or before");
                return Err(in_entry(Error::invalid("sequence_id", message)));
            };
            if !self.scheduled.insert(id) {
                let message = format!("{id} is scheduled twice: give it one entry with all of its tokens");
                return Err(in_entry(Error::invalid("sequence_id", message)));
            }
            if seen_chunk && scheduled.num_tokens == 1 {
                let message = "is 1 behind an entry with more: entries with one token come first";
                return Err(in_entry(Error::invalid("num_tokens", message)));
            }
            seen_chunk |= scheduled.num_tokens > 1;
            check_scheduled(scheduled, place, limits).map_err(in_entry)?;
        }
        Ok(())
    }
}

impl Place {
    fn of(sequence: &Sequence) -> Self {
        Self {
            len: sequence.len(),
            computed_len: sequence.computed_len,
            num_blocks: sequence.block_ids.len(),
            finished: sequence.has_ended(),
        }
    }

    fn of_new(new: &NewSequence) -> Self {
        Self {
            len: new.token_ids.len(),
            computed_len: new.computed_tokens as usize,
            num_blocks: new.block_ids.len(),
            finished: false,
        }
    }
}

fn check_scheduled(scheduled: &ScheduledSequence, place: Place, limits: &Limits) -> Result<(), Error> {
    check_blocks("append_block_ids", &scheduled.append_block_ids, limits)?;
    if scheduled.num_tokens == 0 {
        return Err(Error::invalid("num_tokens", "must be at least 1 but is 0"));
    }
    if place.finished {
        // It ended in a step that the router had not seen the answer of; it is skipped.
        return Ok(());
    }
    let (num_tokens, pending) = (scheduled.num_tokens as usize, place.len - place.computed_len);
    if num_tokens > pending {
        let message =
            format!("is {num_tokens} but only {pending} tokens of the sequence are known and not computed");
        return Err(Error::invalid("num_tokens", message));
    }
    let num_blocks = place.num_blocks + scheduled.append_block_ids.len();
    let needed = (place.computed_len + num_tokens).div_ceil(limits.block_size);
    let most = limits.max_total_tokens.div_ceil(limits.block_size);
    if !(needed..=most).contains(&num_blocks) {
        let message = format!(
            "make the sequence's blocks {num_blocks}, but {} tokens need at least {needed}, and no sequence more than {most}",
            place.computed_len + num_tokens
        );
        return Err(Error::invalid("append_block_ids", message));
    }
    Ok(())
}

fn check_new_sequence(new: &NewSequence, limits: &Limits) -> Result<(), Error> {
    let len = new.token_ids.len();
    in_range("prompt_tokens", new.prompt_tokens as usize, 1..=len)?;
    for (index, &token_id) in new.token_ids.iter().enumerate() {
        check_token(format!("token_ids[{index}]"), token_id, limits)?;
    }
    in_range("computed_tokens", new.computed_tokens as usize, 0..=len - 1)?;
    check_blocks("block_ids", &new.block_ids, limits)?;
    let needed = (new.computed_tokens as usize).div_ceil(limits.block_size);
    let most = limits.max_total_tokens.div_ceil(limits.block_size);
    in_range("the number of block_ids", new.block_ids.len(), needed..=most)?;
    let sampling = new.sampling.as_ref().ok_or_else(|| Error::invalid("sampling", "must be set"))?;
    check_sampling(sampling, limits).map_err(|error| within("sampling", error))?;
    let stopping = new.stopping.ok_or_else(|| Error::invalid("stopping", "must be set"))?;
    check_stopping(stopping, new, limits).map_err(|error| within("stopping", error))?;
    in_range("top_n_tokens", new.top_n_tokens as usize, 0..=limits.max_top_n_tokens)?;
    check_adapter(new, limits)?;
    if new.prompt_logprobs && new.computed_tokens > 0 {
        let message = "needs computed_tokens == 0: what is not computed here has no logits";
        return Err(Error::invalid("prompt_logprobs", message));
    }
    Ok(())
}

fn check_adapter(new: &NewSequence, limits: &Limits) -> Result<(), Error> {
    match new.adapter_index {
        Some(index) if index as usize >= limits.num_adapters => {
            let message = format!(
                "must be below {}, the number of adapters, but is {index}: see InfoResponse.adapter_names, and \
                 --lora-adapters",
                limits.num_adapters
            );
            Err(Error::invalid("adapter_index", message))
        }
        _ => Ok(()),
    }
}

fn check_stopping(stopping: StoppingParameters, new: &NewSequence, limits: &Limits) -> Result<(), Error> {
    let prompt_len = new.prompt_tokens as usize;
    let num_generated = new.token_ids.len() - prompt_len;
    let max_new_tokens = stopping.max_new_tokens as usize;
    if max_new_tokens <= num_generated {
        let message =
            format!("must be above the {num_generated} tokens generated already but is {max_new_tokens}");
        return Err(Error::invalid("max_new_tokens", message));
    }
    if prompt_len + max_new_tokens > limits.max_total_tokens {
        let message = format!(
            "is {max_new_tokens}, which makes {} tokens with the prompt of {prompt_len}, but max_total_tokens is {}: \
             lower it",
            prompt_len + max_new_tokens,
            limits.max_total_tokens
        );
        return Err(Error::invalid("max_new_tokens", message));
    }
    Ok(())
}

fn check_sampling(parameters: &SamplingParameters, limits: &Limits) -> Result<(), Error> {
    finite_in("temperature", parameters.temperature, 0.0..=f32::MAX, "0: greedy")?;
    positive_up_to("top_p", parameters.top_p, 1.0)?;
    finite_in("min_p", parameters.min_p, 0.0..=1.0, "0: off")?;
    positive_up_to("typical_p", parameters.typical_p, 1.0)?;
    positive_up_to("repetition_penalty", parameters.repetition_penalty, f32::MAX)?;
    finite_in("frequency_penalty", parameters.frequency_penalty, -2.0..=2.0, "0: off")?;
    finite_in("presence_penalty", parameters.presence_penalty, -2.0..=2.0, "0: off")?;
    in_range("the number of logit_bias entries", parameters.logit_bias.len(), 0..=limits.max_logit_biases)?;
    for (index, entry) in parameters.logit_bias.iter().enumerate() {
        check_token(format!("logit_bias[{index}].token_id"), entry.token_id, limits)?;
        finite_in(&format!("logit_bias[{index}].bias"), entry.bias, -100.0..=100.0, "0: off")?;
    }
    Ok(())
}

fn check_token(field: String, token_id: u32, limits: &Limits) -> Result<(), Error> {
    if (token_id as usize) < limits.vocab_size {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        format!("must be below {}, the vocabulary's size, but is {token_id}", limits.vocab_size),
    ))
}

fn check_blocks(field: &str, block_ids: &[u32], limits: &Limits) -> Result<(), Error> {
    match block_ids.iter().position(|&block_id| block_id as usize >= limits.num_blocks) {
        Some(index) => Err(Error::invalid(
            format!("{field}[{index}]"),
            format!("must be below {}, the number of blocks, but is {}", limits.num_blocks, block_ids[index]),
        )),
        None => Ok(()),
    }
}

fn at_most(field: &str, what: &str, given: usize, limit_name: &str, limit: usize) -> Result<(), Error> {
    if given <= limit {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        format!("has {given} {what} but {limit_name} is {limit}: schedule less in one step"),
    ))
}

fn in_range(field: &str, value: usize, range: RangeInclusive<usize>) -> Result<(), Error> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(field, format!("must be within {} ..= {} but is {value}", range.start(), range.end())))
}

/// `hint`: what the neutral value is, for people who left the field out.
fn finite_in(field: &str, value: f32, range: RangeInclusive<f32>, hint: &str) -> Result<(), Error> {
    // NaN is in no range; infinity in none of those used here.
    if range.contains(&value) {
        return Ok(());
    }
    let message = format!("must be within {} ..= {} but is {value} ({hint})", range.start(), range.end());
    Err(Error::invalid(field, message))
}

fn positive_up_to(field: &str, value: f32, most: f32) -> Result<(), Error> {
    if value > 0.0 && value <= most {
        return Ok(());
    }
    Err(Error::invalid(field, format!("must be above 0 and at most {most} but is {value} (1: off)")))
}

/// The same error with the field's path from further outside.
fn within(path: &str, error: Error) -> Error {
    match error {
        Error::InvalidArgument { field, message } => {
            Error::InvalidArgument { field: format!("{path}.{field}"), message }
        }
        other => other,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::sequence::tests::new_sequence;
    use super::*;

    pub(in crate::engine) const LIMITS: Limits = Limits {
        vocab_size: 100,
        block_size: 4,
        num_blocks: 8,
        max_step_tokens: 16,
        max_step_sequences: 3,
        max_total_tokens: 24,
        max_sequences: 5,
        max_top_n_tokens: 100,
        max_logit_biases: 4,
        num_adapters: 2,
    };

    fn scheduled(sequence_id: u64, num_tokens: u32, append: &[u32]) -> ScheduledSequence {
        ScheduledSequence { sequence_id, num_tokens, append_block_ids: append.to_vec() }
    }

    fn verdict(request: &StepRequest, sequences: &Sequences) -> Result<(), String> {
        let mut validator = StepValidator::default();
        validator.check(request, Some(4), sequences, &LIMITS).map_err(|error| error.to_string())
    }

    /// A step that is right: admits sequence 1 with five tokens and schedules them.
    fn good() -> StepRequest {
        StepRequest {
            step_id: 5,
            release_sequence_ids: vec![],
            admit: vec![new_sequence(1, &[1, 2, 3, 4, 5])],
            schedule: vec![scheduled(1, 5, &[0, 7])],
        }
    }

    /// Changes the right step and expects it to be refused with a message that starts so.
    fn refused(expected: &str, change: impl FnOnce(&mut StepRequest)) {
        let mut request = good();
        change(&mut request);
        let verdict = verdict(&request, &Sequences::new());
        assert!(
            verdict.as_ref().is_err_and(|message| message.starts_with(expected)),
            "{expected}: {verdict:?}"
        );
    }

    #[test]
    fn a_right_step_is_accepted() {
        assert_eq!(verdict(&good(), &Sequences::new()), Ok(()));
    }

    #[test]
    fn what_is_wrong_with_a_schedule_is_named() {
        refused("step_id must be above 4", |request| request.step_id = 4);
        refused("schedule[0].sequence_id 2 is not known", |request| request.schedule[0].sequence_id = 2);
        refused("schedule[1].sequence_id 1 is scheduled twice", |request| {
            request.schedule.push(scheduled(1, 1, &[]));
        });
        refused("schedule[0].num_tokens must be at least 1", |request| request.schedule[0].num_tokens = 0);
        refused("schedule[0].num_tokens is 6", |request| request.schedule[0].num_tokens = 6);
        refused("schedule[0].append_block_ids make", |request| {
            request.schedule[0].append_block_ids.pop();
        });
        refused("schedule[0].append_block_ids make", |request| {
            request.schedule[0].append_block_ids = vec![0; 7];
        });
        refused("schedule[0].append_block_ids[1] must be below 8", |request| {
            request.schedule[0].append_block_ids[1] = 8;
        });
        refused("schedule has 17 tokens but max_step_tokens is 16", |request| {
            request.schedule[0].num_tokens = 17;
        });
        refused("schedule has 4 sequences but max_step_sequences is 3", |request| {
            request.schedule = (1..=4).map(|id| scheduled(id, 1, &[0])).collect();
        });
        refused("schedule[1].num_tokens is 1 behind", |request| {
            request.admit.push(new_sequence(2, &[1]));
            request.schedule.push(scheduled(2, 1, &[3]));
        });
    }

    #[test]
    fn what_is_wrong_with_a_new_sequence_is_named() {
        refused("admit[0].adapter_index must be below 2, the number of adapters, but is 2", |request| {
            request.admit[0].adapter_index = Some(2);
        });
        let check = |expected: &str, change: fn(&mut NewSequence)| {
            refused(&format!("admit[0].{expected}"), |request| change(&mut request.admit[0]));
        };
        check("prompt_tokens must be within 1 ..= 5", |new| new.prompt_tokens = 6);
        check("prompt_tokens must be within", |new| new.prompt_tokens = 0);
        check("prompt_tokens must be within", |new| new.token_ids.clear());
        check("token_ids[2] must be below 100", |new| new.token_ids[2] = 100);
        check("computed_tokens must be within 0 ..= 4", |new| new.computed_tokens = 5);
        check("the number of block_ids must be within 1", |new| new.computed_tokens = 4);
        check("the number of block_ids must be within 0 ..= 6", |new| new.block_ids = vec![0; 7]);
        check("block_ids[0] must be below 8", |new| new.block_ids = vec![8]);
        check("sampling must be set", |new| new.sampling = None);
        check("stopping must be set", |new| new.stopping = None);
        check("stopping.max_new_tokens must be above the 0", |new| {
            new.stopping = Some(StoppingParameters::default());
        });
        check("stopping.max_new_tokens must be above the 3", |new| {
            new.prompt_tokens = 2;
            new.stopping = Some(StoppingParameters { max_new_tokens: 3, ignore_eos: false });
        });
        check("stopping.max_new_tokens is 20", |new| {
            new.stopping = Some(StoppingParameters { max_new_tokens: 20, ignore_eos: false });
        });
        check("top_n_tokens must be within 0 ..= 100", |new| new.top_n_tokens = 101);
        check("prompt_logprobs needs computed_tokens", |new| {
            (new.prompt_logprobs, new.computed_tokens, new.block_ids) = (true, 2, vec![1]);
        });
    }

    #[test]
    fn what_is_wrong_with_sampling_parameters_is_named() {
        let check = |expected: &str, change: fn(&mut SamplingParameters)| {
            refused(&format!("admit[0].sampling.{expected}"), |request| {
                change(request.admit[0].sampling.as_mut().unwrap());
            });
        };
        check("temperature must be within 0", |p| p.temperature = -0.1);
        check("temperature must be", |p| p.temperature = f32::NAN);
        check("temperature must be", |p| p.temperature = f32::INFINITY);
        check("top_p must be above 0 and at most 1 but is 0 (1: off)", |p| p.top_p = 0.0);
        check("top_p must be", |p| p.top_p = 1.01);
        check("min_p must be within 0 ..= 1", |p| p.min_p = 1.01);
        check("typical_p must be", |p| p.typical_p = 0.0);
        check("repetition_penalty must be above 0", |p| p.repetition_penalty = 0.0);
        check("repetition_penalty must be", |p| p.repetition_penalty = f32::INFINITY);
        check("frequency_penalty must be within -2 ..= 2", |p| p.frequency_penalty = 2.1);
        check("presence_penalty must be", |p| p.presence_penalty = f32::NAN);
        check("the number of logit_bias entries must be within 0 ..= 4 but is 5", |p| {
            p.logit_bias = vec![proto::v1::LogitBias { token_id: 1, bias: 0.0 }; 5];
        });
        check("logit_bias[0].token_id must be below 100", |p| {
            p.logit_bias.push(proto::v1::LogitBias { token_id: 100, bias: 0.0 });
        });
        check("logit_bias[0].bias must be within -100 ..= 100", |p| {
            p.logit_bias.push(proto::v1::LogitBias { token_id: 99, bias: 101.0 });
        });
    }

    #[test]
    fn ids_in_use_are_refused_until_they_are_released() {
        let known = || Sequences::from([(1, Sequence::new(new_sequence(1, &[9])))]);
        let message = verdict(&good(), &known()).unwrap_err();
        assert!(message.starts_with("admit[0].sequence_id 1 is in use"), "{message}");

        let request = StepRequest { release_sequence_ids: vec![1, 77], ..good() };
        assert_eq!(verdict(&request, &known()), Ok(()));

        let request = StepRequest { admit: vec![], ..request };
        assert!(
            verdict(&request, &known()).unwrap_err().starts_with("schedule[0].sequence_id 1 is not known")
        );
    }

    #[test]
    fn more_sequences_than_there_is_room_for_are_refused_until_some_are_released() {
        let known = || (10..14).map(|id| (id, Sequence::new(new_sequence(id, &[9])))).collect();
        let admit = vec![new_sequence(1, &[1]), new_sequence(2, &[1])];
        let request = StepRequest { admit, schedule: vec![], ..good() };
        let message = verdict(&request, &known()).unwrap_err();
        assert!(message.starts_with("admit makes 6 sequences known, but there is room for 5"), "{message}");
        let request = StepRequest { release_sequence_ids: vec![12, 77], ..request };
        assert_eq!(verdict(&request, &known()), Ok(()));
    }

    #[test]
    fn a_sequence_that_has_ended_may_still_be_scheduled() {
        let mut sequence = Sequence::new(new_sequence(1, &[9]));
        sequence.computed_len = 1;
        sequence.finished = true;
        let request = StepRequest { admit: vec![], schedule: vec![scheduled(1, 1, &[])], ..good() };
        assert_eq!(verdict(&request, &Sequences::from([(1, sequence)])), Ok(()));
    }

    #[test]
    fn what_is_wrong_with_a_warmup_is_named() {
        let good = WarmupRequest {
            max_step_tokens: 1,
            max_step_sequences: 1,
            max_total_tokens: 64,
            kv_cache_tokens: Some(64),
        };
        let check = |expected: &str, request: WarmupRequest| {
            let message = check_warmup(&request, 64).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        };
        assert!(check_warmup(&good, 64).is_ok());
        check("max_step_tokens must", WarmupRequest { max_step_tokens: 0, ..good });
        check("max_step_sequences must", WarmupRequest { max_step_sequences: 0, ..good });
        check("max_total_tokens must", WarmupRequest { max_total_tokens: 0, ..good });
        check("max_total_tokens is 65", WarmupRequest { max_total_tokens: 65, ..good });
        check("kv_cache_tokens is 63", WarmupRequest { kv_cache_tokens: Some(63), ..good });
    }
}
