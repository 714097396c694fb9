//! The primary context of a device and the stream that all work goes through.

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cudarc::driver::sys;

use super::error::check;
use crate::{Error, Result};

/// The retained primary context of a device, and its one stream. Whatever belongs to the context holds this, so that it
/// goes last.
pub(crate) struct Stream {
    device: sys::CUdevice,
    context: sys::CUcontext,
    queue: sys::CUstream,
    /// Tells this context from one that got the same address later.
    generation: u64,
    /// Steps under way that must not allocate.
    frozen: AtomicU32,
    /// Of our kernels, queued or recorded so far.
    launches: AtomicU64,
    /// Copied to the device so far.
    copied_bytes: AtomicU64,
}

// SAFETY: the driver's handles may be used from any thread that has the context current; each call makes it so.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver's functions are thread-safe.
unsafe impl Sync for Stream {}

thread_local! {
    /// The generation that is current on this thread; 0: none that we know.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

impl Stream {
    /// The driver has been initialized, and has this device.
    pub(super) fn open(device: sys::CUdevice) -> Result<Self> {
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        let mut context = null_mut();
        // SAFETY: the device is the driver's; it is released when `self` is dropped.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut context, device)
        })?;
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        let mut this = Self {
            device,
            context,
            queue: null_mut(),
            generation,
            frozen: AtomicU32::new(0),
            launches: AtomicU64::new(0),
            copied_bytes: AtomicU64::new(0),
        };
        this.bind()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the stream is destroyed with `this`.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut this.queue, flags) })?;
        Ok(this)
    }

    /// Makes the context current on this thread; each call of the driver that needs one comes behind it.
    pub(crate) fn bind(&self) -> Result<()> {
        if CURRENT.get() != self.generation {
            // SAFETY: the context is retained.
            check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })?;
            CURRENT.set(self.generation);
        }
        Ok(())
    }

    /// For calls of the driver and of its libraries, which queue their work on it.
    pub(crate) fn raw(&self) -> sys::CUstream {
        self.queue
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is ours.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.queue) })
    }

    pub(super) fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn num_launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    pub(super) fn count_copied(&self, bytes: usize) {
        self.copied_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn copied_bytes(&self) -> u64 {
        self.copied_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn freeze(&self) {
        self.frozen.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn thaw(&self) {
        self.frozen.fetch_sub(1, Ordering::Relaxed);
    }

    /// An error inside a step.
    pub(super) fn require_thawed(&self, call: &'static str, bytes: usize) -> Result<()> {
        if self.frozen.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        Err(Error::Frozen { call, bytes })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Nothing can be done about an error here, and after one in a kernel all these fail.
        if self.bind().is_ok() && !self.queue.is_null() {
            // SAFETY: the stream is ours, and whoever used it has gone.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.queue) };
        }
        CURRENT.set(0);
        // SAFETY: retained in `open`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
