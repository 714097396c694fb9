//! Paged memory for keys and values, and writing to it.

use half::{bf16, f16};

use super::super::operands::{
    matrix, require, require_f32_matrix, require_float, u32_vector, unsupported_float,
};
use crate::simd::{Float, Kernel, LANES, Simd, spans};
use crate::{Context, DType, Result, Tensor, View};

/// Keys and values of one layer in f32, f16 or bf16; one block of one head is contiguous.
///
/// Keys are `[num_blocks, kv_heads, head_dim, block_size]`: sixteen positions of one element lie side by side, so that
/// scores of sixteen positions are one vector and no sum over lanes is needed. Values are `[num_blocks, kv_heads,
/// block_size, head_dim]`.
pub struct KvLayer {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
    pub(super) kv_heads: usize,
    pub(super) block_size: usize,
    pub(super) head_dim: usize,
}

impl KvLayer {
    /// Zeroed; the system gives pages when they are first written.
    ///
    /// # Panics
    /// Where a block would be empty.
    pub fn new(num_blocks: usize, kv_heads: usize, block_size: usize, head_dim: usize, dtype: DType) -> Self {
        assert!(kv_heads > 0 && block_size > 0 && head_dim > 0, "empty blocks");
        let zeros = |rows, cols| Tensor::zeros(num_blocks * kv_heads * rows, cols, dtype);
        let (keys, values) = (zeros(head_dim, block_size), zeros(block_size, head_dim));
        Self { keys, values, kv_heads, block_size, head_dim }
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
    pub(super) fn num_blocks(&self) -> usize {
        self.values.rows() / (self.kv_heads * self.block_size)
    }
}

/// Writes keys and values of a flat batch to the cache, rounded to nearest. `keys`, `values`: f32
/// `[rows, kv_heads * head_dim]`; `slots`: u32 `[1, rows]`, block id * block size + place in the block, each at most once.
pub fn write_kv(
    context: &Context,
    keys: View<'_>,
    values: View<'_>,
    slots: View<'_>,
    cache: &mut KvLayer,
) -> Result<()> {
    const OP: &str = "write_kv";
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
    // Scattered keys weigh more than a copy.
    context.for_rows(kv_heads, 8 * slots.len() * head_dim, |head| {
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
        });
    });
}

/// A cache that tasks write to, each to the places of one head.
struct Target<T> {
    keys: *mut T,
    values: *mut T,
    kv_heads: usize,
    block_size: usize,
    head_dim: usize,
}

// SAFETY: the cache is borrowed exclusively while tasks run, and each writes to one head's part of it.
unsafe impl<T: Send> Sync for Target<T> {}

/// One head of all rows. Slots have been checked.
struct WriteHead<'a, T> {
    target: &'a Target<T>,
    head: usize,
    keys: *const f32,
    key_stride: usize,
    values: *const f32,
    value_stride: usize,
    slots: &'a [u32],
}

impl<T: Float> Kernel for WriteHead<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Target { kv_heads, block_size, head_dim, .. } = *self.target;
        for (row, &slot) in self.slots.iter().enumerate() {
            let (block, place) = (slot as usize / block_size, slot as usize % block_size);
            let first = (block * kv_heads + self.head) * block_size * head_dim;
            for (start, len) in spans(head_dim) {
                // SAFETY: the slot is in the cache, a span lies within a head, and no other task writes to this head.
                unsafe {
                    let value = f32::load_part(simd, self.values.add(row * self.value_stride + start), len);
                    let to = self.target.values.add(first + place * head_dim + start);
                    T::store_part(simd, to, len, value);

                    let key = f32::load_part(simd, self.keys.add(row * self.key_stride + start), len);
                    let mut rounded = [T::ZERO; LANES];
                    T::store(simd, rounded.as_mut_ptr(), key);
                    let to = self.target.keys.add(first + start * block_size + place);
                    for (i, &element) in rounded[..len].iter().enumerate() {
                        to.add(i * block_size).write(element);
                    }
                }
            }
        }
    }
}
