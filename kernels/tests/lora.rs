//! Low-rank changes against f64, and what a row's company must not change.

mod common;

use common::{FLOATS, assert_close, assert_same_bits, contexts, levels, rng, tensor, uniform};
use kernels::ops::lora::{AdapterRows, Lora, LowRank, NO_ADAPTER, lora_add};
use kernels::{Context, DType, Error, Tensor, View};
use rand::rngs::StdRng;

const NONE: u32 = NO_ADAPTER;

fn low_rank(rng: &mut StdRng, rank: usize, k: usize, n: usize, dtype: DType) -> LowRank {
    LowRank { a: tensor(rng, rank, k, dtype), b: tensor(rng, n, rank, dtype), scale: 0.7 }
}

/// One adapter for each list of ranks; 0: the layer is not changed.
fn adapters(
    rng: &mut StdRng,
    k: usize,
    outputs: &[usize],
    ranks: &[&[usize]],
    dtype: DType,
) -> Vec<Vec<Option<LowRank>>> {
    let mut adapter = |ranks: &&[usize]| {
        let parts = ranks.iter().zip(outputs);
        parts.map(|(&rank, &n)| (rank > 0).then(|| low_rank(rng, rank, k, n, dtype))).collect()
    };
    ranks.iter().map(&mut adapter).collect()
}

fn f64s(tensor: &Tensor, row: usize) -> Vec<f64> {
    tensor.view().row_f32(row).expect("a float type").into_iter().map(f64::from).collect()
}

fn reference(x: &[f32], adapter: &[Option<LowRank>], outputs: &[usize], out: &[f32]) -> Vec<f64> {
    let mut want: Vec<f64> = out.iter().copied().map(f64::from).collect();
    let mut column = 0;
    for (part, n) in adapter.iter().zip(outputs) {
        if let Some(LowRank { a, b, scale }) = part {
            let dot = |w: Vec<f64>, x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
            let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
            let hidden: Vec<f64> = (0..a.rows()).map(|j| dot(f64s(a, j), &x)).collect();
            for i in 0..*n {
                want[column + i] += f64::from(*scale) * dot(f64s(b, i), &hidden);
            }
        }
        column += n;
    }
    want
}

/// What is left of an output full of `before`; the memory between the factors is poisoned.
fn run(context: &Context, lora: &Lora, x: View<'_>, slots: &[u32], before: View<'_>) -> Tensor {
    let rows: Vec<f32> = (0..before.rows()).flat_map(|row| before.row::<f32>(row).to_vec()).collect();
    let mut out = Tensor::from_slice(&rows, before.rows(), before.cols());
    let poison = vec![f32::NAN; x.rows() * lora.hidden_cols()];
    let mut hidden = Tensor::from_slice(&poison, x.rows(), lora.hidden_cols());
    let rows = AdapterRows { slots: View::from_slice(slots, 1, slots.len()), any: true };
    lora_add(context, x, lora, rows, hidden.view_mut(), out.view_mut()).expect("shapes fit");
    out
}

#[test]
fn each_row_is_changed_by_its_own_adapter_and_a_row_without_one_keeps_its_bits() {
    let mut rng = rng(1);
    let (k, outputs) = (83, [40, 9, 17]);
    let ranks: [&[usize]; 5] = [&[8, 8, 8], &[1, 0, 20], &[0, 0, 0], &[64, 3, 256], &[0, 16, 0]];
    let slots = [NONE, 0, 0, 3, 1, NONE, 2, 4, 4, 4, 0, 3, 3, NONE, 1, 3, 3, 3, 3, 3, 3];
    for context in levels() {
        for dtype in FLOATS {
            let all = adapters(&mut rng, k, &outputs, &ranks, dtype);
            let lora = Lora::new(&context, k, &outputs, all.clone()).expect("shapes fit");
            // Where the CPU multiplies in bf16, x and what lies between the factors are rounded to it.
            let x = tensor(&mut rng, slots.len(), k, DType::BF16).to_dtype(DType::F32).expect("a float type");
            let before = tensor(&mut rng, slots.len(), outputs.iter().sum(), DType::F32);
            let after = run(&context, &lora, x.view(), &slots, before.view());
            for (row, &slot) in slots.iter().enumerate() {
                let (x, before) = (x.view().row::<f32>(row), before.view().row::<f32>(row));
                match all.get(slot as usize) {
                    None => assert_same_bits(after.view().row(row), before, "no adapter"),
                    Some(adapter) => {
                        let want = reference(x, adapter, &outputs, before);
                        // 256 products of a sum of 83: up to about 50, rounded once to 8 bits at worst.
                        let rounding = if dtype == DType::BF16 { 2.0_f64.powi(-8) } else { 1e-6 };
                        let size = want.iter().fold(10.0, |max: f64, v| max.max(v.abs()));
                        assert_close(after.view().row(row), &want, rounding * size, "changed");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_company_on_any_number_of_threads_at_every_level() {
    let mut rng = rng(2);
    let (rows, k, outputs) = (90, 200, [150, 33]);
    let x = tensor(&mut rng, rows, k, DType::F32);
    let before = tensor(&mut rng, rows, 183, DType::F32);
    // Runs of one row and of many, as decode rows and prefill chunks are.
    let slot_of = |row: usize| [NONE, 0, 1, 2][if row < 40 { row % 4 } else { row / 17 % 4 }];
    let slots: Vec<u32> = (0..rows).map(slot_of).collect();
    for (dtype, contexts) in
        FLOATS.into_iter().flat_map(|dtype| contexts(&[1, 2, 3, 4]).into_iter().map(move |of| (dtype, of)))
    {
        let all = adapters(&mut rng, k, &outputs, &[&[16, 16], &[5, 40], &[0, 8]], dtype);
        let lora = Lora::new(&contexts[0], k, &outputs, all).expect("shapes fit");
        let part = |context: &Context, start: usize, len: usize| {
            let (x, before) = (x.view().narrow_rows(start, len), before.view().narrow_rows(start, len));
            run(context, &lora, x, &slots[start..start + len], before)
        };
        let alone: Vec<Tensor> = (0..rows).map(|row| part(&contexts[0], row, 1)).collect();
        for context in &contexts {
            for (start, len) in [(0, rows), (0, 13), (13, 40), (53, 37)] {
                let chunk = part(context, start, len);
                for row in 0..len {
                    let what = format!("{dtype:?}, {}", context.device_name());
                    assert_same_bits(chunk.view().row(row), alone[start + row].as_slice(), &what);
                }
            }
        }
    }
}

#[test]
fn a_product_that_is_spread_over_threads_has_the_bits_of_one_that_is_not_at_every_level() {
    let mut rng = rng(4);
    let (k, outputs) = (40, [700, 65]);
    for (dtype, contexts) in
        FLOATS.into_iter().flat_map(|dtype| contexts(&[1, 3, 10]).into_iter().map(move |of| (dtype, of)))
    {
        let all = adapters(&mut rng, k, &outputs, &[&[256, 200]], dtype);
        let lora = Lora::new(&contexts[0], k, &outputs, all).expect("shapes fit");
        let (x, before) = (tensor(&mut rng, 9, k, DType::F32), tensor(&mut rng, 9, 765, DType::F32));
        let [one, many] = [0, 2].map(|i| run(&contexts[i], &lora, x.view(), &[0; 9], before.view()));
        assert_same_bits(many.as_slice(), one.as_slice(), "on ten threads");
        for row in 0..9 {
            let (x, before) = (x.view().narrow_rows(row, 1), before.view().narrow_rows(row, 1));
            let alone = run(&contexts[1], &lora, x, &[0], before);
            assert_same_bits(alone.as_slice(), one.view().row(row), "alone");
        }
    }
}

#[test]
fn without_an_adapter_nothing_is_read_or_written() {
    let context = Context::cpu(2);
    let mut rng = rng(3);
    let all = adapters(&mut rng, 8, &[6], &[&[4]], DType::F32);
    let lora = Lora::new(&context, 8, &[6], all).expect("shapes fit");
    let poison = |cols: usize| vec![f32::NAN; 3 * cols];
    let (x, mut hidden) = (poison(8), Tensor::from_slice(&poison(16), 3, 16));
    for (slots, any) in [([NONE; 3], true), ([0; 3], false)] {
        let mut out = Tensor::from_slice(&uniform(&mut rng, 18), 3, 6);
        let before = out.as_slice::<f32>().to_vec();
        let rows = AdapterRows { slots: View::from_slice(&slots, 1, 3), any };
        lora_add(&context, View::from_slice(&x, 3, 8), &lora, rows, hidden.view_mut(), out.view_mut())
            .expect("shapes fit");
        assert_same_bits(out.as_slice(), &before, "out");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let context = Context::cpu(1);
    let zeros = |rows, cols| Tensor::zeros(rows, cols, DType::F32);
    let part = |a: Tensor, b: Tensor, scale| Some(LowRank { a, b, scale });
    let refused = [
        part(zeros(4, 7), zeros(6, 4), 1.0),
        part(zeros(4, 8), zeros(5, 4), 1.0),
        part(zeros(4, 8), zeros(6, 3), 1.0),
        part(zeros(0, 8), zeros(6, 0), 1.0),
        part(zeros(257, 8), zeros(6, 257), 1.0),
        part(zeros(4, 8), zeros(6, 4), f32::NAN),
    ];
    for (i, part) in refused.into_iter().enumerate() {
        let outcome = Lora::new(&context, 8, &[6], vec![vec![part]]);
        assert!(matches!(outcome, Err(Error::Shape { .. })), "case {i}");
    }
    let integers = part(Tensor::zeros(4, 8, DType::U32), zeros(6, 4), 1.0);
    assert!(matches!(Lora::new(&context, 8, &[6], vec![vec![integers]]), Err(Error::DType { .. })));
    for (outputs, adapters) in [(vec![], vec![]), (vec![1; 4], vec![]), (vec![6, 6], vec![vec![None]])] {
        assert!(matches!(Lora::new(&context, 8, &outputs, adapters), Err(Error::Shape { .. })));
    }

    let fits = part(zeros(4, 8), zeros(6, 4), 1.0);
    let lora = Lora::new(&context, 8, &[6], vec![vec![fits]]).expect("shapes fit");
    let slots = [0_u32, 1];
    let call = |x: Tensor, slots: &[u32], mut hidden: Tensor, mut out: Tensor| {
        let rows = AdapterRows { slots: View::from_slice(slots, 1, slots.len()), any: true };
        lora_add(&context, x.view(), &lora, rows, hidden.view_mut(), out.view_mut())
    };
    let outcomes = [
        call(zeros(2, 7), &slots[..1], zeros(2, 16), zeros(2, 6)),
        call(zeros(2, 8), &slots[..1], zeros(2, 16), zeros(2, 6)),
        call(zeros(2, 8), &slots, zeros(2, 16), zeros(2, 6)),
        call(zeros(1, 8), &slots[..1], zeros(1, 15), zeros(1, 6)),
        call(zeros(1, 8), &slots[..1], zeros(2, 16), zeros(1, 6)),
        call(zeros(1, 8), &slots[..1], zeros(1, 16), zeros(1, 7)),
    ];
    for (i, outcome) in outcomes.into_iter().enumerate() {
        assert!(matches!(outcome, Err(Error::Shape { .. })), "case {i}: {outcome:?}");
    }
    call(zeros(1, 8), &slots[..1], zeros(1, 16), zeros(1, 6)).expect("shapes fit");
}
