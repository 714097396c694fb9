//! The file in which the ranks of one host meet: who is there, who lives, and a place for each rank's data.
//!
//! A rank lives as long as it holds the lock of its byte of the file. The kernel takes the lock back when the process
//! ends, however it ends, so death is seen at once, also of a process that nobody has waited for yet, and whatever has
//! become of its process id.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::tensor::{Error, Result};

/// Bytes that a rank can put up at once; longer data goes in pieces. An L2 cache holds two ranks' pieces.
pub(super) const SLAB_BYTES: usize = 256 << 10;

/// "lamp", then the version of this layout.
const MAGIC: u32 = 0x6c61_0001;
/// Byte of the lock that is held while the file is set up.
const SETUP_LOCK: u64 = 0;
/// The file begins with it, the ranks' lines follow, then their slabs.
const LINE_BYTES: usize = 128;
const PAGE_BYTES: usize = 4096;

/// The head of the file.
#[repr(C)]
struct Head {
    magic: AtomicU32,
    world_size: AtomicU32,
}

/// What a rank tells the others.
#[repr(C)]
pub(super) struct Line {
    /// Calls (pieces of data) that this rank has put up; the others sleep on it.
    pub(super) posted: AtomicU32,
    pub(super) pid: AtomicU32,
    /// 1 when the rank has left on its own or after an error.
    pub(super) left: AtomicU32,
    /// What the rank put up last and before: kind and length, by parity of `posted`.
    pub(super) calls: [AtomicU32; 2],
}

/// A joined file.
pub(super) struct Rendezvous {
    file: File,
    map: memmap2::MmapRaw,
    path: PathBuf,
    world_size: usize,
}

impl Rendezvous {
    /// Takes `rank`'s place in the file at `path`, which is made (mode 0600) where there is none.
    ///
    /// What a dead group has left at `path` is used anew. While ranks of another group live there, waits for their end
    /// until `deadline`.
    pub(super) fn open(path: &Path, rank: usize, world_size: usize, deadline: Instant) -> Result<Self> {
        loop {
            match Self::try_open(path, rank, world_size)? {
                Ok(rendezvous) => return Ok(rendezvous),
                Err(occupied) if Instant::now() >= deadline => return Err(Error::Collective(occupied)),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The inner error says why the place cannot be taken yet.
    fn try_open(path: &Path, rank: usize, world_size: usize) -> Result<Result<Self, String>> {
        let io = |source| Error::Io { context: format!("joining the ranks at {}", path.display()), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        if !lock(&file, SETUP_LOCK).map_err(io)? {
            return Ok(Err(format!("{} is being set up by another rank", path.display())));
        }
        // Between open and lock, a complete group may have removed the file.
        if file.metadata().map_err(io)?.nlink() == 0 {
            return Ok(Err(format!("{} is being replaced", path.display())));
        }
        let outcome = Self::take_place(file, path, rank, world_size).map_err(io)?;
        if let Ok(rendezvous) = &outcome {
            unlock(&rendezvous.file, SETUP_LOCK).map_err(io)?;
        }
        Ok(outcome)
    }

    /// Under the setup lock.
    fn take_place(
        file: File,
        path: &Path,
        rank: usize,
        world_size: usize,
    ) -> std::io::Result<Result<Self, String>> {
        // Beyond any world size, so that ranks of a larger group are seen too.
        let occupied = is_locked_range(&file, rank_lock(0), u64::from(u16::MAX))?;
        if !occupied {
            file.set_len(0)?;
        }
        reserve(&file, slabs_offset(world_size) + world_size * 2 * SLAB_BYTES)?;
        let map = memmap2::MmapOptions::new().map_raw(&file)?;
        let rendezvous = Self { file, map, path: path.to_owned(), world_size };
        let head = rendezvous.head();
        if occupied {
            let (magic, size) = (head.magic.load(Ordering::Acquire), head.world_size.load(Ordering::Acquire));
            let broken = (0..world_size.min(size as usize)).find(|&peer| {
                let line = rendezvous.line(peer);
                line.pid.load(Ordering::Acquire) != 0
                    && (peer == rank || line.left.load(Ordering::Acquire) != 0 || !rendezvous.is_alive(peer))
            });
            if magic != MAGIC || size as usize != world_size || broken.is_some() {
                return Ok(Err(format!(
                    "{} is in use by another group of {size} ranks: end its processes or use another path",
                    path.display()
                )));
            }
        } else {
            head.world_size.store(world_size as u32, Ordering::Release);
            head.magic.store(MAGIC, Ordering::Release);
        }
        if !lock(&rendezvous.file, rank_lock(rank))? {
            return Ok(Err(format!("rank {rank} at {} is taken by another process", path.display())));
        }
        rendezvous.line(rank).pid.store(std::process::id(), Ordering::Release);
        Ok(Ok(rendezvous))
    }

    /// Takes the name away, so that nothing is left behind and no later group meets this one. For one rank to call when
    /// all have joined.
    pub(super) fn remove_file(&self) {
        // Already gone is as good.
        let _ = std::fs::remove_file(&self.path);
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether `rank` has ever taken its place.
    pub(super) fn has_joined(&self, rank: usize) -> bool {
        self.line(rank).pid.load(Ordering::Acquire) != 0
    }

    /// Whether the process that took `rank`'s place is there. Not for one's own rank.
    pub(super) fn is_alive(&self, rank: usize) -> bool {
        // An error of the lock call is no sign of death.
        is_locked_range(&self.file, rank_lock(rank), 1).unwrap_or(true)
    }

    /// Whether a peer that has joined will not post any more. Costs a system call.
    pub(super) fn is_gone(&self, rank: usize) -> bool {
        self.has_joined(rank) && (self.line(rank).left.load(Ordering::Acquire) != 0 || !self.is_alive(rank))
    }

    fn head(&self) -> &Head {
        // SAFETY: the file is larger than its head, mapped at a page's start, and `Head` is made of atomics.
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
        unsafe {
            &*self.map.as_ptr().cast::<Head>()
        }
    }

    pub(super) fn line(&self, rank: usize) -> &Line {
        assert!(rank < self.world_size, "rank {rank} of {}", self.world_size);
        // SAFETY: a multiple of `LINE_BYTES` within the mapping; `Line` is made of atomics.
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
        unsafe {
            &*self.map.as_ptr().add((rank + 1) * LINE_BYTES).cast::<Line>()
        }
    }

    /// A rank's memory for the calls of one parity: `SLAB_BYTES`, at a page's start.
    pub(super) fn slab(&self, rank: usize, parity: usize) -> *mut f32 {
        assert!(rank < self.world_size && parity < 2, "slab {parity} of rank {rank}");
        let offset = slabs_offset(self.world_size) + (2 * rank + parity) * SLAB_BYTES;
        // SAFETY: within the mapping: `take_place` reserved two slabs for each rank.
        unsafe { self.map.as_mut_ptr().add(offset).cast() }
    }
}

fn slabs_offset(world_size: usize) -> usize {
    ((world_size + 1) * LINE_BYTES).next_multiple_of(PAGE_BYTES)
}

fn rank_lock(rank: usize) -> u64 {
    SETUP_LOCK + 1 + rank as u64
}

/// Grows the file and makes the memory sure, so that a full memory file system is an error here, not SIGBUS later.
fn reserve(file: &File, bytes: usize) -> std::io::Result<()> {
    if file.metadata()?.len() >= bytes as u64 {
        return Ok(());
    }
    // SAFETY: a system call on an open file.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) } {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(error)),
    }
}

fn record_lock(kind: libc::c_int, start: u64, len: u64) -> libc::flock {
    // SAFETY: all zeros is a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start as libc::off_t;
    lock.l_len = len as libc::off_t;
    lock
}

/// Locks a byte for this open file; false where another holds it.
fn lock(file: &File, byte: u64) -> std::io::Result<bool> {
    match control(file, libc::F_OFD_SETLK, &mut record_lock(libc::F_WRLCK, byte, 1)) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn unlock(file: &File, byte: u64) -> std::io::Result<()> {
    control(file, libc::F_OFD_SETLK, &mut record_lock(libc::F_UNLCK, byte, 1))
}

/// Whether another open file holds a lock in the range.
fn is_locked_range(file: &File, start: u64, len: u64) -> std::io::Result<bool> {
    let mut lock = record_lock(libc::F_WRLCK, start, len);
    control(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

fn control(file: &File, command: libc::c_int, lock: &mut libc::flock) -> std::io::Result<()> {
    // SAFETY: a system call on an open file with a valid `flock`.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } == -1 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
