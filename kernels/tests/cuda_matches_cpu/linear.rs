//! Linear layers: all kernels that a size may go to, against the CPU.

use kernels::ops::activation::Activation;
use kernels::ops::linear::{
    Experts, GatedLinear, Int8Weight, LinearPart, Weight, linear, linear_add, linear_gated, linear_grouped,
};
use kernels::{DType, Error, Staging, Tensor, View};
use rand::RngExt;

use super::{ACTIVATIONS, Fixture, LAYOUTS, Layout, download_f32, tolerance};

const PACKED: Layout = LAYOUTS[0];

/// Around what kernels take at once: a warp's fragment, a column of mma, a tile, and the rows from which libraries compute.
const ROWS: [usize; 16] = [1, 2, 3, 4, 5, 8, 9, 12, 15, 16, 17, 31, 33, 127, 129, 200];

/// A weight on both sides, the same values.
enum Both {
    Dense { cpu: Tensor, cuda: Tensor },
    Int8 { cpu: Int8Weight, cuda: Int8Weight },
}

impl Both {
    /// Rounded to `dtype`, or quantized where it is u8, as columns of a wider matrix.
    fn new(fixture: &mut Fixture, dtype: DType, n: usize, k: usize, layout: Layout) -> Self {
        if dtype == DType::U8 {
            let values = fixture.values(n, k, DType::F32);
            let cpu = Int8Weight::quantize(&fixture.cpu, &values).expect("finite");
            let cuda = cpu.upload(&fixture.cuda).expect("memory");
            return Self::Int8 { cpu, cuda };
        }
        let cpu = fixture.values(n, k, dtype);
        let whole = fixture.upload(&cpu, dtype, layout).whole;
        Self::Dense { cpu, cuda: whole.narrow_cols(layout.left, k) }
    }
    fn cpu(&self) -> Weight<'_> {
        match self {
            Self::Dense { cpu, .. } => cpu.into(),
            Self::Int8 { cpu, .. } => cpu.into(),
        }
    }
    fn cuda(&self) -> Weight<'_> {
        match self {
            Self::Dense { cuda, .. } => cuda.into(),
            Self::Int8 { cuda, .. } => cuda.into(),
        }
    }
}

/// Weights with biases, on both sides.
struct Parts {
    weights: Vec<Both>,
    /// On the CPU, on the device.
    biases: Vec<Option<(Tensor, Tensor)>>,
}

impl Parts {
    /// Every second one has a bias where there are several, as has a single one of an odd size.
    fn new(fixture: &mut Fixture, dtype: DType, sizes: &[usize], k: usize, layout: Layout) -> Self {
        let weights = sizes.iter().map(|&n| Both::new(fixture, dtype, n, k, layout)).collect();
        let biases = sizes.iter().enumerate().map(|(i, n)| {
            let has_bias = (i + n) % 2 == 1;
            has_bias.then(|| {
                let bias = fixture.values(1, *n, DType::BF16);
                let uploaded = fixture.weights(&bias);
                (bias, uploaded)
            })
        });
        Self { biases: biases.collect(), weights }
    }
    fn cpu(&self) -> Vec<LinearPart<'_>> {
        let biases = self.biases.iter().map(|bias| bias.as_ref().map(|(cpu, _)| cpu));
        self.weights
            .iter()
            .zip(biases)
            .map(|(weight, bias)| LinearPart { weight: weight.cpu(), bias })
            .collect()
    }
    fn cuda(&self) -> Vec<LinearPart<'_>> {
        let biases = self.biases.iter().map(|bias| bias.as_ref().map(|(_, cuda)| cuda));
        self.weights
            .iter()
            .zip(biases)
            .map(|(weight, bias)| LinearPart { weight: weight.cuda(), bias })
            .collect()
    }
    fn total(&self) -> usize {
        self.weights.iter().map(|weight| weight.cpu().rows()).sum()
    }
}

/// Sums of k products of values below 1, in f32 in another order; then, of 8-bit weights that are widened, the rounding of
/// weights to the type; then of the result, which is of the size of sqrt(k).
fn tolerance_of(fixture: &Fixture, [dtype, weights, out]: [DType; 3], rows: usize, k: usize) -> f32 {
    let spread = (k as f32).sqrt();
    let widened = if weights == DType::U8 && rows > fixture.most_fused_rows {
        tolerance(dtype) * spread / 2.0
    } else {
        0.0
    };
    widened + tolerance(out) + 4.0 * f32::EPSILON * spread
}

struct Case<'a> {
    dtype: DType,
    weights: DType,
    out: DType,
    sizes: &'a [usize],
    k: usize,
    layout: Layout,
}

/// Both operations, for each number of rows.
fn check(fixture: &mut Fixture, case: &Case<'_>, rows: impl IntoIterator<Item = usize>) {
    let &Case { dtype, weights, out: out_dtype, sizes, k, layout } = case;
    let parts = Parts::new(fixture, weights, sizes, k, layout);
    for rows in rows {
        let what =
            format!("{dtype:?} x {weights:?} -> {out_dtype:?}, {rows} rows, {sizes:?} x {k}, {layout:?}");
        let tolerance = tolerance_of(fixture, [dtype, weights, out_dtype], rows, k);
        let x = fixture.values(rows, k, dtype);
        let on_device = fixture.upload(&x, dtype, layout);
        let mut expected = Tensor::zeros(rows, parts.total(), DType::F32);
        linear(&fixture.cpu, x.view(), &parts.cpu(), expected.view_mut()).expect("shapes fit");

        let mut out = fixture.poisoned(rows, parts.total(), out_dtype, layout);
        linear(&fixture.cuda, on_device.view(), &parts.cuda(), out.view_mut()).expect("shapes fit");
        fixture.check(&what, &out, &expected, tolerance);

        let mut sum = fixture.values(rows, parts.total(), out_dtype);
        let mut out = fixture.upload(&sum, out_dtype, layout);
        linear_add(&fixture.cpu, x.view(), &parts.cpu(), sum.view_mut()).expect("shapes fit");
        linear_add(&fixture.cuda, on_device.view(), &parts.cuda(), out.view_mut()).expect("shapes fit");
        // The bias may be added, and rounded, before the product.
        fixture.check(&format!("{what}, added"), &out, &sum, 2.0 * tolerance);
    }
}

#[test]
fn every_number_of_rows_is_that_of_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(31) {
        for (dtype, out) in [(DType::BF16, DType::BF16), (DType::F16, DType::F32), (DType::F32, DType::F32)] {
            let case = Case { dtype, weights: dtype, out, sizes: &[40], k: 96, layout: PACKED };
            check(&mut fixture, &case, ROWS);
            let case = Case { weights: DType::U8, sizes: &[33], k: 144, ..case };
            check(&mut fixture, &case, [1, 6, 16, 17, 40]);
        }
    }
}

#[test]
fn odd_sizes_and_any_alignment_are_those_of_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(32) {
        for dtype in ACTIVATIONS {
            for (i, (n, k)) in
                [(1, 1), (17, 8), (3, 65), (15, 200), (130, 72), (5, 515)].into_iter().enumerate()
            {
                for weights in [dtype, DType::U8] {
                    let out = if i % 2 == 0 { dtype } else { DType::F32 };
                    let layout = LAYOUTS[(i + 1) % LAYOUTS.len()];
                    let case = Case { dtype, weights, out, sizes: &[n], k, layout };
                    check(&mut fixture, &case, [1, 7, 20]);
                }
            }
        }
    }
}

#[test]
fn parts_of_all_sizes_are_computed_side_by_side() {
    for mut fixture in Fixture::of_all_kernels(33) {
        for sizes in [&[48, 16, 16][..], &[1, 2, 3, 4, 5], &[0, 7], &[64, 64]] {
            for rows in [1, 10, 21] {
                for weights in [DType::BF16, DType::U8] {
                    let layout = LAYOUTS[1];
                    let case = Case { dtype: DType::BF16, weights, out: DType::BF16, sizes, k: 80, layout };
                    check(&mut fixture, &case, [rows]);
                }
            }
        }
    }
}

#[test]
fn blocks_of_several_tiles_and_long_rows_are_those_of_the_cpu() {
    let mut fixture = Fixture::new(34);
    // Outputs for which blocks take 2 and 4 tiles on a GPU of up to 132 multiprocessors; k that warps share unevenly.
    for (n, k, rows) in [(4300, 72, 7), (17000, 40, 13), (33, 4168, 3), (20, 2056, 16)] {
        for weights in [DType::BF16, DType::U8] {
            // Of 8-bit weights, rows of 16 elements can be read in packs.
            let k = if weights == DType::U8 { k / 16 * 16 } else { k };
            let case = Case { dtype: DType::BF16, weights, out: DType::F32, sizes: &[n], k, layout: PACKED };
            check(&mut fixture, &case, [rows]);
        }
    }
}

#[test]
fn parts_that_lie_side_by_side_in_memory_are_those_of_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(35) {
        let (k, sizes) = (64, [24, 8, 16]);
        let weight = fixture.values(48, k, DType::BF16);
        let fused = fixture.upload(&weight, DType::BF16, PACKED).whole;
        let split = |whole: &Tensor| {
            let mut first = 0;
            sizes.map(|n| {
                first += n;
                whole.narrow_rows(first - n, n)
            })
        };
        let (cpu, cuda) = (split(&weight), split(&fused));
        let bias = fixture.values(1, 8, DType::BF16);
        let uploaded = fixture.weights(&bias);
        for rows in [2, 30] {
            for has_bias in [false, true] {
                let parts = |weights: &'_ [Tensor; 3], bias: &'_ Tensor| -> Vec<(Tensor, Option<Tensor>)> {
                    let biases = [None, has_bias.then(|| bias.clone()), None];
                    weights.iter().cloned().zip(biases).collect()
                };
                let (cpu, cuda) = (parts(&cpu, &bias), parts(&cuda, &uploaded));
                let x = fixture.values(rows, k, DType::BF16);
                let mut expected = Tensor::zeros(rows, 48, DType::F32);
                linear(&fixture.cpu, x.view(), &as_parts(&cpu), expected.view_mut()).expect("shapes fit");
                let on_device = fixture.upload(&x, DType::BF16, PACKED);
                let mut out = fixture.poisoned(rows, 48, DType::BF16, LAYOUTS[2]);
                linear(&fixture.cuda, on_device.view(), &as_parts(&cuda), out.view_mut())
                    .expect("shapes fit");
                fixture.check(
                    &format!("{rows} rows, bias {has_bias}"),
                    &out,
                    &expected,
                    tolerance(DType::BF16),
                );
            }
        }
    }
}

fn as_parts(owned: &[(Tensor, Option<Tensor>)]) -> Vec<LinearPart<'_>> {
    owned.iter().map(|(weight, bias)| LinearPart { weight: weight.into(), bias: bias.as_ref() }).collect()
}

#[test]
fn one_to_sixteen_rows_have_the_bits_of_single_rows() {
    let mut fixture = Fixture::new(36);
    // Small, of an odd number of tiles; large enough for blocks of 2 and 4 tiles; rows that do not begin at 16 bytes.
    for (n, k, layout) in [(45, 328, PACKED), (4300, 64, PACKED), (17000, 48, PACKED), (9, 81, LAYOUTS[2])] {
        for weights in [DType::BF16, DType::U8] {
            let parts = Parts::new(&mut fixture, weights, &[n], k, layout);
            let x = fixture.values(16, k, DType::BF16);
            let x = fixture.upload(&x, DType::BF16, layout);
            let run = |first: usize, rows: usize| {
                let mut out = fixture.poisoned(rows, n, DType::F32, PACKED);
                let x = x.view().narrow_rows(first, rows);
                linear(&fixture.cuda, x, &parts.cuda(), out.view_mut()).expect("shapes fit");
                download_f32(&fixture.cuda, out.view()).as_slice::<f32>().to_vec()
            };
            let row = 2;
            let alone = run(row, 1);
            for rows in [3, 5, 8, 9, 16] {
                let together = run(0, rows);
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert!(
                    bits(&together[row * n..][..n]) == bits(&alone),
                    "{weights:?}, {n} x {k}, {rows} rows"
                );
            }
        }
    }
}

#[test]
fn gated_layers_are_those_of_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(37) {
        let activations = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];
        for (i, (n, k, rows)) in
            [(48, 64, 1), (17, 96, 8), (33, 128, 9), (3000, 16, 2), (8800, 16, 12), (24, 33, 5), (24, 64, 19)]
                .into_iter()
                .enumerate()
        {
            for (dtype, weights) in
                [(DType::BF16, DType::BF16), (DType::F16, DType::U8), (DType::F32, DType::F32)]
            {
                let activation = activations[i % activations.len()];
                let layout = LAYOUTS[i % 2];
                let what =
                    format!("{dtype:?} x {weights:?}, {rows} rows, {n} x {k}, {activation:?}, {layout:?}");
                let parts = Parts::new(&mut fixture, weights, &[n, n], k, layout);
                let x = fixture.values(rows, k, dtype);
                let (cpu, cuda) = (parts.cpu(), parts.cuda());
                let mut expected = Tensor::zeros(rows, n, DType::F32);
                let mut gate_up = Tensor::zeros(rows, 2 * n, DType::F32);
                let on_cpu = GatedLinear { gate: cpu[0], up: cpu[1], activation };
                linear_gated(&fixture.cpu, x.view(), on_cpu, gate_up.view_mut(), expected.view_mut())
                    .expect("shapes fit");

                let on_device = fixture.upload(&x, dtype, layout);
                let mut gate_up = fixture.poisoned(rows, 2 * n, dtype, layout);
                let mut out = fixture.poisoned(rows, n, dtype, layout);
                let there = GatedLinear { gate: cuda[0], up: cuda[1], activation };
                linear_gated(&fixture.cuda, on_device.view(), there, gate_up.view_mut(), out.view_mut())
                    .expect("shapes fit");
                // Kept in registers, only the result is rounded. Where gate and up are written first, each is, and it may be as great
                // as sqrt(k).
                let is_fused = rows <= fixture.most_fused_rows && k % 16 == 0 && dtype != DType::F32;
                let tolerance = if is_fused {
                    tolerance(dtype) + 5e-5
                } else {
                    tolerance_of(&fixture, [dtype, weights, dtype], rows, k) * (2.0 + (k as f32).sqrt())
                };
                fixture.check(&what, &out, &expected, tolerance);
            }
        }
    }
}

#[test]
fn each_row_is_computed_by_its_expert() {
    for mut fixture in Fixture::of_all_kernels(38) {
        // Rows of each expert: none, one, tiles that are full and not, more experts than a warp has lanes.
        let many: Vec<usize> = (0..70).map(|expert| expert * 7 % 4).collect();
        let groups: [&[usize]; 6] = [&[0, 3, 0, 1], &[16, 17, 0, 40], &many, &[70], &[100, 0, 129], &[0, 0]];
        for (i, counts) in groups.into_iter().enumerate() {
            for (dtype, weights, k) in [
                (DType::BF16, DType::BF16, 72),
                (DType::F16, DType::F16, 40),
                (DType::F32, DType::F32, 33),
                (DType::BF16, DType::U8, 48),
                (DType::BF16, DType::BF16, 7),
            ] {
                let (n, num_experts, used) =
                    ([5, 130, 24][i % 3], counts.len(), counts.iter().sum::<usize>());
                // Rows behind the end belong to nobody.
                let rows = used + 3;
                let layout = LAYOUTS[i % 2];
                let weight = Both::new(&mut fixture, weights, num_experts * n, k, layout);
                let x = fixture.values(rows, k, dtype);
                let mut starts = vec![0_u32];
                starts.extend(counts.iter().scan(0, |end, count| {
                    *end += *count as u32;
                    Some(*end)
                }));
                let starts = Tensor::from_slice(&starts, 1, num_experts + 1);
                let uploaded = fixture.cuda.upload(&starts).expect("memory");
                let mut expected = Tensor::from_slice(&vec![f32::NAN; rows * n], rows, n);
                let experts = Experts { weight: weight.cpu(), starts: starts.view() };
                linear_grouped(&fixture.cpu, x.view(), experts, expected.view_mut()).expect("shapes fit");

                let on_device = fixture.upload(&x, dtype, layout);
                let mut out = fixture.poisoned(rows, n, dtype, layout);
                let experts = Experts { weight: weight.cuda(), starts: uploaded.view() };
                linear_grouped(&fixture.cuda, on_device.view(), experts, out.view_mut()).expect("shapes fit");
                let what = format!("{dtype:?} x {weights:?}, {counts:?} rows, {n} x {k}");
                let actual = download_f32(&fixture.cuda, out.view());
                let behind =
                    |matrix: &Tensor| matrix.as_slice::<f32>()[used * n..].iter().all(|value| value.is_nan());
                assert!(behind(&actual) && behind(&expected), "{what}: rows behind the end were written");
                let actual = fixture.upload(&actual.narrow_rows(0, used), DType::F32, PACKED);
                let tolerance = tolerance_of(&fixture, [dtype, weights, dtype], 1, k);
                fixture.check(&what, &actual, &expected.narrow_rows(0, used), tolerance);
            }
        }
    }
}

#[test]
fn a_recorded_step_serves_any_routing() {
    for mut fixture in Fixture::of_all_kernels(41) {
        let (rows, n, k, num_experts) = (20, 24, 64, 4);
        for weights in [DType::BF16, DType::U8] {
            let weight = Both::new(&mut fixture, weights, num_experts * n, k, PACKED);
            let x = fixture.values(rows, k, DType::BF16);
            let on_device = fixture.upload(&x, DType::BF16, PACKED);
            let mut out = fixture.poisoned(rows, n, DType::F32, PACKED);
            let mut staging = Staging::new(&fixture.cuda, &[num_experts + 1]).expect("memory");
            let [starts] = staging.send(&fixture.cuda, [&[0, 20, 20, 20, 20]]).expect("it fits");
            let mut step = || {
                let experts = Experts { weight: weight.cuda(), starts };
                linear_grouped(&fixture.cuda, on_device.view(), experts, out.view_mut())
            };
            step().expect("shapes fit");
            let graph = fixture.cuda.capture(step).expect("it is recorded");
            for starts in [[0, 1, 2, 3, 20], [0, 0, 17, 17, 20], [0, 5, 10, 15, 20]] {
                // At the same address.
                staging.send(&fixture.cuda, [&starts]).expect("it fits");
                graph.launch().expect("it runs");
                let mut expected = Tensor::zeros(rows, n, DType::F32);
                let experts =
                    Experts { weight: weight.cpu(), starts: View::from_slice(&starts, 1, num_experts + 1) };
                linear_grouped(&fixture.cpu, x.view(), experts, expected.view_mut()).expect("shapes fit");
                let tolerance = tolerance_of(&fixture, [DType::BF16, weights, DType::F32], 1, k);
                fixture.check(&format!("{weights:?}, {starts:?}"), &out, &expected, tolerance);
            }
        }
    }
}

#[test]
fn a_step_that_ran_before_needs_no_more_memory() {
    for mut fixture in Fixture::of_all_kernels(42) {
        for weights in [DType::BF16, DType::U8] {
            let parts = Parts::new(&mut fixture, weights, &[40, 24], 64, PACKED);
            for rows in [1, 30] {
                let x = fixture.values(rows, 64, DType::BF16);
                let x = fixture.upload(&x, DType::BF16, PACKED);
                let mut out = fixture.poisoned(rows, parts.total(), DType::BF16, PACKED);
                let mut step = || linear(&fixture.cuda, x.view(), &parts.cuda(), out.view_mut());
                step().expect("shapes fit");
                let frozen = fixture.cuda.freeze();
                step().expect("nothing is allocated");
                drop(frozen);
            }
        }
    }
}

#[test]
fn operands_of_the_wrong_type_or_place_are_refused() {
    let mut fixture = Fixture::new(39);
    let values = fixture.values(4, 16, DType::F32);
    let weight = fixture.upload(&values, DType::BF16, PACKED).whole;
    let x = fixture.upload(&values, DType::BF16, PACKED);
    let parts = |weight| [LinearPart { weight: Weight::Dense(weight), bias: None }];
    let mut out = fixture.poisoned(4, 4, DType::F16, PACKED);
    let refused = linear(&fixture.cuda, x.view(), &parts(&weight), out.view_mut());
    assert!(matches!(refused, Err(Error::DType { dtype: DType::F16, .. })), "{refused:?}");
    let other = fixture.upload(&values, DType::F16, PACKED);
    let refused = linear(&fixture.cuda, other.view(), &parts(&weight), out.view_mut());
    assert!(matches!(refused, Err(Error::DType { dtype: DType::BF16, .. })), "{refused:?}");
    let mut out = fixture.poisoned(4, 4, DType::BF16, PACKED);
    let on_host = values.to_dtype(DType::BF16).expect("a float type");
    let refused = linear(&fixture.cuda, x.view(), &parts(&on_host), out.view_mut());
    let message = refused.expect_err("the weight is on the host").to_string();
    assert!(message.contains("a weight lies in host memory"), "{message}");
    let refused = linear(&fixture.cuda, on_host.view(), &parts(&weight), out.view_mut());
    assert!(refused.expect_err("x is on the host").to_string().contains("x lies in host memory"));
}

#[test]
fn random_shapes_are_those_of_the_cpu() {
    let mut fixture = Fixture::new(40);
    for _ in 0..30 {
        let dtype = ACTIVATIONS[fixture.random.random_range(0..3)];
        let weights = if fixture.random.random_bool(0.3) { DType::U8 } else { dtype };
        let out = if fixture.random.random_bool(0.5) { DType::F32 } else { dtype };
        let sizes: Vec<usize> =
            (0..fixture.random.random_range(1..4)).map(|_| fixture.random.random_range(1..90)).collect();
        // Half of them can be read in packs.
        let k: usize = fixture.random.random_range(1..300);
        let k = if fixture.random.random_bool(0.5) { k.next_multiple_of(16) } else { k };
        let layout = LAYOUTS[fixture.random.random_range(0..LAYOUTS.len())];
        let rows = fixture.random.random_range(1..40);
        check(&mut fixture, &Case { dtype, weights, out, sizes: &sizes, k, layout }, [rows]);
    }
}
