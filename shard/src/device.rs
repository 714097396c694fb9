//! Which device computes: what `--device` means on this machine, with this executable.

use kernels::Context;

use crate::config::{DeviceChoice, Dtype, ShardConfig};

/// GPUs that CUDA shows to this process; an error says what is missing.
pub fn visible_gpus() -> anyhow::Result<usize> {
    Ok(kernels::num_gpus()?)
}

/// What `--device` comes to: never [`DeviceChoice::Auto`]. An error where a GPU is asked for and there is none.
pub fn resolve_device(config: &ShardConfig) -> anyhow::Result<DeviceChoice> {
    Ok(match config.device {
        DeviceChoice::Auto if visible_gpus().is_ok_and(|count| count > 0) => DeviceChoice::Cuda,
        DeviceChoice::Auto | DeviceChoice::Cpu => DeviceChoice::Cpu,
        DeviceChoice::Cuda => {
            visible_gpus()?;
            DeviceChoice::Cuda
        }
    })
}

/// Why an executable for GPUs computes on the CPU though nobody asked it to; none where it does not, or is for CPUs only.
pub fn why_no_gpu(config: &ShardConfig) -> Option<String> {
    let is_asked = kernels::BUILT_WITH_CUDA && config.device == DeviceChoice::Auto;
    is_asked.then(visible_gpus)?.err().map(|error| error.to_string())
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
    Ok(match (resolve_device(config)?, config.disable_custom_kernels, config.dtype) {
        (DeviceChoice::Cuda, true, _) => Context::cuda_with_plain_kernels(ordinal, num_threads)?,
        (DeviceChoice::Cuda, false, _) => Context::cuda(ordinal, num_threads)?,
        // They keep activations in f32 whatever the dtype.
        (_, true, _) => Context::cpu_with_plain_kernels(num_threads),
        (_, false, Some(Dtype::Float32)) => Context::cpu_with_f32_activations(num_threads),
        (_, false, _) => Context::cpu(num_threads),
    })
}
