//! What the ranks say about themselves, and whether they can be one group.

use std::fmt;

use proto::units::TokenId;
use proto::v1;

/// Where a shard computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Processor cores.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Element type of weights and KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataType {
    /// 32-bit float.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

impl fmt::Display for DataType {
    /// The name that PyTorch and the `--dtype` flag use.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        })
    }
}

/// What all ranks agree on, and their sums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroupInfo {
    pub(crate) num_shards: usize,
    pub(crate) device: Device,
    pub(crate) dtype: DataType,
    /// Tokens in a KV block.
    pub(crate) block_size: usize,
    pub(crate) vocab_size: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) sliding_window_tokens: Option<usize>,
    pub(crate) eos_token_ids: Vec<TokenId>,
    pub(crate) num_layers: usize,
    pub(crate) num_parameters: u64,
    pub(crate) adapter_names: Vec<String>,
    /// Of all ranks.
    pub(crate) weight_bytes: u64,
    /// Of all ranks.
    pub(crate) kv_bytes_per_token: u64,
}

/// Why shards cannot be served from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InfoError {
    /// The addresses are in another order, or belong to another group.
    #[error(
        "it says that it is rank {rank} of {world_size} where rank {expected_rank} of {expected_world_size} was \
         expected: give --shard-address once for each rank, in order"
    )]
    Rank {
        /// As it says.
        rank: u32,
        /// As it says.
        world_size: u32,
        /// Its place among the addresses.
        expected_rank: usize,
        /// The number of addresses.
        expected_world_size: usize,
    },
    /// A field without a usable value.
    #[error("its {field} is {value}, which is out of range: router and shard are of different versions")]
    Field {
        /// As in `shard.proto`.
        field: &'static str,
        /// As it says.
        value: i64,
    },
    /// Two ranks of two groups.
    #[error("its {field} is not that of rank 0: all ranks must serve the same model with the same settings")]
    Differs {
        /// As in `shard.proto`.
        field: &'static str,
    },
}

impl GroupInfo {
    /// What the ranks say, in order of rank; or the rank at fault and why.
    pub(crate) fn try_new(ranks: &[v1::InfoResponse]) -> Result<Self, (usize, InfoError)> {
        let first = ranks.first().expect("a group has at least one rank");
        for (rank, info) in ranks.iter().enumerate() {
            check_rank(info, rank, ranks.len()).map_err(|error| (rank, error))?;
            check_same(info, first).map_err(|error| (rank, error))?;
        }
        Self::from_first(first, ranks).map_err(|error| (0, error))
    }

    fn from_first(first: &v1::InfoResponse, ranks: &[v1::InfoResponse]) -> Result<Self, InfoError> {
        Ok(Self {
            num_shards: ranks.len(),
            device: device(first.device)?,
            dtype: data_type(first.data_type)?,
            block_size: at_least_one("block_size_tokens", first.block_size_tokens)?,
            vocab_size: at_least_one("vocab_size", first.vocab_size)?,
            max_position_embeddings: at_least_one("max_position_embeddings", first.max_position_embeddings)?,
            sliding_window_tokens: first
                .sliding_window_tokens
                .map(|tokens| at_least_one("sliding_window_tokens", tokens))
                .transpose()?,
            eos_token_ids: first.eos_token_ids.iter().copied().map(TokenId).collect(),
            num_layers: at_least_one("num_layers", first.num_layers)?,
            num_parameters: first.num_parameters,
            adapter_names: first.adapter_names.clone(),
            weight_bytes: ranks.iter().map(|info| info.weight_bytes).sum(),
            kv_bytes_per_token: ranks.iter().map(|info| info.kv_bytes_per_token).sum(),
        })
    }
}

fn check_rank(
    info: &v1::InfoResponse,
    expected_rank: usize,
    expected_world_size: usize,
) -> Result<(), InfoError> {
    let v1::InfoResponse { rank, world_size, .. } = *info;
    if rank as usize == expected_rank && world_size as usize == expected_world_size {
        return Ok(());
    }
    Err(InfoError::Rank { rank, world_size, expected_rank, expected_world_size })
}

fn check_same(info: &v1::InfoResponse, first: &v1::InfoResponse) -> Result<(), InfoError> {
    let fields = [
        ("device", info.device == first.device),
        ("data_type", info.data_type == first.data_type),
        ("block_size_tokens", info.block_size_tokens == first.block_size_tokens),
        ("vocab_size", info.vocab_size == first.vocab_size),
        ("max_position_embeddings", info.max_position_embeddings == first.max_position_embeddings),
        ("sliding_window_tokens", info.sliding_window_tokens == first.sliding_window_tokens),
        ("eos_token_ids", info.eos_token_ids == first.eos_token_ids),
        ("num_layers", info.num_layers == first.num_layers),
        ("num_parameters", info.num_parameters == first.num_parameters),
        ("adapter_names", info.adapter_names == first.adapter_names),
    ];
    match fields.into_iter().find(|(_, same)| !same) {
        Some((field, _)) => Err(InfoError::Differs { field }),
        None => Ok(()),
    }
}

fn at_least_one(field: &'static str, value: u32) -> Result<usize, InfoError> {
    if value == 0 { Err(InfoError::Field { field, value: 0 }) } else { Ok(value as usize) }
}

fn device(value: i32) -> Result<Device, InfoError> {
    match v1::Device::try_from(value) {
        Ok(v1::Device::Cpu) => Ok(Device::Cpu),
        Ok(v1::Device::Cuda) => Ok(Device::Cuda),
        Ok(v1::Device::Unspecified) | Err(_) => {
            Err(InfoError::Field { field: "device", value: value.into() })
        }
    }
}

fn data_type(value: i32) -> Result<DataType, InfoError> {
    match v1::DataType::try_from(value) {
        Ok(v1::DataType::F32) => Ok(DataType::F32),
        Ok(v1::DataType::F16) => Ok(DataType::F16),
        Ok(v1::DataType::Bf16) => Ok(DataType::Bf16),
        Ok(v1::DataType::Unspecified) | Err(_) => {
            Err(InfoError::Field { field: "data_type", value: value.into() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(rank: u32, world_size: u32) -> v1::InfoResponse {
        v1::InfoResponse {
            rank,
            world_size,
            device: v1::Device::Cpu.into(),
            data_type: v1::DataType::Bf16.into(),
            block_size_tokens: 16,
            vocab_size: 100,
            max_position_embeddings: 512,
            sliding_window_tokens: None,
            eos_token_ids: vec![2],
            num_layers: 2,
            num_parameters: 1000,
            kv_bytes_per_token: 64,
            weight_bytes: 1200,
            adapter_names: vec!["tone".to_owned()],
        }
    }

    #[test]
    fn bytes_of_all_ranks_are_summed() {
        let info = GroupInfo::try_new(&[rank(0, 2), rank(1, 2)]).unwrap();
        assert_eq!((info.num_shards, info.weight_bytes, info.kv_bytes_per_token), (2, 2400, 128));
        assert_eq!((info.num_parameters, info.dtype.to_string()), (1000, "bfloat16".to_owned()));
    }

    #[test]
    fn ranks_that_cannot_be_one_group_are_named_with_what_is_wrong() {
        let check = |ranks: &[v1::InfoResponse], at_fault: usize, part: &str| {
            let (rank, error) = GroupInfo::try_new(ranks).unwrap_err();
            assert_eq!(rank, at_fault);
            assert!(error.to_string().contains(part), "{error}");
        };
        check(&[rank(1, 2), rank(0, 2)], 0, "rank 1 of 2 where rank 0 of 2");
        check(&[rank(0, 2)], 0, "rank 0 of 2 where rank 0 of 1");
        check(&[rank(0, 2), v1::InfoResponse { vocab_size: 99, ..rank(1, 2) }], 1, "vocab_size is not that");
        check(&[rank(0, 2), v1::InfoResponse { adapter_names: vec![], ..rank(1, 2) }], 1, "adapter_names");
        check(&[rank(0, 2), v1::InfoResponse { block_size_tokens: 8, ..rank(1, 2) }], 1, "block_size_tokens");
        check(&[v1::InfoResponse { block_size_tokens: 0, ..rank(0, 1) }], 0, "block_size_tokens is 0");
        check(&[v1::InfoResponse { device: 9, ..rank(0, 1) }], 0, "device is 9");
        check(&[v1::InfoResponse { data_type: 0, ..rank(0, 1) }], 0, "data_type is 0");
    }
}
