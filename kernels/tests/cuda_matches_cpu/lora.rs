//! Low-rank changes: rows one by one and in tiles, against the CPU.

use kernels::ops::lora::{AdapterRows, Lora, LowRank, NO_ADAPTER, lora_add};
use kernels::{DType, Error, Tensor, View};
use rand::RngExt;

use super::{ACTIVATIONS, Fixture, LAYOUTS, Layout, download_f32};

const PACKED: Layout = LAYOUTS[0];

/// Around a tile of 16 rows, and the number from which there are tiles.
const ROWS: [usize; 9] = [1, 2, 7, 31, 32, 33, 48, 77, 130];

/// Inputs, outputs of each layer, and ranks of each adapter.
type Shape<'a> = (usize, &'a [usize], [&'a [usize]; 3]);

/// The same adapters on both sides; 0: the layer is not changed.
fn both(
    fixture: &mut Fixture,
    (k, outputs): (usize, &[usize]),
    ranks: &[&[usize]],
    dtype: DType,
    layout: Layout,
) -> (Lora, Lora) {
    let (mut cpu, mut cuda) = (Vec::new(), Vec::new());
    for ranks in ranks {
        let (mut cpu_parts, mut cuda_parts) = (Vec::new(), Vec::new());
        for (&rank, &n) in ranks.iter().zip(outputs) {
            let (a, b) = (fixture.values(rank, k, dtype), fixture.values(n, rank, dtype));
            let there = [&a, &b].map(|factor| {
                let on_device = fixture.upload(factor, dtype, layout);
                on_device.whole.narrow_cols(layout.left, factor.cols())
            });
            let [there_a, there_b] = there;
            cpu_parts.push((rank > 0).then_some(LowRank { a, b, scale: 0.25 }));
            cuda_parts.push((rank > 0).then_some(LowRank { a: there_a, b: there_b, scale: 0.25 }));
        }
        cpu.push(cpu_parts);
        cuda.push(cuda_parts);
    }
    (
        Lora::new(&fixture.cpu, k, outputs, cpu).expect("shapes fit"),
        Lora::new(&fixture.cuda, k, outputs, cuda).expect("shapes fit"),
    )
}

/// Runs both and compares.
fn check(
    fixture: &mut Fixture,
    (on_cpu, on_device): &(Lora, Lora),
    (k, n): (usize, usize),
    slots: &[u32],
    (dtype, out_dtype): (DType, DType),
    layout: Layout,
) {
    let rows = slots.len();
    let what = format!("{rows} rows of {k} to {n}, {dtype:?} to {out_dtype:?}, {layout:?}");
    let (x, before) = (fixture.values(rows, k, dtype), fixture.values(rows, n, out_dtype));
    let mut expected = Tensor::from_slice(before.as_slice::<f32>(), rows, n);
    let mut hidden = Tensor::zeros(rows, on_cpu.hidden_cols(), DType::F32);
    let known = AdapterRows { slots: View::from_slice(slots, 1, rows), any: true };
    lora_add(&fixture.cpu, x.view(), on_cpu, known, hidden.view_mut(), expected.view_mut())
        .expect("shapes fit");

    let x = fixture.upload(&x, dtype, layout);
    let mut out = fixture.upload(&before, out_dtype, layout);
    let mut hidden = fixture.poisoned(rows, on_device.hidden_cols(), DType::F32, layout);
    let there = fixture.cuda.upload(&Tensor::from_slice(slots, 1, rows)).expect("memory");
    let known = AdapterRows { slots: there.view(), any: true };
    lora_add(&fixture.cuda, x.view(), on_device, known, hidden.view_mut(), out.view_mut())
        .expect("shapes fit");
    // Tiles round what lies between the factors to the type: sums of k products of numbers whose squares are a third on
    // average, so sqrt(k) / 3, rounded by a third of a unit, times 0.25 * sqrt(rank / 3); of that, six times the usual. The
    // output is rounded once more. In f32 they are rounded only as they are added up.
    let rounding = ((on_cpu.hidden_cols() * k) as f32).sqrt() / 10.0;
    let tolerance = match dtype {
        DType::F32 => 2.0_f32.powi(-21) * (4.0 + rounding),
        DType::F16 => 2.0_f32.powi(-11) * (4.0 + rounding),
        _ => 2.0_f32.powi(-8) * (4.0 + rounding),
    };
    fixture.check(&what, &out, &expected, tolerance);
}

fn slots(fixture: &mut Fixture, rows: usize, num_adapters: u32) -> Vec<u32> {
    let mut one = || match fixture.random.random_range(0..=num_adapters) {
        slot if slot == num_adapters => NO_ADAPTER,
        slot => slot,
    };
    // Half of them in runs.
    let mut slots: Vec<u32> = (0..rows).map(|_| one()).collect();
    for row in rows / 2..rows {
        slots[row] = slots[row / 13 * 13];
    }
    slots
}

#[test]
fn rows_of_any_adapters_match_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(51) {
        let shapes: [Shape<'_>; 4] = [
            (64, &[40, 16, 24], [&[8, 8, 8], &[16, 0, 4], &[2, 64, 0]]),
            (160, &[300, 300], [&[16, 16], &[40, 1], &[0, 0]]),
            (1096, &[257], [&[32], &[256], &[16]]),
            (33, &[5, 70, 6], [&[3, 5, 7], &[1, 0, 2], &[16, 9, 16]]),
        ];
        for (k, outputs, ranks) in shapes {
            for dtype in ACTIVATIONS {
                for layout in LAYOUTS {
                    let lora = both(&mut fixture, (k, outputs), &ranks, dtype, layout);
                    for rows in ROWS {
                        let slots = slots(&mut fixture, rows, 3);
                        let out_dtype = if rows % 2 == 0 { dtype } else { DType::F32 };
                        let sizes = (k, outputs.iter().sum());
                        check(&mut fixture, &lora, sizes, &slots, (dtype, out_dtype), layout);
                    }
                }
            }
        }
    }
}

#[test]
fn rows_without_an_adapter_keep_their_bits_and_slots_beyond_the_last_are_none() {
    let mut fixture = Fixture::new(52);
    for rows in [3, 50] {
        let lora = both(&mut fixture, (64, &[96]), &[&[16]], DType::BF16, PACKED);
        let x = fixture.poisoned(rows, 64, DType::BF16, PACKED);
        let before = fixture.values(rows, 96, DType::BF16);
        for slot in [NO_ADAPTER, 1, 7] {
            let mut out = fixture.upload(&before, DType::BF16, PACKED);
            let mut hidden = fixture.poisoned(rows, 16, DType::F32, PACKED);
            let there = fixture.cuda.upload(&Tensor::from_slice(&vec![slot; rows], 1, rows)).expect("memory");
            let known = AdapterRows { slots: there.view(), any: true };
            lora_add(&fixture.cuda, x.view(), &lora.1, known, hidden.view_mut(), out.view_mut())
                .expect("shapes fit");
            fixture.check("no adapter", &out, &before, 0.0);
        }
    }
}

#[test]
fn a_recorded_change_follows_the_rows_adapters() {
    let mut fixture = Fixture::new(53);
    let (k, n, rows) = (128, 64, 6);
    for rows in [rows, 40] {
        let lora = both(&mut fixture, (k, &[n]), &[&[16], &[8]], DType::F16, PACKED);
        let (x, before) = (fixture.values(rows, k, DType::F16), fixture.values(rows, n, DType::F32));
        let there = fixture.upload(&x, DType::F16, PACKED);
        let mut staging = kernels::Staging::new(&fixture.cuda, &[rows]).expect("memory");
        let mut hidden = fixture.cuda.zeros(rows, lora.1.hidden_cols(), DType::F32).expect("memory");
        let mut out = fixture.cuda.zeros(rows, n, DType::F32).expect("memory");
        let none = vec![NO_ADAPTER; rows];
        let mixed: Vec<u32> = (0..rows).map(|row| [1, NO_ADAPTER, 0][row % 3]).collect();
        let mut graph = None;
        for slots in [&none, &mixed, &none, &mixed] {
            let [slots_there] = staging.send(&fixture.cuda, [&slots[..]]).expect("room");
            if graph.is_none() {
                let known = AdapterRows { slots: slots_there, any: true };
                let record = || {
                    lora_add(&fixture.cuda, there.view(), &lora.1, known, hidden.view_mut(), out.view_mut())
                };
                graph = Some(fixture.cuda.capture(record).expect("it is recorded"));
            }
            let before_launch = download_f32(&fixture.cuda, out.view());
            graph.as_ref().expect("recorded above").launch().expect("the stream works");
            let mut expected = Tensor::from_slice(before_launch.as_slice::<f32>(), rows, n);
            let mut hidden = Tensor::zeros(rows, lora.0.hidden_cols(), DType::F32);
            let known = AdapterRows { slots: View::from_slice(slots, 1, rows), any: true };
            lora_add(&fixture.cpu, x.view(), &lora.0, known, hidden.view_mut(), expected.view_mut())
                .expect("shapes fit");
            let after = download_f32(&fixture.cuda, out.view());
            for (after, expected) in after.as_slice::<f32>().iter().zip(expected.as_slice::<f32>()) {
                assert!((after - expected).abs() <= 2e-3 * expected.abs().max(1.0), "{after}, {expected}");
            }
        }
        drop(before);
    }
}

#[test]
fn factors_of_two_types_are_refused() {
    let fixture = Fixture::new(54);
    let zeros = |rows, cols, dtype| fixture.cuda.zeros(rows, cols, dtype).expect("memory");
    let part = |dtype| vec![Some(LowRank { a: zeros(4, 8, dtype), b: zeros(6, 4, dtype), scale: 1.0 })];
    let adapters = vec![part(DType::F16), part(DType::BF16)];
    assert!(matches!(Lora::new(&fixture.cuda, 8, &[6], adapters), Err(Error::DType { .. })));
    let on_host = vec![vec![Some(LowRank {
        a: Tensor::zeros(4, 8, DType::F16),
        b: Tensor::zeros(6, 4, DType::F16),
        scale: 1.0,
    })]];
    assert!(matches!(Lora::new(&fixture.cuda, 8, &[6], on_host), Err(Error::Shape { .. })));
}
