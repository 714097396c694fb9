//! NCCL's library, opened when it is first asked for.
//!
//! cudarc looks for it under names that it rarely has: systems without its development files, and PyTorch's wheels, have
//! `libnccl.so.2` only.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;

use crate::{DType, Error, Result};

/// A communicator of the library.
pub(crate) type Comm = *mut c_void;
/// Names a group; rank 0 makes it, and all join with it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

const SUCCESS: c_int = 0;
/// Not an error: an asynchronous call that is under way.
const IN_PROGRESS: c_int = 7;
const SUM: c_int = 0;
/// The oldest whose collectives graphs may hold together with other work.
const OLDEST: c_int = 21_800;

type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type CommInitRank = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int;
type CommAbort = unsafe extern "C" fn(Comm) -> c_int;
type CommGetAsyncError = unsafe extern "C" fn(Comm, *mut c_int) -> c_int;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int;
type AllGather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, CUstream) -> c_int;
type GetErrorString = unsafe extern "C" fn(c_int) -> *const c_char;

/// Functions of the library, with nccl.h's types.
pub(crate) struct Nccl {
    get_unique_id: GetUniqueId,
    comm_init_rank: CommInitRank,
    comm_abort: CommAbort,
    comm_get_async_error: CommGetAsyncError,
    all_reduce: AllReduce,
    all_gather: AllGather,
    get_error_string: GetErrorString,
}

impl Nccl {
    /// The library of this process.
    pub(crate) fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<Nccl, String>> = OnceLock::new();
        LIBRARY.get_or_init(Self::open).as_ref().map_err(|message| Error::Unavailable(message.clone()))
    }

    fn open() -> Result<Self, String> {
        // SAFETY: opens the library, whose initializers are the system's concern. It is never closed.
        let library = [c"libnccl.so.2", c"libnccl.so"]
            .into_iter()
            .map(|name| unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) })
            .find(|library| !library.is_null())
            .ok_or(
                "several GPUs need NCCL, and libnccl.so.2 is not found: install it (the package libnccl2; PyTorch's wheels \
                 bring it too, in nvidia/nccl/lib, for LD_LIBRARY_PATH), or serve with one shard",
            )?;
        let symbol = |name: &CStr| {
            // SAFETY: an open library and a name that ends with a zero.
            let found = unsafe { libc::dlsym(library, name.as_ptr()) };
            if found.is_null() {
                Err(format!("libnccl.so.2 has no {}: install a newer one", name.to_string_lossy()))
            } else {
                Ok(found)
            }
        };
        macro_rules! function {
            ($name:literal, $type:ty) => {
                // SAFETY: nccl.h declares the function so.
                unsafe { std::mem::transmute::<*mut c_void, $type>(symbol($name)?) }
            };
        }
        let get_version = function!(c"ncclGetVersion", GetVersion);
        let mut version = 0;
        // SAFETY: room for the answer.
        unsafe { get_version(&raw mut version) };
        if version < OLDEST {
            return Err(format!(
                "libnccl.so.2 is version {version}, at least {OLDEST} (2.18) is needed: update it"
            ));
        }
        Ok(Self {
            get_unique_id: function!(c"ncclGetUniqueId", GetUniqueId),
            comm_init_rank: function!(c"ncclCommInitRank", CommInitRank),
            comm_abort: function!(c"ncclCommAbort", CommAbort),
            comm_get_async_error: function!(c"ncclCommGetAsyncError", CommGetAsyncError),
            all_reduce: function!(c"ncclAllReduce", AllReduce),
            all_gather: function!(c"ncclAllGather", AllGather),
            get_error_string: function!(c"ncclGetErrorString", GetErrorString),
        })
    }

    pub(crate) fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: room for the answer.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    /// Waits for all ranks. The device's context is current.
    pub(crate) fn init_rank(&self, world_size: usize, id: UniqueId, rank: usize) -> Result<Comm> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: room for the answer, and an id that rank 0 made.
        let answer = unsafe { (self.comm_init_rank)(&raw mut comm, world_size as c_int, id, rank as c_int) };
        self.check("ncclCommInitRank", answer)?;
        Ok(comm)
    }

    /// Ends whatever the communicator does, and the communicator.
    ///
    /// # Safety
    /// It was made by [`Nccl::init_rank`] and is not used afterwards.
    pub(crate) unsafe fn abort(&self, comm: Comm) {
        // SAFETY: the caller's promise. An error changes nothing: the communicator is given up.
        unsafe { (self.comm_abort)(comm) };
    }

    /// What has gone wrong on the device or with a peer.
    ///
    /// # Safety
    /// The communicator was made by [`Nccl::init_rank`] and not aborted.
    pub(crate) unsafe fn async_error(&self, comm: Comm) -> Result<()> {
        let mut error = SUCCESS;
        // SAFETY: the caller's promise; room for the answer.
        self.check("ncclCommGetAsyncError", unsafe { (self.comm_get_async_error)(comm, &raw mut error) })?;
        if error == IN_PROGRESS { Ok(()) } else { self.check("a collective", error) }
    }

    /// Queues the sum over all ranks of `count` elements, in place.
    ///
    /// # Safety
    /// As [`Nccl::async_error`]; `data` is device memory of so many elements, which nobody touches before the stream has done it.
    pub(crate) unsafe fn all_reduce_sum(
        &self,
        data: u64,
        count: usize,
        dtype: DType,
        comm: Comm,
        stream: CUstream,
    ) -> Result<()> {
        let data = data as *mut c_void;
        // SAFETY: the caller's promise.
        let answer = unsafe { (self.all_reduce)(data, data, count, code(dtype)?, SUM, comm, stream) };
        self.check("ncclAllReduce", answer)
    }

    /// Queues the gathering of all ranks' `count` elements, in order of rank.
    ///
    /// # Safety
    /// As [`Nccl::all_reduce_sum`]; `out` has room for all ranks' elements.
    pub(crate) unsafe fn all_gather(
        &self,
        data: u64,
        out: u64,
        count: usize,
        dtype: DType,
        comm: Comm,
        stream: CUstream,
    ) -> Result<()> {
        let (data, out) = (data as *const c_void, out as *mut c_void);
        // SAFETY: the caller's promise.
        let answer = unsafe { (self.all_gather)(data, out, count, code(dtype)?, comm, stream) };
        self.check("ncclAllGather", answer)
    }

    fn check(&self, call: &str, answer: c_int) -> Result<()> {
        if answer == SUCCESS {
            return Ok(());
        }
        // SAFETY: a static text for each code.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(answer)) };
        let text = text.to_string_lossy();
        Err(Error::Collective(format!("{call}: {text} (NCCL_DEBUG=INFO says more)")))
    }
}

/// ncclDataType_t.
fn code(dtype: DType) -> Result<c_int> {
    Ok(match dtype {
        DType::F16 => 6,
        DType::F32 => 7,
        DType::BF16 => 9,
        _ => return Err(Error::DType { op: "collective", dtype, supported: "f32, f16, bf16" }),
    })
}
