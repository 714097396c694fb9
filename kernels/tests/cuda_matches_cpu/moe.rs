//! Routing to experts and back.

use kernels::ops::moe::{Routing, TopK};
use kernels::{DType, Tensor};

use super::{ACTIVATIONS, Fixture, LAYOUTS, tolerance};

#[test]
fn rows_go_to_the_experts_that_the_cpu_chooses_and_come_back_the_same() {
    let mut fixture = Fixture::new(41);
    let (mut on_cpu, mut on_device) = (Routing::default(), Routing::default());
    let shapes = [(1, 1, 1, 5), (7, 8, 2, 64), (40, 60, 4, 100), (300, 17, 17, 33), (1000, 128, 8, 24)];
    for (i, (rows, experts, experts_per_row, cols)) in shapes.into_iter().enumerate() {
        let (dtype, layout) = (ACTIVATIONS[i % 3], LAYOUTS[i % LAYOUTS.len()]);
        let what = format!("{rows} rows to {experts_per_row} of {experts} {dtype:?} {layout:?}");
        let logits = fixture.values(rows, experts, DType::F32);
        let top_k = TopK { experts_per_row, renormalize: i % 2 == 0 };
        on_cpu.route(&fixture.cpu, logits.view(), top_k).expect("shapes fit");
        let there = fixture.upload(&logits, DType::F32, layout);
        on_device.route(&fixture.cuda, there.view(), top_k).expect("shapes fit");

        let mut starts = vec![0_u32; experts + 1];
        fixture.cuda.download(on_device.starts(), &mut starts).expect("the stream works");
        assert_eq!(starts, on_cpu.starts().into_slice::<u32>(), "{what}");

        let (x, slots) = (fixture.values(rows, cols, dtype), rows * experts_per_row);
        let mut gathered = Tensor::zeros(slots, cols, DType::F32);
        on_cpu.gather(&fixture.cpu, x.view(), gathered.view_mut()).expect("shapes fit");
        let mut gathered_there = fixture.poisoned(slots, cols, dtype, layout);
        let x = fixture.upload(&x, dtype, layout);
        on_device.gather(&fixture.cuda, x.view(), gathered_there.view_mut()).expect("shapes fit");
        fixture.check(&what, &gathered_there, &gathered, 0.0);

        let mut combined = Tensor::zeros(rows, cols, DType::F32);
        on_cpu.combine(&fixture.cpu, gathered.view(), combined.view_mut()).expect("shapes fit");
        let mut combined_there = fixture.poisoned(rows, cols, dtype, layout);
        on_device
            .combine(&fixture.cuda, gathered_there.view(), combined_there.view_mut())
            .expect("shapes fit");
        fixture.check(&what, &combined_there, &combined, tolerance(dtype).max(4e-6));
    }
}

#[test]
fn equally_likely_experts_are_taken_by_lower_ids_and_what_is_not_a_number_last() {
    let fixture = Fixture::new(42);
    let logits = [0.0_f32, 1.0, 1.0, 0.0, 1.0, 1.0, f32::NEG_INFINITY, f32::NEG_INFINITY];
    for (experts_per_row, expected) in
        [(3, vec![0, 0, 1, 2, 2, 3, 3, 3, 3]), (7, vec![0, 1, 2, 3, 4, 5, 6, 7, 7])]
    {
        let mut routing = Routing::default();
        routing.reserve(&fixture.cuda, 10, 8, 7).expect("memory");
        let logits = fixture.cuda.upload(&Tensor::from_slice(&logits, 1, 8)).expect("memory");
        let top_k = TopK { experts_per_row, renormalize: true };
        routing.route(&fixture.cuda, logits.view(), top_k).expect("shapes fit");
        let mut starts = vec![0_u32; 9];
        fixture.cuda.download(routing.starts(), &mut starts).expect("the stream works");
        assert_eq!(starts, expected);
    }
}

#[test]
fn nothing_can_be_gathered_before_it_is_routed() {
    let fixture = Fixture::new(43);
    let x = fixture.cuda.zeros(2, 8, DType::F32).expect("memory");
    let mut out = fixture.cuda.zeros(2, 8, DType::F32).expect("memory");
    let error =
        Routing::default().gather(&fixture.cuda, x.view(), out.view_mut()).expect_err("nothing is there");
    assert!(error.to_string().contains("call Routing::route first"), "{error}");
}
