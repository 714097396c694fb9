//! Launches of `cuda/lora.cu`.

use super::{AdapterRows, Lora, LowRank, OP};
use crate::cuda::{Argument, Device, Grid, Kernels};
use crate::ops::operands::{matrix, matrix_mut, require_device_u32s, require_on_device};
use crate::{Context, DType, Error, Result, Tensor, View, ViewMut};

/// Up to this many rows each is computed by itself: of more, a tile of tensor cores reads the factors once for 16.
const MOST_SINGLE_ROWS: usize = 32;

// As in the kernels.
const SHRINK_THREADS: usize = 128;
const EXPAND_THREADS: usize = 256;
const TILE: usize = 16;
const TILE_THREADS: usize = 256;
const TILE_OUTPUTS: usize = 256;

/// What the device knows of adapters.
#[derive(Debug)]
pub(super) struct Table {
    /// `Change` of the kernels: u32 `[num_adapters * num_parts, WORDS]`.
    changes: Tensor,
    /// Of all factors.
    dtype: DType,
    /// Whether all factors begin where the tiles' loads may.
    fits_tiles: bool,
}

/// Of `Change`.
const WORDS: usize = 8;

impl Table {
    /// None where no adapter changes anything.
    pub(super) fn new(context: &Context, adapters: &[Vec<Option<LowRank>>]) -> Result<Option<Self>> {
        let mut parts = adapters.iter().flatten().flatten();
        let Some(first) = parts.next() else { return Ok(None) };
        let dtype = first.a.dtype();
        for factor in adapters.iter().flatten().flatten().flat_map(|part| [&part.a, &part.b]) {
            if factor.dtype() != dtype {
                let supported = "on a GPU, one for all factors";
                return Err(Error::DType { op: OP, dtype: factor.dtype(), supported });
            }
        }
        let mut words = Vec::new();
        for part in adapters.iter().flatten() {
            words.extend(part.as_ref().map_or([0; WORDS], change));
        }
        let changes = context.upload(&Tensor::from_slice(&words, words.len() / WORDS, WORDS))?;
        let fits_tiles = dtype != DType::F32 && adapters.iter().flatten().flatten().all(fits_tiles);
        Ok(Some(Self { changes, dtype, fits_tiles }))
    }
}

fn change(part: &LowRank) -> [u32; WORDS] {
    let (a, b) = (part.a.view(), part.b.view());
    let halves = |view: View<'_>| {
        let address = view.ptr.addr() as u64;
        [address as u32, (address >> 32) as u32]
    };
    let ([a_low, a_high], [b_low, b_high]) = (halves(a), halves(b));
    let (a_stride, b_stride) = (a.row_stride as u32, b.row_stride as u32);
    [a_low, a_high, b_low, b_high, part.rank() as u32, a_stride, b_stride, part.scale.to_bits()]
}

/// Rows of `a` are loaded 16 bytes at a time, those of `b` 4.
fn fits_tiles(part: &LowRank) -> bool {
    let (a, b) = (part.a.view(), part.b.view());
    is_packed(a)
        && part.rank().is_multiple_of(2)
        && b.row_stride.is_multiple_of(2)
        && b.ptr.addr().is_multiple_of(4)
}

/// Of 16-bit elements.
fn is_packed(view: View<'_>) -> bool {
    view.ptr.addr().is_multiple_of(16) && view.row_stride.is_multiple_of(8) && view.cols().is_multiple_of(8)
}

/// The shapes have been checked.
pub(super) fn add(
    device: &Device,
    x: View<'_>,
    lora: &Lora,
    rows: AdapterRows<'_>,
    hidden: &ViewMut<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    let num_rows = x.rows();
    require_device_u32s(OP, "slots", rows.slots, num_rows)?;
    require_on_device(OP, "hidden", matrix_mut(hidden), DType::F32, (num_rows, hidden.cols()))?;
    let Some(table) = lora.on_device.as_ref().filter(|_| rows.any && num_rows > 0) else { return Ok(()) };
    require_on_device(OP, "x", matrix(x), table.dtype, (num_rows, lora.k))?;
    let out_dtype = if out.dtype() == DType::F32 { DType::F32 } else { table.dtype };
    require_on_device(OP, "out", matrix_mut(out), out_dtype, (num_rows, out.cols()))?;
    let parts = lora.outputs.len();
    let batch: [Argument; 7] = [
        rows.slots.into(),
        table.changes.view().into(),
        (lora.adapters.len() as u32).into(),
        (parts as u32).into(),
        (lora.rank as u32).into(),
        hidden.as_view().into(),
        (hidden.row_stride as u32).into(),
    ];
    let output = |part: usize| Argument::from(lora.outputs.get(part).copied().unwrap_or(0) as u32);
    let outputs = [output(0), output(1), output(2), out.as_view().into(), (out.row_stride as u32).into()];
    let x_arguments = [x.into(), (x.row_stride as u32).into()];
    let (num_rows_argument, k) = (Argument::from(num_rows as u32), Argument::from(lora.k as u32));
    let is_many = num_rows > MOST_SINGLE_ROWS && device.kernels() == Kernels::Tuned;
    let is_tiled = is_many && table.fits_tiles && is_packed(x);
    let (shrink, expand) = if is_tiled {
        let tiles = num_rows.div_ceil(TILE);
        let output_tiles = lora.outputs.iter().map(|n| n.div_ceil(TILE_OUTPUTS)).sum();
        (
            Launch {
                op: "lora_shrink_tile",
                blocks: [tiles, parts * lora.rank / TILE],
                threads: TILE_THREADS,
                arguments: [&x_arguments[..], &[num_rows_argument, k], &batch].concat(),
            },
            Launch {
                op: "lora_expand_tile",
                blocks: [tiles, output_tiles],
                threads: TILE_THREADS,
                arguments: [&[num_rows_argument][..], &batch, &outputs].concat(),
            },
        )
    } else {
        (
            Launch {
                op: "lora_shrink",
                blocks: [num_rows, parts * lora.rank],
                threads: SHRINK_THREADS,
                arguments: [&x_arguments[..], &[k], &batch].concat(),
            },
            Launch {
                op: "lora_expand",
                blocks: [num_rows, out.cols().div_ceil(EXPAND_THREADS)],
                threads: EXPAND_THREADS,
                arguments: [&batch[..], &outputs].concat(),
            },
        )
    };
    shrink.queue(device, &[table.dtype])?;
    expand.queue(device, &[table.dtype, out_dtype])
}

struct Launch {
    op: &'static str,
    blocks: [usize; 2],
    threads: usize,
    /// Those of the kernel's parameters.
    arguments: Vec<Argument>,
}

impl Launch {
    fn queue(&self, device: &Device, dtypes: &[DType]) -> Result<()> {
        let [x, y] = self.blocks.map(|blocks| blocks as u32);
        let grid = Grid { blocks: [x, y, 1], threads: self.threads as u32, shared_bytes: 0 };
        let kernel = device.kernel(self.op, dtypes)?;
        // SAFETY: the parameters of `cuda/lora.cu`; shapes, places and types have been checked, addresses and sizes in the
        // table are those of tensors that the `Lora` holds.
        unsafe { kernel.launch(device, grid, &self.arguments) }
    }
}
