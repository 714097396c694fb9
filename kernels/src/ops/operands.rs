//! What operations ask of their operands, and how the tasks of a parallel region write to one output.

use std::marker::PhantomData;
use std::ops::Range;

use crate::{DType, Error, Place, Result, Tensor, View, ViewMut};

/// `on_cuda!(context, |device| cuda::add(device, x, y))` in an operation: what is done, and returned, where the context
/// computes on a GPU. Nothing in a build without CUDA, but that the context is in use.
macro_rules! on_cuda {
    ($context:expr, |$device:pat_param| $call:expr) => {
        #[cfg(feature = "cuda")]
        if let Some($device) = $context.device() {
            return $call;
        }
        #[cfg(not(feature = "cuda"))]
        let _ = $context;
    };
}
pub(crate) use on_cuda;

/// As [`on_cuda`], where the device has a kernel for what are several operations otherwise.
macro_rules! on_fusing_cuda {
    ($context:expr, |$device:pat_param| $call:expr) => {
        #[cfg(feature = "cuda")]
        if let Some($device) = $context.fusing_device() {
            return $call;
        }
        #[cfg(not(feature = "cuda"))]
        let _ = $context;
    };
}
pub(crate) use on_fusing_cuda;

/// Refuses with a shape error unless `holds`.
pub(crate) fn require(op: &'static str, holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Shape { op, message: message() }) }
}

/// Refuses an operand that is not of the one element type.
pub(crate) fn require_dtype(op: &'static str, dtype: DType, expected: DType) -> Result<()> {
    let supported = match expected {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::U32 => "u32",
        DType::U8 => "u8",
        _ => "another",
    };
    if dtype == expected { Ok(()) } else { Err(Error::DType { op, dtype, supported }) }
}

/// The error for weights that no kernel reads.
pub(crate) fn unsupported_float(op: &'static str, dtype: DType) -> Error {
    Error::DType { op, dtype, supported: "f32, f16, bf16" }
}

/// Refuses element types that kernels do not read.
pub(crate) fn require_float(op: &'static str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        _ => Err(unsupported_float(op, dtype)),
    }
}

/// Refuses an operand that is not where the operation computes.
pub(crate) fn require_place(op: &'static str, name: &str, place: Place, expected: Place) -> Result<()> {
    require(op, place == expected, || {
        format!("{name} lies in {place}, expected in {expected}: upload it, or make it with Context::zeros")
    })
}

/// What is asked of an operand.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    place: Place,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// Refuses unless the operand is `[rows, cols]` in this memory.
    pub(crate) fn require(
        self,
        op: &'static str,
        name: &str,
        place: Place,
        (rows, cols): (usize, usize),
    ) -> Result<()> {
        require_place(op, name, self.place, place)?;
        require(op, self.rows == rows && self.cols == cols, || {
            format!("{name} is [{}, {}], expected [{rows}, {cols}]", self.rows, self.cols)
        })
    }
}

/// Place, element type and shape of an operand.
pub(crate) fn matrix(view: View<'_>) -> Matrix {
    Matrix { place: view.place(), dtype: view.dtype(), rows: view.rows(), cols: view.cols() }
}

/// As [`matrix`], of an output.
pub(crate) fn matrix_mut(view: &ViewMut<'_>) -> Matrix {
    matrix(view.as_view())
}

/// A vector `[1, len]` of f32 in host memory as a slice.
pub(crate) fn f32_vector<'a>(
    op: &'static str,
    name: &str,
    tensor: &'a Tensor,
    len: usize,
) -> Result<&'a [f32]> {
    require_f32_matrix(op, name, matrix(tensor.view()), (1, len))?;
    Ok(tensor.as_slice())
}

/// A vector `[1, len]` of u32 in host memory as a slice.
pub(crate) fn u32_vector<'a>(op: &'static str, name: &str, view: View<'a>, len: usize) -> Result<&'a [u32]> {
    require_dtype(op, view.dtype(), DType::U32)?;
    matrix(view).require(op, name, Place::Host, (1, len))?;
    Ok(view.into_slice())
}

/// As [`u32_vector`], to write.
pub(crate) fn u32_vector_mut<'a>(
    op: &'static str,
    name: &str,
    view: ViewMut<'a>,
    len: usize,
) -> Result<&'a mut [u32]> {
    require_dtype(op, view.dtype(), DType::U32)?;
    matrix_mut(&view).require(op, name, Place::Host, (1, len))?;
    Ok(view.into_slice())
}

/// Refuses unless the matrix is f32 `[rows, cols]` in host memory.
pub(crate) fn require_f32_matrix(
    op: &'static str,
    name: &str,
    matrix: Matrix,
    shape: (usize, usize),
) -> Result<()> {
    require_dtype(op, matrix.dtype, DType::F32)?;
    matrix.require(op, name, Place::Host, shape)
}

/// Refuses unless the matrix is `[rows, cols]` of this element type in device memory.
#[cfg(feature = "cuda")]
pub(crate) fn require_on_device(
    op: &'static str,
    name: &str,
    matrix: Matrix,
    dtype: DType,
    shape: (usize, usize),
) -> Result<()> {
    require_dtype(op, matrix.dtype, dtype)?;
    matrix.require(op, name, Place::Device, shape)
}

/// A view `[1, len]` of u32 in device memory.
#[cfg(feature = "cuda")]
pub(crate) fn require_device_u32s(op: &'static str, name: &str, view: View<'_>, len: usize) -> Result<()> {
    require_on_device(op, name, matrix(view), DType::U32, (1, len))
}

/// A vector `[1, len]` of this element type in device memory.
#[cfg(feature = "cuda")]
pub(crate) fn device_vector<'a>(
    op: &'static str,
    name: &str,
    tensor: &'a Tensor,
    dtype: DType,
    len: usize,
) -> Result<View<'a>> {
    require_on_device(op, name, matrix(tensor.view()), dtype, (1, len))?;
    Ok(tensor.view())
}

/// The rows of an f32 output, shared by the tasks of a region that write disjoint parts of it.
#[derive(Clone, Copy)]
pub(crate) struct SharedRows<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut f32>,
}

// SAFETY: the matrix is borrowed exclusively for 'a; whoever writes promises disjoint parts (see the methods).
unsafe impl Send for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    /// # Panics
    /// Where the matrix is not f32.
    #[expect(clippy::needless_pass_by_value, reason = "takes the exclusive borrow over")]
    pub(crate) fn new(view: ViewMut<'a>) -> Self {
        assert_eq!(view.dtype, DType::F32, "checked by the operation");
        let (rows, cols, row_stride) = (view.rows, view.cols, view.row_stride);
        Self { ptr: view.ptr.cast(), rows, cols, row_stride, lifetime: PhantomData }
    }

    /// One row.
    ///
    /// # Safety
    /// No other reference to the row is used while this one is.
    pub(crate) unsafe fn row(&self, row: usize) -> &'a mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: within the matrix; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.row_stride), self.cols) }
    }

    /// A part of one row.
    ///
    /// # Safety
    /// No other reference to the part is used while this one is.
    pub(crate) unsafe fn part(&self, row: usize, cols: Range<usize>) -> &'a mut [f32] {
        assert!(row < self.rows && cols.start <= cols.end && cols.end <= self.cols, "{cols:?} of row {row}");
        // SAFETY: within the row; exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.ptr.add(row * self.row_stride + cols.start), cols.len())
        }
    }

    /// The address of an element; writing to it needs the promise of [`SharedRows::row`].
    pub(crate) fn at(&self, row: usize, col: usize) -> *mut f32 {
        debug_assert!(row < self.rows && col < self.cols);
        // SAFETY: within the matrix.
        unsafe { self.ptr.add(row * self.row_stride + col) }
    }

    /// Elements from a row to the next.
    pub(crate) fn row_stride(&self) -> usize {
        self.row_stride
    }
}
