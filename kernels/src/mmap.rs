//! Read-only mapped files.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::tensor::{Error, Result};

/// A file mapped for reading. Processes that map the same file share its pages, unless
/// [moved](Self::move_to_huge_pages).
pub struct MappedFile {
    map: memmap2::Mmap,
    /// Whether any of its bytes are in memory of this process's own.
    is_moved: AtomicBool,
}

impl MappedFile {
    /// Maps the whole file.
    ///
    /// The file must not be truncated or written while it is mapped: readers would see the change or end with
    /// SIGBUS. Checkpoints are written once and then only read.
    pub fn open(path: &Path) -> Result<Self> {
        let context = || format!("mapping {}", path.display());
        let file = std::fs::File::open(path).map_err(|source| Error::Io { context: context(), source })?;
        // SAFETY: see above; the project never writes to model directories.
        let map = unsafe { memmap2::Mmap::map(&file) }
            .map_err(|source| Error::Io { context: context(), source })?;
        // Where the file system can, what is not in memory yet comes in huge pages.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map, is_moved: AtomicBool::new(false) })
    }

    /// Tells the system that these bytes are not read soon: they no longer count as this process's memory, and are there
    /// again (from the page cache or the disk) when they are read after all.
    ///
    /// # Panics
    /// Where the range is outside.
    pub fn release(&self, range: std::ops::Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.map.len(), "release: {range:?} of the file");
        // What was moved would be lost.
        if self.is_moved.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: the map is of a file and is never written, so there is nothing in its pages that would be lost.
        // It is only advice: that it was not followed is no error.
        let _ = unsafe {
            self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
        };
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Puts copies of these bytes, in huge pages of memory of this process's own, in their place, as far as they fill huge pages;
    /// returns how many that are. Others may read them meanwhile: they stay where they are, and what they are. From then on,
    /// [`Self::release`] does nothing.
    ///
    /// What is read from end to end for each token is read a quarter faster in huge pages, where the file's are small: the CPU
    /// looks up fewer addresses, and guesses further ahead. And with several NUMA nodes the copies lie near who asks for them.
    ///
    /// Where the system does not give huge pages, small ones are used; on other systems than Linux, nothing is done.
    ///
    /// # Errors
    /// Where the system has no memory for it. What was moved before stays so.
    ///
    /// # Panics
    /// Where the range is outside.
    pub fn move_to_huge_pages(&self, range: Range<usize>) -> std::io::Result<usize> {
        assert!(range.start <= range.end && range.end <= self.map.len(), "move: {range:?} of the file");
        #[cfg(target_os = "linux")]
        {
            self.is_moved.store(true, Ordering::Release);
            let base = self.map.as_ptr().addr();
            let first = (base + range.start).next_multiple_of(huge::PAGE);
            let last = (base + range.end) & !(huge::PAGE - 1);
            let mut at = first;
            while at < last {
                let len = (last - at).min(huge::AT_ONCE);
                let from = &self.map[at - base..at - base + len];
                // SAFETY: these are whole pages of the map, which nobody writes.
                unsafe { huge::replace(from)? }
                at += len;
            }
            Ok(last.saturating_sub(first))
        }
        #[cfg(not(target_os = "linux"))]
        Ok(0)
    }

    /// Of the bytes that are in memory, the share that lies in huge pages; `None` where the system does not tell, or nothing is in
    /// memory.
    pub fn share_in_huge_pages(&self) -> Option<f64> {
        let map = self.map.as_ptr_range();
        let text = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let (mut in_map, mut resident, mut huge) = (false, 0_u64, 0_u64);
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(first), second) = (words.next(), words.next()) else { continue };
            if let Some((start, end)) = first.split_once('-') {
                let address = |text: &str| usize::from_str_radix(text, 16).ok();
                if let (Some(start), Some(end)) = (address(start), address(end)) {
                    in_map = start < map.end.addr() && end > map.start.addr();
                }
            } else if in_map {
                let kib = || second.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
                match first {
                    "Rss:" => resident += kib(),
                    "FilePmdMapped:" | "AnonHugePages:" => huge += kib(),
                    _ => {}
                }
            }
        }
        (resident > 0).then(|| huge as f64 / resident as f64)
    }
}

/// Whether this system gives huge pages to programs that ask for them, and lets pages take the place of others at any time: one
/// that counts all memory that programs ask for (`vm.overcommit_memory` = 2) may refuse when the old ones are gone already.
pub fn can_move_to_huge_pages() -> bool {
    let is = |path, says: fn(&str) -> bool| std::fs::read_to_string(path).is_ok_and(|text| says(&text));
    is("/sys/kernel/mm/transparent_hugepage/enabled", |choice| !choice.contains("[never]"))
        && is("/proc/sys/vm/overcommit_memory", |mode| mode.trim() != "2")
}

#[cfg(target_os = "linux")]
mod huge {
    use std::io;
    use std::ptr;

    use crate::tensor::ask_for_huge_pages;

    /// Of most systems.
    pub(super) const PAGE: usize = 2 << 20;

    /// What is copied before it takes its place: this much memory is needed twice for a moment.
    pub(super) const AT_ONCE: usize = 32 << 20;

    /// Memory that is not in its place yet.
    struct Pages {
        start: *mut libc::c_void,
        len: usize,
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: mapped by `pages`, and nobody refers to it.
            unsafe { libc::munmap(self.start, self.len) };
        }
    }

    /// New memory that begins at a huge page.
    fn pages(len: usize) -> io::Result<Pages> {
        const MINE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let room = len + PAGE;
        // SAFETY: new memory, wherever the system likes.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), room, libc::PROT_READ | libc::PROT_WRITE, MINE, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = start.cast::<u8>().align_offset(PAGE);
        let pages = Pages { start: start.wrapping_byte_add(before), len };
        // SAFETY: the ends, which nobody has heard of yet.
        unsafe {
            if before > 0 {
                libc::munmap(start, before);
            }
            if before < PAGE {
                libc::munmap(pages.start.wrapping_byte_add(len), PAGE - before);
            }
        }
        Ok(pages)
    }

    /// Copies `old` and puts the copy in its place.
    ///
    /// The system moves the pages, and takes the old ones away, while it lets no other thread of the process change or look up
    /// addresses: who reads `old` meanwhile reads the old page or the new one.
    ///
    /// # Safety
    /// `old` is whole huge pages of a map that is only read, and is unmapped as a whole in the end.
    pub(super) unsafe fn replace(old: &[u8]) -> io::Result<()> {
        let len = old.len();
        let pages = pages(len)?;
        let new = pages.start.cast::<u8>();
        ask_for_huge_pages(new, len);
        // SAFETY: `new` has as many bytes, which are nobody else's.
        unsafe { ptr::copy_nonoverlapping(old.as_ptr(), new, len) };
        // SAFETY: own memory, to which nothing refers; then it has the place and the contents of `old`, whose mapping the caller
        // lets us replace.
        unsafe {
            if libc::mprotect(new.cast(), len, libc::PROT_READ) != 0 {
                return Err(io::Error::last_os_error());
            }
            let place = old.as_ptr().cast_mut().cast::<libc::c_void>();
            let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            if libc::mremap(new.cast(), len, len, how, place) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        // They have left their place, which may be another thread's by now.
        std::mem::forget(pages);
        Ok(())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::Write;
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// A file of so many bytes, all places different from those around.
    fn file(len: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
        let contents: Vec<u8> = (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&contents).expect("write");
        (file, contents)
    }

    #[test]
    fn bytes_that_are_moved_stay_what_they_are_for_those_who_read_them_meanwhile() {
        let (file, contents) = file(9 * huge::PAGE + 12345);
        let map = MappedFile::open(file.path()).expect("map");
        let (address, is_done) = (map.bytes().as_ptr(), AtomicBool::new(false));
        std::thread::scope(|threads| {
            for _ in 0..2 {
                threads.spawn(|| {
                    while !is_done.load(Ordering::Relaxed) {
                        assert!(map.bytes() == contents);
                    }
                });
            }
            let moved = map.move_to_huge_pages(100..contents.len()).expect("memory");
            assert!(moved >= 7 * huge::PAGE && moved.is_multiple_of(huge::PAGE), "{moved}");
            is_done.store(true, Ordering::Relaxed);
        });
        assert_eq!(map.bytes().as_ptr(), address);
        // The file is no longer needed, nor is advice to forget it followed.
        file.as_file().set_len(0).expect("truncate");
        map.release(huge::PAGE..5 * huge::PAGE);
        let middle = 2 * huge::PAGE..7 * huge::PAGE;
        assert!(map.bytes()[middle.clone()] == contents[middle]);
    }

    #[test]
    fn less_than_a_huge_page_is_not_moved() {
        let (file, contents) = file(huge::PAGE - 1);
        let map = MappedFile::open(file.path()).expect("map");
        assert_eq!(map.move_to_huge_pages(0..contents.len()).expect("nothing to do"), 0);
        assert!(map.bytes() == contents);
    }

    #[test]
    fn what_lies_in_huge_pages_is_a_share() {
        let (file, contents) = file(4 * huge::PAGE);
        let map = MappedFile::open(file.path()).expect("map");
        assert!(map.bytes() == contents);
        let share = map.share_in_huge_pages().expect("it was read");
        assert!((0.0..=1.0).contains(&share), "{share}");
    }
}
