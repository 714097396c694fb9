//! Activations, plain and gated, and sums.

use kernels::ops::activation::{self, Activation};
use kernels::{DType, Tensor};

use super::{ACTIVATIONS, Fixture, LAYOUTS, tolerance};

const FUNCTIONS: [Activation; 5] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::SquaredRelu];
/// Below and above what a thread takes, and more than a block.
const SHAPES: [(usize, usize); 7] = [(1, 1), (2, 3), (3, 8), (2, 64), (5, 100), (1, 2056), (2, 4100)];

/// Exponentials of a GPU are good to some units of the last place.
fn wide(dtype: DType) -> f32 {
    tolerance(dtype).max(4e-6)
}

#[test]
fn activations_are_those_of_the_cpu_plain_and_gated() {
    let mut fixture = Fixture::new(11);
    let mut case = 0;
    for dtype in ACTIVATIONS {
        for (rows, cols) in SHAPES {
            for function in FUNCTIONS {
                case += 1;
                let layout = LAYOUTS[case % LAYOUTS.len()];
                let what = format!("{function:?} {dtype:?} [{rows}, {cols}] {layout:?}");
                let x = fixture.values(rows, 2 * cols, dtype);
                let there = fixture.upload(&x, dtype, layout);

                let mut expected = Tensor::zeros(rows, cols, DType::F32);
                activation::gated(&fixture.cpu, function, x.view(), expected.view_mut()).expect("shapes fit");
                let mut out = fixture.poisoned(rows, cols, dtype, layout);
                activation::gated(&fixture.cuda, function, there.view(), out.view_mut()).expect("shapes fit");
                fixture.check(&what, &out, &expected, wide(dtype));

                let mut expected = Tensor::zeros(rows, 2 * cols, DType::F32);
                activation::activate(&fixture.cpu, function, x.view(), expected.view_mut())
                    .expect("shapes fit");
                let mut out = fixture.poisoned(rows, 2 * cols, dtype, layout);
                activation::activate(&fixture.cuda, function, there.view(), out.view_mut())
                    .expect("shapes fit");
                fixture.check(&what, &out, &expected, wide(dtype));
            }
        }
    }
}

#[test]
fn a_sum_is_that_of_the_cpu() {
    let mut fixture = Fixture::new(12);
    for dtype in ACTIVATIONS {
        for (i, (rows, cols)) in SHAPES.into_iter().enumerate() {
            let layout = LAYOUTS[i % LAYOUTS.len()];
            let (x, y) = (fixture.values(rows, cols, DType::F32), fixture.values(rows, cols, dtype));
            let mut there = fixture.upload(&x, DType::F32, layout);
            let mut expected = x.to_dtype(DType::F32).expect("a float type");
            activation::add(&fixture.cpu, expected.view_mut(), y.view()).expect("shapes fit");
            let added = fixture.upload(&y, dtype, layout);
            activation::add(&fixture.cuda, there.view_mut(), added.view()).expect("shapes fit");
            fixture.check(&format!("{dtype:?} [{rows}, {cols}] {layout:?}"), &there, &expected, 0.0);
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let fixture = Fixture::new(13);
    let on_device = |cols, dtype| fixture.cuda.zeros(2, cols, dtype).expect("memory");
    let mut out = on_device(8, DType::BF16);
    let mut refused = |x: &Tensor, expected: &str| {
        let error = activation::activate(&fixture.cuda, Activation::Silu, x.view(), out.view_mut())
            .expect_err("it does not fit");
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused(&on_device(9, DType::BF16), "x is [2, 9], expected [2, 8]");
    refused(&on_device(8, DType::F16), "supported are bf16");
    refused(&Tensor::zeros(2, 8, DType::BF16), "x lies in host memory");
}
