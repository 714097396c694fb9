//! Working memory that a thread keeps from call to call.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

use crate::simd::Lanes;
use crate::tensor::ask_for_huge_pages;

/// A huge page of most systems. In small pages, which lie anywhere, some sets of a cache are asked for more than they hold while
/// others are half empty: about half of an L2 cache could be used.
const HUGE_PAGE: usize = 2 << 20;

/// From this many bytes, whole huge pages are asked for.
const HUGE_FROM: usize = 512 << 10;

/// Vectors whose contents nobody relies on, in as few pages as can be.
pub(crate) struct Scratch {
    ptr: *mut Lanes,
    layout: Layout,
}

impl Scratch {
    pub(crate) const fn new() -> Self {
        Self { ptr: std::ptr::dangling_mut(), layout: Layout::new::<()>() }
    }

    /// The first `len` vectors, whatever is in them. More than there are replace those that there are.
    pub(crate) fn lanes(&mut self, len: usize) -> &mut [Lanes] {
        if self.layout.size() < len * size_of::<Lanes>() {
            // What was there is given back first.
            *self = Self::new();
            (self.ptr, self.layout) = allocate(len);
        }
        // SAFETY: the memory has room for `len` vectors, is initialized, and is borrowed with `self`; none needs no memory.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, len) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(self.ptr.cast(), self.layout) }
        }
    }
}

fn allocate(len: usize) -> (*mut Lanes, Layout) {
    let size = len * size_of::<Lanes>();
    let (size, align) = match size {
        HUGE_FROM.. => (size.next_multiple_of(HUGE_PAGE), HUGE_PAGE),
        _ => (size, align_of::<Lanes>()),
    };
    let layout = Layout::from_size_align(size, align).expect("size fits the address space");
    // SAFETY: the layout has a non-zero size, since more is asked for than nothing.
    let ptr = unsafe { alloc(layout) };
    if ptr.is_null() {
        handle_alloc_error(layout)
    }
    if align == HUGE_PAGE {
        ask_for_huge_pages(ptr, size);
    }
    // SAFETY: `size` bytes of this allocation. Zeros are vectors.
    unsafe { ptr.write_bytes(0, size) }
    (ptr.cast(), layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_and_is_kept() {
        let mut scratch = Scratch::new();
        assert!(scratch.lanes(0).is_empty());
        for len in [1, 7, HUGE_FROM / size_of::<Lanes>() + 1] {
            let lanes = scratch.lanes(len);
            lanes.fill(Lanes([len as f32; 16]));
            let first = lanes.as_ptr();
            assert_eq!(scratch.lanes(1).as_ptr(), first, "less is a part of what is there");
            assert_eq!(scratch.lanes(len)[len - 1].0.map(f32::to_bits), [(len as f32).to_bits(); 16]);
        }
    }
}
