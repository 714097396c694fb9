//! No operation reads or writes beyond its operands or its working memory, whatever it is made of: each lies beside a page that
//! may not be touched, so who goes there is stopped by the system, which names the case. Blocks of a cache that no sequence has
//! may not be touched either.
//!
//! Results are compared with those of operands that lie anywhere. Where rows have gaps, NaN is in them.
#![expect(unsafe_code, reason = "memory that may not be touched is made here")]

#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "what other tests need")]
mod common;
mod memory;

use common::{FLOATS, assert_same_bits, levels, rng, tensor, uniform};
use half::{bf16, f16};
use kernels::ops::activation::Activation;
use kernels::ops::attention::{paged_attention, write_kv};
use kernels::ops::linear::{GatedLinear, Int8Weight, LinearPart, Weight, linear_add, linear_gated};
use kernels::{AttentionBatch, AttentionParams, Context, DType, KvLayer, Tensor, View, ViewMut};
use memory::{Allocator, Fence, Guarded, PAGE, Side, can_be_read, case, mapped};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

#[test]
fn what_lies_beside_an_operand_cannot_be_reached() {
    for side in Side::BOTH {
        let values = Guarded::new(&[1.0_f32; 5], side);
        let weight = mapped(&[bf16::ONE; 7], 1, 7, side);
        let bytes =
            [(values.as_slice().as_ptr().cast::<u8>(), 20), (weight.as_slice::<bf16>().as_ptr().cast(), 14)];
        for (first, len) in bytes {
            assert!(can_be_read(first) && can_be_read(first.wrapping_add(len - 1)));
            assert_eq!(can_be_read(first.wrapping_sub(1)), side == Side::Behind);
            assert_eq!(can_be_read(first.wrapping_add(len)), side == Side::Before);
        }
    }
    let tensor = Tensor::zeros(4, PAGE, DType::U8);
    let bytes = tensor.as_slice::<u8>();
    let fence = Fence::around(bytes, std::slice::from_ref(&(PAGE..PAGE + 1)));
    let readable = [0, 1, 2, 3].map(|page| can_be_read(&raw const bytes[page * PAGE]));
    drop(fence);
    assert_eq!(readable, [false, true, false, false]);
    assert!(can_be_read(&raw const bytes[0]));
}

/// A weight whose rows have `gap` elements between them, at the side of a guard.
fn placed(weight: &Tensor, gap: usize, side: Side) -> Tensor {
    fn of<T: kernels::Element>(weight: &Tensor, gap: usize, side: Side, rubbish: T) -> Tensor {
        let (rows, cols) = (weight.rows(), weight.cols() + gap);
        let first = if side == Side::Behind { gap } else { 0 };
        let mut values = vec![rubbish; rows * cols];
        for row in 0..rows {
            values[row * cols + first..][..weight.cols()].copy_from_slice(weight.view().row::<T>(row));
        }
        mapped(&values, rows, cols, side).narrow_cols(first, weight.cols())
    }
    match weight.dtype() {
        DType::F32 => of(weight, gap, side, f32::NAN),
        DType::F16 => of(weight, gap, side, f16::NAN),
        DType::BF16 => of(weight, gap, side, bf16::NAN),
        _ => of(weight, gap, side, 0x7f_u8),
    }
}

/// An owned weight.
enum Owned {
    Dense(Tensor),
    Int8(Int8Weight),
}

impl Owned {
    fn all(n: usize, k: usize) -> Vec<Self> {
        let mut rng = rng((n * 1000 + k) as u64);
        let dense = tensor(&mut rng, n, k, DType::F32);
        let int8 = Int8Weight::quantize(&Context::cpu(1), &dense).expect("finite");
        let all = FLOATS.map(|dtype| Self::Dense(dense.to_dtype(dtype).expect("a float type")));
        all.into_iter().chain([Self::Int8(int8)]).collect()
    }

    fn placed(&self, gap: usize, side: Side) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(placed(weight, gap, side)),
            Self::Int8(weight) => Self::Int8(
                Int8Weight::new(placed(weight.values(), gap, side), placed(weight.scales(), 0, side))
                    .expect("shapes fit"),
            ),
        }
    }

    fn weight(&self) -> Weight<'_> {
        match self {
            Self::Dense(weight) => Weight::Dense(weight),
            Self::Int8(weight) => Weight::Int8(weight),
        }
    }
}

/// A matrix of f32 with gaps between its rows, in a slice at the side of a guard.
struct Matrix {
    memory: Guarded<f32>,
    rows: usize,
    cols: usize,
    gap: usize,
    first: usize,
}

impl Matrix {
    fn new(values: &[f32], cols: usize, gap: usize, side: Side) -> Self {
        let (rows, first) = (values.len() / cols, if side == Side::Behind { gap } else { 0 });
        let mut with_gaps = vec![f32::NAN; rows * (cols + gap)];
        for (to, from) in with_gaps.chunks_mut(cols + gap).zip(values.chunks(cols)) {
            to[first..][..cols].copy_from_slice(from);
        }
        Self { memory: Guarded::new(&with_gaps, side), rows, cols, gap, first }
    }

    fn view(&self) -> View<'_> {
        View::from_slice(self.memory.as_slice(), self.rows, self.cols + self.gap)
            .narrow_cols(self.first, self.cols)
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        let Self { rows, cols, gap, first, .. } = *self;
        ViewMut::from_slice(self.memory.as_mut_slice(), rows, cols + gap).narrow_cols(first, cols)
    }

    /// Fails unless these are the values, and the gaps what they were.
    fn check(&self, want: &[f32], name: &str) {
        let rows = self.memory.as_slice().chunks(self.cols + self.gap);
        for (row, want) in rows.zip(want.chunks(self.cols)) {
            let (before, rest) = row.split_at(self.first);
            let (values, behind) = rest.split_at(self.cols);
            assert_same_bits(values, want, name);
            assert!(before.iter().chain(behind).all(|value| value.is_nan()), "{name} writes between rows");
        }
    }
}

#[test]
fn products_stay_within_their_operands_at_every_level() {
    // For all ways to compute them: a few rows in one to four tiles, squares of tiles, parts of k, panels, and ends of each.
    let rows = [1, 2, 3, 5, 7, 8, 16, 17, 33, 50, 66];
    let outputs_and_inputs =
        [(1, 1), (3, 31), (16, 32), (17, 33), (15, 64), (33, 95), (49, 260), (130, 40), (37, 1057)];
    let contexts = levels();
    for (n, k) in outputs_and_inputs {
        let weights = Owned::all(n, k);
        let mut rng = rng(k as u64);
        let (bias, x) = (tensor(&mut rng, 1, n, DType::F32), uniform(&mut rng, 66 * k));
        let before = uniform(&mut rng, 66 * n);
        for (side, gap) in Side::BOTH.into_iter().zip([0, 5]).chain(Side::BOTH.into_iter().zip([5, 0])) {
            let placed: Vec<Owned> = weights.iter().map(|weight| weight.placed(gap, side)).collect();
            let guarded_bias = self::placed(&bias, 0, side);
            for (weight, placed) in weights.iter().zip(&placed) {
                for context in &contexts {
                    for rows in rows.into_iter().filter(|rows| rows * n * k <= 66 * 49 * 260) {
                        let name = format!("{} rows, {}, {:?}", rows, context.device_name(), placed.weight());
                        let (x, before) = (&x[..rows * k], &before[..rows * n]);
                        let parts = |of, bias| [LinearPart { weight: of, bias: Some(bias) }];
                        let mut want = before.to_vec();
                        let view = View::from_slice(x, rows, k);
                        let to = ViewMut::from_slice(&mut want, rows, n);
                        linear_add(context, view, &parts(weight.weight(), &bias), to).expect("shapes fit");
                        case(&name, side, || {
                            let x = Matrix::new(x, k, gap, side);
                            let mut out = Matrix::new(before, n, gap, side);
                            let parts = parts(placed.weight(), &guarded_bias);
                            linear_add(context, x.view(), &parts, out.view_mut()).expect("shapes fit");
                            out.check(&want, &name);
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn gated_layers_stay_within_their_operands_at_every_level() {
    let contexts = levels();
    for (n, k) in [(1, 3), (17, 33), (35, 70)] {
        let weights = Owned::all(n, k);
        let x = uniform(&mut rng(3), 80 * k);
        for (side, weight) in
            Side::BOTH.into_iter().flat_map(|side| weights.iter().map(move |weight| (side, weight)))
        {
            let placed = weight.placed(0, side);
            for (context, rows) in
                contexts.iter().flat_map(|context| [1, 6, 20, 80].map(|rows| (context, rows)))
            {
                let name = format!("gated, {rows} rows, {}, {:?}", context.device_name(), placed.weight());
                let run = |weight, x: View<'_>, gate_up: ViewMut<'_>, out: ViewMut<'_>| {
                    let part = LinearPart { weight, bias: None };
                    let layer = GatedLinear { gate: part, up: part, activation: Activation::Silu };
                    linear_gated(context, x, layer, gate_up, out).expect("shapes fit");
                };
                let x = &x[..rows * k];
                let (mut gate_up, mut want) = (vec![0.0; 2 * rows * n], vec![0.0; rows * n]);
                let products = ViewMut::from_slice(&mut gate_up, rows, 2 * n);
                run(
                    weight.weight(),
                    View::from_slice(x, rows, k),
                    products,
                    ViewMut::from_slice(&mut want, rows, n),
                );
                case(&name, side, || {
                    let x = Matrix::new(x, k, 0, side);
                    let mut gate_up = Matrix::new(&vec![0.0; 2 * rows * n], 2 * n, 0, side);
                    let mut out = Matrix::new(&vec![0.0; rows * n], n, 3, side);
                    run(placed.weight(), x.view(), gate_up.view_mut(), out.view_mut());
                    out.check(&want, &name);
                });
            }
        }
    }
}

/// A cache of which sequences have every other block: with these shapes, a block's heads are whole pages, or a few blocks are
/// less than one.
struct Pages {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    block_size: usize,
}

const PAGES: [Pages; 8] = [
    // Of whole tiles in bf16.
    Pages { kv_heads: 2, group: 1, head_dim: 64, block_size: 32 },
    Pages { kv_heads: 1, group: 3, head_dim: 64, block_size: 32 },
    Pages { kv_heads: 2, group: 8, head_dim: 32, block_size: 32 },
    Pages { kv_heads: 1, group: 20, head_dim: 96, block_size: 64 },
    Pages { kv_heads: 1, group: 2, head_dim: 128, block_size: 32 },
    // And not.
    Pages { kv_heads: 1, group: 3, head_dim: 128, block_size: 16 },
    Pages { kv_heads: 8, group: 2, head_dim: 80, block_size: 16 },
    Pages { kv_heads: 2, group: 5, head_dim: 33, block_size: 61 },
];

const NUM_BLOCKS: usize = 15;

impl Pages {
    fn kv_cols(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn slots(&self, table: &[u32], len: usize) -> Vec<u32> {
        let size = self.block_size;
        (0..len).map(|p| table[p / size] * size as u32 + (p % size) as u32).collect()
    }

    /// Keys and values of a cache: no others than these blocks may be touched.
    fn fence(&self, cache: &KvLayer, blocks: &[u32]) -> [Fence; 2] {
        let block_bytes = self.kv_cols() * self.block_size * cache.dtype().size_in_bytes();
        let bytes = |&block: &u32| block as usize * block_bytes..(block as usize + 1) * block_bytes;
        let open: Vec<_> = blocks.iter().map(bytes).collect();
        cache.pages().map(|view| match view.dtype() {
            DType::F32 => Fence::around(view.into_slice::<f32>(), &open),
            DType::F16 => Fence::around(view.into_slice::<f16>(), &open),
            _ => Fence::around(view.into_slice::<bf16>(), &open),
        })
    }

    fn cache(&self, context: &Context, dtype: DType) -> KvLayer {
        KvLayer::new(context, NUM_BLOCKS, self.kv_heads, self.block_size, self.head_dim, dtype)
            .expect("a float type")
    }
}

#[test]
fn attention_stays_within_its_operands_and_the_blocks_of_its_sequences_at_every_level() {
    let contexts = levels();
    // Of two sequences, no block beside another; what is behind the last one's is rubbish.
    let tables = [[9_u32, 3, 5, 11], [1, 7, 13, u32::MAX]];
    let used = &tables.as_flattened()[..7];
    for (pages, dtype) in PAGES.iter().flat_map(|pages| FLOATS.map(|dtype| (pages, dtype))) {
        let (block, kv_cols) = (pages.block_size, pages.kv_cols());
        let heads = pages.kv_heads * pages.group;
        let cols = heads * pages.head_dim;
        let mut cache = pages.cache(&contexts[0], dtype);
        let mut rng = rng(5);
        let kv_lens = [4 * block - 1, 2 * block + 1];
        for (table, len) in tables.iter().zip(kv_lens) {
            let slots = pages.slots(table, len);
            let [keys, values] = [(); 2].map(|()| tensor(&mut rng, len, kv_cols, DType::F32));
            let slots = View::from_slice(&slots, 1, len);
            write_kv(&contexts[0], keys.view(), values.view(), slots, &mut cache).expect("shapes fit");
        }
        let lens = kv_lens.map(|len| len as u32);
        let slopes = uniform(&mut rng, heads);
        // Decode rows, a chunk that ends in a decode row's place, and one with many tiles of rows.
        for (first, second) in [(1, 1), (7, 1), (50, block + 3)] {
            let starts = [0, first as u32, (first + second) as u32];
            let query = uniform(&mut rng, (first + second) * cols);
            for (window, marked) in [(None, false), (Some(block + 5), true)] {
                for context in &contexts {
                    let run =
                        |query: View<'_>, batch: &AttentionBatch<'_>, of_heads: &[f32], out: ViewMut<'_>| {
                            let of_heads = marked.then_some(View::from_slice(of_heads, 1, heads));
                            let params = AttentionParams {
                                window,
                                alibi_slopes: of_heads,
                                sinks: of_heads,
                                ..AttentionParams::new(0.2)
                            };
                            paged_attention(context, query, &cache, batch, params, out).expect("shapes fit");
                        };
                    let mut want = vec![0.0; query.len()];
                    let batch = AttentionBatch::from_slices(&starts, &lens, tables.as_flattened(), 4);
                    let rows = first + second;
                    run(
                        View::from_slice(&query, rows, cols),
                        &batch,
                        &slopes,
                        ViewMut::from_slice(&mut want, rows, cols),
                    );
                    for side in Side::BOTH {
                        let name = format!(
                            "attention, {} x {} x {}, blocks of {block} of {dtype:?}, {first} and {second} rows, {}",
                            pages.kv_heads,
                            pages.group,
                            pages.head_dim,
                            context.device_name()
                        );
                        case(&name, side, || {
                            let query = Matrix::new(&query, cols, 6, side);
                            let mut out = Matrix::new(&vec![0.0; want.len()], cols, 6, side);
                            let (starts, lens) = (Guarded::new(&starts, side), Guarded::new(&lens, side));
                            let (entries, slopes) =
                                (Guarded::new(tables.as_flattened(), side), Guarded::new(&slopes, side));
                            let (starts, lens) = (starts.as_slice(), lens.as_slice());
                            let batch = AttentionBatch::from_slices(starts, lens, entries.as_slice(), 4);
                            let fences = pages.fence(&cache, used);
                            run(query.view(), &batch, slopes.as_slice(), out.view_mut());
                            drop(fences);
                            out.check(&want, &name);
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn keys_and_values_are_written_to_the_blocks_of_their_slots_alone_at_every_level() {
    let table = [9_u32, 3, 12];
    for (pages, dtype) in PAGES.iter().flat_map(|pages| FLOATS.map(|dtype| (pages, dtype))) {
        let (cols, len) = (pages.kv_cols(), 2 * pages.block_size + 3);
        let slots = pages.slots(&table, len);
        let mut rng = rng(6);
        let [keys, values] = [(); 2].map(|()| uniform(&mut rng, len * cols));
        for (context, side) in levels().iter().flat_map(|context| Side::BOTH.map(|side| (context, side))) {
            let name = format!("{cols} columns of {dtype:?}, {}", context.device_name());
            case(&name, side, || {
                let (keys, values) = (Matrix::new(&keys, cols, 7, side), Matrix::new(&values, cols, 7, side));
                let guarded_slots = Guarded::new(&slots, side);
                let mut cache = pages.cache(context, dtype);
                let fences = pages.fence(&cache, &table);
                let slots = View::from_slice(guarded_slots.as_slice(), 1, len);
                write_kv(context, keys.view(), values.view(), slots, &mut cache).expect("shapes fit");
                drop(fences);
            });
        }
    }
}
