//! The matrix product against an f64 reference and candle.

mod common;

use candle_core::Device;
use common::{FLOATS, assert_close, assert_same_bits, contexts, levels, rng, tensor, uniform};
use half::bf16;
use kernels::ops::activation::Activation;
use kernels::ops::linear::{
    Experts, GatedLinear, Int8Weight, LinearPart, Weight, linear, linear_add, linear_gated, linear_grouped,
};
use kernels::{Context, DType, Error, Level, Tensor, View};
use rand::RngExt;
use rand::rngs::StdRng;

fn run(context: &Context, x: View<'_>, parts: &[LinearPart<'_>]) -> Vec<f32> {
    let cols = parts.iter().map(|part| part.weight.rows()).sum();
    let mut out = Tensor::zeros(x.rows(), cols, DType::F32);
    linear(context, x, parts, out.view_mut()).expect("shapes fit");
    out.as_slice().to_vec()
}

/// A row as f64.
fn row_f64(tensor: &Tensor, row: usize) -> Vec<f64> {
    tensor.view().row_f32(row).expect("a float type").into_iter().map(f64::from).collect()
}

/// A row of a weight as f64.
fn weight_f64(weight: Weight<'_>, row: usize) -> Vec<f64> {
    match weight {
        Weight::Dense(weight) => row_f64(weight, row),
        Weight::Int8(weight) => {
            let scale = f64::from(weight.scales().as_slice::<f32>()[row]);
            let values = weight.values().view().row::<u8>(row);
            values.iter().map(|value| f64::from(value.cast_signed()) * scale).collect()
        }
    }
}

/// The product in f64, of what is multiplied at this level.
fn reference(level: Level, x: &Tensor, parts: &[LinearPart<'_>]) -> Vec<f64> {
    let mut out = Vec::new();
    for row in 0..x.rows() {
        let x = row_f64(x, row);
        let rounded: Vec<f64> = x.iter().map(|&x| bf16::from_f32(x as f32).to_f64()).collect();
        for part in parts {
            let x = if rounds_x(level, part.weight) { &rounded } else { &x };
            for n in 0..part.weight.rows() {
                let product: f64 = weight_f64(part.weight, n).iter().zip(x).map(|(w, x)| w * x).sum();
                out.push(product + part.bias.map_or(0.0, |bias| f64::from(bias.as_slice::<f32>()[n])));
            }
        }
    }
    out
}

/// Whether the level multiplies in bf16.
fn rounds_x(level: Level, weight: Weight<'_>) -> bool {
    level.has_dot_bf16() && matches!(weight, Weight::Dense(weight) if weight.dtype() == DType::BF16)
}

/// The instruction sets of this machine, with single-threaded contexts.
fn named_levels() -> Vec<(Level, Context)> {
    Level::ALL.into_iter().filter(|level| level.is_available()).zip(levels()).collect()
}

/// The same weight in every layout.
struct Layouts {
    dense: Vec<Tensor>,
    int8: Int8Weight,
}

impl Layouts {
    fn random(rng: &mut StdRng, n: usize, k: usize) -> Self {
        let weight = tensor(rng, n, k, DType::F32);
        let dense = FLOATS.map(|dtype| weight.to_dtype(dtype).expect("a float type")).into();
        Self { dense, int8: Int8Weight::quantize(&Context::cpu(1), &weight).expect("finite") }
    }

    fn all(&self) -> impl Iterator<Item = Weight<'_>> {
        self.dense.iter().map(Weight::Dense).chain([Weight::Int8(&self.int8)])
    }
}

/// Rounding of k products and sums of values below 1, in sixteen lanes; 4 is generous for the random walk of the errors.
fn tolerance(k: usize) -> f64 {
    4.0 * f64::from(f32::EPSILON) * (k as f64).sqrt().max(1.0)
}

#[test]
fn all_layouts_and_odd_sizes_match_the_reference_at_every_level() {
    let mut rng = rng(1);
    for (level, context) in named_levels() {
        for (rows, n, k) in [
            (1, 1, 1),
            (1, 8, 16),
            (2, 5, 17),
            (3, 33, 100),
            (7, 3, 515),
            (16, 40, 96),
            (70, 35, 1100),
            (19, 9, 5000),
        ] {
            let weights = Layouts::random(&mut rng, n, k);
            let bias = tensor(&mut rng, 1, n, DType::F32);
            let x = tensor(&mut rng, rows, k, DType::F32);
            for weight in weights.all() {
                for bias in [None, Some(&bias)] {
                    let parts = [LinearPart { weight, bias }];
                    assert_close(
                        &run(&context, x.view(), &parts),
                        &reference(level, &x, &parts),
                        tolerance(k),
                        &format!("{level:?}, {rows} rows, {weight:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn every_number_of_rows_gives_the_bits_of_single_rows_at_every_level() {
    let mut rng = rng(11);
    // Odd sizes: a vector cut off along k, a panel along the outputs.
    let weights = Layouts::random(&mut rng, 45, 83);
    let x = tensor(&mut rng, 60, 83, DType::F32);
    for (level, context) in named_levels() {
        for weight in weights.all() {
            let parts = [LinearPart { weight, bias: None }];
            let alone: Vec<f32> =
                (0..60).flat_map(|row| run(&context, x.view().narrow_rows(row, 1), &parts)).collect();
            for rows in 1..=60 {
                let together = run(&context, x.view().narrow_rows(0, rows), &parts);
                assert_same_bits(
                    &together,
                    &alone[..rows * 45],
                    &format!("{level:?}, {rows} rows, {weight:?}"),
                );
            }
        }
    }
}

#[test]
fn a_product_is_added_to_what_is_there() {
    let mut rng = rng(12);
    let weights = Layouts::random(&mut rng, 45, 83);
    let bias = tensor(&mut rng, 1, 45, DType::F32);
    for (level, context) in named_levels() {
        for (weight, rows) in weights.all().flat_map(|weight| [(weight, 3), (weight, 40)]) {
            let x = tensor(&mut rng, rows, 83, DType::F32);
            let mut residual = tensor(&mut rng, rows, 45, DType::F32);
            let parts = [LinearPart { weight, bias: Some(&bias) }];
            let product = run(&context, x.view(), &parts);
            let want: Vec<f32> = residual.as_slice::<f32>().iter().zip(product).map(|(a, b)| a + b).collect();
            linear_add(&context, x.view(), &parts, residual.view_mut()).expect("shapes fit");
            assert_same_bits(residual.as_slice(), &want, &format!("{level:?}, {rows} rows, {weight:?}"));
        }
    }
}

/// What the quantization is defined as, in f64.
#[test]
fn int8_weights_are_the_nearest_multiples_of_the_greatest_magnitude_over_128() {
    let mut rng = rng(10);
    for dtype in FLOATS {
        let mut dense = tensor(&mut rng, 40, 77, DType::F32);
        dense.as_mut_slice::<f32>()[3 * 77..4 * 77].fill(0.0);
        let dense = dense.to_dtype(dtype).expect("a float type");
        let int8 = Int8Weight::quantize(&Context::cpu(2), &dense).expect("finite");
        for row in 0..40 {
            let values = row_f64(&dense, row);
            let greatest = values.iter().fold(0.0, |greatest: f64, value| greatest.max(value.abs()));
            let scale = f64::from(int8.scales().as_slice::<f32>()[row]);
            assert!((scale - greatest / 128.0).abs() < 1e-45, "an exact division: {scale}, {greatest}");
            for (&value, &got) in values.iter().zip(int8.values().view().row::<u8>(row)) {
                let quotient = if scale == 0.0 { 0.0 } else { value / scale };
                let got = f64::from(got.cast_signed());
                // A quotient near a half may be rounded to it in f32; 128 is beyond the type.
                assert!(
                    (quotient - got).abs() <= 0.500_01 || (got > 126.5 && quotient > 127.0),
                    "{quotient}: {got}"
                );
            }
        }
    }
}

#[test]
fn weights_that_are_not_finite_are_not_quantized() {
    for (bad, at) in [(f32::NAN, 7), (f32::INFINITY, 0), (f32::NEG_INFINITY, 23)] {
        let mut values = [1.0_f32; 24];
        values[at] = bad;
        let error =
            Int8Weight::quantize(&Context::cpu(1), &Tensor::from_slice(&values, 3, 8)).expect_err("refused");
        assert!(error.to_string().contains(&format!("[{}, {}] is {bad}", at / 8, at % 8)), "{error}");
    }
    let ints = Tensor::zeros(2, 2, DType::U32);
    assert!(matches!(Int8Weight::quantize(&Context::cpu(1), &ints), Err(Error::DType { .. })));
    let (values, scales) = (Tensor::zeros(2, 8, DType::U8), Tensor::zeros(1, 3, DType::F32));
    assert!(matches!(Int8Weight::new(values, scales), Err(Error::Shape { .. })));
}

#[test]
fn random_shapes_strides_and_parts_match_the_reference() {
    let mut rng = rng(2);
    let context = Context::cpu(2);
    for _ in 0..60 {
        let (rows, k) = (rng.random_range(1..40), rng.random_range(1..300));
        let (offset, rest) = (rng.random_range(0..20), rng.random_range(0..20));
        let whole: Vec<Tensor> = (0..rng.random_range(1..4))
            .map(|_| {
                let (n, dtype) = (rng.random_range(1..70), FLOATS[rng.random_range(0..3)]);
                tensor(&mut rng, n, offset + k + rest, dtype)
            })
            .collect();
        let weights: Vec<Tensor> = whole.iter().map(|weight| weight.narrow_cols(offset, k)).collect();
        let biases: Vec<Tensor> = weights.iter().map(|w| tensor(&mut rng, 1, w.rows(), DType::F32)).collect();
        let parts: Vec<LinearPart<'_>> = weights
            .iter()
            .zip(&biases)
            .enumerate()
            .map(|(i, (weight, bias))| LinearPart {
                weight: Weight::Dense(weight),
                bias: (i % 2 == 0).then_some(bias),
            })
            .collect();
        let x = tensor(&mut rng, rows, offset + k + rest, DType::F32).narrow_cols(offset, k);
        assert_close(
            &run(&context, x.view(), &parts),
            &reference(Level::detect(), &x, &parts),
            tolerance(k),
            "strided parts",
        );
    }
}

#[test]
fn an_output_with_gaps_keeps_what_lies_between() {
    let mut rng = rng(3);
    let (weight, x) = (tensor(&mut rng, 20, 48, DType::BF16), tensor(&mut rng, 5, 48, DType::F32));
    let mut out = Tensor::from_slice(&[7.0_f32; 5 * 30], 5, 30);
    let parts = [LinearPart { weight: Weight::Dense(&weight), bias: None }];
    linear(&Context::cpu(1), x.view(), &parts, out.view_mut().narrow_cols(4, 20)).expect("shapes fit");
    let want = run(&Context::cpu(1), x.view(), &parts);
    for (row, values) in out.as_slice::<f32>().chunks(30).enumerate() {
        assert_same_bits(&values[4..24], &want[row * 20..][..20], "product");
        assert!(values[..4].iter().chain(&values[24..]).all(|&value| value.to_bits() == 7.0_f32.to_bits()));
    }
}

/// What is done to products, by its name.
type Layer = (&'static str, fn(&Context, View<'_>, Weight<'_>, &Tensor) -> Vec<f32>);

const LAYERS: [Layer; 3] = [
    ("with a bias", |context, x, weight, bias| run(context, x, &[LinearPart { weight, bias: Some(bias) }])),
    ("added to what is there", |context, x, weight, bias| {
        let mut out = Tensor::from_slice(&vec![0.7_f32; x.rows() * weight.rows()], x.rows(), weight.rows());
        linear_add(context, x, &[LinearPart { weight, bias: Some(bias) }], out.view_mut())
            .expect("shapes fit");
        out.as_slice().to_vec()
    }),
    ("gated", |context, x, weight, bias| {
        let part = LinearPart { weight, bias: Some(bias) };
        gate(context, x, GatedLinear { gate: part, up: part, activation: Activation::Silu })
    }),
];

fn gate(context: &Context, x: View<'_>, layer: GatedLinear<'_>) -> Vec<f32> {
    let n = layer.gate.weight.rows();
    let mut gate_up = Tensor::zeros(x.rows(), 2 * n, DType::F32);
    let mut out = Tensor::zeros(x.rows(), n, DType::F32);
    linear_gated(context, x, layer, gate_up.view_mut(), out.view_mut()).expect("shapes fit");
    out.as_slice().to_vec()
}

/// Rows of each way to compute them and of the ends of each, up to where x is multiplied in several parts.
const COMPANIES: [usize; 23] =
    [2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 18, 28, 32, 33, 40, 49, 64, 65, 130, 530];

/// Above the threshold from which threads are woken; several groups of outputs and of panels, of which the last is cut off, and
/// several parts of k with a tail.
#[test]
fn a_row_has_the_same_bits_in_any_company_on_1_to_3_threads_at_every_level_whatever_is_done_to_its_products()
{
    const N: usize = 141;
    const K: usize = 1043;
    let mut rng = rng(4);
    let weights = Layouts::random(&mut rng, N, K);
    let (bias, x) = (tensor(&mut rng, 1, N, DType::F32), tensor(&mut rng, 530, K, DType::F32));
    for contexts in contexts(&[1, 2, 3]) {
        for (weight, (name, layer)) in weights.all().flat_map(|weight| LAYERS.map(|layer| (weight, layer))) {
            let one_by_one = |row| layer(&contexts[row % 3], x.view().narrow_rows(row, 1), weight, &bias);
            let alone: Vec<f32> = (0..530).flat_map(one_by_one).collect();
            for rows in COMPANIES {
                // Also such as are not the first.
                let first = (530 - rows) / 2;
                let got = layer(&contexts[rows % 3], x.view().narrow_rows(first, rows), weight, &bias);
                let what = format!("{rows} rows {name}, {}, {weight:?}", contexts[0].device_name());
                assert_same_bits(&got, &alone[first * N..][..rows * N], &what);
            }
        }
    }
}

#[test]
fn fused_parts_have_the_bits_of_parts_alone_at_every_level_also_where_their_types_differ() {
    let mut rng = rng(5);
    let outputs = [130, 37, 200];
    let weights = outputs.map(|n| Layouts::random(&mut rng, n, 777));
    let x = tensor(&mut rng, 40, 777, DType::F32);
    // Which layout each part has.
    let choices = [[0; 3], [1; 3], [2; 3], [3; 3], [2, 3, 1], [3, 0, 2]];
    for (context, choice) in
        contexts(&[3]).iter().flatten().flat_map(|context| choices.map(|choice| (context, choice)))
    {
        let parts: Vec<LinearPart<'_>> = weights
            .iter()
            .zip(choice)
            .map(|(weights, layout)| weights.all().nth(layout).expect("a layout"))
            .map(|weight| LinearPart { weight, bias: None })
            .collect();
        for rows in [6, 40] {
            let x = x.view().narrow_rows(0, rows);
            let fused = run(context, x, &parts);
            let mut column = 0;
            for (part, n) in parts.iter().zip(outputs) {
                let alone = run(context, x, &[*part]);
                for (fused, alone) in fused.chunks(367).zip(alone.chunks(n)) {
                    let what = format!("{rows} rows, {}, {:?}", context.device_name(), part.weight);
                    assert_same_bits(&fused[column..][..n], alone, &what);
                }
                column += n;
            }
        }
    }
}

/// The order of additions that the operation promises: sixteen lanes along k, then halves onto each other.
fn in_lanes_and_a_tree(weight: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    for (i, (weight, x)) in weight.iter().zip(x).enumerate() {
        lanes[i % 16] = weight.mul_add(*x, lanes[i % 16]);
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

#[test]
fn every_cpu_that_rounds_a_multiply_add_once_gives_the_same_bits() {
    let mut rng = rng(6);
    let mut levels = vec![Level::Avx2, Level::Avx512, Level::Neon];
    if cfg!(target_arch = "aarch64") {
        // There the compiler makes such instructions of plain Rust.
        levels.push(Level::Portable);
    }
    levels.retain(|level| level.is_available());
    let contexts: Vec<Context> = levels.into_iter().map(|level| Context::cpu_with_level(1, level)).collect();
    for (rows, k) in [(1, 5), (2, 64), (7, 611), (40, 1043)] {
        let (x, bias) = (tensor(&mut rng, rows, k, DType::F32), tensor(&mut rng, 1, 37, DType::F32));
        let dense = FLOATS.map(|dtype| tensor(&mut rng, 37, k, dtype));
        let int8 = Int8Weight::quantize(&Context::cpu(1), &dense[0]).expect("finite");
        let weights = dense.iter().map(Weight::Dense).chain([Weight::Int8(&int8)]);
        for (i, weight) in weights.enumerate() {
            let mut want = Vec::new();
            for row in 0..rows {
                for output in 0..37 {
                    let (values, scale) = match weight {
                        Weight::Dense(weight) => (weight.view().row_f32(output).expect("a float type"), 1.0),
                        Weight::Int8(weight) => (
                            weight
                                .values()
                                .view()
                                .row::<u8>(output)
                                .iter()
                                .map(|v| f32::from(v.cast_signed()))
                                .collect(),
                            weight.scales().as_slice::<f32>()[output],
                        ),
                    };
                    let product = in_lanes_and_a_tree(&values, x.view().row(row)) * scale;
                    want.push(product + bias.as_slice::<f32>()[output]);
                }
            }
            for context in &contexts {
                let got = run(context, x.view(), &[LinearPart { weight, bias: Some(&bias) }]);
                assert_same_bits(&got, &want, &format!("weight {i}, {rows} rows of {k}"));
            }
        }
    }
}

#[test]
fn candle_is_a_second_witness() {
    let mut rng = rng(7);
    let weight = tensor(&mut rng, 64, 256, DType::F32);
    let x = Tensor::from_slice(&uniform(&mut rng, 9 * 256), 9, 256);
    let candle = |tensor: &Tensor| {
        candle_core::Tensor::from_slice(
            tensor.as_slice::<f32>(),
            (tensor.rows(), tensor.cols()),
            &Device::Cpu,
        )
        .expect("a tensor")
    };
    let want = candle(&x).matmul(&candle(&weight).t().expect("a matrix")).expect("shapes fit");
    let want: Vec<f64> = want
        .flatten_all()
        .and_then(|t| t.to_vec1::<f32>())
        .expect("values")
        .into_iter()
        .map(f64::from)
        .collect();
    let got = run(&Context::cpu(1), x.view(), &[LinearPart { weight: Weight::Dense(&weight), bias: None }]);
    assert_close(&got, &want, 2.0 * tolerance(256), "candle");
}

#[test]
fn what_is_not_finite_reaches_its_row_and_no_other() {
    let mut rng = rng(8);
    let weights = Layouts::random(&mut rng, 9, 37);
    // One of the NaN whose upper half alone would be an infinity.
    let signaling = f32::from_bits(0x7f80_0001);
    for (level, context) in named_levels() {
        for bad in [f32::NAN, signaling, -signaling, f32::INFINITY, f32::NEG_INFINITY] {
            for rows in [2, 3, 7, 12, 40] {
                let mut x = tensor(&mut rng, rows, 37, DType::F32);
                x.as_mut_slice::<f32>()[37 + 36] = bad;
                for weight in weights.all() {
                    let parts = [LinearPart { weight, bias: None }];
                    let (got, want) = (run(&context, x.view(), &parts), reference(level, &x, &parts));
                    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
                        let what = format!("{level:?}, row {} of {rows}, {weight:?}: {got}, {want}", i / 9);
                        assert_eq!(got.is_finite(), i / 9 != 1, "{what}");
                        // Infinity times zero is NaN.
                        assert!(got.is_finite() || got.is_nan() == want.is_nan(), "{what}");
                        assert!(!got.is_infinite() || f64::from(got).total_cmp(&want).is_eq(), "{what}");
                    }
                }
            }
        }
    }
}

/// A single product for each output, so that what each part of an x contributes is seen.
#[test]
fn int8_weights_are_multiplied_with_all_bits_of_x() {
    let mut rng = rng(15);
    let ints = [1_i8, -1, 127, -128, 77, -3];
    let k = 45;
    let at = |output: usize| (7 * output + 3) % k;
    let mut values = Tensor::zeros(ints.len(), k, DType::U8);
    for (output, int) in ints.into_iter().enumerate() {
        values.as_mut_slice::<u8>()[output * k + at(output)] = int.cast_unsigned();
    }
    let weight = Int8Weight::new(values, Tensor::from_slice(&[1.0_f32; 6], 1, 6)).expect("shapes fit");
    let part = LinearPart { weight: Weight::Int8(&weight), bias: None };
    let mut cases = vec![1.0, 1.0 + f32::EPSILON, 2.0 - f32::EPSILON, f32::MAX, -f32::MAX, 0.1, -1e-30, 0.0];
    let random = uniform(&mut rng, 200);
    cases.extend(random.into_iter().map(|x| x * f32::powi(2.0, rng.random_range(-90..100))));
    // Below the least normal number there is nothing in tiles, nor are there parts of numbers that are.
    cases.extend([1e-36, f32::MIN_POSITIVE, f32::MIN_POSITIVE / 3.0, 1e-45]);
    for (level, context) in named_levels() {
        let lost = if level == Level::Amx { 3.0 * f64::from(f32::MIN_POSITIVE) } else { 0.0 };
        for rows in [1, 4, 8, 16, 40] {
            for cases in cases.chunks(rows) {
                let mut x = Tensor::zeros(rows, k, DType::F32);
                for (row, &case) in x.as_mut_slice::<f32>().chunks_mut(k).zip(cases) {
                    (0..ints.len()).for_each(|output| row[at(output)] = case);
                }
                let got = run(&context, x.view(), &[part]);
                for (got, case) in got.chunks(ints.len()).zip(cases) {
                    for (&got, int) in got.iter().zip(ints) {
                        let want = f64::from(*case) * f64::from(int);
                        let what = format!("{level:?}, {rows} rows: {case} * {int} is {got}");
                        if want.abs() > f64::from(f32::MAX) {
                            assert!(got.is_infinite() && got.is_sign_positive() == (want > 0.0), "{what}");
                            continue;
                        }
                        // A power of two is exact; of others, sums of parts are rounded, too.
                        let ulps = if int.unsigned_abs().is_power_of_two() { 0.0 } else { 1.0 };
                        let tolerance = ulps * want.abs() * f64::from(f32::EPSILON)
                            + lost * f64::from(int.unsigned_abs());
                        assert!((f64::from(got) - want).abs() <= tolerance, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn weights_in_a_mapped_file_are_used_in_place_at_any_offset() {
    let mut rng = rng(9);
    let file = tempfile::NamedTempFile::new().expect("a file");
    let weight = tensor(&mut rng, 11, 53, DType::F16);
    // Two bytes from the start: aligned to the element only.
    let mut bytes = vec![0_u8; 2];
    bytes.extend(weight.as_slice::<half::f16>().iter().flat_map(|value| value.to_le_bytes()));
    std::fs::write(file.path(), bytes).expect("write");
    let map = kernels::mmap::MappedFile::open(file.path()).expect("map");
    let mapped = Tensor::mapped(map.into(), 2, DType::F16, 11, 53).expect("fits");
    let x = tensor(&mut rng, 2, 53, DType::F32);
    let got = run(&Context::cpu(1), x.view(), &[LinearPart { weight: Weight::Dense(&mapped), bias: None }]);
    assert_same_bits(
        &got,
        &run(&Context::cpu(1), x.view(), &[LinearPart { weight: Weight::Dense(&weight), bias: None }]),
        "mapped",
    );
}

#[test]
fn a_gated_layer_multiplies_what_is_up_with_the_activated_gate_at_every_level() {
    let mut rng = rng(13);
    let [gates, ups] = [(); 2].map(|()| Layouts::random(&mut rng, 21, 40));
    let bias = tensor(&mut rng, 1, 21, DType::F32);
    let x = tensor(&mut rng, 70, 40, DType::F32);
    // Of one type, which are computed together, and not.
    let same = gates.all().zip(ups.all());
    let pairs: Vec<_> = same.chain(gates.all().zip(ups.all().skip(1))).collect();
    for (level, context) in named_levels() {
        for ((gate, up), rows) in pairs.iter().flat_map(|&pair| [1, 3, 16, 70].map(|rows| (pair, rows))) {
            let gate = LinearPart { weight: gate, bias: Some(&bias) };
            let up = LinearPart { weight: up, bias: None };
            let x = Tensor::from_slice(&x.as_slice::<f32>()[..rows * 40], rows, 40);
            let want: Vec<f64> = reference(level, &x, &[gate, up])
                .chunks(42)
                .flat_map(|row| row[..21].iter().zip(&row[21..]))
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            let got = self::gate(&context, x.view(), GatedLinear { gate, up, activation: Activation::Silu });
            // A factor is the size of the sums.
            assert_close(
                &got,
                &want,
                8.0 * tolerance(40),
                &format!("{level:?}, {rows} rows, {:?}, {:?}", gate.weight, up.weight),
            );
        }
    }
}

#[test]
fn gated_layers_that_do_not_fit_are_refused() {
    let mut rng = rng(16);
    let context = Context::cpu(1);
    let (gate, x) = (tensor(&mut rng, 21, 40, DType::BF16), tensor(&mut rng, 3, 40, DType::F32));
    let gate = LinearPart { weight: Weight::Dense(&gate), bias: None };
    let layer = GatedLinear { gate, up: gate, activation: Activation::Silu };
    let (mut gate_up, mut out) = (Tensor::zeros(3, 42, DType::F32), Tensor::zeros(3, 21, DType::F32));
    let other = tensor(&mut rng, 20, 40, DType::BF16);
    let uneven = GatedLinear { up: LinearPart { weight: Weight::Dense(&other), bias: None }, ..layer };
    let refused = linear_gated(&context, x.view(), uneven, gate_up.view_mut(), out.view_mut());
    assert!(refused.expect_err("21 and 20").to_string().contains("gate has 21 outputs, up 20"));
    let mut narrow = Tensor::zeros(3, 41, DType::F32);
    let refused = linear_gated(&context, x.view(), layer, narrow.view_mut(), out.view_mut());
    assert!(matches!(refused, Err(Error::Shape { .. })));
}

#[test]
fn each_row_is_multiplied_with_the_weights_of_its_expert_at_every_level() {
    let mut rng = rng(14);
    let weights = Layouts::random(&mut rng, 3 * 10, 33);
    let x = tensor(&mut rng, 7, 33, DType::F32);
    let contexts = contexts(&[2]);
    for (context, weight) in
        contexts.iter().flatten().flat_map(|of| weights.all().map(move |weight| (of, weight)))
    {
        let starts = [0_u32, 2, 2, 6];
        let mut out = Tensor::from_slice(&[7.0_f32; 7 * 10], 7, 10);
        let experts = Experts { weight, starts: View::from_slice(&starts, 1, 4) };
        linear_grouped(context, x.view(), experts, out.view_mut()).expect("shapes fit");
        let all = run(context, x.view(), &[LinearPart { weight, bias: None }]);
        for (row, got) in out.as_slice::<f32>().chunks(10).enumerate() {
            let want = match row {
                0..2 => &all[row * 30..][..10],
                2..6 => &all[row * 30 + 20..][..10],
                // Behind the end.
                _ => &[7.0; 10][..],
            };
            assert_same_bits(got, want, &format!("row {row}, {weight:?}"));
        }
        for starts in [[0_u32, 3, 2, 6], [0, 2, 2, 8]] {
            let experts = Experts { weight, starts: View::from_slice(&starts, 1, 4) };
            let refused = linear_grouped(context, x.view(), experts, out.view_mut());
            assert!(refused.expect_err("rows that there are not").to_string().contains("has the rows"));
        }
        let experts = Experts { weight, starts: View::from_slice(&starts[..3], 1, 3) };
        let refused = linear_grouped(context, x.view(), experts, out.view_mut());
        assert!(matches!(refused, Err(Error::Shape { .. })));
    }
}

#[test]
fn empty_inputs_give_empty_outputs() {
    let weight = Tensor::zeros(3, 4, DType::F32);
    let x = Tensor::zeros(0, 4, DType::F32);
    assert!(
        run(&Context::cpu(2), x.view(), &[LinearPart { weight: Weight::Dense(&weight), bias: None }])
            .is_empty()
    );
    let x = Tensor::zeros(2, 4, DType::F32);
    assert!(run(&Context::cpu(2), x.view(), &[]).is_empty());
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let context = Context::cpu(1);
    let (x, weight) = (Tensor::zeros(2, 8, DType::F32), Tensor::zeros(3, 8, DType::BF16));
    let ints = Tensor::zeros(3, 8, DType::U32);
    let mut out = Tensor::zeros(2, 3, DType::F32);
    let narrow = Tensor::zeros(2, 7, DType::F32);
    let mut wide = Tensor::zeros(2, 4, DType::F32);
    let part = LinearPart { weight: Weight::Dense(&weight), bias: None };
    let mut call = |x: &Tensor, part: LinearPart<'_>| linear(&context, x.view(), &[part], out.view_mut());
    assert!(matches!(call(&narrow, part), Err(Error::Shape { .. })));
    assert!(matches!(call(&x, LinearPart { bias: Some(&narrow), ..part }), Err(Error::Shape { .. })));
    assert!(matches!(call(&weight.narrow_rows(0, 2), part), Err(Error::DType { .. })));
    assert!(matches!(
        call(&x, LinearPart { weight: Weight::Dense(&ints), bias: None }),
        Err(Error::DType { .. })
    ));
    assert!(matches!(call(&Tensor::zeros(3, 8, DType::F32), part), Err(Error::Shape { .. })));
    assert!(matches!(linear(&context, x.view(), &[part], wide.view_mut()), Err(Error::Shape { .. })));
}
