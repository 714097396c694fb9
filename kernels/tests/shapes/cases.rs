//! Every operation on operands of arbitrary shapes, strides and element types, against f64, with canaries around each
//! output. What is arbitrary is drawn: by the test from a seed, by the fuzz target (`kernels/fuzz`) from a fuzzer's bytes.

#[path = "../common/mod.rs"]
mod common;

use std::convert::Infallible;

pub(crate) use common::levels;
use common::{FLOATS, assert_close, assert_same_bits, tensor};
use half::bf16;
use kernels::ops::activation::{self, Activation};
use kernels::ops::attention::{HeadNorms, RotaryAndPages, paged_attention, rotary_write_kv, write_kv};
use kernels::ops::linear::{
    Experts, GatedLinear, Int8Weight, LinearPart, Weight, linear, linear_add, linear_gated, linear_grouped,
};
use kernels::ops::lora::{AdapterRows, Lora, LowRank, NO_ADAPTER, lora_add};
use kernels::ops::moe::{Routing, TopK};
use kernels::ops::norm::LayerNormWeights;
use kernels::ops::rotary::{RotaryPairs, RotaryTables};
use kernels::ops::{embedding, logits, norm, rotary};
use kernels::{AttentionBatch, AttentionParams, Context, DType, KvLayer, Tensor, View, ViewMut};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, TryRng};

/// Draws operands, calls an operation, and fails unless the result is right.
pub(crate) type Case = fn(&Context, &mut Draws);

/// The operations and their names.
pub(crate) const OPERATIONS: [(&str, Case); 15] = [
    ("norms", norms),
    ("norms of sums and of heads", fused_norms),
    ("activations", activations),
    ("rotary", turn),
    ("embedding", embed),
    ("gather", gather),
    ("linear", product),
    ("int8 linear", int8_product),
    ("gated linear", gated_product),
    ("experts' linear", experts_products),
    ("experts", experts),
    ("logits", distribution),
    ("attention", attend),
    ("what comes before attention", turn_and_write),
    ("lora", low_rank_change),
];

const CANARY: f32 = -12345.5;

/// Where a case has its numbers from. As a generator it gives those that choose: shapes, strides, options. The values of
/// operands' elements are never of the bytes, which so stay few: a change of one changes a choice.
pub(crate) struct Draws<'a> {
    /// Two for each choice; where they end, choices are drawn as values are.
    bytes: &'a [u8],
    values: StdRng,
}

impl<'a> Draws<'a> {
    pub(crate) fn new(bytes: &'a [u8], seed: u64) -> Self {
        Self { bytes, values: common::rng(seed) }
    }

    fn choice(&mut self) -> Option<u16> {
        let (&bytes, rest) = self.bytes.split_first_chunk::<2>()?;
        self.bytes = rest;
        Some(u16::from_be_bytes(bytes))
    }
}

impl TryRng for Draws<'_> {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.choice().map_or_else(|| self.values.next_u32(), |choice| u32::from(choice) * 0x1_0001))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let repeated = |choice| u64::from(choice) * 0x0001_0001_0001_0001;
        Ok(self.choice().map_or_else(|| self.values.next_u64(), repeated))
    }

    fn try_fill_bytes(&mut self, to: &mut [u8]) -> Result<(), Infallible> {
        self.values.try_fill_bytes(to)
    }
}

/// An f32 matrix within a larger one, whose other elements are canaries.
struct Framed {
    whole: Tensor,
    place: [usize; 4],
}

impl Framed {
    fn new(draws: &mut Draws, rows: usize, cols: usize) -> Self {
        let [top, left, bottom, right] = std::array::from_fn(|_| draws.random_range(0..4_usize));
        let (all_rows, all_cols) = (top + rows + bottom, left + cols + right);
        let whole = Tensor::from_slice(&vec![CANARY; all_rows * all_cols], all_rows, all_cols);
        Self { whole, place: [top, left, rows, cols] }
    }

    fn filled(draws: &mut Draws, rows: usize, cols: usize) -> Self {
        let mut framed = Self::new(draws, rows, cols);
        let [top, left, ..] = framed.place;
        let stride = framed.whole.cols();
        for row in 0..rows {
            for value in &mut framed.whole.as_mut_slice::<f32>()[(top + row) * stride + left..][..cols] {
                *value = draws.values.random_range(-2.0..2.0);
            }
        }
        framed
    }

    fn view(&self) -> View<'_> {
        let [top, left, rows, cols] = self.place;
        self.whole.view().narrow_rows(top, rows).narrow_cols(left, cols)
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        let [top, left, rows, cols] = self.place;
        self.whole.view_mut().narrow_rows(top, rows).narrow_cols(left, cols)
    }

    fn values(&self) -> Vec<f32> {
        (0..self.place[2]).flat_map(|row| self.view().row::<f32>(row).to_vec()).collect()
    }

    fn rows(&self) -> Vec<Vec<f64>> {
        (0..self.place[2])
            .map(|row| self.view().row::<f32>(row).iter().copied().map(f64::from).collect())
            .collect()
    }

    /// Within `tolerance` of what is expected, relative to the greatest value, and the canaries live.
    fn check(&self, want: &[f64], tolerance: f64, what: &str) {
        let scale = want.iter().fold(1.0, |max: f64, value| max.max(value.abs()));
        assert_close(&self.values(), want, tolerance * scale, what);
        self.check_frame(what);
    }

    /// The canaries live.
    fn check_frame(&self, what: &str) {
        let [top, left, rows, cols] = self.place;
        for (i, value) in self.whole.as_slice::<f32>().iter().enumerate() {
            let (row, col) = (i / self.whole.cols(), i % self.whole.cols());
            let inside = (top..top + rows).contains(&row) && (left..left + cols).contains(&col);
            assert!(inside || value.to_bits() == CANARY.to_bits(), "{what} wrote to [{row}, {col}]");
        }
    }
}

fn size(draws: &mut Draws, most: usize) -> usize {
    // Often near the width of a vector.
    match draws.random_range(0..3) {
        0 => draws.random_range(1..=most),
        1 => draws.random_range(1..=most.min(4)),
        _ => (16 * draws.random_range(1..=4) + draws.random_range(0..3) - 1).min(most),
    }
}

fn f64s(tensor: &Tensor, row: usize) -> Vec<f64> {
    tensor.view().row_f32(row).expect("a float type").into_iter().map(f64::from).collect()
}

fn norms(context: &Context, draws: &mut Draws) {
    let (rows, cols) = (size(draws, 5), size(draws, 200));
    let x = Framed::filled(draws, rows, cols);
    let (weight, bias) =
        (tensor(&mut draws.values, 1, cols, DType::F32), tensor(&mut draws.values, 1, cols, DType::F32));
    let (w, b) = (f64s(&weight, 0), f64s(&bias, 0));
    let eps = 1e-3;
    let mut out = Framed::new(draws, rows, cols);
    norm::rms_norm(context, x.view(), &weight, eps, out.view_mut()).expect("shapes fit");
    let want: Vec<f64> = x.rows().iter().flat_map(|x| rms_normed(x, &w, eps.into())).collect();
    out.check(&want, 2e-6, "rms_norm");

    let bias = draws.random_bool(0.5).then_some(&bias);
    let weights = LayerNormWeights { weight: &weight, bias, eps };
    norm::layer_norm(context, x.view(), weights, out.view_mut()).expect("shapes fit");
    let want: Vec<f64> =
        x.rows().iter().flat_map(|x| layer_normed(x, &w, bias.map(|_| &*b), eps.into())).collect();
    out.check(&want, 2e-5, "layer_norm");
}

fn rms_normed(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let rms = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / rms * w).collect()
}

fn layer_normed(x: &[f64], weight: &[f64], bias: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (variance + eps).sqrt();
    let bias = |i: usize| bias.map_or(0.0, |bias| bias[i]);
    (0..x.len()).map(|i| (x[i] - mean) * scale * weight[i] + bias(i)).collect()
}

fn fused_norms(context: &Context, draws: &mut Draws) {
    let (rows, cols, heads) = (size(draws, 5), size(draws, 70), size(draws, 4));
    let eps = 1e-3;
    let [weight, bias] = [(); 2].map(|()| tensor(&mut draws.values, 1, cols, DType::F32));
    let (w, b) = (f64s(&weight, 0), f64s(&bias, 0));
    let mut x = Framed::filled(draws, rows, heads * cols);
    let normed =
        |row: Vec<f64>| row.chunks(cols).flat_map(|x| rms_normed(x, &w, eps.into())).collect::<Vec<_>>();
    let want: Vec<f64> = x.rows().into_iter().flat_map(normed).collect();
    norm::rms_norm_heads(context, x.view_mut(), &weight, eps).expect("shapes fit");
    x.check(&want, 2e-6, "rms_norm_heads");

    let y = Framed::filled(draws, rows, cols);
    let (mut sum, mut out) = (Framed::filled(draws, rows, cols), Framed::new(draws, rows, cols));
    let added = |sum: &Framed| -> Vec<Vec<f64>> {
        let both = sum.rows().into_iter().zip(y.rows());
        both.map(|(a, b)| a.iter().zip(b).map(|(a, b)| f64::from((a + b) as f32)).collect()).collect()
    };
    let rows = added(&sum);
    norm::add_rms_norm(context, sum.view_mut(), y.view(), &weight, eps, out.view_mut()).expect("shapes fit");
    sum.check(&rows.concat(), 0.0, "the sum of add_rms_norm");
    out.check(
        &rows.iter().flat_map(|x| rms_normed(x, &w, eps.into())).collect::<Vec<_>>(),
        2e-6,
        "add_rms_norm",
    );

    let rows = added(&sum);
    let weights = LayerNormWeights { weight: &weight, bias: Some(&bias), eps };
    norm::add_layer_norm(context, sum.view_mut(), y.view(), weights, out.view_mut()).expect("shapes fit");
    sum.check(&rows.concat(), 0.0, "the sum of add_layer_norm");
    let want: Vec<f64> = rows.iter().flat_map(|x| layer_normed(x, &w, Some(&b), eps.into())).collect();
    out.check(&want, 2e-5, "add_layer_norm");
}

/// The error function by its series, for arguments up to 3.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn activations(context: &Context, draws: &mut Draws) {
    type Definition = (Activation, fn(f64) -> f64);
    let definitions: [Definition; 5] = [
        (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        (Activation::Gelu, |x| x * (1.0 + erf(x / 2.0_f64.sqrt())) / 2.0),
        (Activation::GeluTanh, |x| {
            x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()) / 2.0
        }),
        (Activation::Relu, |x| x.max(0.0)),
        (Activation::SquaredRelu, |x| x.max(0.0).powi(2)),
    ];
    let (activation, definition) = definitions[draws.random_range(0..definitions.len())];
    let (rows, cols) = (size(draws, 5), size(draws, 200));
    let x = Framed::filled(draws, rows, 2 * cols);
    let mut out = Framed::new(draws, rows, cols);
    activation::gated(context, activation, x.view(), out.view_mut()).expect("shapes fit");
    let gated = |x: &Vec<f64>| (0..cols).map(|i| definition(x[i]) * x[cols + i]).collect::<Vec<_>>();
    out.check(&x.rows().iter().flat_map(gated).collect::<Vec<_>>(), 1e-6, "gated");

    let mut out = Framed::new(draws, rows, 2 * cols);
    activation::activate(context, activation, x.view(), out.view_mut()).expect("shapes fit");
    let want: Vec<f64> = x.rows().concat().into_iter().map(definition).collect();
    out.check(&want, 1e-6, "activate");

    let mut sum = Framed::filled(draws, rows, 2 * cols);
    let want: Vec<f64> =
        sum.rows().concat().iter().zip(x.rows().concat()).map(|(a, b)| f64::from((a + b) as f32)).collect();
    activation::add(context, sum.view_mut(), x.view()).expect("shapes fit");
    sum.check(&want, 0.0, "add");
}

fn turn(context: &Context, draws: &mut Draws) {
    let (rows, heads, half) = (size(draws, 5), size(draws, 4), size(draws, 40));
    let head_dim = 2 * half + draws.random_range(0..5);
    let (cos, sin) =
        (tensor(&mut draws.values, 9, half, DType::F32), tensor(&mut draws.values, 9, half, DType::F32));
    let positions: Vec<u32> = (0..rows).map(|_| draws.random_range(0..9)).collect();
    for pairs in [RotaryPairs::HalfApart, RotaryPairs::Adjacent] {
        let mut x = Framed::filled(draws, rows, heads * head_dim);
        let mut want = x.rows();
        for (row, &position) in want.iter_mut().zip(&positions) {
            let (cos, sin) = (f64s(&cos, position as usize), f64s(&sin, position as usize));
            for head in row.chunks_mut(head_dim) {
                for pair in 0..half {
                    let (i, j) = match pairs {
                        RotaryPairs::HalfApart => (pair, half + pair),
                        RotaryPairs::Adjacent => (2 * pair, 2 * pair + 1),
                    };
                    let (a, b) = (head[i], head[j]);
                    (head[i], head[j]) = (a * cos[pair] - b * sin[pair], b * cos[pair] + a * sin[pair]);
                }
            }
        }
        let tables = RotaryTables { cos: &cos, sin: &sin, pairs };
        let ids = View::from_slice(&positions, 1, rows);
        rotary::rotary(context, x.view_mut(), head_dim, ids, tables).expect("shapes fit");
        x.check(&want.concat(), 1e-6, "rotary");
    }
}

fn embed(context: &Context, draws: &mut Draws) {
    let (rows, cols, vocab) = (size(draws, 9), size(draws, 100), size(draws, 20));
    for dtype in FLOATS {
        let table =
            tensor(&mut draws.values, vocab, cols + 3, dtype).narrow_cols(draws.random_range(0..=3), cols);
        let ids: Vec<u32> = (0..rows).map(|_| draws.random_range(0..2 * vocab as u32)).collect();
        let first_id = draws.random_range(0..vocab as u32);
        let mut out = Framed::new(draws, rows, cols);
        embedding::embedding(context, View::from_slice(&ids, 1, rows), &table, first_id, out.view_mut())
            .expect("shapes fit");
        let want: Vec<f64> = ids
            .iter()
            .flat_map(|&id| match id.checked_sub(first_id) {
                Some(id) if (id as usize) < vocab => f64s(&table, id as usize),
                _ => vec![0.0; cols],
            })
            .collect();
        out.check(&want, 0.0, "embedding");
    }
}

fn gather(context: &Context, draws: &mut Draws) {
    let (rows, cols, from) = (size(draws, 9), size(draws, 100), size(draws, 20));
    let x = Framed::filled(draws, from, cols);
    let ids: Vec<u32> = (0..rows).map(|_| draws.random_range(0..from as u32)).collect();
    let mut out = Framed::new(draws, rows, cols);
    embedding::gather_rows(context, x.view(), View::from_slice(&ids, 1, rows), out.view_mut())
        .expect("shapes fit");
    let rows = x.rows();
    out.check(&ids.iter().flat_map(|&id| rows[id as usize].clone()).collect::<Vec<_>>(), 0.0, "gather_rows");
}

/// What every CPU multiplies as it is: where one multiplies in bf16, it rounds x first.
fn in_bf16(draws: &mut Draws, rows: usize, k: usize) -> Framed {
    let mut x = Framed::filled(draws, rows, k);
    for value in x.whole.as_mut_slice::<f32>() {
        *value = bf16::from_f32(*value).to_f32();
    }
    x
}

fn product(context: &Context, draws: &mut Draws) {
    let (rows, k) = (size(draws, 80), size(draws, 90));
    let x = in_bf16(draws, rows, k);
    for dtype in FLOATS {
        let outputs = [size(draws, 30), size(draws, 9)];
        let left = draws.random_range(0..=2);
        let weights = outputs.map(|n| tensor(&mut draws.values, n, k + 2, dtype).narrow_cols(left, k));
        let bias = tensor(&mut draws.values, 1, outputs[1], DType::F32);
        let mut out = Framed::new(draws, rows, outputs[0] + outputs[1]);
        let parts = [
            LinearPart { weight: Weight::Dense(&weights[0]), bias: None },
            LinearPart { weight: Weight::Dense(&weights[1]), bias: Some(&bias) },
        ];
        linear(context, x.view(), &parts, out.view_mut()).expect("shapes fit");
        let mut want = Vec::new();
        for x in x.rows() {
            let dot = |w: Vec<f64>| w.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>();
            want.extend((0..outputs[0]).map(|n| dot(f64s(&weights[0], n))));
            let bias = f64s(&bias, 0);
            want.extend((0..outputs[1]).map(|n| dot(f64s(&weights[1], n)) + bias[n]));
        }
        out.check(&want, 1e-5, "linear");

        let mut sum = Framed::filled(draws, rows, outputs[0] + outputs[1]);
        let before = sum.rows().concat();
        linear_add(context, x.view(), &parts, sum.view_mut()).expect("shapes fit");
        let want: Vec<f64> = want.iter().zip(before).map(|(product, before)| product + before).collect();
        sum.check(&want, 1e-5, "linear_add");
    }
}

/// A weight `[n, k]` of any layout with gaps between its rows, and its values.
struct AnyWeight {
    dense: Option<Tensor>,
    int8: Option<Int8Weight>,
    values: Vec<Vec<f64>>,
}

impl AnyWeight {
    fn new(draws: &mut Draws, n: usize, k: usize) -> Self {
        let left = draws.random_range(0..=2);
        if let Some(&dtype) = FLOATS.get(draws.random_range(0..=FLOATS.len())) {
            let weight = tensor(&mut draws.values, n, k + 2, dtype).narrow_cols(left, k);
            let values = (0..n).map(|row| f64s(&weight, row)).collect();
            return Self { dense: Some(weight), int8: None, values };
        }
        let ints: Vec<u8> = (0..n * (k + 2)).map(|_| draws.values.random()).collect();
        let scales = tensor(&mut draws.values, 1, n, DType::F32);
        let value = |row: usize, i: usize| {
            f64::from(ints[row * (k + 2) + left + i].cast_signed()) * f64::from(scales.as_slice::<f32>()[row])
        };
        let values = (0..n).map(|row| (0..k).map(|i| value(row, i)).collect()).collect();
        let whole = Int8Weight::new(Tensor::from_slice(&ints, n, k + 2), scales).expect("shapes fit");
        Self { dense: None, int8: Some(whole.narrow_cols(left, k)), values }
    }

    fn weight(&self) -> Weight<'_> {
        let int8 = || Weight::Int8(self.int8.as_ref().expect("one of both"));
        self.dense.as_ref().map_or_else(int8, Weight::Dense)
    }

    fn dot(&self, row: usize, x: &[f64]) -> f64 {
        self.values[row].iter().zip(x).map(|(w, x)| w * x).sum()
    }
}

fn gated_product(context: &Context, draws: &mut Draws) {
    let (rows, k, n) = (size(draws, 80), size(draws, 90), size(draws, 40));
    let x = in_bf16(draws, rows, k);
    let [gate, up] = [(); 2].map(|()| AnyWeight::new(draws, n, k));
    let bias = tensor(&mut draws.values, 1, n, DType::F32);
    let (mut gate_up, mut out) = (Framed::new(draws, rows, 2 * n), Framed::new(draws, rows, n));
    let layer = GatedLinear {
        gate: LinearPart { weight: gate.weight(), bias: None },
        up: LinearPart { weight: up.weight(), bias: Some(&bias) },
        activation: Activation::Relu,
    };
    linear_gated(context, x.view(), layer, gate_up.view_mut(), out.view_mut()).expect("shapes fit");
    let bias = f64s(&bias, 0);
    let gated =
        |x: &Vec<f64>| (0..n).map(|i| gate.dot(i, x).max(0.0) * (up.dot(i, x) + bias[i])).collect::<Vec<_>>();
    out.check(&x.rows().iter().flat_map(gated).collect::<Vec<_>>(), 1e-5, "gated linear");
    gate_up.check_frame("gated linear");
}

/// Rows of some experts and, behind them, of none.
fn experts_products(context: &Context, draws: &mut Draws) {
    let (rows, k, n, num_experts) = (size(draws, 60), size(draws, 70), size(draws, 20), size(draws, 6));
    let x = in_bf16(draws, rows, k);
    let weight = AnyWeight::new(draws, num_experts * n, k);
    let mut starts: Vec<u32> = (0..num_experts).map(|_| draws.random_range(0..=rows as u32)).collect();
    starts.push(0);
    starts.sort_unstable();
    let mut out = Framed::filled(draws, rows, n);
    let mut want = out.rows();
    for (expert, bounds) in starts.windows(2).enumerate() {
        let own = bounds[0] as usize..bounds[1] as usize;
        for (want, x) in want[own.clone()].iter_mut().zip(&x.rows()[own]) {
            *want = (0..n).map(|i| weight.dot(expert * n + i, x)).collect();
        }
    }
    let experts = Experts { weight: weight.weight(), starts: View::from_slice(&starts, 1, num_experts + 1) };
    linear_grouped(context, x.view(), experts, out.view_mut()).expect("shapes fit");
    out.check(&want.concat(), 1e-5, "experts' linear");
}

/// Against the operations that it is made of.
fn turn_and_write(context: &Context, draws: &mut Draws) {
    let (rows, kv_heads, group) = (size(draws, 6), size(draws, 3), size(draws, 4));
    let (half, block_size) = (size(draws, 40), size(draws, 20));
    let head_dim = 2 * half + draws.random_range(0..4);
    let (query, key) = (kv_heads * group * head_dim, kv_heads * head_dim);
    let angles = [(); 2].map(|()| tensor(&mut draws.values, 9, half, DType::F32));
    let weights = [(); 2].map(|()| tensor(&mut draws.values, 1, head_dim, DType::F32));
    let norms =
        draws.random_bool(0.5).then_some(HeadNorms { query: &weights[0], key: &weights[1], eps: 1e-3 });
    let pairs = [RotaryPairs::HalfApart, RotaryPairs::Adjacent][draws.random_range(0..2)];
    let tables = RotaryTables { cos: &angles[0], sin: &angles[1], pairs };
    let positions: Vec<u32> = (0..rows).map(|_| draws.random_range(0..9)).collect();
    let positions = View::from_slice(&positions, 1, rows);
    let num_blocks = rows.div_ceil(block_size) + 1;
    let mut slots: Vec<u32> = (0..(num_blocks * block_size) as u32).collect();
    slots.shuffle(&mut draws.values);
    let slots = View::from_slice(&slots[..rows], 1, rows);
    let dtype = FLOATS[draws.random_range(0..3)];
    let cache =
        || KvLayer::new(context, num_blocks, kv_heads, block_size, head_dim, dtype).expect("a float type");
    let (mut got, mut want) = (cache(), cache());
    let mut qkv = Framed::filled(draws, rows, query + 2 * key);
    let mut apart = Tensor::from_slice(&qkv.values(), rows, query + 2 * key);
    rotary_write_kv(context, qkv.view_mut(), norms, RotaryAndPages { positions, tables, slots }, &mut got)
        .expect("shapes fit");

    if let Some(HeadNorms { query: of_query, key: of_key, eps }) = norms {
        norm::rms_norm_heads(context, apart.view_mut().narrow_cols(0, query), of_query, eps)
            .expect("shapes fit");
        norm::rms_norm_heads(context, apart.view_mut().narrow_cols(query, key), of_key, eps)
            .expect("shapes fit");
    }
    for (start, cols) in [(0, query), (query, key)] {
        rotary::rotary(context, apart.view_mut().narrow_cols(start, cols), head_dim, positions, tables)
            .expect("shapes fit");
    }
    let [keys, values] = [query, query + key].map(|start| apart.view().narrow_cols(start, key));
    write_kv(context, keys, values, slots, &mut want).expect("shapes fit");
    qkv.check_frame("what comes before attention");
    for row in 0..rows {
        let (got, want) = (qkv.view().row::<f32>(row), apart.view().row::<f32>(row));
        assert_same_bits(&got[..query], &want[..query], "queries");
    }
    for (got, want) in got.pages().into_iter().zip(want.pages()) {
        for row in 0..got.rows() {
            let [got, want] = [got, want].map(|pages| pages.row_f32(row).expect("a float type"));
            assert_same_bits(&got, &want, "keys and values");
        }
    }
}

fn attend(context: &Context, draws: &mut Draws) {
    /// A power of two, so that scaled queries in bf16 are those that were drawn.
    const SCALE: f32 = 0.25;
    let (kv_heads, group) = (size(draws, 3), size(draws, 9));
    // Half of them of whole tiles, which a CPU may multiply in bf16.
    let whole_tiles = draws.random_bool(0.5);
    let (head_dim, block_size) = if whole_tiles {
        (32 * draws.random_range(1..=4), 32 * draws.random_range(1..=2))
    } else {
        (size(draws, 70), size(draws, 40))
    };
    let len = size(draws, 150);
    let rows = draws.random_range(1..=len);
    let num_blocks = len.div_ceil(block_size);
    let window = [None, Some(draws.random_range(1..=len))][draws.random_range(0..2)];
    let soft_cap = draws.random_bool(0.5).then(|| draws.random_range(0.5..30.0_f32));
    let mut of_heads = || -> Option<Vec<f32>> {
        let heads = 0..kv_heads * group;
        draws.random_bool(0.5).then(|| heads.map(|_| draws.values.random_range(0.0..1.0)).collect())
    };
    let (slopes, sinks) = (of_heads(), of_heads());
    let kv_cols = kv_heads * head_dim;
    for dtype in FLOATS {
        let (keys, values) = (Framed::filled(draws, len, kv_cols), Framed::filled(draws, len, kv_cols));
        let mut cache =
            KvLayer::new(context, num_blocks, kv_heads, block_size, head_dim, dtype).expect("a float type");
        // Backwards, so that neighbours are not.
        let table: Vec<u32> = (0..num_blocks as u32).rev().collect();
        let slot = |p: usize| table[p / block_size] * block_size as u32 + (p % block_size) as u32;
        let slots: Vec<u32> = (0..len).map(slot).collect();
        write_kv(context, keys.view(), values.view(), View::from_slice(&slots, 1, len), &mut cache)
            .expect("shapes fit");
        let query = in_bf16(draws, rows, group * kv_cols);
        let mut out = Framed::new(draws, rows, group * kv_cols);
        let (query_starts, kv_lens) = ([0, rows as u32], [len as u32]);
        let batch = AttentionBatch::from_slices(&query_starts, &kv_lens, &table, num_blocks);
        let heads = kv_heads * group;
        let params = AttentionParams {
            window,
            soft_cap,
            alibi_slopes: slopes.as_ref().map(|slopes| View::from_slice(slopes, 1, heads)),
            sinks: sinks.as_ref().map(|sinks| View::from_slice(sinks, 1, heads)),
            ..AttentionParams::new(SCALE)
        };
        paged_attention(context, query.view(), &cache, &batch, params, out.view_mut()).expect("shapes fit");
        let rounded = |framed: &Framed| -> Vec<Vec<f64>> {
            let stored = Tensor::from_slice(&framed.values(), len, kv_cols);
            let stored = stored.to_dtype(dtype).expect("a float type");
            (0..len).map(|row| f64s(&stored, row)).collect()
        };
        let (keys, values) = (rounded(&keys), rounded(&values));
        let mut want = Vec::new();
        for (row, query) in query.rows().iter().enumerate() {
            let position = len - rows + row;
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            for (head, query) in query.chunks(head_dim).enumerate() {
                let columns = head / group * head_dim..(head / group + 1) * head_dim;
                let score = |p: usize| -> f64 {
                    let product = query.iter().zip(&keys[p][columns.clone()]).map(|(q, k)| q * k);
                    let score = f64::from(SCALE) * product.sum::<f64>();
                    let capped = soft_cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh());
                    let slope = slopes.as_ref().map_or(0.0, |slopes| f64::from(slopes[head]));
                    capped + slope * (p as f64 - position as f64)
                };
                let scores: Vec<f64> = (first..=position).map(score).collect();
                let sink = sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let max = scores.iter().copied().fold(sink, f64::max);
                let total = (sink - max).exp() + scores.iter().map(|score| (score - max).exp()).sum::<f64>();
                for column in columns.clone() {
                    let weighted = scores.iter().zip(first..);
                    want.push(
                        weighted.map(|(score, p)| (score - max).exp() / total * values[p][column]).sum(),
                    );
                }
            }
        }
        // Scores up to a hundred are good to a few units of 2^-24, and so relative to themselves are their exponentials. Weights
        // in bf16 are off by up to 2^-9 of themselves, and values are up to 2.
        let in_tiles = head_dim.is_multiple_of(32) && block_size.is_multiple_of(32) && dtype == DType::BF16;
        let in_tiles = in_tiles && context.device_name().contains("Amx");
        out.check(&want, if in_tiles { 2.0_f64.powi(-8) } else { 5e-5 }, "attention");
    }
}

fn int8_product(context: &Context, draws: &mut Draws) {
    let (rows, k, n) = (size(draws, 80), size(draws, 90), size(draws, 40));
    let left = draws.random_range(0..=2);
    let values: Vec<u8> = (0..n * (k + 2)).map(|_| draws.values.random()).collect();
    let scales = tensor(&mut draws.values, 1, n, DType::F32);
    let whole = Int8Weight::new(Tensor::from_slice(&values, n, k + 2), scales.clone()).expect("shapes fit");
    let weight = whole.narrow_cols(left, k);
    let (x, bias) = (Framed::filled(draws, rows, k), tensor(&mut draws.values, 1, n, DType::F32));
    let mut out = Framed::new(draws, rows, n);
    let part = LinearPart { weight: Weight::Int8(&weight), bias: Some(&bias) };
    linear(context, x.view(), &[part], out.view_mut()).expect("shapes fit");
    let (scales, bias) = (f64s(&scales, 0), f64s(&bias, 0));
    let mut want = Vec::new();
    for x in x.rows() {
        want.extend((0..n).map(|n| {
            let row = &values[n * (k + 2) + left..][..k];
            let sum: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(w.cast_signed()) * x).sum();
            scales[n] * sum + bias[n]
        }));
    }
    out.check(&want, 1e-5, "int8 linear");
}

/// Each expert multiplies with its number plus one.
fn experts(context: &Context, draws: &mut Draws) {
    let (rows, cols, num_experts) = (size(draws, 20), size(draws, 100), size(draws, 30));
    let top_k =
        TopK { experts_per_row: draws.random_range(1..=num_experts), renormalize: draws.random_bool(0.5) };
    let (router, x) = (Framed::filled(draws, rows, num_experts), Framed::filled(draws, rows, cols));
    let mut routing = Routing::default();
    routing.route(context, router.view(), top_k).expect("shapes fit");
    let mut gathered = Framed::new(draws, rows * top_k.experts_per_row, cols);
    routing.gather(context, x.view(), gathered.view_mut()).expect("shapes fit");
    let [top, left, ..] = gathered.place;
    let stride = gathered.whole.cols();
    for expert in 0..num_experts {
        for slot in routing.slots(expert) {
            let row = &mut gathered.whole.as_mut_slice::<f32>()[(top + slot) * stride + left..][..cols];
            for value in row {
                *value *= (expert + 1) as f32;
            }
        }
    }
    let mut out = Framed::new(draws, rows, cols);
    routing.combine(context, gathered.view(), out.view_mut()).expect("shapes fit");
    let mut want = Vec::new();
    for (logits, x) in router.rows().iter().zip(x.rows()) {
        let mut order: Vec<usize> = (0..num_experts).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let chosen = &order[..top_k.experts_per_row];
        let sum_of = |experts: &[usize]| experts.iter().map(|&e| logits[e].exp()).sum::<f64>();
        let total = if top_k.renormalize { sum_of(chosen) } else { sum_of(&order) };
        let factor: f64 = chosen.iter().map(|&e| logits[e].exp() / total * (e + 1) as f64).sum();
        want.extend(x.iter().map(|x| factor * x));
    }
    out.check(&want, 1e-5, "experts");
}

fn distribution(_: &Context, draws: &mut Draws) {
    let len = size(draws, 3000);
    let row = Framed::filled(draws, 1, len).values();
    let greatest = logits::greatest(&row);
    let first = row.iter().position(|&logit| logit.to_bits() == greatest.logit.to_bits());
    assert!(row.iter().all(|&logit| logit <= greatest.logit) && first == Some(greatest.index));
    let want: Vec<f64> =
        row.iter().map(|&logit| (f64::from(logit) - f64::from(greatest.logit)).exp()).collect();
    let mut weights = vec![0.0; row.len()];
    logits::weights(&row, greatest.logit, &mut weights);
    assert_close(&weights, &want, 1e-6, "weights");
    let total: f64 = want.iter().sum();
    assert!((logits::sum_of_exp(&row, greatest.logit) - total).abs() <= 1e-6 * total, "sum of exponentials");
}

/// Rows of some adapters, each of which changes some of the layers.
fn low_rank_change(context: &Context, draws: &mut Draws) {
    let (rows, k) = (size(draws, 24), size(draws, 90));
    let outputs: Vec<usize> = (0..draws.random_range(1..=3)).map(|_| size(draws, 40)).collect();
    let dtype = FLOATS[draws.random_range(0..3)];
    let left = draws.random_range(0..=2);
    let mut adapters = Vec::new();
    for _ in 0..draws.random_range(1..=3) {
        let mut part = |n: usize| {
            let rank = size(draws, 40);
            let mut factor =
                |rows, cols| tensor(&mut draws.values, rows, cols + 2, dtype).narrow_cols(left, cols);
            let (a, b) = (factor(rank, k), factor(n, rank));
            draws.random_bool(0.8).then_some(LowRank { a, b, scale: 0.5 })
        };
        adapters.push(outputs.iter().map(|&n| part(n)).collect::<Vec<_>>());
    }
    let lora = Lora::new(context, k, &outputs, adapters.clone()).expect("shapes fit");
    let slots: Vec<u32> = (0..rows)
        .map(|_| match draws.random_range(0..=adapters.len()) {
            0 => NO_ADAPTER,
            slot => slot as u32 - 1,
        })
        .collect();
    let x = Framed::filled(draws, rows, k);
    let mut hidden = Framed::new(draws, rows, lora.hidden_cols());
    let mut out = Framed::filled(draws, rows, outputs.iter().sum());
    let mut want = out.rows();
    for (row, &slot) in slots.iter().enumerate() {
        let Some(adapter) = adapters.get(slot as usize) else { continue };
        let dot = |w: Vec<f64>, x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let (x, mut column) = (&x.rows()[row], 0);
        for (part, &n) in adapter.iter().zip(&outputs) {
            if let Some(LowRank { a, b, .. }) = part {
                let between: Vec<f64> = (0..a.rows()).map(|j| dot(f64s(a, j), x)).collect();
                (0..n).for_each(|i| want[row][column + i] += 0.5 * dot(f64s(b, i), &between));
            }
            column += n;
        }
    }
    let known = AdapterRows { slots: View::from_slice(&slots, 1, rows), any: true };
    lora_add(context, x.view(), &lora, known, hidden.view_mut(), out.view_mut()).expect("shapes fit");
    // Where the CPU multiplies in bf16, x and what lies between the factors are rounded to it.
    let rounding = if dtype == DType::BF16 { 2.0_f64.powi(-7) } else { 1e-5 };
    out.check(&want.concat(), rounding, "lora");
    hidden.check_frame("lora");
}
