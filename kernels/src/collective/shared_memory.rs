//! Ranks on one host, meeting in shared memory.
//!
//! A call puts this rank's data into its slab, raises its `posted`, waits until all others have raised theirs as
//! far, and reads their slabs. There are two slabs per rank, used in turn: who has seen all peers post call n knows that
//! they have finished reading call n - 1, so one wait per call is enough.

use std::path::Path;
use std::ptr::copy_nonoverlapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::rendezvous::{Rendezvous, SLAB_BYTES};
use super::{Communicator, SLICE, check_gather};
use crate::cores::available_cores_of_all_ranks;
use crate::ops::operands::{SharedRows, matrix_mut, require, require_f32_matrix};
use crate::tensor::{Error, Result, View, ViewMut};

/// More than one host has cores for.
const MAX_RANKS: usize = 1024;
/// Elements of a piece; f32 and u32 alike.
const PIECE: usize = SLAB_BYTES / 4;

/// Ranks on one host that meet in a shared-memory file. Waiting ranks sleep (futex), so two ranks on two cores that are
/// halves of one do not slow each other down.
pub struct SharedMemory {
    rendezvous: Arc<Rendezvous>,
    rank: usize,
    world_size: usize,
    timeout: Duration,
    /// Looks at a peer before sleeping; 0 unless there are cores to spare.
    spin_rounds: u32,
    /// Calls made by this rank.
    posted: u32,
    /// Why the group is broken, if it is.
    broken: Option<String>,
}

/// Which call a piece belongs to, so that ranks that drift apart are told so.
#[derive(Clone, Copy)]
enum Call {
    Join = 1,
    AllReduceSum = 2,
    AllGatherCols = 3,
    Broadcast = 4,
}

impl SharedMemory {
    /// Joins the group at `path` (created by whoever comes first, on a memory file system where there is one), and
    /// returns when all `world_size` ranks have joined, or with an error after `timeout`. The same `timeout` holds for
    /// each collective call afterwards.
    ///
    /// The file is readable by its owner only, and its name is gone when all have joined.
    pub fn join(path: &Path, rank: usize, world_size: usize, timeout: Duration) -> Result<Self> {
        require("SharedMemory::join", rank < world_size && world_size <= MAX_RANKS, || {
            format!("rank {rank} of a group of {world_size}")
        })?;
        let rendezvous = Arc::new(Rendezvous::open(path, rank, world_size, Instant::now() + timeout)?);
        // About twenty microseconds, and only where no other rank needs this core.
        let spin_rounds = if available_cores_of_all_ranks() >= 2 * world_size { 500 } else { 0 };
        let mut group = Self { rendezvous, rank, world_size, timeout, spin_rounds, posted: 0, broken: None };
        group.meet(Call::Join, 0)?;
        if rank == 0 {
            group.rendezvous.remove_file();
        }
        Ok(group)
    }

    /// Says which peer has gone, where one has, on any thread and after this rank has left.
    #[cfg(feature = "cuda")]
    pub(super) fn absences(&self) -> impl Fn() -> Option<String> + Send + use<> {
        let (rendezvous, rank, world_size) = (Arc::clone(&self.rendezvous), self.rank, self.world_size);
        move || {
            let gone = (0..world_size).find(|&peer| peer != rank && rendezvous.is_gone(peer))?;
            let pid = rendezvous.line(gone).pid.load(Ordering::Acquire);
            Some(format!("rank {gone} (process {pid}) is gone"))
        }
    }

    /// Half of the slabs that the next call uses.
    fn parity(&self) -> usize {
        (self.posted.wrapping_add(1) % 2) as usize
    }

    /// Tells the others that this rank's slab is ready and waits until theirs are.
    fn meet(&mut self, call: Call, len: usize) -> Result<()> {
        let parity = self.parity();
        let mine = self.rendezvous.line(self.rank);
        let description = (call as u32) << 24 | len as u32;
        mine.calls[parity].store(description, Ordering::Relaxed);
        self.posted = self.posted.wrapping_add(1);
        mine.posted.store(self.posted, Ordering::Release);
        futex_wake_all(&mine.posted);
        let deadline = Instant::now() + self.timeout;
        for peer in (0..self.world_size).filter(|&peer| peer != self.rank) {
            let outcome = self.wait_for(peer, deadline).and_then(|()| {
                let theirs = self.rendezvous.line(peer).calls[parity].load(Ordering::Relaxed);
                if theirs == description {
                    return Ok(());
                }
                Err(format!(
                    "rank {peer} made another call than rank {} (codes {theirs:#x}, {description:#x}): all ranks must \
                     run the same version on the same steps",
                    self.rank
                ))
            });
            if let Err(message) = outcome {
                self.leave();
                self.broken = Some(message.clone());
                return Err(Error::Collective(message));
            }
        }
        Ok(())
    }

    fn wait_for(&self, peer: usize, deadline: Instant) -> Result<(), String> {
        let word = &self.rendezvous.line(peer).posted;
        let has_posted = || (word.load(Ordering::Acquire).wrapping_sub(self.posted) as i32) >= 0;
        for _ in 0..self.spin_rounds {
            if has_posted() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        loop {
            let seen = word.load(Ordering::Acquire);
            if has_posted() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.absence(peer));
            }
            if self.rendezvous.is_gone(peer) && !has_posted() {
                return Err(self.death(peer));
            }
            futex_wait(word, seen, left.min(SLICE));
        }
    }

    fn absence(&self, peer: usize) -> String {
        let seconds = self.timeout.as_secs_f32();
        let path = self.rendezvous.path().display();
        if self.rendezvous.has_joined(peer) {
            let pid = self.rendezvous.line(peer).pid.load(Ordering::Acquire);
            format!(
                "rank {peer} (process {pid}) did not answer rank {} for {seconds} s: see its log, restart the group",
                self.rank
            )
        } else {
            format!(
                "rank {peer} of {} did not join at {path} within {seconds} s: see its log, and start all ranks with \
                 the same path and number of ranks",
                self.world_size
            )
        }
    }

    fn death(&self, peer: usize) -> String {
        let pid = self.rendezvous.line(peer).pid.load(Ordering::Acquire);
        format!(
            "rank {peer} (process {pid}) is gone while rank {} waits for it: see its log, restart the group",
            self.rank
        )
    }

    /// Tells the peers not to wait for this rank.
    fn leave(&self) {
        let line = self.rendezvous.line(self.rank);
        line.left.store(1, Ordering::Release);
        futex_wake_all(&line.posted);
    }

    fn refuse_if_broken(&self) -> Result<()> {
        match &self.broken {
            Some(message) => Err(Error::Collective(message.clone())),
            None => Ok(()),
        }
    }

    /// Exchanges one piece: `put` fills this rank's slab, `take` reads the slabs of all when they are filled.
    fn exchange(
        &mut self,
        call: Call,
        len: usize,
        put: impl FnOnce(*mut f32),
        take: impl FnOnce(&dyn Fn(usize) -> *const f32),
    ) -> Result<()> {
        let parity = self.parity();
        put(self.rendezvous.slab(self.rank, parity));
        self.meet(call, len)?;
        take(&|rank| self.rendezvous.slab(rank, parity).cast_const());
        Ok(())
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Communicator for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&mut self, data: ViewMut<'_>) -> Result<()> {
        require_f32_matrix("all_reduce_sum", "data", matrix_mut(&data), (data.rows(), data.cols()))?;
        self.refuse_if_broken()?;
        let (rows, cols, world_size) = (data.rows(), data.cols(), self.world_size);
        let data = SharedRows::new(data);
        for piece in pieces(rows * cols) {
            let segments = || segments(piece.clone(), cols);
            self.exchange(
                Call::AllReduceSum,
                piece.len(),
                |slab| {
                    for segment in segments() {
                        let from = data.at(segment.row, segment.col);
                        // SAFETY: a segment lies in one row and, with its `at`, in the slab.
                        unsafe { copy_nonoverlapping(from, slab.add(segment.at), segment.len) }
                    }
                },
                |slab| {
                    for segment in segments() {
                        let to = data.at(segment.row, segment.col);
                        // SAFETY: as above; `data` is borrowed exclusively, the slabs are only read until all ranks have
                        // posted the call after the next.
                        unsafe {
                            let part = |rank| {
                                let from = slab(rank).add(segment.at);
                                std::slice::from_raw_parts(from, segment.len)
                            };
                            let to = std::slice::from_raw_parts_mut(to, segment.len);
                            to.copy_from_slice(part(0));
                            for rank in 1..world_size {
                                to.iter_mut().zip(part(rank)).for_each(|(sum, value)| *sum += value);
                            }
                        }
                    }
                },
            )?;
        }
        Ok(())
    }

    fn all_gather_cols(&mut self, data: View<'_>, out: ViewMut<'_>) -> Result<()> {
        check_gather(data, &out, self.world_size)?;
        self.refuse_if_broken()?;
        let (rows, cols, world_size) = (data.rows(), data.cols(), self.world_size);
        let out = SharedRows::new(out);
        for piece in pieces(rows * cols) {
            let segments = || segments(piece.clone(), cols);
            self.exchange(
                Call::AllGatherCols,
                piece.len(),
                |slab| {
                    for segment in segments() {
                        let from = &data.row::<f32>(segment.row)[segment.col..][..segment.len];
                        // SAFETY: a segment with its `at` lies in the slab.
                        unsafe {
                            copy_nonoverlapping(from.as_ptr(), slab.add(segment.at), segment.len);
                        }
                    }
                },
                |slab| {
                    for rank in 0..world_size {
                        for segment in segments() {
                            let to = out.at(segment.row, rank * cols + segment.col);
                            // SAFETY: as above; a rank's segment lies in its part of the row.
                            unsafe { copy_nonoverlapping(slab(rank).add(segment.at), to, segment.len) }
                        }
                    }
                },
            )?;
        }
        Ok(())
    }

    fn broadcast(&mut self, data: &mut [u32]) -> Result<()> {
        self.refuse_if_broken()?;
        let is_source = self.rank == 0;
        for piece in data.chunks_mut(PIECE) {
            let len = piece.len();
            let to = piece.as_mut_ptr();
            self.exchange(
                Call::Broadcast,
                len,
                |slab| {
                    if is_source {
                        // SAFETY: a piece is no longer than a slab.
                        unsafe { copy_nonoverlapping(to.cast_const(), slab.cast::<u32>(), len) }
                    }
                },
                |slab| {
                    if !is_source {
                        // SAFETY: as above; rank 0 has filled its slab before it posted.
                        unsafe { copy_nonoverlapping(slab(0).cast::<u32>(), to, len) }
                    }
                },
            )?;
        }
        Ok(())
    }
}

/// Ranges of elements that fit a slab.
fn pieces(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len).step_by(PIECE).map(move |start| start..len.min(start + PIECE))
}

/// The part of a piece that lies in one row.
struct Segment {
    row: usize,
    col: usize,
    len: usize,
    /// Its place in the slab.
    at: usize,
}

fn segments(piece: std::ops::Range<usize>, cols: usize) -> impl Iterator<Item = Segment> {
    let mut next = piece.start;
    std::iter::from_fn(move || {
        (next < piece.end).then(|| {
            let (row, col) = (next / cols, next % cols);
            let len = (cols - col).min(piece.end - next);
            let segment = Segment { row, col, len, at: next - piece.start };
            next += len;
            segment
        })
    })
}

/// Sleeps while the word has the value, for `timeout` at most; may wake earlier.
fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
    };
    // SAFETY: a system call on a word and a time that live. Not "private": the peers are other processes.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const timeout) };
}

fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: a system call on a word that lives.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
