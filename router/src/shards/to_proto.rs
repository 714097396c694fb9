//! The scheduler's step, as the shards read it.

use grammar::GrammarId;
use proto::units::{AdapterIndex, BlockId, SequenceId, TokenId};
use proto::v1;

use crate::scheduler::{NewSequence, Sampling, Scheduled, Step};

/// The message for all ranks.
pub(crate) fn step(step: &Step) -> v1::StepRequest {
    v1::StepRequest {
        step_id: step.id,
        release_sequence_ids: step.release.iter().map(|&SequenceId(id)| id).collect(),
        admit: step.admit.iter().map(new_sequence).collect(),
        schedule: step.schedule.iter().map(scheduled).collect(),
    }
}

fn new_sequence(new: &NewSequence) -> v1::NewSequence {
    let request = &*new.request;
    v1::NewSequence {
        sequence_id: new.id.0,
        token_ids: token_ids(&new.tokens),
        prompt_tokens: request.prompt.len() as u32,
        computed_tokens: new.computed_tokens as u32,
        block_ids: block_ids(&new.block_ids),
        sampling: Some(sampling(&request.sampling)),
        stopping: Some(v1::StoppingParameters {
            max_new_tokens: request.max_new_tokens,
            ignore_eos: request.ignore_eos,
        }),
        top_n_tokens: request.top_n_tokens,
        prompt_logprobs: new.prompt_logprobs,
        adapter_index: request.cache_namespace.adapter.map(|AdapterIndex(index)| index),
        grammar_id: request.grammar.map_or(0, |GrammarId(id)| id),
    }
}

fn sampling(sampling: &Sampling) -> v1::SamplingParameters {
    v1::SamplingParameters {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        typical_p: sampling.typical_p,
        seed: sampling.seed,
        repetition_penalty: sampling.repetition_penalty,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        logit_bias: sampling
            .logit_bias
            .iter()
            .map(|&(TokenId(token_id), bias)| v1::LogitBias { token_id, bias })
            .collect(),
    }
}

fn scheduled(scheduled: &Scheduled) -> v1::ScheduledSequence {
    v1::ScheduledSequence {
        sequence_id: scheduled.sequence.0,
        num_tokens: scheduled.num_tokens as u32,
        append_block_ids: block_ids(&scheduled.new_blocks),
    }
}

fn token_ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|&TokenId(id)| id).collect()
}

fn block_ids(blocks: &[BlockId]) -> Vec<u32> {
    blocks.iter().map(|&BlockId(id)| id).collect()
}
