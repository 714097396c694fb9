//! Storage and matrix views.

use std::marker::PhantomData;
use std::sync::Arc;

use candle_core::DType;
use half::{bf16, f16};

use crate::mmap::MappedFile;

/// What a caller did wrong with shapes or element types, or what the system refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Shapes of the operands do not fit together.
    #[error("{op}: {message}")]
    Shape {
        /// The operation that refused.
        op: &'static str,
        /// Which operand, its shape, and what was expected.
        message: String,
    },
    /// There is no code for this element type.
    #[error("{op}: element type {dtype:?} is not supported; supported are {supported}")]
    DType {
        /// The operation that refused.
        op: &'static str,
        /// The element type given.
        dtype: DType,
        /// The element types that work.
        supported: &'static str,
    },
    /// A tensor-parallel peer is gone or did not answer in time.
    #[error("{0}")]
    Collective(String),
    /// There is no such device here, or nothing to reach it with.
    #[error("{0}")]
    Unavailable(String),
    /// The device has no room left.
    #[error("{0}")]
    OutOfMemory(String),
    /// Memory is asked for while none may be taken ([`crate::Context::freeze`]). Ranks that have made the same calls come to this at
    /// the same one.
    #[error("{call}: {bytes} more bytes of device memory are needed than were taken before")]
    Frozen {
        /// The function that was called.
        call: &'static str,
        /// How many it asked for.
        bytes: usize,
    },
    /// The CUDA driver or one of its libraries refused.
    #[error("{call}: {message}")]
    Cuda {
        /// The function or kernel that was called.
        call: &'static str,
        /// Its answer.
        message: String,
    },
    /// Reading or mapping a file.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path.
        context: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where memory lies. An operation wants all its operands where its [`crate::Context`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory that this process reads.
    Host,
    /// Memory of a GPU, which only operations reach.
    Device,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Place::Host => "host memory",
            Place::Device => "device memory",
        })
    }
}

/// A Rust type that is an element of a [`Tensor`].
pub trait Element: Copy + Send + Sync + 'static + sealed::Sealed {
    /// Its candle name.
    const DTYPE: DType;
}
mod sealed {
    pub trait Sealed {}
}
macro_rules! element {
    ($($t:ty => $d:ident),*) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t { const DTYPE: DType = DType::$d; }
    )*};
}
element!(f32 => F32, f16 => F16, bf16 => BF16, u32 => U32, u8 => U8);

enum Storage {
    /// Zeroed at first.
    Owned {
        /// The first of `size` bytes, 64-byte aligned.
        ptr: *mut u8,
        size: usize,
        /// What was allocated, with `layout`; `ptr` lies up to `ALIGNMENT - 1` bytes behind it.
        base: *mut u8,
        layout: std::alloc::Layout,
    },
    Mapped(Arc<MappedFile>),
    #[cfg(feature = "cuda")]
    Device(crate::cuda::DeviceMemory),
}

// SAFETY: owned memory is reached for writing only through `&mut Tensor` that holds the only `Arc`; mapped memory is never
// written; device memory is reached by the device alone.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}

/// Of owned memory, in bytes: a cache line, and the widest vector.
const ALIGNMENT: usize = 64;

/// Bytes from which memory is asked for in huge pages: what lies in small pages costs a table walk for each KV block,
/// what is asked for in huge ones up to one of them more than is used.
const HUGE_PAGES_FROM: usize = 16 << 20;

/// Advice that the system may not follow: where huge pages are switched off, all works as before, only slower.
#[cfg(target_os = "linux")]
pub(crate) fn ask_for_huge_pages(ptr: *mut u8, size: usize) {
    const PAGE: usize = 4096;
    let offset = ptr.align_offset(PAGE);
    if offset < size {
        // SAFETY: the range lies within an allocation; the advice changes neither its contents nor who owns it.
        unsafe { libc::madvise(ptr.add(offset).cast(), (size - offset) & !(PAGE - 1), libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn ask_for_huge_pages(_: *mut u8, _: usize) {}

impl Storage {
    /// Asks for an alignment that `malloc` gives anyway and aligns by hand. For more, Rust's allocator would write the
    /// zeros itself, and a KV cache would take its memory at once instead of when blocks are first used.
    fn zeros(size: usize) -> Self {
        let layout =
            std::alloc::Layout::from_size_align(size + ALIGNMENT, 16).expect("size fits the address space");
        // SAFETY: the layout has a non-zero size.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            std::alloc::handle_alloc_error(layout)
        }
        // SAFETY: an offset below `ALIGNMENT` leaves `size` bytes behind it.
        let ptr = unsafe { base.add(base.align_offset(ALIGNMENT)) };
        if size >= HUGE_PAGES_FROM {
            ask_for_huge_pages(ptr, size);
        }
        Storage::Owned { ptr, size, base, layout }
    }
    fn ptr(&self) -> *const u8 {
        match self {
            Storage::Owned { ptr, .. } => *ptr,
            Storage::Mapped(map) => map.bytes().as_ptr(),
            #[cfg(feature = "cuda")]
            Storage::Device(memory) => memory.start().as_ptr(),
        }
    }
    fn place(&self) -> Place {
        match self {
            Storage::Owned { .. } | Storage::Mapped(_) => Place::Host,
            #[cfg(feature = "cuda")]
            Storage::Device(_) => Place::Device,
        }
    }
    fn len(&self) -> usize {
        match self {
            Storage::Owned { size, .. } => *size,
            Storage::Mapped(map) => map.bytes().len(),
            #[cfg(feature = "cuda")]
            Storage::Device(memory) => memory.size(),
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Storage::Owned { base, layout, .. } = self {
            // SAFETY: allocated in `Storage::zeros` with this layout and not freed before.
            unsafe { std::alloc::dealloc(*base, *layout) }
        }
    }
}

/// A matrix `[rows, cols]` in owned or mapped memory; rows lie `row_stride` elements apart, columns side by side.
/// Clones share the storage. A vector is a matrix of one row.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    /// In bytes.
    offset: usize,
    dtype: DType,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?} [{}, {}], row stride {})", self.dtype, self.rows, self.cols, self.row_stride)
    }
}

impl Tensor {
    /// Zeroed memory of its own. The system gives the pages when they are first touched.
    pub fn zeros(rows: usize, cols: usize, dtype: DType) -> Self {
        let size = rows * cols * dtype.size_in_bytes();
        Self { storage: Arc::new(Storage::zeros(size)), offset: 0, dtype, rows, cols, row_stride: cols }
    }

    /// A copy of `data`, row by row.
    ///
    /// # Panics
    /// Where `data.len() != rows * cols`.
    pub fn from_slice<T: Element>(data: &[T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "from_slice: length");
        let mut tensor = Self::zeros(rows, cols, T::DTYPE);
        tensor.as_mut_slice::<T>().copy_from_slice(data);
        tensor
    }

    /// A matrix in a mapped file, used in place, `offset` bytes from the file's start.
    pub fn mapped(
        file: Arc<MappedFile>,
        offset: usize,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let bytes = rows * cols * dtype.size_in_bytes();
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= file.bytes().len());
        let aligned = offset.is_multiple_of(dtype.size_in_bytes());
        if !fits || !aligned {
            return Err(Error::Shape {
                op: "mapped",
                message: format!(
                    "[{rows}, {cols}] of {dtype:?} at byte {offset} does not lie (aligned) in the file"
                ),
            });
        }
        Ok(Self { storage: Arc::new(Storage::Mapped(file)), offset, dtype, rows, cols, row_stride: cols })
    }

    /// Where a matrix without gaps lies in a mapped file, in bytes; `None` for others.
    pub fn in_file(&self) -> Option<(&Arc<MappedFile>, std::ops::Range<usize>)> {
        match &*self.storage {
            Storage::Mapped(file) if self.rows <= 1 || self.row_stride == self.cols => {
                Some((file, self.offset..self.offset + self.size_in_bytes()))
            }
            _ => None,
        }
    }

    /// A matrix without gaps in memory of a device that holds as many bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(
        memory: crate::cuda::DeviceMemory,
        rows: usize,
        cols: usize,
        dtype: DType,
    ) -> Self {
        assert!(rows * cols * dtype.size_in_bytes() <= memory.size(), "on_device: size");
        Self { storage: Arc::new(Storage::Device(memory)), offset: 0, dtype, rows, cols, row_stride: cols }
    }

    /// Rows `start .. start + len`, sharing the storage.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_rows(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.rows, "narrow_rows: {start}+{len} of {}", self.rows);
        let offset = self.offset + start * self.row_stride * self.dtype.size_in_bytes();
        Self { offset, rows: len, ..self.clone() }
    }

    /// Columns `start .. start + len`, sharing the storage.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_cols(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.cols, "narrow_cols: {start}+{len} of {}", self.cols);
        Self { offset: self.offset + start * self.dtype.size_in_bytes(), cols: len, ..self.clone() }
    }

    /// A copy in another element type (or the same), of a matrix in host memory.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let mut out = Self::zeros(self.rows, self.cols, dtype);
        for row in 0..self.rows {
            let values: Vec<f32> = self.view().row_f32(row)?;
            match dtype {
                DType::F32 => out.row_mut::<f32>(row).copy_from_slice(&values),
                DType::F16 => {
                    out.row_mut::<f16>(row).iter_mut().zip(values).for_each(|(o, v)| *o = f16::from_f32(v));
                }
                DType::BF16 => {
                    out.row_mut::<bf16>(row).iter_mut().zip(values).for_each(|(o, v)| *o = bf16::from_f32(v));
                }
                _ => return Err(Error::DType { op: "to_dtype", dtype, supported: "f32, f16, bf16" }),
            }
        }
        Ok(out)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Bytes of the elements.
    pub fn size_in_bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.size_in_bytes()
    }
    /// Where the elements lie.
    pub fn place(&self) -> Place {
        self.storage.place()
    }
    /// Whether the memory is a mapped file, not a copy.
    pub fn is_mapped(&self) -> bool {
        matches!(*self.storage, Storage::Mapped(_))
    }

    /// The whole matrix.
    pub fn view(&self) -> View<'_> {
        debug_assert!(self.offset + self.span_bytes() <= self.storage.len());
        View {
            // Of a device, it is an address that nothing follows here.
            ptr: self.storage.ptr().wrapping_add(self.offset),
            place: self.place(),
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            lifetime: PhantomData,
        }
    }

    /// The whole matrix, for writing.
    ///
    /// # Panics
    /// Where the storage is mapped or shared with a clone.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let storage = Arc::get_mut(&mut self.storage).expect("view_mut: storage shared with a clone");
        let place = storage.place();
        let ptr = match storage {
            Storage::Owned { ptr, .. } => *ptr,
            Storage::Mapped(_) => panic!("view_mut: storage is a mapped file"),
            #[cfg(feature = "cuda")]
            Storage::Device(memory) => memory.start().as_ptr().cast_mut(),
        };
        ViewMut {
            ptr: ptr.wrapping_add(self.offset),
            place,
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            lifetime: PhantomData,
        }
    }

    /// All elements of a contiguous matrix.
    ///
    /// # Panics
    /// Where `T` is not the element type or rows have gaps.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        self.view().into_slice::<T>()
    }

    /// All elements of a contiguous matrix, for writing.
    ///
    /// # Panics
    /// As [`Tensor::as_slice`] and [`Tensor::view_mut`].
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        self.view_mut().into_slice::<T>()
    }

    /// A copy of a matrix of the same width and element type in host memory, from `start` on.
    pub(crate) fn copy_rows(&mut self, start: usize, from: View<'_>) {
        assert!(self.cols == from.cols && self.dtype == from.dtype, "copy_rows: another width or type");
        assert!(start + from.rows <= self.rows && self.row_stride == self.cols, "copy_rows: {start}");
        let row_bytes = self.cols * self.dtype.size_in_bytes();
        let to = self.view_mut();
        assert_eq!(to.place, Place::Host, "copy_rows");
        // SAFETY: contiguous rows of initialized host memory, borrowed exclusively; elements of all types are bytes.
        let to = unsafe { std::slice::from_raw_parts_mut(to.ptr, to.rows * row_bytes) };
        for row in 0..from.rows {
            to[(start + row) * row_bytes..][..row_bytes].copy_from_slice(from.row_bytes(row));
        }
    }

    fn row_mut<T: Element>(&mut self, row: usize) -> &mut [T] {
        let cols = self.cols;
        &mut self.as_mut_slice::<T>()[row * cols..(row + 1) * cols]
    }

    fn span_bytes(&self) -> usize {
        span(self.rows, self.cols, self.row_stride) * self.dtype.size_in_bytes()
    }
}

/// Elements from the first to the last of a strided matrix.
fn span(rows: usize, cols: usize, row_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols }
}

/// A matrix to read: pointer, shape, row stride, element type.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub(crate) ptr: *const u8,
    pub(crate) place: Place,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// In elements.
    pub(crate) row_stride: usize,
    pub(crate) lifetime: PhantomData<&'a u8>,
}

// SAFETY: a view is a shared borrow of memory that is `Sync`.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl<'a> View<'a> {
    /// A matrix over a slice.
    ///
    /// # Panics
    /// Where `data.len() != rows * cols`.
    pub fn from_slice<T: Element>(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "View::from_slice: length");
        Self {
            ptr: data.as_ptr().cast(),
            place: Place::Host,
            dtype: T::DTYPE,
            rows,
            cols,
            row_stride: cols,
            lifetime: PhantomData,
        }
    }
    /// A matrix without gaps in device memory that the caller borrows for 'a.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(start: crate::cuda::DevicePtr, dtype: DType, rows: usize, cols: usize) -> Self {
        Self {
            ptr: start.as_ptr(),
            place: Place::Device,
            dtype,
            rows,
            cols,
            row_stride: cols,
            lifetime: PhantomData,
        }
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Where the elements lie.
    pub fn place(&self) -> Place {
        self.place
    }
    /// Rows `start .. start + len`.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_rows(self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.rows, "narrow_rows: {start}+{len} of {}", self.rows);
        let ptr = self.ptr.wrapping_add(start * self.row_stride * self.dtype.size_in_bytes());
        Self { ptr, rows: len, ..self }
    }
    /// Columns `start .. start + len`.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_cols(self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.cols, "narrow_cols: {start}+{len} of {}", self.cols);
        let ptr = self.ptr.wrapping_add(start * self.dtype.size_in_bytes());
        Self { ptr, cols: len, ..self }
    }
    /// The same elements in rows of another length.
    ///
    /// # Panics
    /// Where rows have gaps, or the number of elements differs.
    #[must_use]
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        assert!(self.rows <= 1 || self.row_stride == self.cols, "rows have gaps");
        assert_eq!(self.rows * self.cols, rows * cols, "reshape: number of elements");
        Self { rows, cols, row_stride: cols, ..self }
    }
    /// One row.
    ///
    /// # Panics
    /// Where `T` is not the element type or the row is outside.
    pub fn row<T: Element>(self, row: usize) -> &'a [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.narrow_rows(row, 1).into_slice::<T>()
    }
    /// One row, converted.
    ///
    /// # Panics
    /// Where the row is outside or not in host memory.
    pub fn row_f32(self, row: usize) -> Result<Vec<f32>> {
        Ok(match self.dtype {
            DType::F32 => self.row::<f32>(row).to_vec(),
            DType::F16 => self.row::<f16>(row).iter().map(|v| v.to_f32()).collect(),
            DType::BF16 => self.row::<bf16>(row).iter().map(|v| v.to_f32()).collect(),
            dtype => return Err(Error::DType { op: "row_f32", dtype, supported: "f32, f16, bf16" }),
        })
    }
    /// One row, whatever its elements are.
    pub(crate) fn row_bytes(self, row: usize) -> &'a [u8] {
        assert!(row < self.rows && self.place == Place::Host, "row_bytes: {row} of {}", self.rows);
        let size = self.dtype.size_in_bytes();
        // SAFETY: within the matrix, checked above; elements of all types are initialized bytes.
        unsafe { std::slice::from_raw_parts(self.ptr.add(row * self.row_stride * size), self.cols * size) }
    }
    /// All elements of a contiguous matrix.
    ///
    /// # Panics
    /// Where `T` is not the element type, rows have gaps, or the elements are not in host memory.
    pub fn into_slice<T: Element>(self) -> &'a [T] {
        assert_eq!(self.dtype, T::DTYPE, "element type");
        assert_eq!(self.place, Place::Host, "only operations reach device memory: download it first");
        assert!(self.rows <= 1 || self.row_stride == self.cols, "rows have gaps");
        // SAFETY: the constructors ensure `rows * cols` initialized elements at an aligned address for 'a.
        unsafe { std::slice::from_raw_parts(self.ptr.cast::<T>(), self.rows * self.cols) }
    }
}

/// A matrix to write: pointer, shape, row stride, element type.
pub struct ViewMut<'a> {
    pub(crate) ptr: *mut u8,
    pub(crate) place: Place,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// In elements.
    pub(crate) row_stride: usize,
    lifetime: PhantomData<&'a mut u8>,
}

// SAFETY: a mutable view is an exclusive borrow of memory that is `Send`.
unsafe impl Send for ViewMut<'_> {}
// SAFETY: shared references to it only read the shape.
unsafe impl Sync for ViewMut<'_> {}

impl<'a> ViewMut<'a> {
    /// A matrix over a slice.
    ///
    /// # Panics
    /// Where `data.len() != rows * cols`.
    pub fn from_slice<T: Element>(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "ViewMut::from_slice: length");
        Self {
            ptr: data.as_mut_ptr().cast(),
            place: Place::Host,
            dtype: T::DTYPE,
            rows,
            cols,
            row_stride: cols,
            lifetime: PhantomData,
        }
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Where the elements lie.
    pub fn place(&self) -> Place {
        self.place
    }
    /// A shorter borrow.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { lifetime: PhantomData, ..*self }
    }
    /// Another way to write the matrix, for tasks that share it.
    ///
    /// # Safety
    /// While the one is in use, what is reached through it is not reached through the other.
    pub(crate) unsafe fn alias(&self) -> ViewMut<'a> {
        ViewMut { lifetime: PhantomData, ..*self }
    }
    /// For reading.
    pub fn as_view(&self) -> View<'_> {
        View {
            ptr: self.ptr,
            place: self.place,
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            lifetime: PhantomData,
        }
    }
    /// Rows `start .. start + len`.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_rows(self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.rows, "narrow_rows: {start}+{len} of {}", self.rows);
        let ptr = self.ptr.wrapping_add(start * self.row_stride * self.dtype.size_in_bytes());
        Self { ptr, rows: len, ..self }
    }
    /// Columns `start .. start + len`.
    ///
    /// # Panics
    /// Where the range is outside.
    #[must_use]
    pub fn narrow_cols(self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.cols, "narrow_cols: {start}+{len} of {}", self.cols);
        let ptr = self.ptr.wrapping_add(start * self.dtype.size_in_bytes());
        Self { ptr, cols: len, ..self }
    }
    /// One row, for writing.
    ///
    /// # Panics
    /// Where `T` is not the element type or the row is outside.
    pub fn row<T: Element>(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.reborrow().narrow_rows(row, 1).into_slice::<T>()
    }
    /// All elements of a contiguous matrix, for writing.
    ///
    /// # Panics
    /// Where `T` is not the element type, rows have gaps, or the elements are not in host memory.
    pub fn into_slice<T: Element>(self) -> &'a mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "element type");
        assert_eq!(self.place, Place::Host, "only operations reach device memory: download it first");
        assert!(self.rows <= 1 || self.row_stride == self.cols, "rows have gaps");
        // SAFETY: the constructors ensure `rows * cols` initialized elements, borrowed exclusively for 'a.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast::<T>(), self.rows * self.cols) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(rows: usize, cols: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
        Tensor::from_slice(&values, rows, cols)
    }

    #[test]
    fn narrowing_shares_the_storage_and_keeps_the_stride() {
        let whole = counted(5, 7);
        let part = whole.narrow_rows(1, 3).narrow_cols(2, 4);
        assert_eq!((part.rows(), part.cols()), (3, 4));
        for row in 0..3 {
            assert_eq!(part.view().row::<f32>(row), &whole.view().row::<f32>(row + 1)[2..6]);
        }
    }

    #[test]
    fn converting_rounds_to_the_type_and_back_exactly() {
        let values = counted(3, 50);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let there = values.narrow_cols(3, 40).to_dtype(dtype).expect("a float type");
            assert_eq!((there.dtype(), there.rows(), there.cols()), (dtype, 3, 40));
            let back = there.to_dtype(DType::F32).expect("a float type");
            assert_eq!(back.view().row::<f32>(2), &values.view().row::<f32>(2)[3..43]);
        }
        assert!(matches!(values.to_dtype(DType::U32), Err(Error::DType { .. })));
    }

    #[test]
    fn a_matrix_beyond_the_file_or_out_of_alignment_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [0_u8; 40]).expect("write");
        let map = Arc::new(MappedFile::open(file.path()).expect("map"));
        let at = |offset, rows| Tensor::mapped(Arc::clone(&map), offset, DType::F32, rows, 2);
        assert!(at(8, 4).is_ok_and(|tensor| tensor.is_mapped()));
        for (offset, rows) in [(8, 5), (2, 1), (48, 0), (usize::MAX - 3, 1)] {
            assert!(matches!(at(offset, rows), Err(Error::Shape { .. })), "{rows} rows at {offset}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open("/no/such/file".as_ref()).map(|_| ()).expect_err("not there");
        assert!(error.to_string().starts_with("mapping /no/such/file: "), "{error}");
    }
}
