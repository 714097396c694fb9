//! Pinned buffers: one with a twin on the device, for what a step reads, and one for what it has chosen.

use std::sync::Arc;

use super::memory::{DeviceMemory, DevicePtr, Mark, PinnedMemory};
use super::stream::Stream;
use crate::{DType, Result, View};

/// Bytes of an element.
const SIZE: usize = size_of::<u32>();

/// u32 arrays that are copied together.
pub(crate) struct StagingBuffers {
    pinned: PinnedMemory,
    device: DeviceMemory,
    /// Behind the last copy.
    copied: Mark,
}

impl StagingBuffers {
    pub(crate) fn new(stream: &Arc<Stream>, max_elements: usize) -> Result<Self> {
        Ok(Self {
            pinned: PinnedMemory::allocate(stream, max_elements * SIZE)?,
            device: DeviceMemory::allocate(stream, max_elements * SIZE)?,
            copied: Mark::new(stream)?,
        })
    }

    /// Each array to its first element, in one copy. Arrays ascend and do not overlap.
    pub(crate) fn send<const N: usize>(&mut self, arrays: [(usize, &[u32]); N]) -> Result<()> {
        self.copied.wait()?;
        let mut end = 0;
        for (at, array) in arrays {
            end = at + array.len();
            let target = &mut self.pinned.as_mut_slice()[at * SIZE..end * SIZE];
            for (target, value) in target.as_chunks_mut::<SIZE>().0.iter_mut().zip(array) {
                *target = value.to_ne_bytes();
            }
        }
        if end == 0 {
            return Ok(());
        }
        // SAFETY: the pinned memory is written again only behind `copied`, and waits for the stream when it is dropped.
        unsafe { self.device.copy_from_pinned(0, &self.pinned, end * SIZE)? };
        self.copied.set()
    }

    /// `len` elements from `at`, as `[1, len]`.
    pub(crate) fn view(&self, at: usize, len: usize) -> View<'_> {
        assert!((at + len) * SIZE <= self.device.size(), "view: {at}+{len}");
        let start = DevicePtr(self.device.start().0 + (at * SIZE) as u64);
        View::on_device(start, DType::U32, 1, len)
    }
}

/// Pinned memory that the device copies to.
pub(crate) struct ReadbackBuffer {
    pinned: PinnedMemory,
    /// Behind the last copy.
    copied: Mark,
}

impl ReadbackBuffer {
    pub(crate) fn new(stream: &Arc<Stream>, max_elements: usize) -> Result<Self> {
        Ok(Self { pinned: PinnedMemory::allocate(stream, max_elements * SIZE)?, copied: Mark::new(stream)? })
    }

    pub(crate) fn start(&mut self, from: View<'_>) -> Result<()> {
        self.copied.wait()?;
        // SAFETY: the pinned memory is read and written only behind `copied`, and waits for the stream when it is dropped.
        unsafe { self.pinned.copy_from_device(from)? };
        self.copied.set()
    }

    pub(crate) fn is_done(&self) -> Result<bool> {
        self.copied.is_done()
    }

    /// The first elements.
    pub(crate) fn wait(&mut self, len: usize) -> Result<&[u32]> {
        self.copied.wait()?;
        Ok(self.pinned.as_u32s(len))
    }
}
