//! One GPU: its context, one stream, the kernels, and memory. Thin owners over the driver's API, which is loaded when a device
//! is opened: the executable needs neither CUDA nor a GPU to start.
//!
//! All work of a process goes through one stream, so it is done in the order in which it was queued, and memory that was
//! used by earlier work can be used again by later work.

mod cublaslt;
mod device;
mod error;
mod graph;
mod launch;
mod memory;
pub(crate) mod nccl;
mod staging;
mod stream;
mod upload;

pub(crate) use cublaslt::{Operand, Product};
pub(crate) use device::{Device, Kernels, num_devices};
pub(crate) use graph::Graph;
pub(crate) use launch::{Argument, Grid};
pub(crate) use memory::{DeviceMemory, DevicePtr};
pub(crate) use staging::{ReadbackBuffer, StagingBuffers};
