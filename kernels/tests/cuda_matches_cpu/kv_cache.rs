//! Writing keys and values to pages, alone and with norm and rotation before it.

use kernels::ops::attention::{HeadNorms, RotaryAndPages, rotary_write_kv, write_kv};
use kernels::ops::rotary::{RotaryPairs, RotaryTables};
use kernels::{Context, DType, KvLayer, Tensor, View};
use rand::RngExt;
use rand::seq::SliceRandom;

use super::{ACTIVATIONS, Fixture, LAYOUTS, download_f32, tolerance};

const BLOCK_SIZE: usize = KvLayer::DEVICE_BLOCK_SIZE;
const NUM_BLOCKS: usize = 3;
const CACHES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F8E4M3];

#[derive(Debug, Clone, Copy)]
struct Shape {
    rows: usize,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const SHAPES: [Shape; 4] = [
    Shape { rows: 1, query_heads: 1, kv_heads: 1, head_dim: 2 },
    Shape { rows: 5, query_heads: 4, kv_heads: 2, head_dim: 64 },
    Shape { rows: 3, query_heads: 6, kv_heads: 3, head_dim: 33 },
    Shape { rows: 40, query_heads: 4, kv_heads: 1, head_dim: 128 },
];

/// Each slot at most once.
fn slots(fixture: &mut Fixture, rows: usize) -> Vec<u32> {
    let mut slots: Vec<u32> = (0..(NUM_BLOCKS * BLOCK_SIZE) as u32).collect();
    slots.shuffle(&mut fixture.random);
    slots.truncate(rows);
    slots
}

fn vector(context: &Context, values: &[u32]) -> Tensor {
    context.upload(&Tensor::from_slice(values, 1, values.len())).expect("memory")
}

/// `[slot][head][element]`, from either layout: on the CPU keys lie with an element's positions side by side.
fn elements(context: &Context, layer: &KvLayer, shape: Shape) -> [Vec<f32>; 2] {
    let Shape { kv_heads, head_dim, .. } = shape;
    let [keys, values] = layer.pages().map(|pages| floats(context, pages));
    let on_cpu = context.place() == kernels::Place::Host;
    let by_slot = |pages: &[f32], transposed: bool| {
        let mut elements = Vec::with_capacity(pages.len());
        for slot in 0..NUM_BLOCKS * BLOCK_SIZE {
            let (block, place) = (slot / BLOCK_SIZE, slot % BLOCK_SIZE);
            for head in 0..kv_heads {
                let page = &pages[(block * kv_heads + head) * BLOCK_SIZE * head_dim..];
                let place_of =
                    |i: usize| if transposed { i * BLOCK_SIZE + place } else { place * head_dim + i };
                elements.extend((0..head_dim).map(|i| page[place_of(i)]));
            }
        }
        elements
    };
    [by_slot(&keys, on_cpu), by_slot(&values, false)]
}

fn floats(context: &Context, pages: View<'_>) -> Vec<f32> {
    if pages.dtype() != DType::U8 {
        return download_f32(context, pages).as_slice::<f32>().to_vec();
    }
    let mut bytes = vec![0_u8; pages.rows() * pages.cols()];
    context.download(pages, &mut bytes).expect("the stream works");
    bytes.into_iter().map(from_f8).collect()
}

/// e4m3: 4 bits of exponent with a bias of 7, 3 of the fraction.
fn from_f8(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude =
        if exponent == 0 { fraction / 512.0 } else { (1.0 + fraction / 8.0) * 2.0_f32.powi(exponent - 7) };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Half of the spacing of the cache's numbers, and a little, for values below 2 in f32.
fn rounding(dtype: DType) -> f32 {
    match dtype {
        DType::F8E4M3 => 2.0_f32.powi(-4) * 1.01,
        dtype => tolerance(dtype),
    }
}

fn check(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (found - expected).abs();
        assert!(
            difference <= tolerance * expected.abs().max(1.0),
            "{what}: {i} is {found}, expected {expected}"
        );
    }
}

#[test]
fn keys_and_values_are_in_the_slots_that_were_named_and_nowhere_else() {
    let mut fixture = Fixture::new(51);
    let mut case = 0;
    for dtype in ACTIVATIONS {
        for cache in CACHES {
            for shape in SHAPES {
                case += 1;
                let Shape { rows, kv_heads, head_dim, .. } = shape;
                let layout = LAYOUTS[case % LAYOUTS.len()];
                let cols = kv_heads * head_dim;
                let (keys, values) = (fixture.values(rows, cols, dtype), fixture.values(rows, cols, dtype));
                let mut slots = slots(&mut fixture, rows);
                // A row that only fills a batch up.
                if rows > 1 {
                    slots[rows / 2] = u32::MAX;
                }
                let mut layer =
                    KvLayer::new(&fixture.cuda, NUM_BLOCKS, kv_heads, BLOCK_SIZE, head_dim, cache)
                        .expect("memory");
                let (there, values_there) =
                    (fixture.upload(&keys, dtype, layout), fixture.upload(&values, dtype, layout));
                let slots_there = vector(&fixture.cuda, &slots);
                write_kv(&fixture.cuda, there.view(), values_there.view(), slots_there.view(), &mut layer)
                    .expect("shapes fit");
                let found = elements(&fixture.cuda, &layer, shape);
                for (found, written) in found.iter().zip([&keys, &values]) {
                    let mut expected = vec![0.0; NUM_BLOCKS * BLOCK_SIZE * cols];
                    for (row, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot != u32::MAX) {
                        expected[slot as usize * cols..][..cols].copy_from_slice(written.view().row(row));
                    }
                    let what = format!("{dtype:?} to {cache:?} {shape:?} {layout:?}");
                    check(&what, found, &expected, rounding(cache));
                }
            }
        }
    }
}

#[test]
fn norm_rotation_and_writing_in_one_are_the_same_as_one_after_the_other() {
    for mut fixture in Fixture::of_all_kernels(52) {
        let mut case = 0;
        for dtype in ACTIVATIONS {
            for cache in CACHES {
                for shape in SHAPES {
                    case += 1;
                    one_kernel(&mut fixture, case, dtype, cache, shape);
                }
            }
        }
    }
}

fn one_kernel(fixture: &mut Fixture, case: usize, dtype: DType, cache: DType, shape: Shape) {
    let Shape { rows, query_heads, kv_heads, head_dim } = shape;
    let layout = LAYOUTS[case % LAYOUTS.len()];
    let pairs = if case.is_multiple_of(2) { RotaryPairs::HalfApart } else { RotaryPairs::Adjacent };
    let half = if case.is_multiple_of(3) { head_dim / 2 } else { head_dim.div_ceil(4) };
    let what = format!("{dtype:?} to {cache:?} {shape:?} {pairs:?} ({half}) {layout:?}");
    let cols = (query_heads + 2 * kv_heads) * head_dim;
    let mut qkv = fixture.values(rows, cols, dtype);
    let [query_weight, key_weight] = [0, 1].map(|_| fixture.values(1, head_dim, DType::F32));
    let [cos, sin] = [0, 1].map(|_| fixture.values(60, half, DType::F32));
    let positions: Vec<u32> = (0..rows).map(|_| fixture.random.random_range(0..60)).collect();
    let slots = slots(fixture, rows);
    let has_norms = case % 4 < 2;
    let run = |context: &Context, qkv: kernels::ViewMut<'_>, cache: DType| {
        let upload = |values: &Tensor| context.upload(values).expect("memory");
        let (query, key, cos, sin) = (upload(&query_weight), upload(&key_weight), upload(&cos), upload(&sin));
        let (positions, slots) = (vector(context, &positions), vector(context, &slots));
        let mut layer =
            KvLayer::new(context, NUM_BLOCKS, kv_heads, BLOCK_SIZE, head_dim, cache).expect("memory");
        let norms = has_norms.then_some(HeadNorms { query: &query, key: &key, eps: 1e-5 });
        let rotary_and_pages = RotaryAndPages {
            positions: positions.view(),
            tables: RotaryTables { cos: &cos, sin: &sin, pairs },
            slots: slots.view(),
        };
        rotary_write_kv(context, qkv, norms, rotary_and_pages, &mut layer).expect("shapes fit");
        elements(context, &layer, shape)
    };
    let mut there = fixture.upload(&qkv, dtype, layout);
    let expected = run(&fixture.cpu, qkv.view_mut(), DType::F32);
    let found = run(&fixture.cuda, there.view_mut(), cache);
    // Rounded twice more.
    let unfused = fixture.unfused(4.0);
    for (found, expected) in found.iter().zip(&expected) {
        // Norms make values of up to sqrt(head_dim).
        check(&what, found, expected, rounding(cache).max(tolerance(dtype) * unfused).max(4e-6 * unfused));
    }
    let queries = query_heads * head_dim;
    let rest = there.cols() - queries;
    let queries_there = super::OnDevice {
        whole: there.whole.narrow_cols(layout.left, queries),
        layout: super::Layout { left: 0, right: 0 },
    };
    assert!(rest > 0);
    let tolerance = tolerance(dtype).max(4e-6) * fixture.unfused(4.0);
    fixture.check(&what, &queries_there, &qkv.narrow_cols(0, queries), tolerance);
}

#[test]
fn rows_that_only_fill_a_batch_up_are_left_alone() {
    let mut fixture = Fixture::new(53);
    let shape = SHAPES[1];
    let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
    let qkv = fixture.values(2, 8 * head_dim, DType::F32);
    let mut there = fixture.upload(&qkv, DType::F32, LAYOUTS[0]);
    let tables = [0, 1].map(|_| fixture.weights(&Tensor::zeros(4, head_dim / 2, DType::F32)));
    let mut layer =
        KvLayer::new(&fixture.cuda, NUM_BLOCKS, kv_heads, BLOCK_SIZE, head_dim, DType::F32).expect("memory");
    let (positions, slots) = (vector(&fixture.cuda, &[1, 0]), vector(&fixture.cuda, &[u32::MAX; 2]));
    let rotary_and_pages = RotaryAndPages {
        positions: positions.view(),
        tables: RotaryTables { cos: &tables[0], sin: &tables[1], pairs: RotaryPairs::HalfApart },
        slots: slots.view(),
    };
    rotary_write_kv(&fixture.cuda, there.view_mut(), None, rotary_and_pages, &mut layer).expect("shapes fit");
    fixture.check("rows without a slot", &there, &qkv, 0.0);
    let written = elements(&fixture.cuda, &layer, shape);
    assert!(written.iter().flatten().all(|&element| element == 0.0));
}
