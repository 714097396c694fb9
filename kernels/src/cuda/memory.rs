//! Device memory, pinned host memory, and marks in the stream.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::error::check;
use super::stream::Stream;
use crate::{Error, Place, Result, View};

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// As [`crate::View`]s hold it; nothing on the host follows it.
    pub(crate) fn as_ptr(self) -> *const u8 {
        std::ptr::without_provenance(self.0 as usize)
    }
}

/// Owned device memory, aligned to 256 bytes. What is queued when it is dropped is done before it is freed.
pub(crate) struct DeviceMemory {
    stream: Arc<Stream>,
    start: DevicePtr,
    size: usize,
}

impl DeviceMemory {
    /// With whatever was there before.
    pub(crate) fn allocate(stream: &Arc<Stream>, size: usize) -> Result<Self> {
        const CALL: &str = "cuMemAlloc";
        stream.require_thawed(CALL, size)?;
        stream.bind()?;
        let mut start = 0;
        if size > 0 {
            // SAFETY: the context is current; the memory is freed when `self` is dropped.
            let answer = unsafe { sys::cuMemAlloc_v2(&raw mut start, size) };
            if answer == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(Error::OutOfMemory(format!("the GPU's memory has no {size} bytes left")));
            }
            check(CALL, answer)?;
        }
        Ok(Self { stream: Arc::clone(stream), start: DevicePtr(start), size })
    }

    pub(crate) fn start(&self) -> DevicePtr {
        self.start
    }

    /// In bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn fill_zeros(&mut self) -> Result<()> {
        if self.size == 0 {
            return Ok(());
        }
        self.stream.bind()?;
        // SAFETY: the range is this memory.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(self.start.0, 0, self.size, self.stream.raw())
        })
    }

    /// Queues a copy of the first `len` bytes of `from` to `offset`.
    ///
    /// # Safety
    /// `from` is not written or freed until the copy is done.
    pub(super) unsafe fn copy_from_pinned(
        &mut self,
        offset: usize,
        from: &PinnedMemory,
        len: usize,
    ) -> Result<()> {
        assert!(len <= from.size && offset + len <= self.size, "copy_from_pinned: {offset}+{len}");
        self.stream.bind()?;
        self.stream.count_copied(len);
        // SAFETY: both ranges were checked; `from` stays, by the caller's promise.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.start.0 + offset as u64,
                from.start.cast_const().cast(),
                len,
                self.stream.raw(),
            )
        })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.size > 0 && self.stream.bind().is_ok() {
            // SAFETY: allocated in `allocate`. The driver waits for queued work first. It refuses only after an error that
            // ended the context, and its memory with it.
            let _ = unsafe { sys::cuMemFree_v2(self.start.0) };
        }
    }
}

/// Host memory that stays where it is, so that the device copies to and from it by itself.
pub(crate) struct PinnedMemory {
    stream: Arc<Stream>,
    start: *mut u8,
    size: usize,
}

// SAFETY: owned memory; reached through `&self` only for reading.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// Zeroed.
    pub(crate) fn allocate(stream: &Arc<Stream>, size: usize) -> Result<Self> {
        const CALL: &str = "cuMemHostAlloc";
        stream.require_thawed(CALL, size)?;
        stream.bind()?;
        let mut start = null_mut();
        // SAFETY: the context is current; the memory is freed when `self` is dropped.
        check(CALL, unsafe { sys::cuMemHostAlloc(&raw mut start, size.max(1), 0) })?;
        let start: *mut u8 = start.cast();
        // SAFETY: just allocated with this size.
        unsafe { start.write_bytes(0, size) };
        Ok(Self { stream: Arc::clone(stream), start, size })
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: this memory, initialized, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.size) }
    }
}

impl PinnedMemory {
    /// Its first elements.
    pub(super) fn as_u32s(&self, len: usize) -> &[u32] {
        assert!(len * size_of::<u32>() <= self.size, "as_u32s: {len}");
        // SAFETY: within this memory, initialized, and aligned to pages.
        unsafe { std::slice::from_raw_parts(self.start.cast(), len) }
    }

    /// Queues a copy of a matrix without gaps to its start.
    ///
    /// # Safety
    /// Nothing reads or writes this memory until the copy is done.
    pub(super) unsafe fn copy_from_device(&mut self, from: View<'_>) -> Result<()> {
        let size = from.rows() * from.cols() * from.dtype().size_in_bytes();
        assert!(from.place() == Place::Device && size <= self.size, "copy_from_device: {size} bytes");
        assert!(from.rows() <= 1 || from.row_stride == from.cols(), "copy_from_device: rows have gaps");
        if size == 0 {
            return Ok(());
        }
        self.stream.bind()?;
        // SAFETY: the view is of this much device memory, and this memory has room for it.
        check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(self.start.cast(), from.ptr.addr() as u64, size, self.stream.raw())
        })
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // A copy may be under way: the driver does not wait for it.
        if self.stream.synchronize().is_ok() {
            // SAFETY: allocated in `allocate`.
            let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
        }
    }
}

/// A place in the stream, to wait for.
pub(super) struct Mark {
    stream: Arc<Stream>,
    event: sys::CUevent,
}

// SAFETY: as of `Stream`.
unsafe impl Send for Mark {}
// SAFETY: as of `Stream`.
unsafe impl Sync for Mark {}

impl Mark {
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Self> {
        stream.bind()?;
        let mut event = null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current; the event is destroyed when `self` is dropped.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(Self { stream: Arc::clone(stream), event })
    }

    /// Behind all that has been queued.
    pub(super) fn set(&self) -> Result<()> {
        self.stream.bind()?;
        // SAFETY: event and stream are of this context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, self.stream.raw()) })
    }

    /// Whether what was queued before the last `set` is done.
    pub(super) fn is_done(&self) -> Result<bool> {
        self.stream.bind()?;
        // SAFETY: the event is of this context.
        match unsafe { sys::cuEventQuery(self.event) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            answer => check("cuEventQuery", answer).map(|()| true),
        }
    }

    /// Until what was queued before the last `set` is done; returns at once where it was never set.
    pub(super) fn wait(&self) -> Result<()> {
        self.stream.bind()?;
        // SAFETY: the event is of this context.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.event) })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.stream.bind().is_ok() {
            // SAFETY: created in `new`.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}
