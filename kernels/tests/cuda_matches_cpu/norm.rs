//! RMS and layer normalization.

use kernels::DType;
use kernels::ops::norm;

use super::{ACTIVATIONS, Fixture, LAYOUTS, tolerance};

const EPS: f32 = 1e-5;
/// Around what a thread loads at once, what a block keeps in registers, and more than that.
const SHAPES: [(usize, usize); 8] =
    [(1, 1), (2, 3), (3, 64), (5, 100), (2, 576), (1, 1030), (2, 4096), (1, 20000)];

#[test]
fn rms_norm_is_that_of_the_cpu() {
    let mut fixture = Fixture::new(2);
    for dtype in ACTIVATIONS {
        for (i, (rows, cols)) in SHAPES.into_iter().enumerate() {
            let layout = LAYOUTS[i % LAYOUTS.len()];
            let x = fixture.values(rows, cols, DType::F32);
            let weight = fixture.values(1, cols, DType::F32);
            let mut expected = kernels::Tensor::zeros(rows, cols, DType::F32);
            norm::rms_norm(&fixture.cpu, x.view(), &weight, EPS, expected.view_mut()).expect("shapes fit");

            let on_device = fixture.upload(&x, DType::F32, layout);
            let mut out = fixture.poisoned(rows, cols, dtype, layout);
            norm::rms_norm(&fixture.cuda, on_device.view(), &fixture.weights(&weight), EPS, out.view_mut())
                .expect("shapes fit");
            fixture.check(
                &format!("{dtype:?} [{rows}, {cols}] {layout:?}"),
                &out,
                &expected,
                tolerance(dtype),
            );
        }
    }
}
