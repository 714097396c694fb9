//! Memory beside which a page may not be touched, so that the system stops whoever goes beyond an operand: assembly too, which
//! no sanitizer watches.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::c_int;
use std::io::Write;
use std::ops::Range;
use std::ptr::{null_mut, with_exposed_provenance_mut};
use std::sync::Once;

use kernels::mmap::MappedFile;
use kernels::{Element, Tensor};

pub(crate) const PAGE: usize = 4096;

/// Which side of what is placed touches the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Before,
    Behind,
}

impl Side {
    pub(crate) const BOTH: [Self; 2] = [Self::Before, Self::Behind];

    /// Where `size` bytes begin in whole pages that have room for them.
    fn offset(self, size: usize) -> usize {
        match self {
            Self::Before => 0,
            Self::Behind => size.next_multiple_of(PAGE) - size,
        }
    }
}

/// Pages of zeros between two that may not be touched: the first byte, for `size` bytes at that side; null where there is no
/// memory.
fn map(size: usize, side: Side) -> *mut u8 {
    let inner = size.next_multiple_of(PAGE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, at no address that anybody has.
    let whole = unsafe { libc::mmap(null_mut(), inner + 2 * PAGE, libc::PROT_NONE, flags, -1, 0) };
    if whole == libc::MAP_FAILED {
        return null_mut();
    }
    let first = whole.cast::<u8>().wrapping_add(PAGE);
    protect(first, inner, libc::PROT_READ | libc::PROT_WRITE);
    first.wrapping_add(side.offset(size))
}

/// Gives back what [`map`] gave for so many bytes.
///
/// # Safety
/// It did, and nobody uses them.
unsafe fn unmap(start: *mut u8, size: usize) {
    let first = start.wrapping_sub(start.addr() % PAGE + PAGE);
    let end = (start.addr() + size).next_multiple_of(PAGE) + PAGE;
    // SAFETY: the caller's promise; whichever the side is, these are all its pages.
    unsafe { libc::munmap(first.cast(), end - first.addr()) };
}

/// Whole pages of a mapping.
fn protect(start: *mut u8, size: usize, protection: c_int) {
    // SAFETY: pages of a mapping of ours. Who touches them against the protection is what the tests are after.
    let outcome = unsafe { libc::mprotect(start.cast(), size, protection) };
    assert_eq!(outcome, 0, "pages are protected");
}

/// What the kernels work in lies between guards too: what is aligned as vectors are is theirs.
///
/// Larger blocks with the alignment that tensors ask for begin with a page, so that a [`Fence`] can be put around parts of a
/// tensor.
pub(crate) struct Allocator;

const VECTOR: usize = 64;

thread_local! {
    /// Of what this thread allocates.
    static SIDE: Cell<Side> = const { Cell::new(Side::Behind) };
    /// What this thread is doing, for [`name_the_case`].
    static CASE: Cell<[u8; 160]> = const { Cell::new([b' '; 160]) };
}

fn is_guarded(layout: Layout) -> bool {
    (VECTOR..=PAGE).contains(&layout.align())
}

fn from_a_page(layout: Layout) -> Layout {
    match layout.align() {
        16 if layout.size() >= PAGE => layout.align_to(PAGE).expect("a layout"),
        _ => layout,
    }
}

// SAFETY: of mappings and the system's allocator, told apart by what an allocation and its end are both told.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_guarded(layout) {
            // Sizes are those of whole vectors, so both ends are aligned.
            return map(layout.size(), SIDE.get());
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(from_a_page(layout)) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe {
            if is_guarded(layout) {
                return unmap(ptr, layout.size());
            }
            System.dealloc(ptr, from_a_page(layout));
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_guarded(layout) {
            return map(layout.size(), SIDE.get());
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(from_a_page(layout)) }
    }
}

/// Runs a case on a thread of its own, whose working memory so is no larger than the case asks for.
pub(crate) fn case<T: Send>(name: &str, side: Side, run: impl FnOnce() -> T + Send) -> T {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(name_the_case);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let mut case = [b' '; 160];
            let _ = writeln!(&mut case[..], "beyond an operand, guard {side:?} it: {name}");
            CASE.set(case);
            SIDE.set(side);
            run()
        });
        thread.join().unwrap_or_else(|_| panic!("the case fails: {name}"))
    })
}

/// The process ends with the signal all the same, but says where it was.
fn name_the_case() {
    extern "C" fn handler(signal: c_int) {
        let case = CASE.get();
        // SAFETY: both may be called in a handler. The instruction then runs again, and ends the process.
        unsafe {
            libc::write(libc::STDERR_FILENO, case.as_ptr().cast(), case.len());
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    let handler: extern "C" fn(c_int) = handler;
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the handler calls nothing that may not be called there.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// A copy of some values with a guard at one side.
pub(crate) struct Guarded<T> {
    start: *mut T,
    len: usize,
}

impl<T: Element> Guarded<T> {
    pub(crate) fn new(values: &[T], side: Side) -> Self {
        let start = map(size_of_val(values).max(1), side).cast::<T>();
        assert!(!start.is_null(), "there is memory");
        // SAFETY: there is room for all; sizes are multiples of the elements', so both ends are aligned.
        unsafe { start.copy_from_nonoverlapping(values.as_ptr(), values.len()) }
        Self { start, len: values.len() }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: initialized above, and not written while borrowed.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: mapped for as many bytes, and nobody borrows them.
        unsafe { unmap(self.start.cast(), (self.len * size_of::<T>()).max(1)) }
    }
}

/// A matrix without gaps as a mapped file has it, with a guard at one side.
pub(crate) fn mapped<T: Element>(values: &[T], rows: usize, cols: usize, side: Side) -> Tensor {
    let size = size_of_val(values);
    let inner = size.next_multiple_of(PAGE);
    let offset = PAGE + side.offset(size);
    // In all types of ours but integers, these are NaN.
    let mut bytes = vec![0xff_u8; inner + 2 * PAGE];
    // SAFETY: elements are bytes.
    bytes[offset..][..size]
        .copy_from_slice(unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size) });
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&bytes).expect("write");
    let map = MappedFile::open(file.path()).expect("map");
    let first = map.bytes().as_ptr().cast_mut();
    // They stay so until the file is no longer mapped.
    protect(first, PAGE, libc::PROT_NONE);
    protect(first.wrapping_add(PAGE + inner), PAGE, libc::PROT_NONE);
    Tensor::mapped(map.into(), offset, T::DTYPE, rows, cols).expect("it lies in the file")
}

/// While it lives, no page of some memory may be touched but those with one of the `open` bytes in them.
pub(crate) struct Fence {
    closed: Vec<Range<usize>>,
}

impl Fence {
    /// # Panics
    /// Where there is nothing to close.
    pub(crate) fn around<T>(memory: &[T], open: &[Range<usize>]) -> Self {
        let start = memory.as_ptr().expose_provenance();
        let pages = start.next_multiple_of(PAGE)..(start + size_of_val(memory)) / PAGE * PAGE;
        let is_open =
            |page: usize| open.iter().any(|open| start + open.start < page + PAGE && page < start + open.end);
        let closed: Vec<_> =
            pages.step_by(PAGE).filter(|&page| !is_open(page)).map(|page| page..page + PAGE).collect();
        assert!(!closed.is_empty(), "no page is closed");
        let fence = Self { closed };
        fence.protect(libc::PROT_NONE);
        fence
    }

    fn protect(&self, protection: c_int) {
        for pages in &self.closed {
            protect(with_exposed_provenance_mut(pages.start), pages.len(), protection);
        }
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.protect(libc::PROT_READ | libc::PROT_WRITE);
    }
}

/// Whether the system lets this process read a byte.
pub(crate) fn can_be_read(byte: *const u8) -> bool {
    let (_reader, writer) = std::io::pipe().expect("a pipe");
    // SAFETY: the system reads the byte, and says so where it may not be read.
    let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), byte.cast(), 1) };
    written == 1
}
