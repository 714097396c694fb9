//! Rows by index, and ids that the host has not seen.

use kernels::ops::embedding::{self, LAST_TOKEN_OF};
use kernels::{DType, Tensor};
use rand::RngExt;

use super::{ACTIVATIONS, Fixture, LAYOUTS};

const WIDTHS: [usize; 6] = [1, 3, 8, 100, 1030, 4096];

#[test]
fn embeddings_are_those_of_the_cpu_and_zeros_outside_of_the_ranks_part() {
    let mut fixture = Fixture::new(21);
    for dtype in ACTIVATIONS {
        for (i, cols) in WIDTHS.into_iter().enumerate() {
            let layout = LAYOUTS[i % LAYOUTS.len()];
            let table = fixture.values(50, cols, dtype);
            let ids = [100, 149, 150, 99, 0, u32::MAX, 123];
            let ids = Tensor::from_slice(&ids, 1, ids.len());
            let mut expected = Tensor::zeros(7, cols, DType::F32);
            embedding::embedding(&fixture.cpu, ids.view(), &table, 100, expected.view_mut())
                .expect("shapes fit");
            let there = fixture.upload(&table, dtype, LAYOUTS[0]).whole;
            let mut out = fixture.poisoned(7, cols, DType::F32, layout);
            let ids = fixture.cuda.upload(&ids).expect("memory");
            embedding::embedding(&fixture.cuda, ids.view(), &there, 100, out.view_mut()).expect("shapes fit");
            fixture.check(&format!("{dtype:?} of {cols} {layout:?}"), &out, &expected, 0.0);
        }
    }
}

#[test]
fn gathered_rows_are_copies_and_those_of_no_row_are_zeros() {
    let mut fixture = Fixture::new(22);
    for dtype in ACTIVATIONS {
        for (i, cols) in WIDTHS.into_iter().enumerate() {
            let layout = LAYOUTS[i % LAYOUTS.len()];
            let x = fixture.values(30, cols, dtype);
            let mut rows: Vec<u32> = (0..40).map(|_| fixture.random.random_range(0..30)).collect();
            let mut expected = Tensor::zeros(40, cols, DType::F32);
            let host_rows = Tensor::from_slice(&rows, 1, 40);
            embedding::gather_rows(&fixture.cpu, x.view(), host_rows.view(), expected.view_mut())
                .expect("shapes fit");
            rows[7] = 30;
            rows[9] = u32::MAX;
            for row in [7, 9] {
                expected.view_mut().row::<f32>(row).fill(0.0);
            }
            let there = fixture.upload(&x, dtype, layout);
            let mut out = fixture.poisoned(40, cols, dtype, layout);
            let rows = fixture.cuda.upload(&Tensor::from_slice(&rows, 1, 40)).expect("memory");
            embedding::gather_rows(&fixture.cuda, there.view(), rows.view(), out.view_mut())
                .expect("shapes fit");
            fixture.check(&format!("{dtype:?} of {cols} {layout:?}"), &out, &expected, 0.0);
        }
    }
}

#[test]
fn ids_that_name_a_place_become_the_token_there() {
    let fixture = Fixture::new(23);
    let ids: Vec<u32> =
        (0..700).map(|i| if i % 3 == 0 { LAST_TOKEN_OF | (i % 5) } else { 1000 + i }).collect();
    let last_tokens = [7_u32, 8, 9, 10, 11];
    let resolve = |context: &kernels::Context| {
        let upload = |values: &[u32]| context.upload(&Tensor::from_slice(values, 1, values.len()));
        let (ids, last_tokens) = (upload(&ids).expect("memory"), upload(&last_tokens).expect("memory"));
        let mut out = context.zeros(1, 700, DType::U32).expect("memory");
        embedding::resolve_ids(context, ids.view(), last_tokens.view(), out.view_mut()).expect("shapes fit");
        let mut resolved = vec![0_u32; 700];
        context.download(out.view(), &mut resolved).expect("the stream works");
        resolved
    };
    let expected = resolve(&fixture.cpu);
    assert_eq!((expected[0], expected[1], expected[3]), (7, 1001, 10));
    assert_eq!(resolve(&fixture.cuda), expected);
}
