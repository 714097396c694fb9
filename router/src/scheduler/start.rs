//! From addresses of shards to a door that takes requests: connecting, limits, warm-up.

use std::time::Duration;

use proto::client::ShardAddress;
use proto::units::TokenId;
use proto::v1;
use tokio::sync::watch;

use super::handle::SchedulerHandle;
use super::limits::{Budget, Limits};
use super::policy::{Discipline, Policy};
use super::state::Scheduler;
use super::task;
use crate::config::RouterConfig;
use crate::shards::{self, DataType, Device, GroupInfo, ShardError};

/// How long shards may take to load their weights before they answer. Long, because a model may come from a slow
/// disk; a shard that has died is noticed by the launcher at once.
const LOADING_DEADLINE: Duration = Duration::from_mins(20);

/// How long shards may take to allocate the KV cache and to prepare their buffers.
const WARMUP_DEADLINE: Duration = Duration::from_mins(10);

/// Where the start is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartPhase {
    /// Waiting for the shards to have their weights.
    Connecting,
    /// The shards allocate their KV caches.
    WarmingUp,
    /// Requests are taken.
    Ready,
}

/// What is served, and within which limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServingInfo {
    /// Ranks of the tensor-parallel group.
    pub num_shards: usize,
    /// Where they compute.
    pub device: Device,
    /// Element type of weights and KV cache.
    pub dtype: DataType,
    /// Rows of the logits; every token id is below it.
    pub vocab_size: usize,
    /// Longest sequence that the model's positions allow, in tokens.
    pub max_position_embeddings: usize,
    /// Present where every layer attends only to that many last tokens.
    pub sliding_window_tokens: Option<usize>,
    /// Ids that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
    /// Names of the adapters that requests may have, in the order of their indices.
    pub adapter_names: Vec<String>,
    /// Layers of the model.
    pub num_layers: usize,
    /// Parameters of the model, all ranks together.
    pub num_parameters: u64,
    /// Bytes of weights, all ranks together.
    pub weight_bytes: u64,
    /// Bytes of keys and values of one token, all ranks together.
    pub kv_bytes_per_token: u64,
    /// Tokens in a KV block.
    pub block_size: usize,
    /// Tokens of the KV cache, for all running sequences together.
    pub kv_cache_tokens: usize,
    /// Longest sequence that is served, prompt and output, in tokens. It fits the KV cache.
    pub max_total_tokens: usize,
    /// Longest prompt that is served, in tokens; below `max_total_tokens`.
    pub max_input_tokens: usize,
    /// Most prompt tokens computed in one step.
    pub max_batch_prefill_tokens: usize,
    /// Most sequences computed in one step.
    pub max_batch_size: usize,
    /// Most requests in the house.
    pub max_concurrent_requests: usize,
}

/// Why serving could not begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A shard could not be reached, or said something that cannot be.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// A setting that no machine can serve.
    #[error("--{setting} is {value}, the most that can be served is {limit}: lower it")]
    TooLarge {
        /// The flag without dashes.
        setting: &'static str,
        /// What was given.
        value: usize,
        /// The most that is possible.
        limit: usize,
    },
    /// No room for a single generated token.
    #[error(
        "--max-input-tokens is {max_input_tokens} but a sequence may have {max_total_tokens} tokens with its output: \
         lower --max-input-tokens below that, or raise --max-total-tokens"
    )]
    NoRoomForOutput {
        /// As given.
        max_input_tokens: usize,
        /// As given or found.
        max_total_tokens: usize,
    },
    /// Longer than the model was made for.
    #[error(
        "--max-total-tokens is {max_total_tokens} but the model's positions end at {max_position_embeddings}: lower it"
    )]
    BeyondPositions {
        /// As given.
        max_total_tokens: usize,
        /// From the model's config.json.
        max_position_embeddings: usize,
    },
    /// A sequence that could never run.
    #[error(
        "--max-total-tokens is {max_total_tokens} but the KV cache holds {kv_cache_tokens} tokens: lower \
         --max-total-tokens, raise --max-batch-total-tokens if it is set, or give the shards more memory"
    )]
    BeyondCache {
        /// As given.
        max_total_tokens: usize,
        /// As given in max-batch-total-tokens, or as much as the shards' memory holds.
        kv_cache_tokens: usize,
    },
    /// A cache in which not even a prompt of one token can be answered.
    #[error(
        "the KV cache holds {kv_cache_tokens} tokens, too few to serve anything: raise --max-batch-total-tokens if it \
         is set, or give the shards more memory"
    )]
    NoCache {
        /// As much as the shards' memory holds.
        kv_cache_tokens: usize,
    },
}

/// Connects to all shards (`shard_addresses` in order of rank), waiting while they load; warms them up; and spawns the
/// scheduler on the current runtime. `phase` tells where this is.
pub async fn start(
    config: &RouterConfig,
    shard_addresses: Vec<ShardAddress>,
    phase: &watch::Sender<StartPhase>,
) -> Result<(SchedulerHandle, ServingInfo), StartError> {
    phase.send_replace(StartPhase::Connecting);
    let group = shards::connect(&shard_addresses, LOADING_DEADLINE).await?;
    let wish = Wish::new(config, group.info())?;

    phase.send_replace(StartPhase::WarmingUp);
    let num_blocks = group.warmup(wish.warmup, WARMUP_DEADLINE).await?;
    let serving = wish.granted(config, group.info(), num_blocks)?;
    let max_step_sequences = serving.max_batch_size;
    let limits = Limits {
        num_blocks,
        budget: Budget {
            max_prefill_tokens: serving.max_batch_prefill_tokens,
            max_sequences: max_step_sequences,
            block_size: serving.block_size,
        },
        // On a CPU the shards compute with the cores that would plan the next step, so nothing is won by more.
        steps_in_flight: config.steps_in_flight.unwrap_or(match serving.device {
            Device::Cpu => 1,
            Device::Cuda => 2,
        }),
        prefix_caching: config.prefix_caching,
        policy: Policy {
            discipline: Discipline::Fair,
            ageing: Duration::from_millis(config.priority_ageing_ms as u64),
            request_timeout: config.request_timeout(),
            target_itl: config.target_itl_ms.map(|millis| Duration::from_millis(millis as u64)),
        },
        // The shards do not speculate.
        max_sampled_tokens: 1,
    };
    let grammars = group.grammars();
    let shards = group.run(limits.steps_in_flight).await?;
    let (handle, events) = SchedulerHandle::new(wish.max_concurrent_requests, serving.kv_cache_tokens);
    tokio::spawn(task::run(Scheduler::new(limits), events, shards, handle.status_sender()));
    phase.send_replace(StartPhase::Ready);
    Ok((handle.with_grammars(grammars), serving))
}

/// What the settings ask for, as far as it can be said before the KV cache is measured.
struct Wish {
    warmup: v1::WarmupRequest,
    max_concurrent_requests: u32,
}

impl Wish {
    fn new(config: &RouterConfig, info: &GroupInfo) -> Result<Self, StartError> {
        let (prefill_tokens, batch_size) = match info.device {
            Device::Cpu => (512, 64),
            Device::Cuda => (4096, 256),
        };
        let positions = info.max_position_embeddings;
        // A sequence is never longer than the cache, so where nothing is said the smaller of the two is the limit.
        let kv_cache_tokens = config.max_batch_total_tokens.unwrap_or(usize::MAX);
        let max_total_tokens = config.max_total_tokens.unwrap_or(positions.min(kv_cache_tokens));
        if max_total_tokens > positions {
            return Err(StartError::BeyondPositions { max_total_tokens, max_position_embeddings: positions });
        }
        if max_total_tokens > kv_cache_tokens {
            return Err(StartError::BeyondCache { max_total_tokens, kv_cache_tokens });
        }
        check_input(config.max_input_tokens, max_total_tokens)?;

        // A quarter of u32, so that sums of them are in range too.
        let within = |setting, value: usize| {
            let limit = u32::MAX / 4;
            u32::try_from(value).ok().filter(|value| *value <= limit).ok_or(StartError::TooLarge {
                setting,
                value,
                limit: limit as usize,
            })
        };
        let prefill_tokens = config.max_batch_prefill_tokens.unwrap_or(prefill_tokens);
        let prefill_tokens = within("max-batch-prefill-tokens", prefill_tokens)?;
        let max_step_sequences = within("max-batch-size", config.max_batch_size.unwrap_or(batch_size))?;
        Ok(Self {
            warmup: v1::WarmupRequest {
                // Decode rows come on top of the chunks.
                max_step_tokens: prefill_tokens + max_step_sequences,
                max_step_sequences,
                max_total_tokens: within("max-total-tokens", max_total_tokens)?,
                kv_cache_tokens: config.max_batch_total_tokens.map(|tokens| tokens as u64),
            },
            max_concurrent_requests: within("max-concurrent-requests", config.max_concurrent_requests)?,
        })
    }

    /// The limits that are kept, with a KV cache of `num_blocks`.
    fn granted(
        &self,
        config: &RouterConfig,
        info: &GroupInfo,
        num_blocks: u32,
    ) -> Result<ServingInfo, StartError> {
        let kv_cache_tokens = num_blocks as usize * info.block_size;
        if let Some(max_total_tokens) = config.max_total_tokens.filter(|tokens| *tokens > kv_cache_tokens) {
            return Err(StartError::BeyondCache { max_total_tokens, kv_cache_tokens });
        }
        let max_total_tokens = (self.warmup.max_total_tokens as usize).min(kv_cache_tokens);
        if max_total_tokens < 2 {
            return Err(StartError::NoCache { kv_cache_tokens });
        }
        check_input(config.max_input_tokens, max_total_tokens)?;
        let max_batch_size = self.warmup.max_step_sequences as usize;
        Ok(ServingInfo {
            num_shards: info.num_shards,
            device: info.device,
            dtype: info.dtype,
            vocab_size: info.vocab_size,
            max_position_embeddings: info.max_position_embeddings,
            sliding_window_tokens: info.sliding_window_tokens,
            eos_token_ids: info.eos_token_ids.clone(),
            adapter_names: info.adapter_names.clone(),
            num_layers: info.num_layers,
            num_parameters: info.num_parameters,
            weight_bytes: info.weight_bytes,
            kv_bytes_per_token: info.kv_bytes_per_token,
            block_size: info.block_size,
            kv_cache_tokens,
            max_total_tokens,
            max_input_tokens: config.max_input_tokens.unwrap_or(max_total_tokens - 1),
            max_batch_prefill_tokens: self.warmup.max_step_tokens as usize - max_batch_size,
            max_batch_size,
            max_concurrent_requests: self.max_concurrent_requests as usize,
        })
    }
}

fn check_input(max_input_tokens: Option<usize>, max_total_tokens: usize) -> Result<(), StartError> {
    match max_input_tokens {
        Some(max_input_tokens) if max_input_tokens >= max_total_tokens => {
            Err(StartError::NoRoomForOutput { max_input_tokens, max_total_tokens })
        }
        _ => Ok(()),
    }
}
