//! What operations run on: a device, and the threads given to this process.

use std::marker::PhantomData;
#[cfg(feature = "cuda")]
use std::sync::Arc;

#[cfg(feature = "cuda")]
use crate::cuda::{Device, Kernels};
use crate::ops::operands::{require, require_place};
use crate::pool::Pool;
use crate::simd::Level;
use crate::{DType, Element, Error, Place, Result, Tensor, View};

/// What an operation runs on: the device and, for what the CPU computes, the threads given to this process.
///
/// One for a process; operations of one context do not overlap. On a GPU they are only queued, and done one after the
/// other: [`Context::download`] and [`Context::synchronize`] wait.
pub struct Context {
    level: Level,
    pool: Pool,
    #[cfg(feature = "cuda")]
    device: Option<Arc<Device>>,
}

/// Memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// What can still be allocated, by this process or another.
    pub free_bytes: usize,
    /// All of it.
    pub total_bytes: usize,
}

impl Context {
    /// A CPU context with `num_threads` threads (the caller's is one of them), at least one.
    ///
    /// The other threads sleep while there is nothing to do, and end with the context. Which vector instructions
    /// are used is found out here.
    ///
    /// # Panics
    /// Where the system refuses another thread.
    pub fn cpu(num_threads: usize) -> Self {
        Self::cpu_with_level(num_threads, Level::detect())
    }

    /// As [`Context::cpu`], for results in full f32: where the CPU multiplies bf16 by itself, [`Context::cpu`] rounds
    /// activations to bf16 before they are multiplied with bf16 weights; this one never does.
    ///
    /// # Panics
    /// Where the system refuses another thread.
    pub fn cpu_with_f32_activations(num_threads: usize) -> Self {
        Self::cpu_with_level(num_threads, Level::detect_f32_activations())
    }

    /// As [`Context::cpu`], without kernels for this CPU's vector instructions: what the compiler makes of plain Rust. For
    /// who doubts their results.
    ///
    /// # Panics
    /// Where the system refuses another thread.
    pub fn cpu_with_plain_kernels(num_threads: usize) -> Self {
        Self::cpu_with_level(num_threads, Level::Portable)
    }

    /// As [`Context::cpu`], with chosen vector instructions, for tests that compare them.
    ///
    /// # Panics
    /// Where the CPU lacks them.
    #[doc(hidden)]
    pub fn cpu_with_level(num_threads: usize, level: Level) -> Self {
        assert!(level.is_available(), "this CPU has no {level:?}");
        Self {
            level,
            pool: Pool::new(num_threads),
            #[cfg(feature = "cuda")]
            device: None,
        }
    }

    /// The GPU `ordinal` (from 0, among those that CUDA shows to this process), with `num_threads` threads for what the
    /// CPU does beside it. An error says what is missing: a build with CUDA, the driver, the device, a newer one.
    ///
    /// # Panics
    /// Where the system refuses another thread.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize, num_threads: usize) -> Result<Self> {
        Self::cuda_with_kernels(ordinal, num_threads, Kernels::Tuned)
    }

    /// As [`Context::cuda`], without the kernels that are tuned for GPUs: products by cuBLASLt alone; attention, experts'
    /// products and adapters each by the one kernel that is for any size; norms, rotary embedding and writes to the cache
    /// one by one. What has no alternative stays, such as sampling. For who doubts results: it is slower.
    ///
    /// # Panics
    /// Where the system refuses another thread.
    #[cfg(feature = "cuda")]
    pub fn cuda_with_plain_kernels(ordinal: usize, num_threads: usize) -> Result<Self> {
        Self::cuda_with_kernels(ordinal, num_threads, Kernels::Plain)
    }

    #[cfg(feature = "cuda")]
    fn cuda_with_kernels(ordinal: usize, num_threads: usize, kernels: Kernels) -> Result<Self> {
        let device = Some(Arc::new(Device::open(ordinal, kernels)?));
        Ok(Self { device, ..Self::cpu(num_threads) })
    }

    /// An error: this build is without CUDA.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(_ordinal: usize, _num_threads: usize) -> Result<Self> {
        Err(without_cuda())
    }

    /// An error: this build is without CUDA.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda_with_plain_kernels(_ordinal: usize, _num_threads: usize) -> Result<Self> {
        Err(without_cuda())
    }

    /// Where operations expect their operands.
    pub fn place(&self) -> Place {
        #[cfg(feature = "cuda")]
        if self.device.is_some() {
            return Place::Device;
        }
        Place::Host
    }

    /// What it computes on, for people.
    pub fn device_name(&self) -> String {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            return device.name();
        }
        format!("CPU, {:?}", self.level)
    }

    /// The type of activations with weights of this type (of 8-bit weights: the type of the unquantized ones): f32 on the
    /// CPU, the weights' own on a GPU.
    pub fn activation_dtype(&self, weights: DType) -> DType {
        match self.place() {
            Place::Host => DType::F32,
            Place::Device => weights,
        }
    }

    /// A zeroed matrix where operations expect it.
    pub fn zeros(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            let memory = device.zeros(rows * cols * dtype.size_in_bytes())?;
            return Ok(Tensor::on_device(memory, rows, cols, dtype));
        }
        Ok(Tensor::zeros(rows, cols, dtype))
    }

    /// The matrix where operations expect it: on the CPU the same one, used in place; on a GPU a copy without gaps
    /// between rows. It may still be under way: operations come behind it.
    pub fn upload(&self, tensor: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let (Some(device), Place::Host) = (self.device(), tensor.place()) {
            let memory = device.upload(&self.pool, &[tensor.view()])?;
            return Ok(Tensor::on_device(memory, tensor.rows(), tensor.cols(), tensor.dtype()));
        }
        Ok(tensor.clone())
    }

    /// Matrices in host memory of one width and element type, one below the other, as one matrix where operations expect
    /// it: a copy on the CPU too.
    pub fn upload_stacked(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        let (cols, dtype) = tensors.first().map_or((0, DType::F32), |first| (first.cols(), first.dtype()));
        let rows = tensors.iter().map(|tensor| tensor.rows()).sum();
        for tensor in tensors {
            require("upload_stacked", tensor.cols() == cols && tensor.dtype() == dtype, || {
                format!("{tensor:?} below {:?}", tensors[0])
            })?;
            require_place("upload_stacked", "a matrix", tensor.place(), Place::Host)?;
        }
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            let views: Vec<_> = tensors.iter().map(|tensor| tensor.view()).collect();
            return Ok(Tensor::on_device(device.upload(&self.pool, &views)?, rows, cols, dtype));
        }
        let mut stacked = Tensor::zeros(rows, cols, dtype);
        let mut row = 0;
        for tensor in tensors {
            stacked.copy_rows(row, tensor.view());
            row += tensor.rows();
        }
        Ok(stacked)
    }

    /// Copies a matrix to `out`, row by row without gaps, when all operations queued so far are done.
    pub fn download<T: Element>(&self, view: View<'_>, out: &mut [T]) -> Result<()> {
        const OP: &str = "download";
        if view.dtype() != T::DTYPE {
            return Err(Error::DType { op: OP, dtype: view.dtype(), supported: "that of the output" });
        }
        require(OP, out.len() == view.rows() * view.cols(), || {
            format!("the matrix is [{}, {}], the output has {} elements", view.rows(), view.cols(), out.len())
        })?;
        #[cfg(feature = "cuda")]
        if let (Some(device), Place::Device) = (self.device(), view.place()) {
            return device.download(view, out);
        }
        for row in 0..if view.cols() == 0 { 0 } else { view.rows() } {
            out[row * view.cols()..][..view.cols()].copy_from_slice(view.row::<T>(row));
        }
        Ok(())
    }

    /// Waits until all operations queued so far are done, and tells of an error in one of them.
    pub fn synchronize(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            return device.stream().synchronize();
        }
        Ok(())
    }

    /// Memory of the device; none on the CPU.
    pub fn device_memory(&self) -> Result<Option<MemoryUse>> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            return device.memory_use().map(Some);
        }
        Ok(None)
    }

    /// Bytes that were copied to the device so far, for tests of what a step sends; 0 on the CPU.
    #[doc(hidden)]
    pub fn copied_bytes(&self) -> u64 {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            return device.stream().copied_bytes();
        }
        0
    }

    /// As if operations had not taken the memory that they need inside, for tests of what happens where there is none left.
    #[doc(hidden)]
    pub fn forget_scratch(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            device.forget_scratch()?;
        }
        Ok(())
    }

    /// Until the guard is dropped, allocating device memory and copying to it other than through
    /// [`crate::Staging`] is an error: what a step would wait for.
    pub fn freeze(&self) -> Frozen<'_> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            device.stream().freeze();
        }
        Frozen { context: self, not_sent: PhantomData }
    }

    /// Threads, the caller's included.
    pub fn num_threads(&self) -> usize {
        self.pool.num_threads()
    }

    /// Runs `task(0) .. task(num_tasks - 1)`, spread over the threads as they become free, and returns when all are
    /// done. Allocates nothing. A region that begins while another runs, or inside one, runs on its caller's thread alone.
    ///
    /// # Panics
    /// Where a task panics, with its payload, after the other threads have stopped.
    pub fn parallel_for(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        self.pool.parallel_for(num_tasks, task);
    }

    /// Runs `task` for each of the rows, some rows at a time, or all here where they are not worth waking a thread for.
    ///
    /// `row_elements`: elements that a row reads or writes, weighted by what is done to them.
    pub(crate) fn for_rows(&self, rows: usize, row_elements: usize, task: impl Fn(usize) + Sync) {
        // About ten microseconds of one core.
        const TASK_ELEMENTS: usize = 64 << 10;
        let rows_per_task = (TASK_ELEMENTS / row_elements.max(1)).max(1);
        if rows <= rows_per_task {
            return (0..rows).for_each(task);
        }
        self.parallel_for(rows.div_ceil(rows_per_task), |i| {
            (i * rows_per_task..rows.min((i + 1) * rows_per_task)).for_each(&task);
        });
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn device(&self) -> Option<&Arc<Device>> {
        self.device.as_ref()
    }

    /// The device, if it is to compute several operations in one kernel.
    #[cfg(feature = "cuda")]
    pub(crate) fn fusing_device(&self) -> Option<&Arc<Device>> {
        self.device().filter(|device| device.kernels() == Kernels::Tuned)
    }

    /// Names of the kernels that operations have used so far, for tests of which these are; none on the CPU.
    #[doc(hidden)]
    pub fn used_kernels(&self) -> Vec<String> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.device() {
            return device.used_kernels();
        }
        Vec::new()
    }
}

/// Whether this build computes on GPUs where there are any.
pub const BUILT_WITH_CUDA: bool = cfg!(feature = "cuda");

/// GPUs that CUDA shows to this process (`CUDA_VISIBLE_DEVICES` chooses among those there are). An error says what is
/// missing: a build with CUDA, the driver, a GPU, a newer driver.
pub fn num_gpus() -> Result<usize> {
    #[cfg(feature = "cuda")]
    return crate::cuda::num_devices();
    #[cfg(not(feature = "cuda"))]
    Err(without_cuda())
}

#[cfg(not(feature = "cuda"))]
fn without_cuda() -> Error {
    Error::Unavailable(
        "this executable was built without CUDA: build it with `--features cuda` (`make build-cuda`), or compute on the CPU"
            .into(),
    )
}

/// See [`Context::freeze`].
#[must_use = "frozen only until it is dropped"]
pub struct Frozen<'a> {
    context: &'a Context,
    /// A step is one thread's.
    not_sent: PhantomData<*const ()>,
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let Self { context, not_sent: PhantomData } = self;
        #[cfg(feature = "cuda")]
        if let Some(device) = context.device() {
            device.stream().thaw();
        }
        #[cfg(not(feature = "cuda"))]
        let _ = context;
    }
}
