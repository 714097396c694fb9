//! Paged attention against an f64 softmax over the whole sequence.

mod common;

use common::{FLOATS, assert_close, assert_same_bits, contexts, levels, rng, tensor, uniform};
use half::bf16;
use kernels::ops::attention::{self, BlockTables, NewBlocks, paged_attention};
use kernels::{AttentionBatch, AttentionParams, Context, DType, Error, KvLayer, Result, Tensor, View};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

#[derive(Clone, Copy)]
struct Shape {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    block_size: usize,
}

/// What is done to scores, for all shapes.
#[derive(Clone, Copy, Debug, Default)]
struct Features {
    window: Option<usize>,
    soft_cap: Option<f32>,
    alibi: bool,
    sinks: bool,
}

impl Features {
    fn window(window: Option<usize>) -> Self {
        Self { window, ..Self::default() }
    }
    fn slope(head: usize) -> f32 {
        0.5_f32.powi(head as i32 % 7 + 1)
    }
    fn sink(head: usize) -> f32 {
        head as f32 * 0.7 - 1.0
    }
}

/// With slots as they are here.
fn write_kv(
    context: &Context,
    keys: View<'_>,
    values: View<'_>,
    slots: &[u32],
    cache: &mut KvLayer,
) -> Result<()> {
    attention::write_kv(context, keys, values, View::from_slice(slots, 1, slots.len()), cache)
}

/// Sequences whose keys and values lie in a cache, in blocks in no order.
struct Cached {
    shape: Shape,
    cache: KvLayer,
    /// Of each sequence: query, key and value rows, all f32.
    sequences: Vec<[Tensor; 3]>,
    /// `[sequence][block]`
    tables: Vec<Vec<u32>>,
    max_blocks: usize,
}

impl Cached {
    fn new(context: &Context, rng: &mut StdRng, shape: Shape, dtype: DType, lens: &[usize]) -> Self {
        let max_blocks = lens.iter().map(|len| len.div_ceil(shape.block_size)).max().expect("a sequence") + 1;
        let num_blocks = max_blocks * lens.len();
        let mut blocks: Vec<u32> = (0..num_blocks as u32).collect();
        blocks.shuffle(rng);
        let tables: Vec<Vec<u32>> = blocks.chunks(max_blocks).map(<[u32]>::to_vec).collect();
        let Shape { kv_heads, block_size, head_dim, .. } = shape;
        let mut cache =
            KvLayer::new(context, num_blocks, kv_heads, block_size, head_dim, dtype).expect("a float type");
        // What an earlier sequence has left must not be seen, not even where it is NaN.
        let kv_cols = shape.kv_heads * shape.head_dim;
        let all: Vec<u32> = (0..(num_blocks * shape.block_size) as u32).collect();
        let rubbish = Tensor::from_slice(&vec![f32::NAN; all.len() * kv_cols], all.len(), kv_cols);
        write_kv(context, rubbish.view(), rubbish.view(), &all, &mut cache).expect("shapes fit");
        let sequences: Vec<[Tensor; 3]> = lens
            .iter()
            .map(|&len| {
                let [q, k, v] = [shape.group * kv_cols, kv_cols, kv_cols].map(|cols| (len, cols));
                [q, k, v].map(|(rows, cols)| Tensor::from_slice(&uniform(rng, rows * cols), rows, cols))
            })
            .collect();
        for ([_, keys, values], table) in sequences.iter().zip(&tables) {
            let slots: Vec<u32> = (0..keys.rows())
                .map(|p| {
                    table[p / shape.block_size] * shape.block_size as u32 + (p % shape.block_size) as u32
                })
                .collect();
            write_kv(context, keys.view(), values.view(), &slots, &mut cache).expect("shapes fit");
        }
        Self { shape, cache, sequences, tables, max_blocks }
    }

    /// Attention for the positions `parts[i] = (sequence, start, end)` as one flat batch; later positions are in the
    /// cache, but not yet part of the sequence.
    fn run(&self, context: &Context, parts: &[(usize, usize, usize)], features: Features) -> Vec<f32> {
        let cols = self.sequences[0][0].cols();
        let mut query = Vec::new();
        let (mut starts, mut kv_lens, mut tables) = (vec![0], Vec::new(), Vec::new());
        for &(sequence, start, end) in parts {
            query.extend_from_slice(&self.sequences[sequence][0].as_slice::<f32>()[start * cols..end * cols]);
            starts.push(starts[starts.len() - 1] + (end - start) as u32);
            kv_lens.push(end as u32);
            tables.extend_from_slice(&self.tables[sequence]);
        }
        let rows = query.len() / cols;
        let query = Tensor::from_slice(&query, rows, cols);
        let mut out = Tensor::zeros(rows, cols, DType::F32);
        let batch = AttentionBatch::from_slices(&starts, &kv_lens, &tables, self.max_blocks);
        let heads = cols / self.shape.head_dim;
        let slopes: Vec<f32> = (0..heads).map(Features::slope).collect();
        let sinks: Vec<f32> = (0..heads).map(Features::sink).collect();
        let params = AttentionParams {
            scale: self.scale() as f32,
            window: features.window,
            soft_cap: features.soft_cap,
            alibi_slopes: features.alibi.then_some(View::from_slice(&slopes, 1, heads)),
            sinks: features.sinks.then_some(View::from_slice(&sinks, 1, heads)),
        };
        paged_attention(context, query.view(), &self.cache, &batch, params, out.view_mut())
            .expect("shapes fit");
        out.as_slice().to_vec()
    }

    /// Large enough that the softmax has peaks.
    fn scale(&self) -> f64 {
        3.0 / (self.shape.head_dim as f64).sqrt()
    }

    /// In f64; `tiled`: of queries in bf16.
    fn reference(
        &self,
        dtype: DType,
        (sequence, position): (usize, usize),
        features: Features,
        tiled: bool,
    ) -> Vec<f64> {
        let Shape { kv_heads, group, head_dim, .. } = self.shape;
        let [query, keys, values] = &self.sequences[sequence];
        let [keys, values] = [keys, values].map(|tensor| tensor.to_dtype(dtype).expect("a float type"));
        let rounded = |tensor: &Tensor, row: usize, head: usize| -> Vec<f64> {
            let row =
                tensor.view().narrow_cols(head * head_dim, head_dim).row_f32(row).expect("a float type");
            row.into_iter().map(f64::from).collect()
        };
        let first = features.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut out = Vec::new();
        for head in 0..kv_heads * group {
            let q: Vec<f64> = query.view().row::<f32>(position)[head * head_dim..][..head_dim]
                .iter()
                .map(|&q| {
                    if tiled {
                        bf16::from_f32(q * self.scale() as f32).to_f64() / self.scale()
                    } else {
                        f64::from(q)
                    }
                })
                .collect();
            let scores: Vec<f64> = (first..=position)
                .map(|p| {
                    let products = q.iter().zip(rounded(&keys, p, head / group)).map(|(q, k)| q * k);
                    let score = products.sum::<f64>() * self.scale();
                    let capped =
                        features.soft_cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh());
                    let distance = p as f64 - position as f64;
                    capped + if features.alibi { f64::from(Features::slope(head)) * distance } else { 0.0 }
                })
                .collect();
            let sink = if features.sinks { f64::from(Features::sink(head)) } else { f64::NEG_INFINITY };
            let max = scores.iter().copied().fold(sink, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let total: f64 = weights.iter().sum::<f64>() + (sink - max).exp();
            let mut sum = vec![0.0; head_dim];
            for (p, weight) in (first..=position).zip(weights) {
                let value = rounded(&values, p, head / group);
                sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight / total * value);
            }
            out.extend(sum);
        }
        out
    }
}

const SHAPES: [Shape; 9] = [
    Shape { kv_heads: 2, group: 2, head_dim: 16, block_size: 16 },
    Shape { kv_heads: 1, group: 1, head_dim: 8, block_size: 4 },
    Shape { kv_heads: 2, group: 7, head_dim: 20, block_size: 5 },
    Shape { kv_heads: 1, group: 4, head_dim: 64, block_size: 32 },
    Shape { kv_heads: 3, group: 1, head_dim: 128, block_size: 16 },
    Shape { kv_heads: 1, group: 40, head_dim: 80, block_size: 1 },
    Shape { kv_heads: 2, group: 3, head_dim: 64, block_size: 32 },
    Shape { kv_heads: 1, group: 20, head_dim: 32, block_size: 64 },
    Shape { kv_heads: 1, group: 1, head_dim: 96, block_size: 32 },
];

/// Whether keys and values are multiplied in tiles, with queries and weights in bf16.
fn is_tiled(context: &Context, shape: Shape, dtype: DType) -> bool {
    let whole = shape.block_size.is_multiple_of(32) && shape.head_dim.is_multiple_of(32);
    context.device_name().contains("Amx") && dtype == DType::BF16 && whole
}

#[test]
fn decode_rows_and_chunks_match_the_reference_at_every_level() {
    let mut rng = rng(1);
    let contexts = levels();
    for (shape, dtype) in SHAPES.into_iter().flat_map(|shape| FLOATS.map(|dtype| (shape, dtype))) {
        let cached = Cached::new(&contexts[0], &mut rng, shape, dtype, &[37, 3, 50]);
        let windows = [None, Some(1), Some(9), Some(1000)].map(Features::window);
        let changed = [
            Features { soft_cap: Some(2.5), ..Features::default() },
            Features { alibi: true, ..Features::default() },
            Features { sinks: true, ..Features::default() },
            Features { window: Some(9), soft_cap: Some(2.5), alibi: true, sinks: true },
        ];
        for features in windows.into_iter().chain(changed) {
            let parts = [(0, 36, 37), (1, 0, 3), (2, 20, 30)];
            for context in &contexts {
                let tiled = is_tiled(context, shape, dtype);
                let want: Vec<f64> = parts
                    .iter()
                    .flat_map(|&(s, start, end)| (start..end).map(move |p| (s, p)))
                    .flat_map(|at| cached.reference(dtype, at, features, tiled))
                    .collect();
                let got = cached.run(context, &parts, features);
                // Sums of at most 50 values below 1 with weights that add up to 1; exp is good to two units. Weights in bf16 are
                // off by up to 2^-9 of themselves.
                let tolerance = if tiled { 2.0_f64.powi(-9) } else { 3e-6 };
                assert_close(&got, &want, tolerance, &format!("{features:?}, {dtype:?}"));
            }
        }
    }
}

#[test]
fn long_sequences_are_cut_at_the_same_places_by_any_threads_and_any_chunks_at_every_level() {
    for (group, head_dim) in [(2, 40), (3, 32)] {
        for contexts in contexts(&[1, 2, 3, 8]) {
            check_long_sequences(&contexts, Shape { kv_heads: 2, group, head_dim, block_size: 32 });
        }
    }
}

fn check_long_sequences(contexts: &[Context], shape: Shape) {
    let cols = shape.kv_heads * shape.group * shape.head_dim;
    let len = 2500;
    let cached = Cached::new(&contexts[0], &mut rng(6), shape, DType::BF16, &[len, 700]);
    let all = Features { window: Some(1400), soft_cap: Some(4.0), alibi: true, sinks: true };
    for features in [Features::default(), Features::window(Some(1400)), all] {
        let tiled = is_tiled(&contexts[0], shape, DType::BF16);
        let want = cached.reference(DType::BF16, (0, len - 1), features, tiled);
        let alone = cached.run(&contexts[0], &[(0, len - 1, len)], features);
        // The weights add up to 1, and merging rounds a few times more.
        assert_close(&alone, &want, if tiled { 2.0_f64.powi(-9) } else { 5e-6 }, &format!("{features:?}"));
        for context in contexts {
            let again = cached.run(context, &[(0, len - 1, len)], features);
            assert_same_bits(&again, &alone, "decode row");
            let beside = cached.run(context, &[(1, 690, 691), (0, len - 1, len), (1, 0, 70)], features);
            assert_same_bits(&beside[cols..2 * cols], &alone, "decode row in company");
            for start in [len - 3, len - 20, len - 100] {
                let chunk = cached.run(context, &[(0, start, len)], features);
                assert_same_bits(&chunk[chunk.len() - cols..], &alone, "last row of a chunk");
            }
        }
        let chunk = cached.run(&contexts[2], &[(0, 1000, len)], features);
        assert_same_bits(&chunk[chunk.len() - cols..], &alone, "last row of a long chunk");
    }
}

#[test]
fn a_row_has_the_same_bits_chunked_or_not_in_any_batch_on_any_number_of_threads_at_every_level() {
    let mut rng = rng(2);
    let all = Features { window: Some(23), soft_cap: Some(2.5), alibi: true, sinks: true };
    let changes = [Features::default(), Features::window(Some(23)), all];
    let levels = contexts(&[1, 2, 3]);
    for ((i, shape), contexts) in
        SHAPES.into_iter().enumerate().flat_map(|shape| levels.iter().map(move |of| (shape, of)))
    {
        for (j, dtype) in FLOATS.into_iter().enumerate() {
            // Each change with each type, in other shapes.
            let features = changes[(i + j) % changes.len()];
            let cached = Cached::new(&contexts[0], &mut rng, shape, dtype, &[150, 61]);
            let cols = shape.kv_heads * shape.group * shape.head_dim;
            let whole = cached.run(&contexts[0], &[(0, 0, 150)], features);
            for context in contexts {
                let mut start = 0;
                while start < 150 {
                    let end = 150.min(start + rng.random_range(1..40));
                    let at = rng.random_range(0..60);
                    let got = cached.run(context, &[(1, at, at + 1), (0, start, end)], features);
                    let what = format!("{}, {dtype:?}, {features:?}", context.device_name());
                    assert_same_bits(&got[cols..], &whole[start * cols..end * cols], &what);
                    start = end;
                }
            }
        }
    }
}

#[test]
fn nan_in_a_key_reaches_the_rows_that_see_it_and_no_other_at_every_level() {
    for (context, shape) in levels().iter().flat_map(|of| [SHAPES[0], SHAPES[6]].map(|shape| (of, shape))) {
        let Shape { kv_heads, group, head_dim, block_size } = shape;
        let mut cached = Cached::new(context, &mut rng(3), shape, DType::BF16, &[90]);
        let poison = Tensor::from_slice(&vec![f32::NAN; kv_heads * head_dim], 1, kv_heads * head_dim);
        let slot = cached.tables[0][1] * block_size as u32 + 4;
        write_kv(context, poison.view(), poison.view(), &[slot], &mut cached.cache).expect("shapes fit");
        let got = cached.run(context, &[(0, 0, 90)], Features::window(Some(6)));
        for (row, out) in got.chunks(kv_heads * group * head_dim).enumerate() {
            let sees = (block_size + 4..block_size + 10).contains(&row);
            assert!(out.iter().all(|value| value.is_nan() == sees), "row {row}");
        }
    }
}

#[test]
fn what_is_infinite_reaches_no_row_that_does_not_see_it_at_every_level() {
    for (context, shape) in levels().iter().flat_map(|of| [SHAPES[0], SHAPES[6]].map(|shape| (of, shape))) {
        let Shape { kv_heads, group, head_dim, block_size } = shape;
        let mut cached = Cached::new(context, &mut rng(7), shape, DType::BF16, &[90]);
        let before = cached.run(context, &[(0, 0, 50)], Features::default());
        let [zeros, infinite] = [0.0, f32::INFINITY]
            .map(|value| Tensor::from_slice(&vec![value; kv_heads * head_dim], 1, kv_heads * head_dim));
        let slot = cached.tables[0][50 / block_size] * block_size as u32 + 50 % block_size as u32;
        write_kv(context, zeros.view(), infinite.view(), &[slot], &mut cached.cache).expect("shapes fit");
        let got = cached.run(context, &[(0, 0, 90)], Features::default());
        assert_same_bits(&got[..before.len()], &before, "rows before it");
        let cols = kv_heads * group * head_dim;
        assert!(got[50 * cols..].iter().all(|value| *value == f32::INFINITY), "rows that see it");
    }
}

#[test]
fn write_kv_rounds_to_nearest_even_at_every_level() {
    let mut rng = rng(4);
    for context in levels() {
        for head_dim in [1, 16, 40] {
            // All kinds of bits: denormals, ties, infinities, NaN.
            let mut bits: Vec<f32> = (0..64 * head_dim).map(|_| f32::from_bits(rng.random())).collect();
            for (i, value) in bits.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
                *value = [1.003_906_2, -1.011_718_8, 1.000_488_3, 65520.0, 6e-8, 2.98e-8, -0.0][i / 3 % 7];
            }
            let keys = Tensor::from_slice(&bits, 64, head_dim);
            let slots: Vec<u32> = (0..64).rev().collect();
            let mut layer = KvLayer::new(&context, 4, 1, 16, head_dim, DType::F16).expect("a float type");
            check_rounding(&context, &keys, &slots, &mut layer, |value| half::f16::from_f32(value).to_f32());
            let mut layer = KvLayer::new(&context, 4, 1, 16, head_dim, DType::BF16).expect("a float type");
            check_rounding(&context, &keys, &slots, &mut layer, |value| half::bf16::from_f32(value).to_f32());
        }
    }
}

#[test]
fn rows_written_together_lie_as_those_written_one_by_one_at_every_level() {
    let mut rng = rng(8);
    // Runs of any length, of which some go on in the block that is next in memory, then slots in no order.
    let mut slots: Vec<u32> = [3..41, 60..61, 64..66, 80..97, 130..160].into_iter().flatten().collect();
    let mut rest: Vec<u32> = (0..160).filter(|slot| !slots.contains(slot)).collect();
    rest.shuffle(&mut rng);
    slots.extend(&rest[..40]);
    for context in levels() {
        for (block_size, head_dim) in [(4, 16), (16, 5), (20, 40), (32, 64)] {
            let (kv_heads, rows) = (2, slots.len());
            let [keys, values] = [(); 2].map(|()| tensor(&mut rng, rows, kv_heads * head_dim, DType::F32));
            for dtype in FLOATS {
                let cache = || {
                    KvLayer::new(
                        &context,
                        160_usize.div_ceil(block_size),
                        kv_heads,
                        block_size,
                        head_dim,
                        dtype,
                    )
                    .expect("a float type")
                };
                let (mut together, mut single) = (cache(), cache());
                write_kv(&context, keys.view(), values.view(), &slots, &mut together).expect("shapes fit");
                for (row, slot) in slots.iter().enumerate() {
                    let [key, value] = [&keys, &values].map(|all| all.view().narrow_rows(row, 1));
                    write_kv(&context, key, value, &[*slot], &mut single).expect("shapes fit");
                }
                for (together, single) in together.pages().into_iter().zip(single.pages()) {
                    let values = |view: View<'_>| -> Vec<f32> {
                        (0..view.rows()).flat_map(|row| view.row_f32(row).expect("floats")).collect()
                    };
                    let what = format!("{dtype:?} in blocks of {block_size}");
                    assert_same_bits(&values(together), &values(single), &what);
                }
            }
        }
    }
}

/// Reads the values back through attention to a single position: its weight is exactly one.
fn check_rounding(
    context: &Context,
    data: &Tensor,
    slots: &[u32],
    layer: &mut KvLayer,
    rounded: impl Fn(f32) -> f32,
) {
    let zeros = Tensor::zeros(data.rows(), data.cols(), DType::F32);
    write_kv(context, zeros.view(), data.view(), slots, layer).expect("shapes fit");
    let table: Vec<u32> = (0..4).collect();
    for (row, &slot) in slots.iter().enumerate() {
        let query = Tensor::zeros(1, data.cols(), DType::F32);
        let mut out = Tensor::zeros(1, data.cols(), DType::F32);
        let kv_lens = [slot + 1];
        let batch = AttentionBatch::from_slices(&[0, 1], &kv_lens, &table, 4);
        let params = AttentionParams { window: Some(1), ..AttentionParams::new(1.0) };
        paged_attention(context, query.view(), layer, &batch, params, out.view_mut()).expect("shapes fit");
        for (&got, &value) in out.as_slice::<f32>().iter().zip(data.view().row::<f32>(row)) {
            let want = rounded(value);
            let same = got.to_bits() == want.to_bits() || (got == 0.0 && want == 0.0);
            assert!(same || (got.is_nan() && want.is_nan()), "{value} became {got}, expected {want}");
        }
    }
}

#[test]
fn sequences_find_their_tables_in_the_rows_that_they_name() {
    let context = Context::cpu(2);
    let (mut cache, query) = (
        KvLayer::new(&context, 4, 2, 16, 8, DType::F16).expect("a float type"),
        tensor(&mut rng(6), 3, 32, DType::F32),
    );
    let kv = tensor(&mut rng(7), 64, 16, DType::F32);
    let slots: Vec<u32> = (0..64).collect();
    write_kv(&context, kv.view(), kv.view(), &slots, &mut cache).expect("shapes fit");
    let attend = |batch: &AttentionBatch<'_>| {
        let mut out = Tensor::zeros(3, 32, DType::F32);
        let params = AttentionParams::new(1.0);
        paged_attention(&context, query.view(), &cache, batch, params, out.view_mut()).expect("shapes fit");
        out.as_slice::<f32>().to_vec()
    };
    let in_order = AttentionBatch::from_slices(&[0, 1, 3], &[20, 2], &[1, 2, 3, 0], 2);
    let mut tables = BlockTables::new(&context, 5, 3, 2).expect("memory");
    for (row, column, ids) in [(4, 0, &[1][..]), (2, 0, &[3, 0]), (4, 1, &[2])] {
        tables.append(&context, [NewBlocks { row, column, ids }]).expect("they fit");
    }
    let rows = [4_u32, 2];
    let kept = AttentionBatch {
        block_tables: tables.entries(),
        table_rows: Some(View::from_slice(&rows, 1, 2)),
        max_blocks: tables.max_blocks(),
        ..in_order
    };
    assert_eq!(attend(&kept), attend(&in_order));
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let context = Context::cpu(1);
    let mut cache = KvLayer::new(&context, 4, 2, 16, 8, DType::F16).expect("a float type");
    let good = tensor(&mut rng(5), 3, 32, DType::F32);
    let mut out = Tensor::zeros(3, 32, DType::F32);
    let vector = |values: &'static [u32]| View::from_slice(values, 1, values.len());
    let batch = AttentionBatch::from_slices(&[0, 1, 3], &[20, 2], &[0, 1, 3, 0], 2);
    let params = AttentionParams::new(1.0);
    let mut attend = |query: &Tensor, batch: AttentionBatch<'_>| {
        paged_attention(&context, query.view(), &cache, &batch, params, out.view_mut())
    };
    attend(&good, batch).expect("shapes fit");
    let shape_errors = [
        attend(&Tensor::zeros(3, 24, DType::F32), batch),
        attend(&Tensor::zeros(2, 32, DType::F32), batch),
        attend(&good, AttentionBatch { query_starts: vector(&[0, 3]), ..batch }),
        attend(&good, AttentionBatch { query_starts: vector(&[]), kv_lens: vector(&[]), ..batch }),
        attend(&good, AttentionBatch { query_starts: vector(&[0, 2, 1]), ..batch }),
        attend(&good, AttentionBatch { query_starts: vector(&[1, 1, 3]), ..batch }),
        attend(&good, AttentionBatch { kv_lens: vector(&[20, 1]), ..batch }),
        attend(&good, AttentionBatch { kv_lens: vector(&[33, 2]), ..batch }),
        attend(&good, AttentionBatch { block_tables: vector(&[0, 4, 3, 0]), ..batch }),
        attend(&good, AttentionBatch { block_tables: vector(&[0, 1, 3]), ..batch }),
        attend(&good, AttentionBatch { table_rows: Some(vector(&[0])), ..batch }),
        attend(&good, AttentionBatch { table_rows: Some(vector(&[0, 2])), ..batch }),
        attend(&good, AttentionBatch { table_rows: Some(vector(&[0, u32::MAX])), ..batch }),
    ];
    for (i, outcome) in shape_errors.into_iter().enumerate() {
        assert!(matches!(outcome, Err(Error::Shape { .. })), "case {i}");
    }
    let half = Tensor::zeros(3, 32, DType::F16);
    assert!(matches!(attend(&half, batch), Err(Error::DType { .. })));
    for bad in [
        AttentionParams { window: Some(0), ..params },
        AttentionParams { soft_cap: Some(0.0), ..params },
        AttentionParams { soft_cap: Some(f32::NAN), ..params },
        AttentionParams { alibi_slopes: Some(View::from_slice(&[1.0_f32; 3], 1, 3)), ..params },
        AttentionParams { sinks: Some(View::from_slice(&[1.0_f32; 5], 1, 5)), ..params },
    ] {
        let outcome = paged_attention(&context, good.view(), &cache, &batch, bad, out.view_mut());
        assert!(matches!(outcome, Err(Error::Shape { .. })));
    }
    let kv = Tensor::zeros(2, 16, DType::F32);
    let mut write =
        |keys: &Tensor, slots: &[u32]| write_kv(&context, keys.view(), kv.view(), slots, &mut cache);
    write(&kv, &[0, 63]).expect("shapes fit");
    assert!(matches!(write(&kv, &[0, 64]), Err(Error::Shape { .. })));
    assert!(matches!(write(&kv, &[0]), Err(Error::Shape { .. })));
    assert!(matches!(write(&Tensor::zeros(2, 8, DType::F32), &[0, 1]), Err(Error::Shape { .. })));
}
