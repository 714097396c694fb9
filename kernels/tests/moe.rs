//! Routing to experts and back, against f64.

#[expect(dead_code, reason = "what other tests need")]
mod common;

use common::{assert_close, assert_same_bits, contexts, levels, rng, tensor, uniform};
use kernels::ops::moe::{Routing, TopK};
use kernels::{Context, DType, Error, Tensor, View};

fn softmax(logits: &[f32]) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|&logit| f64::from(logit).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

#[test]
fn rows_go_to_their_most_likely_experts_with_the_weights_of_softmax() {
    let mut rng = rng(1);
    let context = Context::cpu(2);
    let mut routing = Routing::default();
    for (rows, experts, experts_per_row) in [(1, 1, 1), (5, 8, 2), (40, 60, 4), (300, 17, 17)] {
        let logits: Vec<f32> = uniform(&mut rng, rows * experts).iter().map(|v| 5.0 * v).collect();
        for renormalize in [false, true] {
            let top_k = TopK { experts_per_row, renormalize };
            let view = View::from_slice(&logits, rows, experts);
            routing.route(&context, view, top_k).expect("shapes fit");
            for (row, logits) in logits.chunks(experts).enumerate() {
                let likely = softmax(logits);
                let mut best: Vec<usize> = (0..experts).collect();
                best.sort_by(|&a, &b| likely[b].total_cmp(&likely[a]));
                best.truncate(experts_per_row);
                let total: f64 = if renormalize { best.iter().map(|&e| likely[e]).sum() } else { 1.0 };
                let chosen = routing.chosen(row);
                assert_eq!(chosen.iter().map(|c| c.expert as usize).collect::<Vec<_>>(), best);
                let got: Vec<f32> = chosen.iter().map(|choice| choice.weight).collect();
                let want: Vec<f64> = best.iter().map(|&expert| likely[expert] / total).collect();
                assert_close(&got, &want, 5e-7, "weights");
            }
        }
    }
}

#[test]
fn equally_likely_experts_are_taken_by_lower_ids() {
    let mut routing = Routing::default();
    let top_k = TopK { experts_per_row: 3, renormalize: true };
    routing
        .route(&Context::cpu(1), View::from_slice(&[0.0_f32, 1.0, 1.0, 0.0, 1.0, 1.0], 1, 6), top_k)
        .expect("shapes fit");
    let experts: Vec<u32> = routing.chosen(0).iter().map(|choice| choice.expert).collect();
    assert_eq!(experts, [1, 2, 4]);
}

#[test]
fn slots_are_grouped_by_expert_in_order_of_rows_and_gathered_and_combined_rows_come_back() {
    let mut rng = rng(2);
    let (rows, experts, cols) = (50, 7, 37);
    let logits = tensor(&mut rng, rows, experts, DType::F32);
    let x = tensor(&mut rng, rows, cols, DType::F32);
    for context in levels() {
        let mut routing = Routing::default();
        let top_k = TopK { experts_per_row: 3, renormalize: false };
        routing.route(&context, logits.view(), top_k).expect("shapes fit");
        let mut gathered = Tensor::zeros(rows * 3, cols, DType::F32);
        routing.gather(&context, x.view(), gathered.view_mut()).expect("shapes fit");
        assert_eq!((routing.slots(0).start, routing.slots(experts - 1).end), (0, rows * 3));
        for expert in 0..experts {
            let rows = &routing.rows()[routing.slots(expert)];
            assert!(rows.is_sorted());
            for (slot, &row) in routing.slots(expert).zip(rows) {
                let choice = routing.chosen(row as usize).iter().find(|c| c.slot as usize == slot);
                assert_eq!(choice.map(|choice| choice.expert as usize), Some(expert));
                assert_same_bits(gathered.view().row(slot), x.view().row(row as usize), "gathered");
            }
        }
        // Expert e multiplies with e + 1.
        for expert in 0..experts {
            for slot in routing.slots(expert) {
                let row = &mut gathered.as_mut_slice::<f32>()[slot * cols..][..cols];
                for value in row {
                    *value *= expert as f32 + 1.0;
                }
            }
        }
        let mut out = Tensor::zeros(rows, cols, DType::F32);
        routing.combine(&context, gathered.view(), out.view_mut()).expect("shapes fit");
        for row in 0..rows {
            let factor: f64 = routing
                .chosen(row)
                .iter()
                .map(|choice| f64::from(choice.weight) * (f64::from(choice.expert) + 1.0))
                .sum();
            let want: Vec<f64> =
                x.view().row::<f32>(row).iter().map(|&value| f64::from(value) * factor).collect();
            // Three products of at most 7, each rounded twice.
            assert_close(out.view().row(row), &want, 3e-6, "combined");
        }
    }
}

#[test]
fn rows_whose_logits_are_not_all_numbers_leave_the_others_alone() {
    let (rows, experts) = (4, 20);
    let top_k = TopK { experts_per_row: 3, renormalize: true };
    let mut logits = uniform(&mut rng(4), rows * experts);
    let mut routing = Routing::default();
    routing.route(&Context::cpu(1), View::from_slice(&logits, rows, experts), top_k).expect("shapes fit");
    let before: Vec<_> = [0, 3].map(|row| routing.chosen(row).to_vec()).concat();
    logits[experts..2 * experts].fill(f32::NAN);
    logits[2 * experts + 7] = f32::NEG_INFINITY;
    routing.route(&Context::cpu(1), View::from_slice(&logits, rows, experts), top_k).expect("shapes fit");
    let after: Vec<_> = [0, 3].map(|row| routing.chosen(row).to_vec()).concat();
    let experts_and_weights = |choices: &[kernels::ops::moe::Choice]| -> Vec<(u32, u32)> {
        choices.iter().map(|choice| (choice.expert, choice.weight.to_bits())).collect()
    };
    assert_eq!(experts_and_weights(&after), experts_and_weights(&before));
    assert!(routing.chosen(1).iter().all(|choice| choice.weight.is_nan()), "of NaN nothing is known");
    let chosen = routing.chosen(2);
    assert!(chosen.iter().all(|choice| choice.expert != 7 && choice.weight.is_finite()), "{chosen:?}");
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_company_at_every_level() {
    let mut rng = rng(3);
    let (rows, experts, cols) = (400, 16, 64);
    let logits = tensor(&mut rng, rows, experts, DType::F32);
    let x = tensor(&mut rng, rows, cols, DType::F32);
    let top_k = TopK { experts_per_row: 4, renormalize: true };
    let run = |context: &Context, logits: View<'_>, x: View<'_>| {
        let mut routing = Routing::default();
        routing.route(context, logits, top_k).expect("shapes fit");
        let mut gathered = Tensor::zeros(x.rows() * 4, cols, DType::F32);
        routing.gather(context, x, gathered.view_mut()).expect("shapes fit");
        let mut out = Tensor::zeros(x.rows(), cols, DType::F32);
        routing.combine(context, gathered.view(), out.view_mut()).expect("shapes fit");
        out
    };
    for contexts in contexts(&[1, 2, 3]) {
        let [all, on_two] = [2, 1].map(|i| run(&contexts[i], logits.view(), x.view()));
        assert_same_bits(on_two.as_slice(), all.as_slice(), "on two threads");
        for row in [0, 199, 399] {
            let one = run(&contexts[0], logits.view().narrow_rows(row, 1), x.view().narrow_rows(row, 1));
            assert_same_bits(all.view().row(row), one.as_slice(), "row");
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let context = Context::cpu(1);
    let zeros = |rows, cols| Tensor::zeros(rows, cols, DType::F32);
    let mut routing = Routing::default();
    for experts_per_row in [0, 5] {
        let top_k = TopK { experts_per_row, renormalize: false };
        let outcome = routing.route(&context, zeros(2, 4).view(), top_k);
        assert!(matches!(outcome, Err(Error::Shape { .. })));
    }
    let top_k = TopK { experts_per_row: 2, renormalize: false };
    let half = Tensor::zeros(2, 4, DType::F16);
    assert!(matches!(routing.route(&context, half.view(), top_k), Err(Error::DType { .. })));
    routing.route(&context, zeros(2, 4).view(), top_k).expect("shapes fit");
    let outcomes = [
        routing.gather(&context, zeros(1, 3).view(), zeros(4, 3).view_mut()),
        routing.gather(&context, zeros(2, 3).view(), zeros(3, 3).view_mut()),
        routing.combine(&context, zeros(3, 3).view(), zeros(2, 3).view_mut()),
        routing.combine(&context, zeros(4, 3).view(), zeros(2, 4).view_mut()),
    ];
    for outcome in outcomes {
        assert!(matches!(outcome, Err(Error::Shape { .. })), "{outcome:?}");
    }
}
