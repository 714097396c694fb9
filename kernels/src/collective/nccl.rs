//! Ranks on GPUs: NCCL for tensors, on the stream of all other work, so that graphs may hold it; a [`Meeting`] for the rest.
//!
//! A device that waits for a dead peer waits for ever. So a thread looks after the group: where a peer has gone, NCCL reports an
//! error, or a step lasts longer than a step can, it aborts the communicator, which ends the wait with garbage, and says why.
//! [`Communicator::check`] behind each wait for the device turns that into an error.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::meeting::{Absences, Meeting};
use super::{Communicator, MeetingPlace, SLICE};
use crate::cuda::nccl::{Comm, Nccl, UniqueId};
use crate::cuda::{Device, Grid};
use crate::ops::operands::{matrix, matrix_mut, require, require_float, require_on_device};
use crate::{Context, Error, Result, View, ViewMut};

/// A group of GPUs.
pub(super) struct NcclGroup {
    device: Arc<Device>,
    shared: Arc<Shared>,
    meeting: Box<dyn Meeting>,
    rank: usize,
    world_size: usize,
    watchdog: Option<JoinHandle<()>>,
}

/// What the thread that looks after the group knows of it.
struct Shared {
    library: &'static Nccl,
    comm: Comm,
    /// Since when a step is under way, if one is.
    step_began: Mutex<Option<Instant>>,
    /// A call of the library is being made: the communicator is not taken away under it, unless it does not return.
    calling: AtomicBool,
    broken: Mutex<Option<String>>,
    ended: AtomicBool,
    timeout: Duration,
}

// SAFETY: a communicator may be used and aborted by any thread; `calling` and `broken` keep the two apart.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl NcclGroup {
    pub(super) fn join(
        context: &Context,
        place: &MeetingPlace,
        rank: usize,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let Some(device) = context.device() else {
            return Err(Error::Unavailable("NCCL joins GPUs, and this context computes on the CPU".into()));
        };
        let library = Nccl::get()?;
        // A rank that finds no memory for code in the middle of a step would be missed by the others.
        device.load_all_kernels()?;
        let mut meeting = place.join(rank, world_size, timeout)?;
        let mut words = [0_u32; 32];
        if rank == 0 {
            let id = library.unique_id()?;
            for (word, bytes) in words.iter_mut().zip(id.0.chunks_exact(4)) {
                *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        meeting.broadcast(&mut words)?;
        let mut id = UniqueId([0; 128]);
        for (bytes, word) in id.0.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        device.stream().bind()?;
        let comm =
            init_within(timeout, Arc::clone(device), library, world_size, id, rank, &meeting.absences())?;
        let shared = Arc::new(Shared {
            library,
            comm,
            step_began: Mutex::new(None),
            calling: AtomicBool::new(false),
            broken: Mutex::new(None),
            ended: AtomicBool::new(false),
            timeout,
        });
        let watched = (Arc::clone(&shared), meeting.absences());
        let watchdog = std::thread::Builder::new()
            .name("nccl-watchdog".into())
            .spawn(move || watched.0.look_after(&watched.1))
            .map_err(|source| Error::Io { context: "starting a thread for NCCL".into(), source })?;
        let device = Arc::clone(device);
        Ok(Self { device, shared, meeting, rank, world_size, watchdog: Some(watchdog) })
    }
}

/// A communicator, made on another thread: a peer that dies meanwhile would hold this one for ever.
fn init_within(
    timeout: Duration,
    device: Arc<Device>,
    library: &'static Nccl,
    world_size: usize,
    id: UniqueId,
    rank: usize,
    absences: &Absences,
) -> Result<Comm> {
    struct Made(Comm);
    // SAFETY: a communicator may be used by any thread.
    unsafe impl Send for Made {}
    let (sender, receiver) = std::sync::mpsc::channel();
    let init = move || {
        let made = device.stream().bind().and_then(|()| library.init_rank(world_size, id, rank));
        // Nobody waits any more where this came too late.
        let _ = sender.send(made.map(Made));
    };
    std::thread::Builder::new()
        .name("nccl-init".into())
        .spawn(init)
        .map_err(|source| Error::Io { context: "starting a thread for NCCL".into(), source })?;
    let deadline = Instant::now() + timeout;
    loop {
        if let Ok(made) = receiver.recv_timeout(SLICE) {
            return made.map(|Made(comm)| comm);
        }
        if let Some(message) = absences() {
            return Err(Error::Collective(format!("{message}, before NCCL joined the GPUs: see its log")));
        }
        if Instant::now() >= deadline {
            return Err(Error::Collective(format!(
                "NCCL did not join the GPUs of {world_size} ranks within {} s: NCCL_DEBUG=INFO says what it waits for",
                timeout.as_secs()
            )));
        }
    }
}

impl Shared {
    /// Runs until the group ends or breaks.
    fn look_after(&self, absences: &Absences) {
        while !self.ended.load(Ordering::Acquire) {
            if let Some(message) = self.trouble(absences) {
                return self.break_up(message);
            }
            std::thread::park_timeout(SLICE);
        }
    }

    fn trouble(&self, absences: &Absences) -> Option<String> {
        if let Some(message) = absences() {
            return Some(format!("{message}: see its log, restart the group"));
        }
        // SAFETY: only this thread aborts it, and ends then; whoever drops the group waits for this thread first.
        if let Err(error) = unsafe { self.library.async_error(self.comm) } {
            return Some(error.to_string());
        }
        let began = *self.step_began.lock().unwrap_or_else(PoisonError::into_inner);
        began.filter(|began| began.elapsed() > self.timeout).map(|_| {
            format!(
                "a step has waited for the other ranks for {} s: see their logs, restart the group",
                self.timeout.as_secs()
            )
        })
    }

    fn break_up(&self, message: String) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        // Whoever calls after this is refused; whoever is within a call gets a moment to leave it.
        let patience = Instant::now() + SLICE;
        while self.calling.load(Ordering::SeqCst) && Instant::now() < patience {
            std::thread::yield_now();
        }
        // SAFETY: made for this group, and not used any more: calls look at `broken` first.
        unsafe { self.library.abort(self.comm) };
    }

    fn refuse_if_broken(&self) -> Result<()> {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
        broken.map_or(Ok(()), |message| Err(Error::Collective(message)))
    }

    /// Calls the library with the communicator.
    fn call(&self, call: impl FnOnce(&Nccl, Comm) -> Result<()>) -> Result<()> {
        self.calling.store(true, Ordering::SeqCst);
        let outcome = self.refuse_if_broken().and_then(|()| call(self.library, self.comm));
        self.calling.store(false, Ordering::SeqCst);
        outcome
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.thread().unpark();
            // It does not panic, and if it did, there would be nothing to do about it here.
            let _ = watchdog.join();
        }
        let is_broken = self.shared.broken.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if !is_broken && self.device.stream().synchronize().is_ok() {
            // SAFETY: made for this group, which ends. The orderly end would wait for peers that may have gone.
            unsafe { self.shared.library.abort(self.shared.comm) };
        }
    }
}

impl Communicator for NcclGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&mut self, data: ViewMut<'_>) -> Result<()> {
        const OP: &str = "all_reduce_sum";
        let (rows, cols, dtype) = (data.rows(), data.cols(), data.dtype());
        require_float(OP, dtype)?;
        require_on_device(OP, "data", matrix_mut(&data), dtype, (rows, cols))?;
        require(OP, rows <= 1 || data.row_stride == cols, || "data has gaps between its rows".into())?;
        let stream = self.device.stream();
        stream.bind()?;
        // SAFETY: the view is of this much device memory, and all later work on it comes behind on the same stream.
        self.shared.call(|library, comm| unsafe {
            library.all_reduce_sum(data.ptr.addr() as u64, rows * cols, dtype, comm, stream.raw())
        })
    }

    fn all_gather_cols(&mut self, data: View<'_>, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "all_gather_cols";
        let (rows, cols, dtype) = (data.rows(), data.cols(), data.dtype());
        require_float(OP, dtype)?;
        require_on_device(OP, "data", matrix(data), dtype, (rows, cols))?;
        require_on_device(OP, "out", matrix_mut(&out), dtype, (rows, self.world_size * cols))?;
        require(OP, rows <= 1 || data.row_stride == cols, || "data has gaps between its rows".into())?;
        let stream = self.device.stream();
        stream.bind()?;
        let out_stride = out.row_stride as u32;
        let out = out.as_view();
        // One row is in order as it comes.
        let gathered = if rows == 1 {
            out.ptr.addr() as u64
        } else {
            self.device.scratch(OP, self.world_size * rows * cols * dtype.size_in_bytes())?.0
        };
        // SAFETY: as above; the output is as long as checked, the scratch as asked for.
        self.shared.call(|library, comm| unsafe {
            library.all_gather(data.ptr.addr() as u64, gathered, rows * cols, dtype, comm, stream.raw())
        })?;
        if rows == 1 {
            return Ok(());
        }
        let kernel = self.device.kernel("gather_cols", &[dtype])?;
        let arguments =
            [gathered.into(), (rows as u32).into(), (cols as u32).into(), out.into(), out_stride.into()];
        let grid = Grid { blocks: [rows as u32, self.world_size as u32, 1], threads: 256, shared_bytes: 0 };
        // SAFETY: the parameters of `gather_cols_*`; shapes and places are checked above.
        unsafe { kernel.launch(&self.device, grid, &arguments) }
    }

    fn broadcast(&mut self, data: &mut [u32]) -> Result<()> {
        self.shared.refuse_if_broken()?;
        self.meeting.broadcast(data)
    }

    fn watch(&mut self, under_way: bool) {
        let began = under_way.then(Instant::now);
        *self.shared.step_began.lock().unwrap_or_else(PoisonError::into_inner) = began;
    }

    fn check(&self) -> Result<()> {
        self.shared.refuse_if_broken()
    }
}
