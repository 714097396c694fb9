//! The index arrays of a step, on their way to where operations expect them.

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{Context, Error, Place, Result, View};

/// Room for the index arrays of a step. On a GPU they travel together in one copy from pinned memory; on the CPU
/// operations read them where they are.
pub struct Staging {
    place: Place,
    max_elements: usize,
    #[cfg(feature = "cuda")]
    buffers: Option<cuda::StagingBuffers>,
}

/// What an array begins at, in elements: kernels load 16 bytes at once.
const ALIGNMENT: usize = 4;

impl Staging {
    /// `lens`: the most elements of each array that will be sent.
    pub fn new(context: &Context, lens: &[usize]) -> Result<Self> {
        let max_elements = lens.iter().map(|len| len.next_multiple_of(ALIGNMENT)).sum();
        Ok(Self {
            place: context.place(),
            max_elements,
            #[cfg(feature = "cuda")]
            buffers: context
                .device()
                .map(|device| cuda::StagingBuffers::new(device.stream(), max_elements))
                .transpose()?,
        })
    }

    /// Each array as u32 `[1, len]` where the context's operations expect it. An array's address is a matter of the lengths
    /// of the arrays before it, so arrays of the same lengths lie where they lay the last time.
    ///
    /// What was sent before may be overwritten when operations queued so far have read it.
    ///
    /// # Panics
    /// Where the context computes elsewhere than the one it was made for.
    pub fn send<'a, const N: usize>(
        &'a mut self,
        context: &Context,
        arrays: [&'a [u32]; N],
    ) -> Result<[View<'a>; N]> {
        assert_eq!(context.place(), self.place, "staging of another context");
        let elements: usize = arrays.iter().map(|array| array.len().next_multiple_of(ALIGNMENT)).sum();
        if elements > self.max_elements {
            let message = format!("{elements} elements, made for at most {}", self.max_elements);
            return Err(Error::Shape { op: "staging", message });
        }
        let on_host = arrays.map(|array| View::from_slice(array, 1, array.len()));
        #[cfg(feature = "cuda")]
        if let Some(buffers) = &mut self.buffers {
            let mut start = 0;
            buffers.send(arrays.map(|array| {
                let at = start;
                start += array.len().next_multiple_of(ALIGNMENT);
                (at, array)
            }))?;
            start = 0;
            return Ok(on_host.map(|view| {
                let at = start;
                start += view.cols().next_multiple_of(ALIGNMENT);
                buffers.view(at, view.cols())
            }));
        }
        Ok(on_host)
    }
}
