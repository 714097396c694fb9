//! Operations that work on each row by itself: norms, rotary, activations, embedding.

mod common;

use candle_core::{D, Device};
use common::{FLOATS, assert_close, assert_same_bits, contexts, levels, rng, tensor, uniform};
use kernels::ops::activation::{self, Activation};
use kernels::ops::norm::LayerNormWeights;
use kernels::ops::rotary::{RotaryPairs, RotaryTables};
use kernels::ops::{embedding, norm, rotary};
use kernels::{Context, DType, Error, Tensor, View};

/// Widths with and without a tail.
const WIDTHS: [usize; 6] = [1, 15, 16, 17, 64, 1000];
const EPS: f32 = 1e-5;

fn as_f64(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn rms_norm_reference(x: &[f32], weight: &[f32]) -> Vec<f64> {
    let x = as_f64(x);
    let rms = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / rms * f64::from(*w)).collect()
}

#[test]
fn rms_norm_matches_the_reference_alone_with_a_sum_and_by_heads() {
    let mut rng = rng(1);
    for context in levels() {
        for cols in WIDTHS {
            let rows = 3;
            let [x, residual] = [(); 2].map(|()| uniform(&mut rng, rows * cols));
            let weight = tensor(&mut rng, 1, cols, DType::F32);
            let w = weight.as_slice::<f32>();
            let want: Vec<f64> = x.chunks(cols).flat_map(|x| rms_norm_reference(x, w)).collect();
            let x = Tensor::from_slice(&x, rows, cols);
            let mut out = Tensor::zeros(rows, cols, DType::F32);
            norm::rms_norm(&context, x.view(), &weight, EPS, out.view_mut()).expect("shapes fit");
            // A value is at most sqrt(cols); a few roundings of it.
            let tolerance = 8.0 * f64::from(f32::EPSILON) * (cols as f64).sqrt();
            assert_close(out.as_slice(), &want, tolerance, "rms_norm");

            // The heads of one wide row are the rows of the matrix.
            let mut heads = Tensor::from_slice(x.as_slice::<f32>(), 1, rows * cols);
            norm::rms_norm_heads(&context, heads.view_mut(), &weight, EPS).expect("shapes fit");
            assert_same_bits(heads.as_slice(), out.as_slice(), "rms_norm_heads");

            let sum: Vec<f32> = residual.iter().zip(x.as_slice::<f32>()).map(|(r, x)| r + x).collect();
            let mut residual = Tensor::from_slice(&residual, rows, cols);
            norm::add_rms_norm(&context, residual.view_mut(), x.view(), &weight, EPS, out.view_mut())
                .expect("shapes fit");
            assert_same_bits(residual.as_slice(), &sum, "residual");
            let want: Vec<f64> = sum.chunks(cols).flat_map(|x| rms_norm_reference(x, w)).collect();
            assert_close(out.as_slice(), &want, tolerance, "add_rms_norm");
        }
    }
}

#[test]
fn silu_mul_matches_the_reference_and_candle() {
    let mut rng = rng(2);
    for context in levels() {
        for cols in WIDTHS {
            let gate_up: Vec<f32> = uniform(&mut rng, 4 * cols).iter().map(|v| v * 20.0).collect();
            let mut out = Tensor::zeros(2, cols, DType::F32);
            activation::silu_mul(&context, View::from_slice(&gate_up, 2, 2 * cols), out.view_mut())
                .expect("shapes fit");
            let want: Vec<f64> = gate_up
                .chunks(2 * cols)
                .flat_map(|row| {
                    let (gate, up) = row.split_at(cols);
                    let silu = |g: f32| f64::from(g) / (1.0 + (-f64::from(g)).exp());
                    gate.iter().zip(up).map(|(&g, &u)| silu(g) * f64::from(u)).collect::<Vec<f64>>()
                })
                .collect();
            // Values up to 400, a few roundings.
            assert_close(out.as_slice(), &want, 400.0 * 4.0 * f64::from(f32::EPSILON), "silu_mul");
            let candle =
                candle_core::Tensor::from_slice(&gate_up, (2, 2, cols), &Device::Cpu).expect("a tensor");
            let gate = candle.narrow(1, 0, 1).and_then(|gate| gate.silu()).expect("a tensor");
            let product = gate.mul(&candle.narrow(1, 1, 1).expect("a half")).and_then(|t| t.flatten_all());
            let want = as_f64(&product.and_then(|t| t.to_vec1::<f32>()).expect("values"));
            assert_close(out.as_slice(), &want, 400.0 * 8.0 * f64::from(f32::EPSILON), "candle");
        }
    }
}

/// The error function by its series, exact to f64 for the arguments here.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn layer_norm_matches_the_reference_with_and_without_bias_and_sum() {
    let mut rng = rng(10);
    for context in levels() {
        for cols in WIDTHS {
            let (x, residual) =
                (tensor(&mut rng, 3, cols, DType::F32), tensor(&mut rng, 3, cols, DType::F32));
            let (weight, bias) =
                (tensor(&mut rng, 1, cols, DType::F32), tensor(&mut rng, 1, cols, DType::F32));
            let reference = |x: &[f32], bias: Option<&Tensor>| -> Vec<f64> {
                let x = as_f64(x);
                let mean = x.iter().sum::<f64>() / cols as f64;
                let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / cols as f64;
                let scale = 1.0 / (variance + f64::from(EPS)).sqrt();
                let bias = bias.map_or(vec![0.0; cols], |bias| as_f64(bias.as_slice()));
                let weight = as_f64(weight.as_slice());
                x.iter().zip(weight.iter().zip(bias)).map(|(x, (w, b))| (x - mean) * scale * w + b).collect()
            };
            // A value is at most sqrt(cols), and 1 / sqrt(eps) = 316 times the mean's rounding where all are equal.
            let tolerance = 40.0 * f64::from(f32::EPSILON) * (cols as f64).sqrt();
            for bias in [None, Some(&bias)] {
                let weights = LayerNormWeights { weight: &weight, bias, eps: EPS };
                let mut out = Tensor::zeros(3, cols, DType::F32);
                norm::layer_norm(&context, x.view(), weights, out.view_mut()).expect("shapes fit");
                let want: Vec<f64> =
                    x.as_slice::<f32>().chunks(cols).flat_map(|x| reference(x, bias)).collect();
                assert_close(out.as_slice(), &want, tolerance, "layer_norm");

                let mut sum = Tensor::from_slice(residual.as_slice::<f32>(), 3, cols);
                norm::add_layer_norm(&context, sum.view_mut(), x.view(), weights, out.view_mut())
                    .expect("shapes fit");
                let added = residual.as_slice::<f32>().iter().zip(x.as_slice::<f32>()).map(|(r, x)| r + x);
                assert_same_bits(sum.as_slice(), &added.collect::<Vec<f32>>(), "residual");
                let want: Vec<f64> =
                    sum.as_slice::<f32>().chunks(cols).flat_map(|x| reference(x, bias)).collect();
                assert_close(out.as_slice(), &want, tolerance, "add_layer_norm");
            }
        }
    }
}

#[test]
fn activations_match_their_definitions_plain_and_gated() {
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
    let mut rng = rng(9);
    for context in levels() {
        for ((activation, definition), cols) in
            definitions.into_iter().flat_map(|definition| WIDTHS.map(|cols| (definition, cols)))
        {
            let x: Vec<f32> = uniform(&mut rng, 3 * 2 * cols).iter().map(|v| v * 6.0).collect();
            let wide = View::from_slice(&x, 3, 2 * cols);
            let mut out = Tensor::zeros(3, 2 * cols, DType::F32);
            activation::activate(&context, activation, wide, out.view_mut()).expect("shapes fit");
            let want: Vec<f64> = x.iter().map(|&x| definition(f64::from(x))).collect();
            // Values up to 36; functions of -1 to 1 are good to a few units of 2^-24, and are multiplied by up to 6.
            assert_close(out.as_slice(), &want, 36.0 * 2e-7, &format!("{activation:?}"));

            let mut out = Tensor::zeros(3, cols, DType::F32);
            activation::gated(&context, activation, wide, out.view_mut()).expect("shapes fit");
            let gated = x.chunks(2 * cols).zip(want.chunks(2 * cols));
            let want: Vec<f64> = gated
                .flat_map(|(x, activated)| {
                    x[cols..].iter().zip(&activated[..cols]).map(|(&up, gate)| f64::from(up) * gate)
                })
                .collect();
            assert_close(out.as_slice(), &want, 6.0 * 36.0 * 2e-7, &format!("gated {activation:?}"));
        }
    }
}

#[test]
fn add_sums_strided_rows() {
    let mut rng = rng(3);
    let (mut x, y) = (tensor(&mut rng, 5, 40, DType::F32), tensor(&mut rng, 5, 60, DType::F32));
    let before = x.as_slice::<f32>().to_vec();
    activation::add(&Context::cpu(1), x.view_mut().narrow_cols(7, 20), y.view().narrow_cols(9, 20))
        .expect("shapes fit");
    for (i, (&after, before)) in x.as_slice::<f32>().iter().zip(before).enumerate() {
        let (row, col) = (i / 40, i % 40);
        let inside = (7..27).contains(&col);
        let want = if inside { before + y.view().row::<f32>(row)[col + 2] } else { before };
        assert_eq!(after.to_bits(), want.to_bits());
    }
}

#[test]
fn rotary_turns_pairs_by_their_angle_and_leaves_the_rest() {
    let mut rng = rng(4);
    for context in levels() {
        for (head_dim, half) in [(2, 1), (16, 8), (64, 32), (80, 16), (96, 48), (10, 5)] {
            let (rows, heads, positions) = (3, 2, [5_u32, 0, 19]);
            let angles: Vec<f64> =
                (0..20 * half).map(|i| (i / half) as f64 * 0.7_f64.powi((i % half) as i32)).collect();
            let table = |f: fn(f64) -> f64| {
                Tensor::from_slice(&angles.iter().map(|&a| f(a) as f32).collect::<Vec<f32>>(), 20, half)
            };
            let before = uniform(&mut rng, rows * heads * head_dim);
            let mut x = Tensor::from_slice(&before, rows, heads * head_dim);
            let ids = View::from_slice(&positions, 1, rows);
            let (cos, sin) = (table(f64::cos), table(f64::sin));
            let mut adjacent = Tensor::from_slice(&before, rows, heads * head_dim);
            for (x, pairs) in [(&mut x, RotaryPairs::HalfApart), (&mut adjacent, RotaryPairs::Adjacent)] {
                let tables = RotaryTables { cos: &cos, sin: &sin, pairs };
                rotary::rotary(&context, x.view_mut(), head_dim, ids, tables).expect("shapes fit");
            }
            let mut want = as_f64(&before);
            let mut want_adjacent = want.clone();
            for i in 0..rows * heads {
                for pair in 0..half {
                    let (sin, cos) = angles[positions[i / heads] as usize * half + pair].sin_cos();
                    let turn = |head: &mut [f64], first: usize, second: usize| {
                        let (a, b) = (head[first], head[second]);
                        (head[first], head[second]) = (a * cos - b * sin, b * cos + a * sin);
                    };
                    turn(&mut want[i * head_dim..], pair, half + pair);
                    turn(&mut want_adjacent[i * head_dim..], 2 * pair, 2 * pair + 1);
                }
            }
            assert_close(adjacent.as_slice(), &want_adjacent, 4.0 * f64::from(f32::EPSILON), "adjacent");
            assert_close(x.as_slice(), &want, 4.0 * f64::from(f32::EPSILON), "rotary");
        }
    }
}

#[test]
fn embedding_gives_this_ranks_rows_exactly_and_zeros_for_others() {
    let mut rng = rng(5);
    for context in levels() {
        for dtype in FLOATS {
            for cols in WIDTHS {
                let table = tensor(&mut rng, 10, cols, dtype);
                let ids = [100_u32, 109, 99, 110, 103, 0, u32::MAX];
                let mut out = Tensor::from_slice(&vec![1.0_f32; 7 * cols], 7, cols);
                embedding::embedding(&context, View::from_slice(&ids, 1, 7), &table, 100, out.view_mut())
                    .expect("shapes fit");
                for (row, id) in ids.into_iter().enumerate() {
                    let want = match id {
                        100..110 => table.view().row_f32(id as usize - 100).expect("a float type"),
                        _ => vec![0.0; cols],
                    };
                    assert_same_bits(out.view().row(row), &want, "embedding");
                }
            }
        }
    }
}

#[test]
fn gathered_rows_are_copies() {
    let x = tensor(&mut rng(6), 6, 33, DType::F32);
    let mut out = Tensor::zeros(4, 33, DType::F32);
    let rows = [5_u32, 0, 5, 2];
    embedding::gather_rows(&Context::cpu(1), x.view(), View::from_slice(&rows, 1, 4), out.view_mut())
        .expect("shapes fit");
    for (i, row) in rows.into_iter().enumerate() {
        assert_same_bits(out.view().row(i), x.view().row(row as usize), "row");
    }
}

/// Weights, biases and tables of [`operations`].
struct Constants {
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    table: Tensor,
}

const COLS: usize = 1004;
const HEAD_DIM: usize = 251;

impl Constants {
    fn random() -> Self {
        let mut rng = rng(7);
        let mut random = |rows, cols| tensor(&mut rng, rows, cols, DType::F32);
        Self {
            weight: random(1, COLS),
            bias: random(1, COLS),
            head_weight: random(1, HEAD_DIM),
            cos: random(40, 125),
            sin: random(40, 125),
            table: random(40, COLS),
        }
    }
}

/// Every operation that works on rows by themselves: what each makes of `x`, `[rows, COLS]`, whose rows have these ids.
fn operations(
    context: &Context,
    x: View<'_>,
    ids: &[u32],
    constants: &Constants,
) -> Vec<(&'static str, Vec<f32>)> {
    let Constants { weight, bias, head_weight, cos, sin, table } = constants;
    let rows = x.rows();
    let copy = || {
        Tensor::from_slice(&(0..rows).flat_map(|i| x.row::<f32>(i).to_vec()).collect::<Vec<_>>(), rows, COLS)
    };
    let ids = View::from_slice(ids, 1, rows);
    let layer = LayerNormWeights { weight, bias: Some(bias), eps: EPS };
    let mut results = Vec::new();
    let mut note = |name, out: &Tensor| results.push((name, out.as_slice::<f32>().to_vec()));
    let (mut out, mut half) = (copy(), Tensor::zeros(rows, COLS / 2, DType::F32));
    norm::rms_norm(context, x, weight, EPS, out.view_mut()).expect("shapes fit");
    note("rms_norm", &out);
    let mut sum = copy();
    norm::add_rms_norm(context, sum.view_mut(), x, weight, EPS, out.view_mut()).expect("shapes fit");
    note("add_rms_norm", &out);
    note("its sum", &sum);
    norm::layer_norm(context, x, layer, out.view_mut()).expect("shapes fit");
    note("layer_norm", &out);
    norm::add_layer_norm(context, sum.view_mut(), x, layer, out.view_mut()).expect("shapes fit");
    note("add_layer_norm", &out);
    activation::add(context, sum.view_mut(), x).expect("shapes fit");
    note("add", &sum);
    let mut heads = copy();
    norm::rms_norm_heads(context, heads.view_mut(), head_weight, EPS).expect("shapes fit");
    note("rms_norm_heads", &heads);
    for activation in
        [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::SquaredRelu]
    {
        activation::activate(context, activation, x, out.view_mut()).expect("shapes fit");
        note("activate", &out);
        activation::gated(context, activation, x, half.view_mut()).expect("shapes fit");
        note("gated", &half);
    }
    for pairs in [RotaryPairs::HalfApart, RotaryPairs::Adjacent] {
        let mut turned = copy();
        rotary::rotary(context, turned.view_mut(), HEAD_DIM, ids, RotaryTables { cos, sin, pairs })
            .expect("shapes fit");
        note("rotary", &turned);
    }
    embedding::embedding(context, ids, table, 3, out.view_mut()).expect("shapes fit");
    note("embedding", &out);
    embedding::gather_rows(context, table.view(), ids, out.view_mut()).expect("shapes fit");
    note("gather_rows", &out);
    results
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_many_on_any_number_of_threads_at_every_level() {
    let rows = 301;
    let x = tensor(&mut rng(7), rows, COLS, DType::F32);
    let ids: Vec<u32> = (0..rows as u32).map(|row| row * 7 % 40).collect();
    let constants = Constants::random();
    for contexts in contexts(&[1, 2, 3]) {
        let some = [0, 1, 65, 150, 300];
        let alone = some
            .map(|row| operations(&contexts[0], x.view().narrow_rows(row, 1), &ids[row..=row], &constants));
        for context in &contexts {
            for (i, (name, many)) in operations(context, x.view(), &ids, &constants).into_iter().enumerate() {
                let cols = many.len() / rows;
                for (row, alone) in some.iter().zip(&alone) {
                    let what = format!("{name}, row {row}, {}", context.device_name());
                    assert_same_bits(&many[row * cols..][..cols], &alone[i].1, &what);
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_reaches_its_row_and_no_other_in_every_operation_at_every_level() {
    let rows = 5;
    let clean = tensor(&mut rng(11), rows, COLS, DType::F32);
    let ids = [3, 0, 39, 12, 12];
    let constants = Constants::random();
    for context in levels() {
        let want = operations(&context, clean.view(), &ids, &constants);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = Tensor::from_slice(clean.as_slice::<f32>(), rows, COLS);
            // The first of a row's last vector, which is cut off, and of both halves' in a gated operation.
            x.as_mut_slice::<f32>()[2 * COLS + 992] = bad;
            for ((name, got), (_, want)) in
                operations(&context, x.view(), &ids, &constants).into_iter().zip(&want)
            {
                let cols = got.len() / rows;
                let what = format!("{name}, {bad}, {}", context.device_name());
                assert_same_bits(&got[..2 * cols], &want[..2 * cols], &what);
                assert_same_bits(&got[3 * cols..], &want[3 * cols..], &what);
                let row = &got[2 * cols..3 * cols];
                match name {
                    "embedding" | "gather_rows" => assert_same_bits(row, &want[2 * cols..3 * cols], &what),
                    // Of what is less than nothing, nothing is left, and of NaN what an activation makes of it.
                    "activate" if bad < 0.0 => {
                        assert!(row[992] <= 0.0 || row[992].is_nan(), "{what}: {}", row[992]);
                    }
                    _ => assert!(row.iter().any(|value| !value.is_finite()), "{what}"),
                }
            }
        }
    }
}

#[test]
fn nan_stays_in_its_place() {
    for context in levels() {
        let mut gate_up = vec![1.0_f32; 80];
        gate_up[3] = f32::NAN;
        gate_up[20 + 5] = f32::NAN;
        let mut out = Tensor::zeros(2, 20, DType::F32);
        activation::silu_mul(&context, View::from_slice(&gate_up, 2, 40), out.view_mut())
            .expect("shapes fit");
        for (i, value) in out.as_slice::<f32>().iter().enumerate() {
            assert_eq!(value.is_nan(), i == 3 || i == 5);
        }
        let x = Tensor::from_slice(&gate_up, 4, 20);
        let weight = Tensor::from_slice(&[1.0_f32; 20], 1, 20);
        let mut out = Tensor::zeros(4, 20, DType::F32);
        norm::rms_norm(&context, x.view(), &weight, EPS, out.view_mut()).expect("shapes fit");
        for (i, value) in out.as_slice::<f32>().iter().enumerate() {
            assert_eq!(value.is_nan(), i < 40);
        }
    }
}

#[test]
fn candle_normalizes_alike() {
    let mut rng = rng(8);
    let x = tensor(&mut rng, 4, 96, DType::F32);
    let weight = Tensor::from_slice(&[1.0_f32; 96], 1, 96);
    let mut out = Tensor::zeros(4, 96, DType::F32);
    norm::rms_norm(&Context::cpu(1), x.view(), &weight, EPS, out.view_mut()).expect("shapes fit");
    let candle =
        candle_core::Tensor::from_slice(x.as_slice::<f32>(), (4, 96), &Device::Cpu).expect("a tensor");
    let mean = candle.sqr().and_then(|squares| squares.mean_keepdim(D::Minus1)).expect("a mean");
    let rms = (mean + f64::from(EPS)).and_then(|mean| mean.sqrt()).expect("a root");
    let want = candle.broadcast_div(&rms).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>());
    assert_close(out.as_slice(), &as_f64(&want.expect("values")), 1e-5, "candle");
}

fn tables<'a>(cos: &'a Tensor, sin: &'a Tensor) -> RotaryTables<'a> {
    RotaryTables { cos, sin, pairs: RotaryPairs::HalfApart }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let context = Context::cpu(1);
    let zeros = |rows, cols| Tensor::zeros(rows, cols, DType::F32);
    let half = Tensor::zeros(2, 8, DType::F16);
    let (x, weight, ids) = (zeros(2, 8), zeros(1, 8), [0_u32, 9]);
    let pair = View::from_slice(&ids, 1, 2);
    let one = View::from_slice(&ids[..1], 1, 1);
    let mut out = zeros(2, 8);
    let narrow = zeros(1, 7);
    let bad_bias = LayerNormWeights { weight: &weight, bias: Some(&narrow), eps: EPS };
    let shape_errors = [
        norm::layer_norm(&context, x.view(), bad_bias, out.view_mut()),
        norm::rms_norm(&context, x.view(), &zeros(1, 7), EPS, out.view_mut()),
        norm::rms_norm(&context, x.view(), &zeros(2, 8), EPS, out.view_mut()),
        norm::rms_norm(&context, zeros(3, 8).view(), &weight, EPS, out.view_mut()),
        norm::add_rms_norm(&context, zeros(2, 7).view_mut(), x.view(), &weight, EPS, out.view_mut()),
        norm::rms_norm_heads(&context, out.view_mut(), &zeros(1, 3), EPS),
        activation::silu_mul(&context, x.view(), out.view_mut()),
        activation::activate(&context, Activation::Gelu, zeros(2, 7).view(), out.view_mut()),
        activation::add(&context, out.view_mut(), zeros(2, 9).view()),
        rotary::rotary(&context, out.view_mut(), 4, pair, tables(&zeros(9, 2), &zeros(9, 2))),
        rotary::rotary(&context, out.view_mut(), 4, pair, tables(&zeros(10, 3), &zeros(10, 3))),
        rotary::rotary(&context, out.view_mut(), 4, pair, tables(&zeros(10, 2), &zeros(9, 2))),
        rotary::rotary(&context, out.view_mut(), 3, pair, tables(&zeros(10, 1), &zeros(10, 1))),
        rotary::rotary(&context, out.view_mut(), 4, one, tables(&zeros(10, 2), &zeros(10, 2))),
        embedding::embedding(&context, one, &x, 0, out.view_mut()),
        embedding::embedding(&context, pair, &zeros(2, 7), 0, out.view_mut()),
        embedding::gather_rows(&context, x.view(), pair, out.view_mut()),
        embedding::gather_rows(&context, zeros(10, 7).view(), pair, out.view_mut()),
    ];
    for (i, outcome) in shape_errors.into_iter().enumerate() {
        assert!(matches!(outcome, Err(Error::Shape { .. })), "case {i}: {outcome:?}");
    }
    let dtype_errors = [
        norm::rms_norm(&context, half.view(), &weight, EPS, out.view_mut()),
        norm::rms_norm(&context, x.view(), &half.narrow_rows(0, 1), EPS, out.view_mut()),
        activation::add(&context, out.view_mut(), half.view()),
        embedding::embedding(&context, half.view(), &x, 0, out.view_mut()),
        embedding::embedding(&context, pair, &Tensor::zeros(9, 8, DType::U32), 0, out.view_mut()),
    ];
    for (i, outcome) in dtype_errors.into_iter().enumerate() {
        assert!(matches!(outcome, Err(Error::DType { .. })), "case {i}: {outcome:?}");
    }
}
