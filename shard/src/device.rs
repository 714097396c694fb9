//! Which device computes: what `--device` means on this machine, with this executable.

use anyhow::ensure;
use kernels::Context;

use crate::config::{DeviceChoice, Dtype, ShardConfig};

/// GPUs that CUDA shows to this process; an error says what is missing.
pub fn visible_gpus() -> anyhow::Result<usize> {
    Ok(kernels::num_gpus()?)
}

/// What `--device` comes to: never [`DeviceChoice::Auto`]. An error where a GPU is asked for and there is none, or where
/// a setting cannot be followed on it.
pub fn resolve_device(config: &ShardConfig) -> anyhow::Result<DeviceChoice> {
    let device = match config.device {
        DeviceChoice::Auto if visible_gpus().is_ok_and(|count| count > 0) => DeviceChoice::Cuda,
        DeviceChoice::Auto | DeviceChoice::Cpu => DeviceChoice::Cpu,
        DeviceChoice::Cuda => {
            visible_gpus()?;
            DeviceChoice::Cuda
        }
    };
    ensure!(
        device == DeviceChoice::Cpu || !config.disable_custom_kernels,
        "--disable-custom-kernels cannot be followed on a GPU, where all kernels are our own: leave it out, or compute on \
         the CPU with --device cpu"
    );
    Ok(device)
}

/// Shards of a launch that does not say how many: one for each GPU.
pub fn default_num_shards(device: DeviceChoice) -> usize {
    match device {
        DeviceChoice::Cuda => visible_gpus().unwrap_or(1).max(1),
        DeviceChoice::Auto | DeviceChoice::Cpu => 1,
    }
}

/// `ordinal`: of the GPU.
pub(crate) fn open(config: &ShardConfig, ordinal: usize, num_threads: usize) -> anyhow::Result<Context> {
    Ok(match (resolve_device(config)?, config.dtype) {
        (DeviceChoice::Cuda, _) => Context::cuda(ordinal, num_threads)?,
        (_, Some(Dtype::Float32)) => Context::cpu_with_f32_activations(num_threads),
        _ => Context::cpu(num_threads),
    })
}
