//! What operations ask of their operands, and how the tasks of a parallel region write to one output.

use std::marker::PhantomData;

use crate::{DType, Error, Result, Tensor, View, ViewMut};

/// Refuses with a shape error unless `holds`.
pub(crate) fn require(op: &'static str, holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Shape { op, message: message() }) }
}

/// Refuses an operand that is not of the one element type.
pub(crate) fn require_dtype(op: &'static str, dtype: DType, expected: DType) -> Result<()> {
    let supported = match expected {
        DType::F32 => "f32",
        DType::U32 => "u32",
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

/// A vector `[1, len]` of f32 as a slice.
pub(crate) fn f32_vector<'a>(
    op: &'static str,
    name: &str,
    tensor: &'a Tensor,
    len: usize,
) -> Result<&'a [f32]> {
    require_dtype(op, tensor.dtype(), DType::F32)?;
    require(op, tensor.rows() == 1 && tensor.cols() == len, || {
        format!("{name} is [{}, {}], expected [1, {len}]", tensor.rows(), tensor.cols())
    })?;
    Ok(tensor.as_slice())
}

/// A vector `[1, len]` of u32 as a slice.
pub(crate) fn u32_vector<'a>(op: &'static str, name: &str, view: View<'a>, len: usize) -> Result<&'a [u32]> {
    require_dtype(op, view.dtype(), DType::U32)?;
    require(op, view.rows() == 1 && view.cols() == len, || {
        format!("{name} is [{}, {}], expected [1, {len}]", view.rows(), view.cols())
    })?;
    Ok(view.into_slice())
}

/// Refuses unless the matrix is f32 `[rows, cols]`.
pub(crate) fn require_f32_matrix(
    op: &'static str,
    name: &str,
    (dtype, actual_rows, actual_cols): (DType, usize, usize),
    (rows, cols): (usize, usize),
) -> Result<()> {
    require_dtype(op, dtype, DType::F32)?;
    require(op, actual_rows == rows && actual_cols == cols, || {
        format!("{name} is [{actual_rows}, {actual_cols}], expected [{rows}, {cols}]")
    })
}

/// Element type and shape, for [`require_f32_matrix`].
pub(crate) fn matrix(view: View<'_>) -> (DType, usize, usize) {
    (view.dtype(), view.rows(), view.cols())
}

/// As [`matrix`], of an output.
pub(crate) fn matrix_mut(view: &ViewMut<'_>) -> (DType, usize, usize) {
    (view.dtype(), view.rows(), view.cols())
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
