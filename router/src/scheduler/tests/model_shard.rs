//! A shard in a hundred lines: it verifies steps as strictly as a real one, and its next token is a hash of all the
//! tokens before it, as they are in the KV blocks. It panics where a sequence reads anything but its own prefix, so a block
//! that is shared too early, written late or freed early is noticed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use proto::units::{BlockId, SequenceId, TokenId};

use crate::scheduler::answer::{Outcome, SequenceOutput, StepAnswer, StepTimes};
use crate::scheduler::limits::Limits;
use crate::scheduler::request::{EndReason, Token, TokenRequest};
use crate::scheduler::step::{NewSequence, Scheduled, Step};

/// Sampled once in a while, and ends a sequence unless `ignore_eos` is set.
pub(super) const EOS: TokenId = TokenId(0);
/// A prompt that begins with it has logits that are not finite.
pub(super) const POISON: TokenId = TokenId(u32::MAX);

const VOCAB_SIZE: u64 = 40;

pub(super) struct ModelShard {
    limits: Limits,
    /// What a slot holds: the hash of all tokens up to its own.
    slots: Vec<u64>,
    /// Who may read a block. More than one: then nobody writes to it.
    users: HashMap<BlockId, HashSet<SequenceId>>,
    sequences: HashMap<SequenceId, Sequence>,
    known: HashSet<SequenceId>,
    last_step: u64,
    /// How often memory does not suffice for the next step that computes something.
    pub(super) shortages: usize,
    /// Blocks of sequences that were left out then.
    uncomputed: HashSet<BlockId>,
}

struct Sequence {
    tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
    computed: usize,
    request: Arc<TokenRequest>,
    prompt_logprobs: bool,
    ended: bool,
    /// For want of memory, or of a prefix.
    left_out: bool,
}

impl ModelShard {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            slots: vec![0; limits.num_blocks as usize * limits.budget.block_size],
            users: HashMap::new(),
            sequences: HashMap::new(),
            known: HashSet::new(),
            last_step: 0,
            shortages: 0,
            uncomputed: HashSet::new(),
        }
    }

    /// Sequences whose state it keeps.
    pub(super) fn num_sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Panics on a step that a shard would refuse.
    pub(super) fn run(&mut self, step: &Step) -> StepAnswer {
        assert!(step.id > self.last_step, "step ids increase");
        self.last_step = step.id;
        for sequence in &step.release {
            assert!(self.sequences.remove(sequence).is_some(), "{sequence} is released and was not there");
            self.users.retain(|_, users| !users.remove(sequence) || !users.is_empty());
        }
        for new in &step.admit {
            self.admit(new);
        }
        self.check_budgets(&step.schedule);
        let mut answer = StepAnswer {
            step: step.id,
            outputs: Vec::new(),
            skipped: Vec::new(),
            times: StepTimes::default(),
        };
        let mut left_out = self.without_prefix(step);
        if !step.schedule.is_empty() {
            for _ in 0..std::mem::take(&mut self.shortages) {
                left_out.extend(self.victims(step, &left_out));
            }
        }
        for scheduled in &step.schedule {
            let sequence = scheduled.sequence;
            if let Some(outcome) = left_out.get(&sequence) {
                self.leave_out(scheduled);
                answer.outputs.push(SequenceOutput {
                    sequence,
                    prompt: Vec::new(),
                    outcome: outcome.clone(),
                });
            } else if self.sequences[&sequence].left_out {
                self.leave_out(scheduled);
                answer.skipped.push(sequence);
            } else if self.sequences[&sequence].ended {
                answer.skipped.push(sequence);
            } else {
                answer.outputs.extend(self.compute(scheduled));
            }
        }
        answer
    }

    /// Those that the step admits over blocks that were not computed.
    fn without_prefix(&self, step: &Step) -> HashMap<SequenceId, Outcome> {
        let reads_uncomputed =
            |new: &&NewSequence| new.block_ids.iter().any(|block| self.uncomputed.contains(block));
        step.admit.iter().filter(reads_uncomputed).map(|new| (new.id, Outcome::MissingPrefix)).collect()
    }

    /// Whom the step is computed without: those that it admits, else the youngest.
    fn victims(&self, step: &Step, left_out: &HashMap<SequenceId, Outcome>) -> Vec<(SequenceId, Outcome)> {
        let computed = step.schedule.iter().map(|scheduled| scheduled.sequence).filter(|id| {
            let sequence = &self.sequences[id];
            !sequence.ended && !sequence.left_out && !left_out.contains_key(id)
        });
        let computed = computed.collect::<Vec<_>>();
        let is_new = |id: &&SequenceId| step.admit.iter().any(|new| new.id == **id);
        let mut victims = computed.iter().filter(is_new).copied().collect::<Vec<_>>();
        if victims.is_empty() {
            victims.extend(computed.iter().max_by_key(|id| id.0));
        }
        victims.into_iter().map(|id| (id, Outcome::OutOfMemory)).collect()
    }

    fn leave_out(&mut self, scheduled: &Scheduled) {
        let block_size = self.limits.budget.block_size;
        let sequence =
            self.sequences.get_mut(&scheduled.sequence).expect("a scheduled sequence was admitted");
        sequence.left_out = true;
        sequence.blocks.extend(&scheduled.new_blocks);
        self.uncomputed.extend(&sequence.blocks[sequence.computed / block_size..]);
    }

    fn admit(&mut self, new: &NewSequence) {
        assert!(self.known.insert(new.id), "{} is used twice", new.id);
        assert!(new.tokens.starts_with(&new.request.prompt));
        assert!(new.computed_tokens < new.tokens.len(), "something is left to compute");
        assert_eq!(
            new.computed_tokens,
            new.block_ids.len() * self.limits.budget.block_size,
            "full blocks are shared"
        );
        assert!(
            new.computed_tokens == 0 || !new.prompt_logprobs,
            "log-probabilities need the logits of each position"
        );
        for block in &new.block_ids {
            self.users.entry(*block).or_default().insert(new.id);
        }
        let sequence = Sequence {
            tokens: new.tokens.clone(),
            blocks: new.block_ids.clone(),
            computed: new.computed_tokens,
            request: Arc::clone(&new.request),
            prompt_logprobs: new.prompt_logprobs,
            ended: false,
            left_out: false,
        };
        self.sequences.insert(new.id, sequence);
    }

    fn check_budgets(&self, schedule: &[Scheduled]) {
        let budget = &self.limits.budget;
        assert!(schedule.len() <= budget.max_sequences, "the sequence budget holds");
        let chunks = schedule.iter().filter(|scheduled| scheduled.num_tokens > 1);
        let chunk_tokens = chunks.map(|scheduled| scheduled.num_tokens).sum::<usize>();
        assert!(chunk_tokens <= budget.max_prefill_tokens, "the prefill budget holds");
        assert!(schedule.iter().all(|scheduled| scheduled.num_tokens > 0), "no row is empty");
        assert!(schedule.is_sorted_by_key(|scheduled| scheduled.num_tokens > 1), "decode rows come first");
        let sequences = schedule.iter().map(|scheduled| scheduled.sequence).collect::<HashSet<_>>();
        assert_eq!(sequences.len(), schedule.len(), "a sequence has one row in a step");
    }

    fn compute(&mut self, scheduled: &Scheduled) -> Option<SequenceOutput> {
        let id = scheduled.sequence;
        for &block in &scheduled.new_blocks {
            assert!(block.0 < self.limits.num_blocks, "{block} is in the cache");
            self.uncomputed.remove(&block);
            let before = self.users.insert(block, HashSet::from([id]));
            assert_eq!(before, None, "{block} is given to {id} while it is used");
        }
        let block_size = self.limits.budget.block_size;
        let sequence = self.sequences.get_mut(&id).expect("a scheduled sequence was admitted");
        sequence.blocks.extend(&scheduled.new_blocks);
        let first = sequence.computed;
        let end = first + scheduled.num_tokens;
        assert!(end <= sequence.tokens.len(), "{id} has no more tokens to compute");
        assert!(end <= sequence.blocks.len() * block_size, "{id} has too few blocks");
        let slot = |position: usize| {
            sequence.blocks[position / block_size].0 as usize * block_size + position % block_size
        };
        let mut hash = 0;
        for position in 0..first {
            hash = mix(hash, sequence.tokens[position]);
            assert_eq!(self.slots[slot(position)], hash, "{id} reads position {position} of another prefix");
        }
        let mut prompt = Vec::new();
        for position in first..end {
            hash = mix(hash, sequence.tokens[position]);
            self.slots[slot(position)] = hash;
            let users = &self.users[&sequence.blocks[position / block_size]];
            assert!(users.len() == 1 && users.contains(&id), "{id} writes to a block that others read");
            if let Some(&next) = sequence.request.prompt.get(position + 1)
                && sequence.prompt_logprobs
            {
                prompt.push(token(hash, next));
            }
        }
        sequence.computed = end;
        if end < sequence.tokens.len() {
            return (!prompt.is_empty()).then_some(SequenceOutput {
                sequence: id,
                prompt,
                outcome: Outcome::Nothing,
            });
        }
        // As if so many had been guessed right: as many as a hash says, and slots are there for.
        let most = 1 + (hash % self.limits.max_sampled_tokens as u64) as usize;
        let most = most.min(1 + sequence.blocks.len() * block_size - end);
        let mut tokens = Vec::new();
        let outcome = loop {
            let Some((token, end)) = choose(&sequence.request, sequence.tokens.len(), hash) else {
                sequence.ended = true;
                break Outcome::InvalidLogits;
            };
            sequence.tokens.push(token.id);
            hash = mix(hash, token.id);
            tokens.push(token);
            sequence.ended = end.is_some();
            match end {
                Some(end) => break Outcome::Ended(tokens, end),
                None if tokens.len() == most => break Outcome::Sampled(tokens),
                None => {
                    let slot = sequence.blocks[sequence.computed / block_size].0 as usize * block_size;
                    self.slots[slot + sequence.computed % block_size] = hash;
                    sequence.computed += 1;
                }
            }
        };
        Some(SequenceOutput { sequence: id, prompt, outcome })
    }
}

/// What a reader gets: prompt log-probabilities, tokens and the end.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Transcript {
    pub(super) prompt: Vec<Token>,
    pub(super) tokens: Vec<Token>,
    pub(super) end: Option<EndReason>,
}

/// What a request gets alone, computed without blocks and steps.
pub(super) fn alone(request: &TokenRequest) -> Transcript {
    let mut transcript = Transcript::default();
    let mut hash = 0;
    for (position, &token_id) in request.prompt.iter().enumerate() {
        hash = mix(hash, token_id);
        if let Some(&next) = request.prompt.get(position + 1)
            && request.prompt_logprobs
        {
            transcript.prompt.push(token(hash, next));
        }
    }
    while transcript.end.is_none() {
        let len = request.prompt.len() + transcript.tokens.len();
        let Some((token, end)) = choose(request, len, hash) else { break };
        hash = mix(hash, token.id);
        transcript.tokens.push(token);
        transcript.end = end;
    }
    transcript
}

/// The token after `len` ones that hash to `hash`, and why it is the last one; nothing where logits are not finite.
fn choose(request: &TokenRequest, len: usize, hash: u64) -> Option<(Token, Option<EndReason>)> {
    if request.prompt[0] == POISON {
        return None;
    }
    let token = token(hash, TokenId((mix(hash, TokenId(7)) % VOCAB_SIZE) as u32));
    let generated = len + 1 - request.prompt.len();
    let end = if token.id == EOS && !request.ignore_eos {
        Some(EndReason::Eos)
    } else {
        (generated == request.max_new_tokens as usize).then_some(EndReason::Length)
    };
    Some((token, end))
}

fn token(hash: u64, id: TokenId) -> Token {
    let logprob = -((mix(hash, id) % 1000) as f32) / 1000.0;
    Token { id, logprob, top: vec![(id, logprob)] }
}

/// The finalizer of SplitMix64 (Steele et al. 2014): every bit of its input reaches every bit of its output.
fn mix(hash: u64, token: TokenId) -> u64 {
    let mut z = hash.wrapping_add(u64::from(token.0) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
