//! The driver's answers as errors.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

use crate::{Error, Result};

/// An error unless the call succeeded.
pub(crate) fn check(call: &'static str, answer: CUresult) -> Result<()> {
    match answer {
        CUresult::CUDA_SUCCESS => Ok(()),
        // Not only where memory is asked for: code is loaded when it is first used, and takes some.
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Err(Error::OutOfMemory(format!("{call}: there is no memory left")))
        }
        answer => Err(Error::Cuda { call, message: describe(answer) }),
    }
}

/// Name and sentence, as the driver words them.
pub(crate) fn describe(answer: CUresult) -> String {
    // SAFETY: both take the place of a pointer; the texts are the driver's own, and stay.
    let text = |ask: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| unsafe {
        let mut text = std::ptr::null();
        let known = ask(answer, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
        known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("CUDA error {}", answer as i32));
    match text(sys::cuGetErrorString) {
        Some(sentence) => format!("{name}: {sentence}"),
        None => name,
    }
}
