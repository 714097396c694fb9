//! Opening a device, and what it keeps: modules, kernels by name, and buffers that operations need inside.

use std::collections::HashMap;
use std::ffi::CStr;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys;
use sys::CUdevice_attribute as Attribute;

use super::cublaslt::CublasLt;
use super::error::{check, describe};
use super::launch::{self, Kernel};
use super::memory::{DeviceMemory, DevicePtr};
use super::stream::Stream;
use super::upload::Uploader;
use crate::context::MemoryUse;
use crate::pool::Pool;
use crate::{DType, Element, Error, Result, View};

mod modules {
    //! `MODULES`: name and code of each file of kernels; `TOOLKIT_VERSION`: of CUDA, as the driver counts.
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

/// The oldest that the kernels are compiled for: asynchronous copies to shared memory, bf16 tensor cores.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// The first driver that loads a function when it is asked to: of CUDA 12.4.
const LOADS_FUNCTIONS: i32 = 12_040;

/// More dtypes than any kernel is named after.
const MAX_DTYPES: usize = 4;
type KernelKey = (&'static str, [Option<DType>; MAX_DTYPES]);

/// Which kernels compute, where several can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernels {
    /// Those that are the fastest for a size.
    Tuned,
    /// Libraries, and the simplest of ours.
    Plain,
}

/// A GPU that operations run on.
pub(crate) struct Device {
    properties: Properties,
    kernels: Kernels,
    modules: Vec<sys::CUmodule>,
    found: Mutex<HashMap<KernelKey, Kernel>>,
    /// By name, the one in use last: graphs may hold the addresses of those before it, so they stay.
    scratch: Mutex<HashMap<&'static str, Vec<DeviceMemory>>>,
    uploader: Mutex<Option<Uploader>>,
    /// None within where there is no such library.
    cublaslt: OnceLock<Option<CublasLt>>,
    /// Last: the others' memory is freed in its context.
    stream: Arc<Stream>,
}

// SAFETY: modules are handles that any thread may use.
unsafe impl Send for Device {}
// SAFETY: as above; the rest is behind locks.
unsafe impl Sync for Device {}

/// What kernels' launches depend on.
#[derive(Debug, Clone)]
pub(crate) struct Properties {
    pub(crate) name: String,
    /// Major and minor.
    pub(crate) capability: (i32, i32),
    pub(crate) num_multiprocessors: usize,
    /// The most shared memory of a block, static and dynamic.
    pub(crate) shared_bytes: usize,
}

impl Device {
    pub(crate) fn open(ordinal: usize, kernels: Kernels) -> Result<Self> {
        let device = find_device(ordinal)?;
        let properties = Properties::of(device)?;
        let stream = Arc::new(Stream::open(device)?);
        let mut this = Self {
            properties,
            kernels,
            modules: Vec::new(),
            found: Mutex::default(),
            scratch: Mutex::default(),
            uploader: Mutex::default(),
            cublaslt: OnceLock::new(),
            stream,
        };
        for (name, code) in modules::MODULES {
            this.modules.push(load(name, code, &this.properties)?);
        }
        Ok(this)
    }

    pub(crate) fn name(&self) -> String {
        let (major, minor) = self.properties.capability;
        let kernels = match self.kernels {
            Kernels::Tuned => "",
            Kernels::Plain => ", plain kernels",
        };
        format!("{}, compute capability {major}.{minor}{kernels}", self.properties.name)
    }

    pub(crate) fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Names of those that [`Self::kernel`] has found so far.
    pub(crate) fn used_kernels(&self) -> Vec<String> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.keys().map(|(op, _)| (*op).to_owned()).collect()
    }

    pub(crate) fn properties(&self) -> &Properties {
        &self.properties
    }

    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// The kernel `<op>_<dtype>_<dtype>`.
    pub(crate) fn kernel(&self, op: &'static str, dtypes: &[DType]) -> Result<Kernel> {
        let mut key = (op, [None; MAX_DTYPES]);
        for (place, &dtype) in key.1.iter_mut().zip(dtypes) {
            *place = Some(dtype);
        }
        assert!(dtypes.len() <= MAX_DTYPES, "{op}: {dtypes:?}");
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&kernel) = found.get(&key) {
            return Ok(kernel);
        }
        self.stream.bind()?;
        let kernel = launch::find(&self.modules, op, dtypes, self.properties.shared_bytes as i32)?;
        found.insert(key, kernel);
        Ok(kernel)
    }

    /// Has the driver load the code of all kernels. Otherwise it loads that of each when it is first used, and may find no memory
    /// for it then.
    pub(crate) fn load_all_kernels(&self) -> Result<()> {
        if driver_version()? < LOADS_FUNCTIONS {
            return Ok(());
        }
        self.stream.bind()?;
        for &module in &self.modules {
            let mut count = 0;
            // SAFETY: the module is loaded.
            check("cuModuleGetFunctionCount", unsafe {
                sys::cuModuleGetFunctionCount(&raw mut count, module)
            })?;
            let mut functions = vec![null_mut(); count as usize];
            // SAFETY: as above, and there is room for as many as said.
            check("cuModuleEnumerateFunctions", unsafe {
                sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module)
            })?;
            for function in functions {
                // SAFETY: of a loaded module.
                check("cuFuncLoad", unsafe { sys::cuFuncLoad(function) })?;
            }
        }
        Ok(())
    }

    /// A buffer of at least `size` bytes that the operations under this name share, with whatever the last one left there
    /// (zeros at first). It only grows, and not within a step.
    pub(crate) fn scratch(&self, name: &'static str, size: usize) -> Result<DevicePtr> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = scratch.entry(name).or_default();
        if let Some(memory) = buffers.last()
            && memory.size() >= size
        {
            return Ok(memory.start());
        }
        let memory = self.zeros(size)?;
        let start = memory.start();
        buffers.push(memory);
        Ok(start)
    }

    /// Has the next operation that needs a buffer take a new one. What it was stays: graphs may hold its address.
    pub(crate) fn forget_scratch(&self) -> Result<()> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        for buffers in scratch.values_mut() {
            buffers.push(DeviceMemory::allocate(&self.stream, 0)?);
        }
        Ok(())
    }

    /// The library for large matrix products, opened when it is first asked for; none where it is not found.
    pub(crate) fn cublaslt(&self) -> Result<Option<&CublasLt>> {
        if let Some(opened) = self.cublaslt.get() {
            return Ok(opened.as_ref());
        }
        let opened = CublasLt::open(self)?;
        Ok(self.cublaslt.get_or_init(|| opened).as_ref())
    }

    pub(crate) fn zeros(&self, size: usize) -> Result<DeviceMemory> {
        let mut memory = DeviceMemory::allocate(&self.stream, size)?;
        memory.fill_zeros()?;
        Ok(memory)
    }

    /// Matrices in host memory, one behind the other and without gaps between rows.
    pub(crate) fn upload(&self, pool: &Pool, from: &[View<'_>]) -> Result<DeviceMemory> {
        let size_of = |view: &View<'_>| view.rows() * view.cols() * view.dtype().size_in_bytes();
        let mut memory = DeviceMemory::allocate(&self.stream, from.iter().map(size_of).sum())?;
        let mut uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner);
        let uploader = match &mut *uploader {
            Some(uploader) => uploader,
            none => none.insert(Uploader::new(&self.stream)?),
        };
        let mut offset = 0;
        for view in from {
            uploader.upload(pool, *view, &mut memory, offset)?;
            offset += size_of(view);
        }
        Ok(memory)
    }

    /// The shapes have been checked.
    pub(crate) fn download<T: Element>(&self, from: View<'_>, out: &mut [T]) -> Result<()> {
        assert_eq!(out.len(), from.rows() * from.cols(), "checked by the caller");
        let packed = from.rows() <= 1 || from.row_stride == from.cols();
        let (pieces, len) = if packed { (1, out.len()) } else { (from.rows(), from.cols()) };
        self.stream.bind()?;
        for piece in 0..if len == 0 { 0 } else { pieces } {
            let start = from.ptr.addr() + piece * from.row_stride * size_of::<T>();
            let out = &mut out[piece * len..][..len];
            // SAFETY: the view is of this much device memory, and the output is waited for below.
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(
                    out.as_mut_ptr().cast(),
                    start as u64,
                    size_of_val(out),
                    self.stream.raw(),
                )
            })?;
        }
        self.stream.synchronize()
    }

    pub(crate) fn memory_use(&self) -> Result<MemoryUse> {
        self.stream.bind()?;
        let (mut free_bytes, mut total_bytes) = (0, 0);
        // SAFETY: the context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free_bytes, &raw mut total_bytes) })?;
        Ok(MemoryUse { free_bytes, total_bytes })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Kernels may be running.
        if self.stream.synchronize().is_ok() {
            for &module in &self.modules {
                // SAFETY: loaded in `open`; nothing runs, and no kernel is launched any more.
                let _ = unsafe { sys::cuModuleUnload(module) };
            }
        }
    }
}

/// Devices that CUDA shows to this process. Looks for the driver before it is called, which would panic
/// without.
pub(crate) fn num_devices() -> Result<usize> {
    let unavailable = |message: String| Err(Error::Unavailable(message));
    // SAFETY: opens the driver's library, whose initializers are the system's concern.
    if !unsafe { sys::is_culib_present() } {
        return unavailable(
            "there is no NVIDIA driver here (libcuda.so.1 is not found): install it, or compute on the CPU"
                .into(),
        );
    }
    // SAFETY: the first call, without preconditions.
    let answer = unsafe { sys::cuInit(0) };
    if answer != sys::CUresult::CUDA_SUCCESS {
        return unavailable(format!("the NVIDIA driver finds no usable GPU: {}", describe(answer)));
    }
    let version = driver_version()?;
    if version / 1000 < modules::TOOLKIT_VERSION / 1000 {
        return unavailable(format!(
            "the NVIDIA driver supports CUDA {}, the kernels of this executable need {}: update the driver",
            decimal(version),
            decimal(modules::TOOLKIT_VERSION)
        ));
    }
    let mut count = 0;
    // SAFETY: the driver is initialized.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(count as usize)
}

/// Of CUDA, as the driver counts. The driver's library is there.
fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: room for the answer; it may be asked for at any time.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    Ok(version)
}

fn find_device(ordinal: usize) -> Result<sys::CUdevice> {
    let count = num_devices()?;
    if ordinal >= count {
        return Err(Error::Unavailable(format!(
            "there is no GPU {ordinal}: CUDA shows {count} to this process (CUDA_VISIBLE_DEVICES chooses among them)"
        )));
    }
    let mut device = 0;
    // SAFETY: the ordinal is below the number of devices.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal as i32) })?;
    Ok(device)
}

/// 13000 is 13.0.
fn decimal(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

impl Properties {
    fn of(device: sys::CUdevice) -> Result<Self> {
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: the device is the driver's.
            check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })
                .map(|()| value)
        };
        let mut name = [0; 256];
        // SAFETY: room for as many bytes as said.
        check("cuDeviceGetName", unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device)
        })?;
        // SAFETY: the last byte is zero in any case.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < OLDEST_CAPABILITY {
            return Err(Error::Unavailable(format!(
                "{name} has compute capability {}.{}, at least {}.{} is needed (Ampere or newer)",
                capability.0, capability.1, OLDEST_CAPABILITY.0, OLDEST_CAPABILITY.1
            )));
        }
        let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Self {
            name,
            capability,
            num_multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            shared_bytes: shared_bytes as usize,
        })
    }
}

fn load(name: &str, code: &[u8], properties: &Properties) -> Result<sys::CUmodule> {
    let mut module = null_mut();
    // SAFETY: the context is current (`Stream::open`); the code is a whole image, as the compiler wrote it.
    let answer = unsafe { sys::cuModuleLoadData(&raw mut module, code.as_ptr().cast()) };
    match answer {
        sys::CUresult::CUDA_SUCCESS => Ok(module),
        sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
            Err(Error::Unavailable(format!(
                "the kernels ({name}) of this executable do not run on {} with this driver: update it to one for CUDA \
                 {} or newer, or compile for compute capability {}.{} (LAMPLIGHTER_CUDA_ARCHS)",
                properties.name,
                decimal(modules::TOOLKIT_VERSION),
                properties.capability.0,
                properties.capability.1
            )))
        }
        sys::CUresult::CUDA_ERROR_INVALID_IMAGE | sys::CUresult::CUDA_ERROR_INVALID_PTX => {
            Err(Error::Unavailable(format!(
                "the kernels ({name}) of this executable are no code for a GPU: it was built with the stand-in for nvcc; \
                 build it with `make build-cuda`"
            )))
        }
        answer => {
            Err(Error::Cuda { call: "cuModuleLoadData", message: format!("{name}: {}", describe(answer)) })
        }
    }
}
