//! Kernels by name, and launching them.

use std::ffi::{CString, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys;

use super::error::describe;
use super::memory::DevicePtr;
use super::{Device, error::check};
use crate::{DType, Error, Place, Result, View, ViewMut};

/// Of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// Where one is 0, there is nothing to do.
    pub(crate) blocks: [u32; 3],
    /// Of a block, a multiple of 32.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
}

impl Grid {
    /// As `cuda/rows.cuh` has it: a block for each piece of each row, 16 bytes of `dtype` for each thread.
    pub(crate) fn of_rows(rows: usize, cols: usize, dtype: DType) -> Self {
        let packs = cols.div_ceil(16 / dtype.size_in_bytes());
        let threads = packs.next_multiple_of(32).clamp(32, 256);
        let pieces = packs.div_ceil(threads);
        Self { blocks: [rows as u32, pieces as u32, 1], threads: threads as u32, shared_bytes: 0 }
    }
}

/// What a kernel is given: an address or a number.
#[derive(Clone, Copy)]
pub(crate) struct Argument {
    /// The lowest bytes are the value (the machines that have CUDA are little-endian).
    bits: u64,
    on_host: bool,
}

impl Argument {
    fn number(bits: u64) -> Self {
        Self { bits, on_host: false }
    }
}
impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Self::number(value.into())
    }
}
impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self::number(value.cast_unsigned().into())
    }
}
impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self::number(value)
    }
}
impl From<i64> for Argument {
    fn from(value: i64) -> Self {
        Self::number(value.cast_unsigned())
    }
}
impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::number(value.to_bits().into())
    }
}
impl From<DevicePtr> for Argument {
    fn from(at: DevicePtr) -> Self {
        Self::number(at.0)
    }
}
impl From<View<'_>> for Argument {
    fn from(view: View<'_>) -> Self {
        Self { bits: view.ptr.addr() as u64, on_host: view.place() == Place::Host }
    }
}
impl From<ViewMut<'_>> for Argument {
    fn from(view: ViewMut<'_>) -> Self {
        view.as_view().into()
    }
}
/// Of what may be missing, the null pointer.
impl From<Option<View<'_>>> for Argument {
    fn from(view: Option<View<'_>>) -> Self {
        view.map_or(Self::number(0), Self::from)
    }
}

/// A function on the device.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    /// The operation, for errors.
    pub(super) op: &'static str,
    pub(super) function: sys::CUfunction,
}

// SAFETY: a handle that stays valid as long as its module; any thread may launch it.
unsafe impl Send for Kernel {}

/// More than any kernel takes.
const MAX_ARGUMENTS: usize = 48;

impl Kernel {
    /// Queues the kernel.
    ///
    /// # Safety
    /// The arguments are of the kernel's parameters, in number, order and type, and what the kernel does with the addresses
    /// stays within the memory behind them.
    ///
    /// # Panics
    /// Where an argument is in host memory: operations check their operands.
    pub(crate) unsafe fn launch(self, device: &Device, grid: Grid, arguments: &[Argument]) -> Result<()> {
        assert!(arguments.len() <= MAX_ARGUMENTS, "{}: {} arguments", self.op, arguments.len());
        let Grid { blocks: [x, y, z], threads, shared_bytes } = grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let mut values = [null_mut::<c_void>(); MAX_ARGUMENTS];
        for (i, argument) in arguments.iter().enumerate() {
            assert!(!argument.on_host, "{}: argument {i} is in host memory", self.op);
            values[i] = (&raw const argument.bits).cast_mut().cast();
        }
        let stream = device.stream();
        stream.bind()?;
        stream.count_launch();
        // SAFETY: the driver reads as many values as the kernel has parameters, by the caller's promise.
        let answer = unsafe {
            sys::cuLaunchKernel(
                self.function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared_bytes,
                stream.raw(),
                values.as_mut_ptr(),
                null_mut(),
            )
        };
        match answer {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => check(self.op, answer),
            answer => {
                let message = format!("launching {grid:?}: {}", describe(answer));
                Err(Error::Cuda { call: self.op, message })
            }
        }
    }
}

/// `<op>_<dtype>_<dtype>`, as the kernels are named.
pub(super) fn kernel_name(op: &'static str, dtypes: &[DType]) -> Result<CString> {
    let mut name = op.to_owned();
    for &dtype in dtypes {
        name.push('_');
        name.push_str(short_name(op, dtype)?);
    }
    Ok(CString::new(name).expect("an operation's name has no zero byte"))
}

fn short_name(op: &'static str, dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::F8E4M3 => "f8",
        DType::U32 => "u32",
        // The bytes of 8-bit weights, which are signed.
        DType::U8 => "i8",
        _ => return Err(Error::DType { op, dtype, supported: "f32, f16, bf16, f8e4m3, u8, u32" }),
    })
}

/// Looks a kernel up in the modules, and lets it have all the shared memory that there is.
pub(super) fn find(
    modules: &[sys::CUmodule],
    op: &'static str,
    dtypes: &[DType],
    shared_bytes: i32,
) -> Result<Kernel> {
    use sys::CUfunction_attribute::{
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    };
    let name = kernel_name(op, dtypes)?;
    let mut function = null_mut();
    let mut found = false;
    for &module in modules {
        // SAFETY: the module is loaded; the name ends with a zero.
        let answer = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        if answer == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            check("cuModuleGetFunction", answer)?;
        }
        if answer == sys::CUresult::CUDA_SUCCESS {
            found = true;
            break;
        }
    }
    if !found {
        return Err(Error::Cuda {
            call: op,
            message: format!("there is no kernel {}", name.to_string_lossy()),
        });
    }
    let mut own = 0;
    // SAFETY: the function is of a loaded module.
    check("cuFuncGetAttribute", unsafe {
        sys::cuFuncGetAttribute(&raw mut own, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
    })?;
    // SAFETY: as above.
    check("cuFuncSetAttribute", unsafe {
        sys::cuFuncSetAttribute(
            function,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            (shared_bytes - own).max(0),
        )
    })?;
    Ok(Kernel { op, function })
}
