//! Weights on their way from the mapped file to the device.

use std::sync::Arc;

use super::memory::{DeviceMemory, Mark, PinnedMemory};
use super::stream::Stream;
use crate::pool::Pool;
use crate::{Result, View};

/// Large enough that a copy over PCIe runs at full speed, small enough that the first begins soon.
const CHUNK_BYTES: usize = 32 << 20;
/// What a thread copies at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Two pinned buffers: while the device copies from one, the threads fill the other.
pub(super) struct Uploader {
    buffers: [(PinnedMemory, Mark); 2],
    /// Which one is filled next.
    next: usize,
}

impl Uploader {
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Self> {
        let buffer =
            || Ok::<_, crate::Error>((PinnedMemory::allocate(stream, CHUNK_BYTES)?, Mark::new(stream)?));
        Ok(Self { buffers: [buffer()?, buffer()?], next: 0 })
    }

    /// Copies the rows of a matrix in host memory, without the gaps between them. The last copies may still be under way.
    /// `offset`: of the first, in bytes.
    pub(super) fn upload(
        &mut self,
        pool: &Pool,
        from: View<'_>,
        to: &mut DeviceMemory,
        offset: usize,
    ) -> Result<()> {
        let rows = Packed::new(from);
        for start in (0..rows.len()).step_by(CHUNK_BYTES) {
            let len = CHUNK_BYTES.min(rows.len() - start);
            let (pinned, copied) = &mut self.buffers[self.next];
            self.next = 1 - self.next;
            copied.wait()?;
            rows.copy(pool, start, &mut pinned.as_mut_slice()[..len]);
            // SAFETY: the pinned memory is written again only behind `copied`, and waits for the stream when it is dropped.
            unsafe { to.copy_from_pinned(offset + start, pinned, len)? };
            copied.set()?;
        }
        Ok(())
    }
}

/// The bytes of a matrix as if its rows had no gaps.
struct Packed<'a> {
    view: View<'a>,
    row_bytes: usize,
}

impl<'a> Packed<'a> {
    fn new(view: View<'a>) -> Self {
        Self { view, row_bytes: view.cols() * view.dtype().size_in_bytes() }
    }

    fn len(&self) -> usize {
        self.view.rows() * self.row_bytes
    }

    /// Those from `start`, spread over the threads: a file's pages come faster when several ask.
    fn copy(&self, pool: &Pool, start: usize, to: &mut [u8]) {
        let pieces = Pieces { to: to.as_mut_ptr(), len: to.len() };
        pool.parallel_for(to.len().div_ceil(PIECE_BYTES), |piece| {
            // SAFETY: each task has a piece of its own.
            let to = unsafe { pieces.get(piece) };
            self.copy_piece(start + piece * PIECE_BYTES, to);
        });
    }

    fn copy_piece(&self, mut start: usize, mut to: &mut [u8]) {
        while !to.is_empty() {
            let (row, offset) = (start / self.row_bytes, start % self.row_bytes);
            let len = to.len().min(self.row_bytes - offset);
            let (now, later) = to.split_at_mut(len);
            now.copy_from_slice(&self.view.row_bytes(row)[offset..offset + len]);
            (start, to) = (start + len, later);
        }
    }
}

/// A buffer that tasks fill, each a piece.
struct Pieces {
    to: *mut u8,
    len: usize,
}

// SAFETY: tasks reach disjoint pieces.
unsafe impl Sync for Pieces {}

impl Pieces {
    /// # Safety
    /// No other reference to the piece is used while this one is.
    #[expect(clippy::mut_from_ref, reason = "each task has a piece of its own")]
    unsafe fn get(&self, piece: usize) -> &mut [u8] {
        let start = piece * PIECE_BYTES;
        let len = PIECE_BYTES.min(self.len - start);
        // SAFETY: within the buffer, which is borrowed exclusively while tasks run; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.to.add(start), len) }
    }
}
