//! A router in small: turns requests into steps, giving blocks as they are needed.

use std::sync::mpsc;

use grammar::{Compiler, GrammarId, Source};
use proto::v1::{
    FinishReason, NewSequence, SampledToken, SamplingParameters, ScheduledSequence, StepRequest,
    StepResponse, StoppingParameters, WarmupRequest,
};

pub(crate) const BLOCK_SIZE: usize = 32;

/// Room for eight sequences of 160 tokens, and no more in one step than 64 tokens.
pub(crate) const WARMUP: WarmupRequest = WarmupRequest {
    max_step_tokens: 64,
    max_step_sequences: 8,
    max_total_tokens: 160,
    kv_cache_tokens: Some(8 * 160),
};

/// Greedy choice, with all else off.
pub(crate) fn greedy() -> SamplingParameters {
    SamplingParameters {
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..SamplingParameters::default()
    }
}

/// A greedy request for 16 tokens whatever they are.
pub(crate) fn request(sequence_id: u64, prompt: &[u32]) -> NewSequence {
    NewSequence {
        sequence_id,
        token_ids: prompt.to_vec(),
        prompt_tokens: prompt.len() as u32,
        sampling: Some(greedy()),
        stopping: Some(StoppingParameters { max_new_tokens: 16, ignore_eos: true }),
        ..NewSequence::default()
    }
}

/// Tokens that look like a prompt and are the same each time; below 384 and none of the special ones.
pub(crate) fn prompt(salt: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|index| 3 + (index * 131 + salt * 977) % 380).collect()
}

/// Six requests that differ in everything.
pub(crate) fn unequal_requests() -> Vec<NewSequence> {
    let lens = [1, 5, 31, 32, 33, 90];
    let mut requests: Vec<NewSequence> =
        (0..6).map(|index| request(index as u64 + 1, &prompt(index, lens[index as usize]))).collect();
    let random = SamplingParameters { temperature: 1.0, seed: 7, ..greedy() };
    requests[1].sampling = Some(random.clone());
    requests[2].sampling = Some(SamplingParameters { top_k: 40, top_p: 0.9, seed: 8, ..random.clone() });
    requests[3].sampling = Some(SamplingParameters { repetition_penalty: 1.3, ..greedy() });
    requests[4].sampling = Some(SamplingParameters {
        min_p: 0.01,
        frequency_penalty: 0.5,
        presence_penalty: 0.2,
        ..random.clone()
    });
    requests[5].sampling = Some(SamplingParameters { typical_p: 0.8, temperature: 1.7, ..random });
    requests[0].top_n_tokens = 3;
    requests[5].prompt_logprobs = true;
    for (request, max_new_tokens) in requests.iter_mut().zip([16, 3, 9, 1, 14, 40]) {
        request.stopping = Some(StoppingParameters { max_new_tokens, ignore_eos: true });
    }
    requests
}

const SCHEMA: &str = r#"{"type":"object","properties":{
    "name":{"type":"string","maxLength":8},"age":{"type":"integer","minimum":0,"maximum":99},"tags":{"type":"array","items":{"enum":["x","y"]},"maxItems":2}},
    "required":["name","age","tags"],"additionalProperties":false}"#;

/// The id of a grammar, compiled.
pub(crate) fn prepared(compiler: &Compiler, source: Source) -> u64 {
    let (sender, receiver) = mpsc::channel();
    compiler.compile(source, Box::new(move |outcome| sender.send(outcome).unwrap())).unwrap();
    let GrammarId(id) = receiver.recv().unwrap().unwrap();
    id
}

/// Objects of three properties.
pub(crate) fn schema() -> Source {
    Source::json_schema(&serde_json::from_str(SCHEMA).unwrap())
}

/// Random choice, so that a model of random weights leaves a grammar as soon as it may.
pub(crate) fn constrained(sequence_id: u64, grammar_id: u64, max_new_tokens: u32) -> NewSequence {
    let seed = sequence_id;
    NewSequence {
        sampling: Some(SamplingParameters { temperature: 1.0, seed, ..greedy() }),
        stopping: Some(StoppingParameters { max_new_tokens, ignore_eos: sequence_id.is_multiple_of(2) }),
        grammar_id,
        ..request(sequence_id, &prompt(sequence_id as u32, 7))
    }
}

/// What came of one request.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Outcome {
    pub(crate) tokens: Vec<SampledToken>,
    pub(crate) prompt_tokens: Vec<SampledToken>,
    pub(crate) finish_reason: i32,
    /// How often it was scheduled after its end.
    pub(crate) num_skipped: usize,
}

impl Outcome {
    pub(crate) fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.token_id).collect()
    }

    pub(crate) fn finish_reason(&self) -> FinishReason {
        FinishReason::try_from(self.finish_reason).unwrap()
    }
}

/// How requests become steps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Most tokens of one sequence in one step.
    pub(crate) chunk: usize,
    /// Whether to schedule all tokens that a request may get without looking at what was answered, as a router does
    /// that queues steps ahead.
    pub(crate) blind: bool,
}

pub(crate) const WHOLE_PROMPTS: Plan = Plan { chunk: 64, blind: false };

/// One request on its way.
struct Running {
    new: Option<NewSequence>,
    sequence_id: u64,
    max_len: usize,
    known_len: usize,
    computed_len: usize,
    num_blocks: usize,
    outcome: Outcome,
}

/// Plays a router for `requests`, all at once as far as a step has room, and releases them in the end.
pub(crate) fn generate(
    requests: &[NewSequence],
    plan: Plan,
    mut step: impl FnMut(StepRequest) -> StepResponse,
) -> Vec<Outcome> {
    let mut running: Vec<Running> = requests.iter().map(Running::new).collect();
    let mut next_block = 0;
    for step_id in 1.. {
        let request = plan_step(step_id, &mut running, plan, &mut next_block);
        if request.schedule.is_empty() {
            break;
        }
        let response = step(request);
        assert_eq!(response.step_id, step_id);
        for output in response.outputs {
            let sequence = running.iter_mut().find(|one| one.sequence_id == output.sequence_id).unwrap();
            if !plan.blind {
                sequence.known_len += output.tokens.len();
            }
            sequence.outcome.tokens.extend(output.tokens);
            sequence.outcome.prompt_tokens.extend(output.prompt_tokens);
            assert_eq!(sequence.outcome.finish_reason, 0, "an ended sequence was computed");
            sequence.outcome.finish_reason = output.finish_reason;
        }
        for sequence_id in response.skipped_sequence_ids {
            let sequence = running.iter_mut().find(|one| one.sequence_id == sequence_id).unwrap();
            sequence.outcome.num_skipped += 1;
        }
    }
    let release_sequence_ids = running.iter().map(|one| one.sequence_id).collect();
    step(StepRequest { step_id: u64::MAX, release_sequence_ids, ..StepRequest::default() });
    running.into_iter().map(|one| one.outcome).collect()
}

fn plan_step(step_id: u64, running: &mut [Running], plan: Plan, next_block: &mut u32) -> StepRequest {
    let mut request = StepRequest { step_id, ..StepRequest::default() };
    let mut budget = WARMUP.max_step_tokens as usize;
    for sequence in running {
        let num_tokens = sequence.wanted(plan).min(budget);
        if num_tokens == 0 {
            continue;
        }
        budget -= num_tokens;
        request.admit.extend(sequence.new.take());
        request.schedule.push(sequence.schedule(num_tokens, next_block));
        if plan.blind && sequence.computed_len == sequence.known_len {
            sequence.known_len += 1;
        }
    }
    request.schedule.sort_by_key(|scheduled| scheduled.num_tokens > 1);
    request
}

impl Running {
    fn new(new: &NewSequence) -> Self {
        Self {
            sequence_id: new.sequence_id,
            max_len: (new.prompt_tokens + new.stopping.unwrap().max_new_tokens) as usize,
            known_len: new.token_ids.len(),
            computed_len: new.computed_tokens as usize,
            num_blocks: new.block_ids.len(),
            new: Some(new.clone()),
            outcome: Outcome::default(),
        }
    }

    fn wanted(&self, plan: Plan) -> usize {
        // The last token that a request may get is never computed.
        let ended = if plan.blind { self.known_len >= self.max_len } else { self.outcome.finish_reason != 0 };
        if ended { 0 } else { (self.known_len - self.computed_len).min(plan.chunk) }
    }

    fn schedule(&mut self, num_tokens: usize, next_block: &mut u32) -> ScheduledSequence {
        self.computed_len += num_tokens;
        let num_blocks = self.computed_len.div_ceil(BLOCK_SIZE);
        let missing = num_blocks.saturating_sub(self.num_blocks) as u32;
        self.num_blocks = num_blocks;
        let append_block_ids = (*next_block..*next_block + missing).collect();
        *next_block += missing;
        ScheduledSequence { sequence_id: self.sequence_id, num_tokens: num_tokens as u32, append_block_ids }
    }
}
