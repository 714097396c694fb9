//! cuBLASLt: products of large matrices, by algorithms that are chosen once for each size.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::{from_ref, null_mut};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys;
use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
use sys::cublasLtMatmulPreferenceAttributes_t as Preferred;
use sys::cublasStatus_t as Status;

use super::{Device, DevicePtr};
use crate::{DType, Error, Result};

/// What cuBLAS's documentation advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// A handle, and the algorithms chosen so far.
pub(crate) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    /// None where there is no algorithm.
    algorithms: Mutex<HashMap<Key, Option<sys::cublasLtMatmulAlgo_t>>>,
}

// SAFETY: the library's functions are thread-safe, and the handle belongs to no thread.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// A row-major matrix in device memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) start: DevicePtr,
    pub(crate) dtype: DType,
    /// Elements from a row to the next.
    pub(crate) row_stride: usize,
}

impl Operand {
    /// Bytes that the start of each row is a multiple of, as far as algorithms ask.
    pub(crate) fn alignment(self) -> u32 {
        const MOST: u64 = 256;
        let bits = self.start.0 | (self.row_stride * self.dtype.size_in_bytes()) as u64 | MOST;
        1 << bits.trailing_zeros()
    }
}

/// `out = x · weightᵀ`, or added to what `out` holds. `x`: `[rows, k]`; `weight`: `[n, k]` of the same type; `out`: `[rows, n]`,
/// of that type or f32. Sums are f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub(crate) x: Operand,
    pub(crate) weight: Operand,
    pub(crate) out: Operand,
    pub(crate) rows: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) adds: bool,
}

/// What an algorithm is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// The greatest number of rows that the algorithm is used for, unless it refuses one.
    rows: usize,
    n: usize,
    k: usize,
    dtype: DType,
    out_dtype: DType,
    adds: bool,
    /// Of x, weight and out.
    alignments: [u32; 3],
}

impl Product {
    fn key(&self, rows: usize) -> Key {
        Key {
            rows,
            n: self.n,
            k: self.k,
            dtype: self.x.dtype,
            out_dtype: self.out.dtype,
            adds: self.adds,
            alignments: [self.x, self.weight, self.out].map(Operand::alignment),
        }
    }
}

/// Numbers of rows that differ by little share an algorithm: a new one is a search of some 100 us.
fn bucket(rows: usize) -> usize {
    let step = match rows {
        0..=64 => 16,
        65..=512 => 64,
        _ => 256,
    };
    rows.next_multiple_of(step)
}

impl CublasLt {
    /// None where the library is not found.
    pub(super) fn open(device: &Device) -> Result<Option<Self>> {
        // SAFETY: opens the library, whose initializers are the system's concern.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        device.stream().bind()?;
        let mut handle = null_mut();
        // SAFETY: the context is current; the handle is destroyed when `self` is dropped.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&raw mut handle) })?;
        Ok(Some(Self { handle, algorithms: Mutex::default() }))
    }

    /// Queues the product; false where the library has no algorithm for it, or no memory, and nothing is queued.
    ///
    /// # Safety
    /// The matrices are in memory of this device and have the shapes that `product` says.
    pub(crate) unsafe fn multiply(&self, device: &Device, product: &Product) -> Result<bool> {
        device.stream().bind()?;
        let workspace = device.scratch("cublaslt", WORKSPACE_BYTES)?;
        let bucket = bucket(product.rows);
        let call = Call::new(product, product.rows)?;
        for rows in [bucket, product.rows] {
            let Some(algorithm) = self.algorithm(product, rows)? else { continue };
            // SAFETY: descriptors and algorithm are of this product; the rest is the caller's promise.
            let status = unsafe { call.queue(self.handle, product, &algorithm, workspace, device) };
            match status {
                Status::CUBLAS_STATUS_SUCCESS => return Ok(true),
                Status::CUBLAS_STATUS_NOT_SUPPORTED => {}
                // Its kernels are loaded when they are first used. Ours need nothing.
                Status::CUBLAS_STATUS_ALLOC_FAILED => return Ok(false),
                // Chosen for more rows than these.
                Status::CUBLAS_STATUS_INVALID_VALUE if rows != product.rows => {}
                status => return check("cublasLtMatmul", status).map(|()| true),
            }
        }
        Ok(false)
    }

    fn algorithm(&self, product: &Product, rows: usize) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
        let mut algorithms = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner);
        let key = product.key(rows);
        if let Some(&known) = algorithms.get(&key) {
            return Ok(known);
        }
        let found = self.search(product, &key)?;
        algorithms.insert(key, found);
        Ok(found)
    }

    fn search(&self, product: &Product, key: &Key) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
        let call = Call::new(product, key.rows)?;
        let preference = Preference::new(key)?;
        let mut count = 0;
        let mut found = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all are descriptors of ours; there is room for the one result asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                call.operation.0,
                call.weight.0,
                call.x.0,
                call.out.0,
                call.out.0,
                preference.0,
                1,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        if status == Status::CUBLAS_STATUS_NOT_SUPPORTED
            || (status == Status::CUBLAS_STATUS_SUCCESS && count == 0)
        {
            return Ok(None);
        }
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        // SAFETY: one result was written.
        let found = unsafe { found.assume_init() };
        Ok((found.state == Status::CUBLAS_STATUS_SUCCESS).then_some(found.algo))
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: created in `open`. Nothing can be done about an error.
        let _ = unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

fn check(call: &'static str, status: Status) -> Result<()> {
    match status {
        Status::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(Error::Cuda { call, message: format!("{status:?}") }),
    }
}

/// Operation and layouts. The library counts by columns, so it sees each matrix transposed: outᵀ = (weightᵀ)ᵀ · xᵀ.
struct Call {
    operation: Operation,
    weight: Layout,
    x: Layout,
    out: Layout,
}

impl Call {
    fn new(product: &Product, rows: usize) -> Result<Self> {
        let Product { x, weight, out, n, k, .. } = *product;
        Ok(Self {
            operation: Operation::new()?,
            weight: Layout::new(weight, k, n)?,
            x: Layout::new(x, k, rows)?,
            out: Layout::new(out, n, rows)?,
        })
    }

    /// # Safety
    /// As [`CublasLt::multiply`]; the workspace has `WORKSPACE_BYTES`.
    unsafe fn queue(
        &self,
        handle: sys::cublasLtHandle_t,
        product: &Product,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        workspace: DevicePtr,
        device: &Device,
    ) -> Status {
        let (one, beta) = (1.0_f32, if product.adds { 1.0_f32 } else { 0.0 });
        let address = |operand: Operand| operand.start.as_ptr().cast::<c_void>();
        // SAFETY: the caller's promise; the numbers are read before the call returns.
        unsafe {
            sys::cublasLtMatmul(
                handle,
                self.operation.0,
                from_ref(&one).cast(),
                address(product.weight),
                self.weight.0,
                address(product.x),
                self.x.0,
                from_ref(&beta).cast(),
                address(product.out),
                self.out.0,
                address(product.out).cast_mut(),
                self.out.0,
                algorithm,
                workspace.as_ptr().cast_mut().cast(),
                WORKSPACE_BYTES,
                device.stream().raw().cast(),
            )
        }
    }
}

struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    /// Products and sums in f32: not by TF32, whose factors have 10 bits.
    fn new() -> Result<Self> {
        let mut raw = null_mut();
        // SAFETY: destroyed when `self` is dropped.
        check("cublasLtMatmulDescCreate", unsafe {
            sys::cublasLtMatmulDescCreate(
                &raw mut raw,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType::CUDA_R_32F,
            )
        })?;
        let this = Self(raw);
        // `CUBLAS_OP_T`, of an enum that the bindings lack.
        let transposed = 1_i32;
        // SAFETY: the attribute is of this type.
        check("cublasLtMatmulDescSetAttribute", unsafe {
            sys::cublasLtMatmulDescSetAttribute(
                this.0,
                CUBLASLT_MATMUL_DESC_TRANSA,
                from_ref(&transposed).cast(),
                size_of_val(&transposed),
            )
        })?;
        Ok(this)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created in `new`.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// In the library's words: `rows` lie side by side.
    fn new(operand: Operand, rows: usize, cols: usize) -> Result<Self> {
        let dtype = match operand.dtype {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
            dtype => return Err(Error::DType { op: "cublasLt", dtype, supported: "f32, f16, bf16" }),
        };
        // Of a single row, views may have any stride; the library wants one that is possible.
        let stride = operand.row_stride.max(rows);
        let mut raw = null_mut();
        // SAFETY: destroyed when `self` is dropped.
        check("cublasLtMatrixLayoutCreate", unsafe {
            sys::cublasLtMatrixLayoutCreate(&raw mut raw, dtype, rows as u64, cols as u64, stride as i64)
        })?;
        Ok(Self(raw))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created in `new`.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(key: &Key) -> Result<Self> {
        let mut raw = null_mut();
        // SAFETY: destroyed when `self` is dropped.
        check("cublasLtMatmulPreferenceCreate", unsafe {
            sys::cublasLtMatmulPreferenceCreate(&raw mut raw)
        })?;
        let this = Self(raw);
        let [x, weight, out] = key.alignments;
        this.set(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        // Parts of k are added in f32, never in the output's type.
        let in_f32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        this.set(Preferred::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &in_f32)?;
        this.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &weight)?;
        this.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x)?;
        this.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out)?;
        this.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out)?;
        Ok(this)
    }

    fn set<T>(&self, attribute: Preferred, value: &T) -> Result<()> {
        // SAFETY: `new` gives each attribute the type that it has: a u64 for the workspace, u32 for the others.
        check("cublasLtMatmulPreferenceSetAttribute", unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(
                self.0,
                attribute,
                from_ref(value).cast(),
                size_of::<T>(),
            )
        })
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_algorithms_serve_all_numbers_of_rows_and_each_at_least_as_many_as_it_is_chosen_for() {
        let buckets: std::collections::BTreeSet<usize> = (1..=8192).map(bucket).collect();
        assert_eq!(buckets.len(), 4 + 7 + 30);
        for rows in 1..=8192 {
            assert!(bucket(rows) >= rows && bucket(rows) <= (2 * rows).max(16), "{rows}");
        }
    }

    #[test]
    fn alignment_is_that_of_every_row() {
        for (start, row_stride, expected) in
            [(0x1000, 64, 128), (0x1000, 4096, 256), (0x1010, 64, 16), (0x1002, 64, 2), (0x1000, 65, 2)]
        {
            let operand = Operand { start: DevicePtr(start), dtype: DType::BF16, row_stride };
            assert_eq!(operand.alignment(), expected, "{start:#x}, {row_stride}");
        }
    }
}
