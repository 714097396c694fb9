//! Recorded work.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::error::check;
use super::stream::Stream;
use crate::{Error, Result};

/// Work that was recorded from the stream, ready to be launched on it.
pub(crate) struct Graph {
    stream: Arc<Stream>,
    executable: sys::CUgraphExec,
    num_launches: u64,
}

// SAFETY: as of `Stream`; it is launched by one thread at a time, on one stream.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    pub(crate) fn capture<E: From<Error>>(
        stream: &Arc<Stream>,
        step: impl FnOnce() -> Result<(), E>,
    ) -> Result<Self, E> {
        stream.bind()?;
        // What other threads do meanwhile is not recorded, and need not be refused.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours and not being captured.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) })?;
        let before = stream.num_launches();
        let recorded = step();
        let num_launches = stream.num_launches() - before;
        let mut graph = Recorded(null_mut());
        // SAFETY: begun above. Also after an error, so that the stream is usable again.
        let ended =
            check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream.raw(), &raw mut graph.0) });
        recorded?;
        ended?;
        let mut executable = null_mut();
        // SAFETY: the graph was made above; the executable is destroyed when `self` is dropped.
        check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&raw mut executable, graph.0, 0)
        })?;
        Ok(Self { stream: Arc::clone(stream), executable, num_launches })
    }

    pub(crate) fn num_launches(&self) -> usize {
        self.num_launches as usize
    }

    pub(crate) fn launch(&self) -> Result<()> {
        self.stream.bind()?;
        // SAFETY: both are ours. The memory that the graph uses is its caller's to keep, as that of any queued work.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, self.stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // It may be running.
        if self.stream.synchronize().is_ok() {
            // SAFETY: instantiated in `capture`.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

/// Not needed any more when it has been instantiated.
struct Recorded(sys::CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the graph was given to us by the end of the capture.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}
