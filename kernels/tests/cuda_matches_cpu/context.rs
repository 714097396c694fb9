//! Memory, copies, recorded steps, and what is refused within one.

use kernels::ops::activation::Activation;
use kernels::ops::attention::{RotaryAndPages, paged_attention, rotary_write_kv};
use kernels::ops::linear::{Experts, GatedLinear, LinearPart, Weight, linear, linear_gated, linear_grouped};
use kernels::ops::lora::{AdapterRows, Lora, LowRank, lora_add};
use kernels::ops::norm::add_rms_norm;
use kernels::ops::rotary::{RotaryPairs, RotaryTables};
use kernels::{
    AttentionBatch, AttentionParams, Context, DType, Error, KvLayer, Place, Readback, Result, Staging, Tensor,
};

use super::{ACTIVATIONS, Fixture, LAYOUTS, download_f32, tolerance};

#[test]
fn what_is_uploaded_comes_back_the_same() {
    let mut fixture = Fixture::new(1);
    for dtype in ACTIVATIONS {
        for (rows, cols) in [(1, 1), (3, 7), (0, 5), (300, 1000)] {
            let values = fixture.values(rows, cols, dtype);
            for layout in LAYOUTS {
                let there = fixture.upload(&values, dtype, layout);
                fixture.check("a copy", &there, &values, 0.0);
                let back = download_f32(&fixture.cuda, there.view());
                assert_eq!(back.as_slice::<f32>(), values.as_slice::<f32>());
            }
        }
    }
}

#[test]
fn a_rank_s_part_of_a_matrix_arrives_without_the_gaps_between_its_rows() {
    let fixture = Fixture::new(2);
    // More than two of the pieces that pinned memory holds at a time (32 MiB); rows that they cut.
    let (rows, cols) = (7001, 3001);
    let values: Vec<u32> = (0..rows * cols).map(|i| i as u32).collect();
    let part = Tensor::from_slice(&values, rows, cols).narrow_rows(1, rows - 1).narrow_cols(5, cols - 6);
    let there = fixture.cuda.upload(&part).expect("memory");
    assert_eq!((there.place(), there.rows(), there.cols()), (Place::Device, rows - 1, cols - 6));
    let mut back = vec![0; there.rows() * there.cols()];
    fixture.cuda.download(there.view(), &mut back).expect("shapes fit");
    for (row, back) in back.chunks(cols - 6).enumerate() {
        assert_eq!(back, part.view().row::<u32>(row), "row {row}");
    }
}

#[test]
fn stacked_matrices_lie_one_below_the_other_on_both() {
    let mut fixture = Fixture::new(3);
    let [a, b] = [2, 3].map(|rows| fixture.values(rows, 10, DType::F32).narrow_cols(1, 7));
    let expected: Vec<f32> = (0..2)
        .map(|row| a.view().row::<f32>(row))
        .chain((0..3).map(|row| b.view().row(row)))
        .flatten()
        .copied()
        .collect();
    for context in [&fixture.cpu, &fixture.cuda] {
        let stacked = context.upload_stacked(&[&a, &b]).expect("memory");
        assert_eq!((stacked.place(), stacked.rows(), stacked.cols()), (context.place(), 5, 7));
        let mut back = vec![0.0_f32; 35];
        context.download(stacked.view(), &mut back).expect("shapes fit");
        assert_eq!(back, expected);
        let refused = context.upload_stacked(&[&a, &b.narrow_cols(0, 6)]);
        assert!(matches!(refused, Err(Error::Shape { .. })));
    }
}

#[test]
fn staged_arrays_lie_where_they_lay_and_come_back() {
    let fixture = Fixture::new(4);
    for context in [&fixture.cpu, &fixture.cuda] {
        let mut staging = Staging::new(context, &[5, 3, 9]).expect("memory");
        let mut readback = Readback::new(context, 9).expect("memory");
        for round in 0..3_u32 {
            let arrays = [&[round, 1, 2, 3, 4][..], &[], &[7, round + 8][..]];
            let views = staging.send(context, arrays).expect("they fit");
            for (view, array) in views.into_iter().zip(arrays) {
                assert_eq!((view.place(), view.rows(), view.cols()), (context.place(), 1, array.len()));
                readback.start(context, view).expect("it fits");
                assert_eq!(readback.wait().expect("done"), array);
                assert!(readback.is_done().expect("done"));
            }
        }
        let too_long = staging.send(context, [&[0; 9][..], &[0; 4], &[0; 9]]);
        assert!(matches!(too_long, Err(Error::Shape { .. })));
    }
}

#[test]
fn a_recorded_step_does_the_same_again_with_what_memory_then_holds() {
    let mut fixture = Fixture::new(5);
    let [mut sum, x] = [0, 1].map(|_| fixture.values(3, 256, DType::F32));
    let weight = fixture.values(1, 256, DType::F32);
    let there_weight = fixture.weights(&weight);
    let mut residual = fixture.upload(&sum, DType::F32, LAYOUTS[0]);
    let there = fixture.upload(&x, DType::F32, LAYOUTS[1]);
    let mut out = fixture.poisoned(3, 256, DType::F32, LAYOUTS[2]);
    let mut step = || {
        add_rms_norm(&fixture.cuda, residual.view_mut(), there.view(), &there_weight, 1e-5, out.view_mut())
    };
    step().expect("shapes fit");
    let graph = fixture.cuda.capture(step).expect("it is recorded");
    let mut expected = Tensor::zeros(3, 256, DType::F32);
    let mut once_more = || {
        add_rms_norm(&fixture.cpu, sum.view_mut(), x.view(), &weight, 1e-5, expected.view_mut())
            .expect("shapes fit");
        (
            sum.to_dtype(DType::F32).expect("a float type"),
            expected.to_dtype(DType::F32).expect("a float type"),
        )
    };
    // Recording it did not run it.
    let (sum, expected) = once_more();
    fixture.check("sum", &residual, &sum, 0.0);
    fixture.check("out", &out, &expected, tolerance(DType::F32));
    for _ in 0..3 {
        graph.launch().expect("it runs");
        let (sum, expected) = once_more();
        fixture.check("sum, launched", &residual, &sum, 0.0);
        fixture.check("out, launched", &out, &expected, tolerance(DType::F32));
    }
}

#[test]
fn an_error_while_recording_leaves_the_stream_usable() {
    let fixture = Fixture::new(6);
    let outcome: Result<_> = fixture.cuda.capture(|| fixture.cuda.zeros(1, 1, DType::F32).map(drop));
    assert!(outcome.is_err(), "recorded an allocation");
    fixture.cuda.synchronize().expect("nothing is being recorded");
    fixture.cuda.zeros(1, 1, DType::F32).expect("nothing is frozen");
}

#[test]
fn a_step_neither_allocates_nor_copies_to_the_device_but_by_staging() {
    let mut fixture = Fixture::new(7);
    let values = fixture.values(2, 2, DType::F32);
    let there = fixture.weights(&values);
    let mut staging = Staging::new(&fixture.cuda, &[4]).expect("memory");
    {
        let _frozen = fixture.cuda.freeze();
        let refused = [
            fixture.cuda.zeros(1, 1, DType::F32).map(drop),
            fixture.cuda.upload(&values).map(drop),
            Staging::new(&fixture.cuda, &[4]).map(drop),
        ];
        for outcome in refused {
            assert!(matches!(outcome, Err(Error::Frozen { .. })));
        }
        staging.send(&fixture.cuda, [&[1, 2, 3][..]]).expect("it fits");
        fixture.cuda.download(there.view(), &mut [0.0_f32; 4]).expect("shapes fit");
    }
    fixture.cuda.upload(&values).expect("memory");
}

#[test]
fn of_plain_kernels_none_is_tuned() {
    let [tuned, plain] = Fixture::of_all_kernels(9).map(|mut fixture| {
        products_and_attention(&mut fixture);
        fixture.cuda.used_kernels()
    });
    let is_tuned = |op: &&String| {
        [
            "linear_few",
            "linear_gated",
            "linear_tile",
            "attention_",
            "add_rms_norm",
            "rotary_write_kv",
            "lora_shrink_tile",
        ]
        .iter()
        .any(|name| op.starts_with(name))
    };
    assert_eq!(tuned.iter().filter(is_tuned).count(), 9, "{tuned:?}");
    assert_eq!(plain.iter().filter(is_tuned).count(), 0, "{plain:?}");
    assert!(plain.iter().any(|op| op == "attention"), "{plain:?}");
    let name = Fixture::of_all_kernels(9)[1].cuda.device_name();
    assert!(name.ends_with("plain kernels"), "{name}");
}

/// A bit of everything that is computed by different kernels.
fn products_and_attention(fixture: &mut Fixture) {
    let cuda = &fixture.cuda;
    let zeros = |rows, cols, dtype| cuda.zeros(rows, cols, dtype).expect("memory");
    let dtype = DType::BF16;
    let (weight, norm) = (zeros(64, 64, dtype), zeros(1, 64, DType::F32));
    let part = LinearPart { weight: Weight::Dense(&weight), bias: None };
    let words = |words: &[u32]| cuda.upload(&Tensor::from_slice(words, 1, words.len())).expect("memory");
    for rows in [1, 40] {
        let x = zeros(rows, 64, dtype);
        let [mut out, mut gate_up] = [64, 128].map(|cols| zeros(rows, cols, dtype));
        linear(cuda, x.view(), &[part], out.view_mut()).expect("shapes fit");
        let gated = GatedLinear { gate: part, up: part, activation: Activation::Silu };
        linear_gated(cuda, x.view(), gated, gate_up.view_mut(), out.view_mut()).expect("shapes fit");
        let starts = words(&[0, rows as u32]);
        let experts = Experts { weight: (&weight).into(), starts: starts.view() };
        linear_grouped(cuda, x.view(), experts, out.view_mut()).expect("shapes fit");
        let mut residual = zeros(rows, 64, DType::F32);
        add_rms_norm(cuda, residual.view_mut(), x.view(), &norm, 1e-5, out.view_mut()).expect("shapes fit");
        let factors = LowRank { a: zeros(16, 64, dtype), b: zeros(64, 16, dtype), scale: 1.0 };
        let lora = Lora::new(cuda, 64, &[64], vec![vec![Some(factors)]]).expect("shapes fit");
        let slots = words(&vec![0; rows]);
        let known = AdapterRows { slots: slots.view(), any: true };
        let mut hidden = zeros(rows, 16, DType::F32);
        lora_add(cuda, x.view(), &lora, known, hidden.view_mut(), out.view_mut()).expect("shapes fit");

        let mut layer = KvLayer::new(cuda, 2, 1, 32, 64, dtype).expect("memory");
        let mut qkv = zeros(rows, 3 * 64, dtype);
        let [cos, sin] = [0, 1].map(|_| zeros(64, 32, DType::F32));
        let counted: Vec<u32> = (0..rows as u32).collect();
        let positions = words(&counted);
        let pages = RotaryAndPages {
            positions: positions.view(),
            tables: RotaryTables { cos: &cos, sin: &sin, pairs: RotaryPairs::HalfApart },
            slots: positions.view(),
        };
        rotary_write_kv(cuda, qkv.view_mut(), None, pages, &mut layer).expect("shapes fit");
        let (starts, lens, tables) = (words(&[0, rows as u32]), words(&[rows as u32]), words(&[0, 1]));
        let batch = AttentionBatch {
            query_starts: starts.view(),
            kv_lens: lens.view(),
            block_tables: tables.view(),
            table_rows: None,
            max_blocks: 2,
            num_decodes: usize::from(rows == 1),
            max_query_len: rows,
        };
        let query = qkv.view().narrow_cols(0, 64);
        paged_attention(cuda, query, &layer, &batch, AttentionParams::new(1.0), out.view_mut())
            .expect("shapes fit");
    }
    cuda.synchronize().expect("nothing went wrong");
}

#[test]
fn a_device_or_memory_that_is_not_there_is_an_error_that_says_so() {
    let error = Context::cuda(1000, 1).map(drop).expect_err("there are fewer");
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
    assert!(error.to_string().starts_with("there is no GPU 1000: CUDA shows "), "{error}");
    let cuda = Fixture::new(8).cuda;
    let memory = cuda.device_memory().expect("a device").expect("of a GPU");
    assert!(memory.free_bytes <= memory.total_bytes && memory.total_bytes > 0, "{memory:?}");
    let too_much = cuda.zeros(memory.total_bytes, 2, DType::F32).map(drop);
    assert!(matches!(too_much, Err(Error::OutOfMemory(_))), "{too_much:?}");
    let on_cpu: Result<_> = Context::cpu(1).capture(|| Ok(()));
    assert!(matches!(on_cpu, Err(Error::Unavailable(_))));
}
