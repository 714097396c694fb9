//! What a step has chosen, on its way back.

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::ops::operands::{require, require_dtype, require_place};
use crate::{Context, DType, Place, Result, View};

/// Room for one array that operations have made. From a GPU it is copied to pinned memory when they are done, while others are
/// queued behind them; on the CPU at once.
pub struct Readback {
    max_elements: usize,
    /// Of the array that was asked for last.
    len: usize,
    on_host: Vec<u32>,
    #[cfg(feature = "cuda")]
    buffer: Option<cuda::ReadbackBuffer>,
}

impl Readback {
    /// `max_elements`: the most that will be asked for at once.
    pub fn new(context: &Context, max_elements: usize) -> Result<Self> {
        Ok(Self {
            max_elements,
            len: 0,
            on_host: match context.place() {
                Place::Host => vec![0; max_elements],
                Place::Device => Vec::new(),
            },
            #[cfg(feature = "cuda")]
            buffer: context
                .device()
                .map(|device| cuda::ReadbackBuffer::new(device.stream(), max_elements))
                .transpose()?,
        })
    }

    /// Asks for a u32 `[1, len]` as it will be when the operations queued so far are done. What was asked for before is
    /// waited for, and lost.
    pub fn start(&mut self, context: &Context, from: View<'_>) -> Result<()> {
        const OP: &str = "readback";
        require_dtype(OP, from.dtype(), DType::U32)?;
        require_place(OP, "the array", from.place(), context.place())?;
        require(OP, from.rows() == 1 && from.cols() <= self.max_elements, || {
            format!("[{}, {}], made for at most [1, {}]", from.rows(), from.cols(), self.max_elements)
        })?;
        #[cfg(feature = "cuda")]
        if let Some(buffer) = &mut self.buffer {
            // Where this fails, nothing was asked for.
            self.len = 0;
            buffer.start(from)?;
            self.len = from.cols();
            return Ok(());
        }
        self.len = from.cols();
        self.on_host[..self.len].copy_from_slice(from.into_slice());
        Ok(())
    }

    /// Whether [`Readback::wait`] returns at once.
    pub fn is_done(&self) -> Result<bool> {
        #[cfg(feature = "cuda")]
        if let Some(buffer) = &self.buffer {
            return buffer.is_done();
        }
        Ok(true)
    }

    /// The array that was asked for last, when it is there; an error if an operation before it went wrong.
    pub fn wait(&mut self) -> Result<&[u32]> {
        #[cfg(feature = "cuda")]
        if let Some(buffer) = &mut self.buffer {
            return buffer.wait(self.len);
        }
        Ok(&self.on_host[..self.len])
    }
}
