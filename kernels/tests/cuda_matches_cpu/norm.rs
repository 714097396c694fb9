//! RMS and layer normalization.

use kernels::ops::norm::{self, LayerNormWeights};
use kernels::{DType, Tensor};

use super::{ACTIVATIONS, Fixture, LAYOUTS, Layout, tolerance};

const EPS: f32 = 1e-5;
/// Around what a thread loads at once, what a block keeps in registers, and more than that.
const SHAPES: [(usize, usize); 8] =
    [(1, 1), (2, 3), (3, 64), (5, 100), (2, 576), (1, 1030), (2, 4096), (1, 20000)];

/// Each element type and shape, with each layout in turn; a name for messages.
fn cases() -> impl Iterator<Item = (String, DType, (usize, usize), Layout)> {
    ACTIVATIONS.into_iter().enumerate().flat_map(|(i, dtype)| {
        SHAPES.into_iter().enumerate().map(move |(j, shape)| {
            let layout = LAYOUTS[(i + j) % LAYOUTS.len()];
            (format!("{dtype:?} {shape:?} {layout:?}"), dtype, shape, layout)
        })
    })
}

fn zeros((rows, cols): (usize, usize)) -> Tensor {
    Tensor::zeros(rows, cols, DType::F32)
}

#[test]
fn rms_norm_is_that_of_the_cpu() {
    let mut fixture = Fixture::new(2);
    for (name, dtype, shape, layout) in cases() {
        let x = fixture.values(shape.0, shape.1, DType::F32);
        let weight = fixture.values(1, shape.1, DType::F32);
        let mut expected = zeros(shape);
        norm::rms_norm(&fixture.cpu, x.view(), &weight, EPS, expected.view_mut()).expect("shapes fit");

        let (x, weight) = (fixture.upload(&x, DType::F32, layout), fixture.weights(&weight));
        let mut out = fixture.poisoned(shape.0, shape.1, dtype, layout);
        norm::rms_norm(&fixture.cuda, x.view(), &weight, EPS, out.view_mut()).expect("shapes fit");
        fixture.check(&name, &out, &expected, tolerance(dtype));
    }
}

#[test]
fn add_rms_norm_is_that_of_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(3) {
        for (name, dtype, shape, layout) in cases() {
            let mut sum = fixture.values(shape.0, shape.1, DType::F32);
            let x = fixture.values(shape.0, shape.1, dtype);
            let weight = fixture.values(1, shape.1, DType::F32);
            let mut residual = fixture.upload(&sum, DType::F32, layout);
            let mut expected = zeros(shape);
            norm::add_rms_norm(&fixture.cpu, sum.view_mut(), x.view(), &weight, EPS, expected.view_mut())
                .expect("shapes fit");

            let (x, weight) = (fixture.upload(&x, dtype, layout), fixture.weights(&weight));
            let mut out = fixture.poisoned(shape.0, shape.1, dtype, layout);
            norm::add_rms_norm(&fixture.cuda, residual.view_mut(), x.view(), &weight, EPS, out.view_mut())
                .expect("shapes fit");
            fixture.check(&format!("{name}, residual"), &residual, &sum, 0.0);
            fixture.check(&name, &out, &expected, tolerance(dtype));
        }
    }
}

#[test]
fn rms_norm_of_heads_is_that_of_the_cpu() {
    let mut fixture = Fixture::new(4);
    for dtype in ACTIVATIONS {
        for (rows, heads, head_dim) in
            [(1, 1, 1), (3, 5, 64), (2, 3, 80), (2, 1, 256), (3, 2, 300), (0, 2, 64)]
        {
            for layout in LAYOUTS {
                let mut expected = fixture.values(rows, heads * head_dim, dtype);
                let weight = fixture.values(1, head_dim, DType::F32);
                let mut x = fixture.upload(&expected, dtype, layout);
                norm::rms_norm_heads(&fixture.cpu, expected.view_mut(), &weight, EPS).expect("shapes fit");

                norm::rms_norm_heads(&fixture.cuda, x.view_mut(), &fixture.weights(&weight), EPS)
                    .expect("shapes fit");
                let name = format!("{dtype:?} {rows} x {heads} x {head_dim} {layout:?}");
                fixture.check(&name, &x, &expected, tolerance(dtype));
            }
        }
    }
}

#[test]
fn layer_norm_is_that_of_the_cpu() {
    let mut fixture = Fixture::new(5);
    for (i, (name, dtype, shape, layout)) in cases().enumerate() {
        // Far from zero, where the mean must go before the squares.
        let mut x = fixture.values(shape.0, shape.1, DType::F32);
        x.as_mut_slice::<f32>().iter_mut().for_each(|x| *x += 10.0);
        let weight = fixture.values(1, shape.1, DType::F32);
        let bias = (i % 2 == 0).then(|| fixture.values(1, shape.1, DType::F32));
        let weights = LayerNormWeights { weight: &weight, bias: bias.as_ref(), eps: EPS };
        let mut expected = zeros(shape);
        norm::layer_norm(&fixture.cpu, x.view(), weights, expected.view_mut()).expect("shapes fit");

        let x = fixture.upload(&x, DType::F32, layout);
        let (weight, bias) = (fixture.weights(&weight), bias.map(|bias| fixture.weights(&bias)));
        let weights = LayerNormWeights { weight: &weight, bias: bias.as_ref(), eps: EPS };
        let mut out = fixture.poisoned(shape.0, shape.1, dtype, layout);
        norm::layer_norm(&fixture.cuda, x.view(), weights, out.view_mut()).expect("shapes fit");
        // The mean of a row at 10 has an error of some 1e-6.
        fixture.check(&name, &out, &expected, tolerance(dtype).max(1e-5));
    }
}

#[test]
fn add_layer_norm_is_that_of_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(6) {
        for (i, (name, dtype, shape, layout)) in cases().enumerate() {
            let mut sum = fixture.values(shape.0, shape.1, DType::F32);
            let x = fixture.values(shape.0, shape.1, dtype);
            let weight = fixture.values(1, shape.1, DType::F32);
            let bias = (i % 2 == 1).then(|| fixture.values(1, shape.1, DType::F32));
            let weights = LayerNormWeights { weight: &weight, bias: bias.as_ref(), eps: EPS };
            let mut residual = fixture.upload(&sum, DType::F32, layout);
            let mut expected = zeros(shape);
            norm::add_layer_norm(&fixture.cpu, sum.view_mut(), x.view(), weights, expected.view_mut())
                .expect("shapes fit");

            let x = fixture.upload(&x, dtype, layout);
            let (weight, bias) = (fixture.weights(&weight), bias.map(|bias| fixture.weights(&bias)));
            let weights = LayerNormWeights { weight: &weight, bias: bias.as_ref(), eps: EPS };
            let mut out = fixture.poisoned(shape.0, shape.1, dtype, layout);
            norm::add_layer_norm(&fixture.cuda, residual.view_mut(), x.view(), weights, out.view_mut())
                .expect("shapes fit");
            fixture.check(&format!("{name}, residual"), &residual, &sum, 0.0);
            fixture.check(&name, &out, &expected, tolerance(dtype));
        }
    }
}

#[test]
fn operands_in_host_memory_or_of_another_shape_are_refused() {
    let mut fixture = Fixture::new(7);
    let host = fixture.values(2, 64, DType::F32);
    let weight = fixture.values(1, 64, DType::F32);
    let (there, there_weight) = (fixture.weights(&host), fixture.weights(&weight));
    let mut out = fixture.poisoned(2, 64, DType::BF16, LAYOUTS[0]);
    let mut refused = |x: &Tensor, weight: &Tensor| {
        norm::rms_norm(&fixture.cuda, x.view(), weight, EPS, out.view_mut()).expect_err("refused").to_string()
    };
    assert!(refused(&host, &there_weight).contains("x lies in host memory"));
    assert!(refused(&there, &weight).contains("weight lies in host memory"));
    assert!(refused(&there.narrow_rows(0, 1), &there_weight).contains("out is [2, 64], expected [1, 64]"));
    assert!(refused(&there, &there_weight.narrow_cols(0, 63)).contains("weight is [1, 63]"));

    let mut out = zeros((2, 64));
    let refused = norm::rms_norm(&fixture.cpu, there.view(), &weight, EPS, out.view_mut());
    assert!(refused.expect_err("refused").to_string().contains("x lies in device memory"));
}
