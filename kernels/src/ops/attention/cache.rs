//! Paged memory for keys and values, and writing to it.

use std::ops::Range;

use half::{bf16, f16};

use super::super::operands::{
    matrix, on_cuda, require, require_f32_matrix, require_float, u32_vector, unsupported_float,
};
use crate::simd::{Float, Kernel, LANES, Simd, spans};
use crate::{Context, DType, Error, Place, Result, Tensor, View};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// Keys and values of one layer; one block of one head is contiguous.
///
/// On the CPU: f32, f16 or bf16. Keys are `[num_blocks, kv_heads, head_dim, block_size]`: sixteen positions of one element
/// lie side by side, so that scores of sixteen positions are one vector and no sum over lanes is needed. Values are
/// `[num_blocks, kv_heads, block_size, head_dim]`.
///
/// On a GPU: f8 (e4m3) too, blocks of 32 tokens, and keys are laid out as values are.
pub struct KvLayer {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
    pub(super) kv_heads: usize,
    pub(super) block_size: usize,
    pub(super) head_dim: usize,
}

impl KvLayer {
    /// Tokens in a block on a GPU, whose kernels are compiled for it.
    pub const DEVICE_BLOCK_SIZE: usize = 32;

    /// Zeroed, where the context computes; on the CPU the system gives pages when they are first written.
    ///
    /// # Errors
    /// An element type or a block size for which there is no code, or a device without so much memory.
    ///
    /// # Panics
    /// Where a block would be empty.
    pub fn new(
        context: &Context,
        num_blocks: usize,
        kv_heads: usize,
        block_size: usize,
        head_dim: usize,
        dtype: DType,
    ) -> Result<Self> {
        const OP: &str = "kv_layer";
        assert!(kv_heads > 0 && block_size > 0 && head_dim > 0, "empty blocks");
        let by_position = (num_blocks * kv_heads * block_size, head_dim);
        let keys_shape = match context.place() {
            Place::Host => {
                require_float(OP, dtype)?;
                (num_blocks * kv_heads * head_dim, block_size)
            }
            Place::Device => {
                require_storable(OP, dtype)?;
                require(OP, block_size == Self::DEVICE_BLOCK_SIZE, || {
                    format!(
                        "a block of {block_size} tokens, expected {} on a GPU: set the block size to it",
                        Self::DEVICE_BLOCK_SIZE
                    )
                })?;
                by_position
            }
        };
        let zeros = |(rows, cols): (usize, usize)| context.zeros(rows, cols, dtype);
        Ok(Self { keys: zeros(keys_shape)?, values: zeros(by_position)?, kv_heads, block_size, head_dim })
    }
    /// Bytes of keys and values.
    pub fn size_in_bytes(&self) -> usize {
        self.keys.size_in_bytes() + self.values.size_in_bytes()
    }
    /// Tokens in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.keys.dtype()
    }
    /// Keys and values as they lie, for tests; f8 as the bytes that it is.
    #[doc(hidden)]
    pub fn pages(&self) -> [View<'_>; 2] {
        [self.keys.view(), self.values.view()].map(|view| match view.dtype() {
            DType::F8E4M3 => View { dtype: DType::U8, ..view },
            _ => view,
        })
    }
    pub(super) fn num_blocks(&self) -> usize {
        self.values.rows() / (self.kv_heads * self.block_size)
    }
}

/// Refuses element types that keys and values on a GPU do not have.
fn require_storable(op: &'static str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 => Ok(()),
        _ => Err(Error::DType { op, dtype, supported: "f32, f16, bf16, f8 (e4m3)" }),
    }
}

/// Writes keys and values of a flat batch to the cache, rounded to nearest. `keys`, `values`: f32
/// `[rows, kv_heads * head_dim]`, on a GPU also both f16 or both bf16; `slots`: u32 `[1, rows]`, block id * block size + place
/// in the block, each at most once (a GPU, which is not waited for, does not write rows with a slot that the cache lacks).
pub fn write_kv(
    context: &Context,
    keys: View<'_>,
    values: View<'_>,
    slots: View<'_>,
    cache: &mut KvLayer,
) -> Result<()> {
    const OP: &str = "write_kv";
    on_cuda!(context, |device| cuda::write_kv(device, keys, values, slots, cache));
    let slots = u32_vector(OP, "slots", slots, slots.cols())?;
    let shape = (slots.len(), cache.kv_heads * cache.head_dim);
    require_f32_matrix(OP, "keys", matrix(keys), shape)?;
    require_f32_matrix(OP, "values", matrix(values), shape)?;
    require_float(OP, cache.keys.dtype())?;
    let num_slots = cache.num_blocks() * cache.block_size;
    require(OP, slots.iter().all(|&slot| (slot as usize) < num_slots), || {
        format!("a slot is beyond the {num_slots} of the cache: {slots:?}")
    })?;
    match cache.keys.dtype() {
        DType::F32 => write::<f32>(context, keys, values, slots, cache),
        DType::F16 => write::<f16>(context, keys, values, slots, cache),
        DType::BF16 => write::<bf16>(context, keys, values, slots, cache),
        dtype => return Err(unsupported_float(OP, dtype)),
    }
    Ok(())
}

/// An element of a key on a line of its own, for which memory is waited, takes as long as so many that are copied.
const SCATTERED: usize = 80;

fn write<T: Float>(context: &Context, keys: View<'_>, values: View<'_>, slots: &[u32], cache: &mut KvLayer) {
    let KvLayer { kv_heads, block_size, head_dim, .. } = *cache;
    let target = Target {
        keys: cache.keys.as_mut_slice::<T>().as_mut_ptr(),
        values: cache.values.as_mut_slice::<T>().as_mut_ptr(),
        kv_heads,
        block_size,
        head_dim,
    };
    let target = &target;
    // Rows that lie side by side in a block are written as vectors.
    let rows_per_task = if slots.len() > LANES { LANES } else { 1 };
    let chunks = slots.len().div_ceil(rows_per_task);
    context.for_rows(chunks * kv_heads, SCATTERED * rows_per_task * head_dim, |task| {
        let (chunk, head) = (task / kv_heads, task % kv_heads);
        let columns =
            |view: View<'_>| -> *const f32 { view.narrow_cols(head * head_dim, head_dim).ptr.cast() };
        context.level().run(WriteHead {
            target,
            head,
            keys: columns(keys),
            key_stride: keys.row_stride,
            values: columns(values),
            value_stride: values.row_stride,
            slots,
            rows: chunk * rows_per_task..slots.len().min((chunk + 1) * rows_per_task),
        });
    });
}

/// A cache that tasks write to, each to the slots of some rows.
struct Target<T> {
    keys: *mut T,
    values: *mut T,
    kv_heads: usize,
    block_size: usize,
    head_dim: usize,
}

// SAFETY: the cache is borrowed exclusively while tasks run, and each writes the slots of its rows in one head's part of it.
unsafe impl<T: Send> Sync for Target<T> {}

/// One head of some rows. Slots have been checked.
struct WriteHead<'a, T> {
    target: &'a Target<T>,
    head: usize,
    keys: *const f32,
    key_stride: usize,
    values: *const f32,
    value_stride: usize,
    slots: &'a [u32],
    rows: Range<usize>,
}

impl<T> WriteHead<'_, T> {
    /// Of a row's slot, the first element of its block and head, and its place in the block.
    #[inline(always)]
    fn first_and_place(&self, row: usize) -> (usize, usize) {
        let Target { kv_heads, block_size, head_dim, .. } = *self.target;
        let slot = self.slots[row] as usize;
        ((slot / block_size * kv_heads + self.head) * block_size * head_dim, slot % block_size)
    }

    /// How many rows from this on, up to a vector's lanes, lie side by side in a block.
    #[inline(always)]
    fn side_by_side(&self, row: usize) -> usize {
        let left = self.target.block_size - self.slots[row] as usize % self.target.block_size;
        let rows = &self.slots[row..self.rows.end.min(row + left.min(LANES))];
        rows.iter().zip(self.slots[row]..).take_while(|(slot, next)| *slot == next).count()
    }
}

impl<T: Float> Kernel for WriteHead<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Target { block_size, head_dim, .. } = *self.target;
        let line_len = 64 / size_of::<T>();
        // The lines of a key are far apart and many: all are asked for before the first is waited for.
        let mut row = self.rows.start;
        while row < self.rows.end {
            let (first, place) = self.first_and_place(row);
            let key = self.target.keys.wrapping_add(first + place);
            for at in (0..head_dim * block_size).step_by(block_size.max(line_len)) {
                simd.prefetch_to_write(key.wrapping_add(at).cast());
            }
            row += self.side_by_side(row);
        }
        let mut row = self.rows.start;
        while row < self.rows.end {
            let num_rows = self.side_by_side(row);
            let (first, place) = self.first_and_place(row);
            for (start, len) in spans(head_dim) {
                // SAFETY: the slots are in the cache and side by side in one block, a span lies within a head, and no other task
                // writes to these slots of this head.
                unsafe {
                    let mut keys = [simd.splat(0.0); LANES];
                    for (i, keys) in keys.iter_mut().enumerate().take(num_rows) {
                        let row = row + i;
                        let value =
                            f32::load_part(simd, self.values.add(row * self.value_stride + start), len);
                        let to = self.target.values.add(first + (place + i) * head_dim + start);
                        T::store_part(simd, to, len, value);
                        *keys = f32::load_part(simd, self.keys.add(row * self.key_stride + start), len);
                    }
                    let to = self.target.keys.add(first + start * block_size + place);
                    if num_rows == 1 {
                        let mut rounded = [T::ZERO; LANES];
                        T::store(simd, rounded.as_mut_ptr(), keys[0]);
                        for (i, &element) in rounded[..len].iter().enumerate() {
                            to.add(i * block_size).write(element);
                        }
                    } else {
                        for (i, rows) in simd.transpose(keys).into_iter().enumerate().take(len) {
                            T::store_part(simd, to.add(i * block_size), num_rows, rows);
                        }
                    }
                }
            }
            row += num_rows;
        }
    }
}
