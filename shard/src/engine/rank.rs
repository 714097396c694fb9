//! This rank's part of the model, and what it is computed on.

use kernels::{Communicator, Context, Place};
use proto::v1::{DataType, Device, InfoResponse};

use super::BLOCK_SIZE_TOKENS;
use super::device::Parts;
use crate::decoder::KvCache;
use crate::models::Model;

pub(super) struct RankModel {
    pub(super) model: Model,
    pub(super) context: Context,
    pub(super) communicator: Box<dyn Communicator>,
}

impl RankModel {
    /// What this shard serves.
    pub(super) fn info(&self) -> InfoResponse {
        let Model {
            decoder,
            eos_token_ids,
            num_parameters,
            weight_bytes,
            dtype,
            kv_dtype,
            adapter_names,
            ..
        } = &self.model;
        let spec = decoder.spec();
        // A window is a property of the model only where all layers have the same.
        let window = spec.layers.first().and_then(|layer| layer.window);
        let everywhere = spec.layers.iter().all(|layer| layer.window == window);
        let device = match self.context.place() {
            Place::Host => Device::Cpu,
            Place::Device => Device::Cuda,
        };
        InfoResponse {
            rank: self.communicator.rank() as u32,
            world_size: self.communicator.world_size() as u32,
            device: device.into(),
            data_type: data_type(*dtype).into(),
            block_size_tokens: BLOCK_SIZE_TOKENS as u32,
            vocab_size: spec.vocab_size as u32,
            max_position_embeddings: spec.max_position_embeddings as u32,
            sliding_window_tokens: window.filter(|_| everywhere).map(|window| window as u32),
            eos_token_ids: eos_token_ids.clone(),
            num_layers: spec.layers.len() as u32,
            num_parameters: *num_parameters,
            kv_bytes_per_token: decoder.kv_bytes_per_token(*kv_dtype) as u64,
            weight_bytes: *weight_bytes,
            adapter_names: adapter_names.clone(),
        }
    }

    /// What steps over `cache` are computed with.
    pub(super) fn parts<'a>(&'a mut self, cache: &'a mut KvCache) -> Parts<'a> {
        let Self { model, context, communicator } = self;
        Parts { context, decoder: &mut model.decoder, communicator: communicator.as_mut(), cache }
    }
}

fn data_type(dtype: kernels::DType) -> DataType {
    match dtype {
        kernels::DType::F32 => DataType::F32,
        kernels::DType::F16 => DataType::F16,
        kernels::DType::BF16 => DataType::Bf16,
        _ => DataType::Unspecified,
    }
}
