//! The operations of a step, recorded once and launched at once.

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{Context, Error, Result};

/// Operations that were recorded, with the addresses and sizes they had then: what differs between launches is read
/// from device memory. There are graphs only on a GPU.
pub struct Graph {
    #[cfg(feature = "cuda")]
    inner: cuda::Graph,
    #[cfg(not(feature = "cuda"))]
    none: std::convert::Infallible,
}

impl Context {
    /// Records what `step` queues, without running it. It must have run before with the same shapes, so that all
    /// memory is allocated and all kernels are loaded, and it must not wait for the device.
    ///
    /// An error on the CPU.
    pub fn capture<E: From<Error>>(&self, step: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            let _frozen = self.freeze();
            return cuda::Graph::capture(device.stream(), step).map(|inner| Graph { inner });
        }
        drop(step);
        Err(Error::Unavailable("operations on the CPU cannot be recorded".into()).into())
    }
}

impl Graph {
    /// Kernels of ours that were recorded; those of libraries are not counted.
    pub fn num_launches(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.inner.num_launches();
        #[cfg(not(feature = "cuda"))]
        match self.none {}
    }

    /// Queues all operations.
    pub fn launch(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        return self.inner.launch();
        #[cfg(not(feature = "cuda"))]
        match self.none {}
    }
}
