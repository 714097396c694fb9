//! From addresses to a group that takes steps: connect, ask, warm up, open the streams.

use std::time::Duration;

use futures::future::try_join_all;
use proto::client::{self, ShardAddress};
use proto::v1;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tonic::transport::Channel;

use super::codec;
use super::grammars::GrammarClient;
use super::group::{Rank, ShardGroup};
use super::info::{Device, GroupInfo, InfoError};

/// Between two attempts at a shard that is not there yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// For one attempt to connect, and for opening a stream: neither computes anything.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What is wrong with a shard.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// A group of nobody.
    #[error("no shard to connect to: give --shard-address once for each rank")]
    NoAddress,
    /// Nobody answers.
    #[error("rank {rank} at {address} did not answer within {seconds} s ({reason}): see its log")]
    Unreachable {
        /// Its place among the addresses.
        rank: usize,
        /// Its address.
        address: String,
        /// How long it was waited for.
        seconds: u64,
        /// What the last attempt said.
        reason: String,
    },
    /// It answers with an error.
    #[error("rank {rank} answered {method} with an error: {reason}")]
    Rpc {
        /// Its place among the addresses.
        rank: usize,
        /// Of `shard.proto`.
        method: &'static str,
        /// The gRPC status.
        reason: String,
    },
    /// It takes too long.
    #[error("rank {rank} did not answer {method} within {seconds} s")]
    Deadline {
        /// Its place among the addresses.
        rank: usize,
        /// Of `shard.proto`.
        method: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// It cannot be a part of this group.
    #[error("rank {rank} cannot be served from: {error}")]
    Info {
        /// Its place among the addresses.
        rank: usize,
        /// Why.
        error: InfoError,
    },
    /// Its memory holds no KV cache.
    #[error("rank {rank} has no memory for a single KV block: give it more memory, or serve a smaller model")]
    NoBlocks {
        /// Its place among the addresses.
        rank: usize,
    },
    /// It went away.
    #[error("rank {rank} ended the stream of steps: it was stopped or has crashed, see its log")]
    Ended {
        /// Its place among the addresses.
        rank: usize,
    },
    /// It said something that cannot be.
    #[error("rank {rank} gave a wrong answer: {reason}")]
    Answer {
        /// Its place among the addresses.
        rank: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// A group whose ranks have their weights, and no KV cache yet.
pub(crate) struct ConnectedGroup {
    channels: Vec<Channel>,
    info: GroupInfo,
}

/// Connects to all ranks, in the order of `addresses`, waiting no longer than `deadline` for them to load.
pub(crate) async fn connect(
    addresses: &[ShardAddress],
    deadline: Duration,
) -> Result<ConnectedGroup, ShardError> {
    if addresses.is_empty() {
        return Err(ShardError::NoAddress);
    }
    let ranks = addresses.iter().enumerate().map(|(rank, address)| connect_rank(rank, address, deadline));
    let (channels, infos): (Vec<_>, Vec<_>) = try_join_all(ranks).await?.into_iter().unzip();
    let info = GroupInfo::try_new(&infos).map_err(|(rank, error)| ShardError::Info { rank, error })?;
    Ok(ConnectedGroup { channels, info })
}

impl ConnectedGroup {
    /// What its ranks say about themselves.
    pub(crate) fn info(&self) -> &GroupInfo {
        &self.info
    }

    /// What has grammars compiled.
    pub(crate) fn grammars(&self) -> GrammarClient {
        GrammarClient::new(self.channels[0].clone())
    }

    /// Sizes and allocates the KV cache, on all ranks at once, since they meet in collectives. Returns the number of
    /// blocks that all have, >= 1.
    pub(crate) async fn warmup(
        &self,
        request: v1::WarmupRequest,
        deadline: Duration,
    ) -> Result<u32, ShardError> {
        let calls = self.channels.iter().enumerate().map(|(rank, channel)| async move {
            let mut client = client::shard_client(channel.clone());
            let response = call(rank, "Warmup", deadline, client.warmup(request)).await?;
            if response.num_blocks == 0 {
                Err(ShardError::NoBlocks { rank })
            } else {
                Ok(response.num_blocks)
            }
        });
        let blocks = try_join_all(calls).await?;
        Ok(blocks.into_iter().min().expect("a group has at least one rank"))
    }

    /// Opens the streams of steps. No more than `steps_in_flight` steps may be without an answer.
    pub(crate) async fn run(self, steps_in_flight: usize) -> Result<ShardGroup, ShardError> {
        let ranks = self.channels.into_iter().enumerate().map(|(rank, channel)| async move {
            let (steps, requests) = tokio::sync::mpsc::channel(steps_in_flight);
            let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
            let responses = call(rank, "Run", CONNECT_TIMEOUT, codec::run(channel, requests)).await?;
            Ok(Rank { steps, responses })
        });
        let ranks = try_join_all(ranks).await?;
        Ok(ShardGroup::new(ranks, steps_in_flight, self.info.vocab_size, step_deadline(self.info.device)))
    }
}

/// How long a step may take before its shards count as hung. A shard that dies is noticed at once, so this is generous:
/// a chunk of 512 tokens of a model with 8 G parameters is 8 T multiplications, minutes on two laptop cores.
fn step_deadline(device: Device) -> Duration {
    match device {
        Device::Cpu => Duration::from_mins(5),
        Device::Cuda => Duration::from_mins(1),
    }
}

/// Connects to a shard and asks what it serves, again and again while it is not there.
async fn connect_rank(
    rank: usize,
    address: &ShardAddress,
    deadline: Duration,
) -> Result<(Channel, v1::InfoResponse), ShardError> {
    let end = Instant::now() + deadline;
    loop {
        let reason = match client::connect(address, CONNECT_TIMEOUT).await {
            Ok(channel) => {
                let mut client = client::shard_client(channel.clone());
                let left = end.saturating_duration_since(Instant::now());
                match timeout(left, client.info(v1::InfoRequest {})).await {
                    Ok(Ok(info)) => return Ok((channel, info.into_inner())),
                    Ok(Err(status)) if status.code() == Code::Unavailable => status.message().to_owned(),
                    Ok(Err(status)) => return Err(rpc_error(rank, "Info", &status)),
                    Err(_) => "no answer to Info".to_owned(),
                }
            }
            Err(error) => with_source(&error),
        };
        if Instant::now() + RETRY_INTERVAL >= end {
            let (address, seconds) = (address.to_string(), deadline.as_secs());
            return Err(ShardError::Unreachable { rank, address, seconds, reason });
        }
        sleep(RETRY_INTERVAL).await;
    }
}

async fn call<T>(
    rank: usize,
    method: &'static str,
    deadline: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, ShardError> {
    match timeout(deadline, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(rpc_error(rank, method, &status)),
        Err(_) => Err(ShardError::Deadline { rank, method, seconds: deadline.as_secs() }),
    }
}

/// A gRPC status as this crate's error.
pub(super) fn rpc_error(rank: usize, method: &'static str, status: &tonic::Status) -> ShardError {
    ShardError::Rpc { rank, method, reason: format!("{:?}: {}", status.code(), status.message()) }
}

/// An error with what it stems from: tonic's own message is only "transport error".
fn with_source(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message = error.to_string();
        source = error.source();
    }
    message
}
