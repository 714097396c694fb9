//! Sampling: the same tokens as by the plain definition on the CPU, and in the long run as often as they are likely.

use kernels::ops::sampling::{
    MAX_TOP_N, NONE, Sampled, SampledStatus, SamplingBuffers, SamplingInput, SamplingRow, TokenCounts,
    commit_tokens, sample,
};
use kernels::{Context, DType, Tensor};
use rand::RngExt;

use super::Fixture;

/// Everything that one call is given.
struct Case {
    logits: Tensor,
    rows: Vec<[u32; SamplingRow::WORDS]>,
    biases: Vec<u32>,
    masks: Option<Tensor>,
    /// Prompt and output of each slot.
    histories: Vec<(Vec<u32>, Vec<u32>)>,
}

impl Case {
    fn new(logits: &[f32], vocab_size: usize, rows: &[SamplingRow]) -> Self {
        assert_eq!(logits.len(), rows.len() * vocab_size);
        Self {
            logits: Tensor::from_slice(logits, rows.len(), vocab_size),
            rows: rows.iter().map(|row| row.to_words()).collect(),
            biases: Vec::new(),
            masks: None,
            histories: Vec::new(),
        }
    }

    fn run(&self, context: &Context) -> Vec<Sampled> {
        let vocab_size = self.logits.cols();
        let words =
            |words: &[u32]| context.upload(&Tensor::from_slice(words, 1, words.len())).expect("memory");
        // With a gap behind each row, as of a vocabulary that is padded.
        let mut padded = Tensor::zeros(self.logits.rows(), vocab_size + 3, DType::F32);
        for row in 0..self.logits.rows() {
            let mut padded = padded.view_mut();
            let padded = padded.row::<f32>(row);
            padded.fill(f32::NAN);
            padded[..vocab_size].copy_from_slice(self.logits.view().row(row));
        }
        let logits = context.upload(&padded).expect("memory").narrow_cols(0, vocab_size);
        let rows = Tensor::from_slice(&self.rows.concat(), self.rows.len(), SamplingRow::WORDS);
        let rows = context.upload(&rows).expect("memory");
        let biases = words(&self.biases);
        let masks = self.masks.as_ref().map(|masks| context.upload(masks).expect("memory"));
        let mut counts = TokenCounts::new(context, self.histories.len().max(1), vocab_size).expect("memory");
        for (slot, (prompt, generated)) in self.histories.iter().enumerate() {
            let (prompt, generated) = (words(prompt), words(generated));
            counts.recount(context, slot as u32, prompt.view(), generated.view()).expect("a slot");
        }
        let input = SamplingInput {
            logits: logits.view(),
            rows: rows.view(),
            biases: biases.view(),
            masks: masks.as_ref().map(Tensor::view),
        };
        let mut buffers = SamplingBuffers::new(context, self.rows.len(), vocab_size).expect("memory");
        let mut out = context.zeros(self.rows.len(), Sampled::WORDS, DType::U32).expect("memory");
        sample(context, &mut buffers, &input, Some(&counts), out.view_mut()).expect("shapes fit");
        let mut sampled = vec![0_u32; self.rows.len() * Sampled::WORDS];
        context.download(out.view(), &mut sampled).expect("the stream works");
        sampled.chunks(Sampled::WORDS).map(Sampled::from_words).collect()
    }

    /// Asserts that both contexts give the same, and returns it.
    fn check(&self, fixture: &Fixture, what: &str) -> Vec<Sampled> {
        let (expected, found) = (self.run(&fixture.cpu), self.run(&fixture.cuda));
        for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let what = format!("{what}, row {row}: {found:?}, expected {expected:?}");
            assert_eq!((found.status, found.token_id), (expected.status, expected.token_id), "{what}");
            let ids = |sampled: &Sampled| sampled.top.iter().map(|(token, _)| *token).collect::<Vec<_>>();
            assert_eq!(ids(found), ids(expected), "{what}");
            let logprobs = |sampled: &Sampled| {
                let mut all = vec![sampled.logprob];
                all.extend(sampled.top.iter().map(|(_, logprob)| *logprob));
                all
            };
            for (found, expected) in logprobs(found).iter().zip(logprobs(expected)) {
                let is_near = found.total_cmp(&expected).is_eq()
                    || (found - expected).abs() <= 3e-6 * expected.abs().max(1.0);
                assert!(is_near, "{what}");
            }
        }
        found
    }
}

/// Logits of a language model's shape: few likely tokens, and a long tail.
fn logits(fixture: &mut Fixture, rows: usize, vocab_size: usize) -> Vec<f32> {
    (0..rows * vocab_size)
        .map(|_| {
            let tail: f32 = fixture.random.random_range(-9.0..-2.0);
            if fixture.random.random_range(0..40) == 0 { tail + 8.0 } else { tail }
        })
        .collect()
}

/// Any mixture of parameters, a different one for each row.
fn mixed(fixture: &mut Fixture, row: usize) -> SamplingRow {
    let random = &mut fixture.random;
    let mut maybe = |off: f32, low: f32, high: f32| {
        if random.random_range(0..2) == 0 { off } else { random.random_range(low..high) }
    };
    SamplingRow {
        temperature: maybe(1.0, 0.3, 2.0),
        top_k: maybe(0.0, 1.0, 80.0) as u32,
        top_p: maybe(1.0, 0.1, 0.99),
        min_p: maybe(0.0, 0.001, 0.2),
        typical_p: maybe(1.0, 0.2, 0.99),
        seed: 1 << 40 | row as u64,
        position: 3 + row as u64,
        top_n: (row % 4 * 5) as u32,
        ..SamplingRow::default()
    }
}

#[test]
fn rows_with_any_parameters_get_the_tokens_of_the_plain_definition() {
    let mut fixture = Fixture::new(61);
    // Around what a thread, a group and a chunk hold.
    for vocab_size in [1, 5, 33, 500, 4096, 4099, 9001] {
        let rows: Vec<SamplingRow> = (0..16).map(|row| mixed(&mut fixture, row)).collect();
        let logits = logits(&mut fixture, rows.len(), vocab_size);
        Case::new(&logits, vocab_size, &rows).check(&fixture, &format!("{vocab_size} tokens"));
    }
}

#[test]
fn each_truncation_alone_keeps_what_the_plain_definition_keeps_however_flat_the_row_is() {
    let mut fixture = Fixture::new(62);
    let plain = SamplingRow::default();
    let vocab_size = 6000;
    for spread in [0.001_f32, 0.5, 8.0, 80.0] {
        let mut rows = Vec::new();
        for (i, truncated) in [
            plain,
            SamplingRow { temperature: 0.05, ..plain },
            SamplingRow { top_k: 1, ..plain },
            SamplingRow { top_k: 3000, ..plain },
            SamplingRow { top_p: 0.01, ..plain },
            SamplingRow { top_p: 0.9, ..plain },
            SamplingRow { min_p: 0.9, ..plain },
            SamplingRow { min_p: 1.0, ..plain },
            SamplingRow { typical_p: 0.5, ..plain },
        ]
        .into_iter()
        .enumerate()
        {
            rows.extend((0..3).map(|k| SamplingRow { seed: 77, position: (3 * i + k) as u64, ..truncated }));
        }
        let logits: Vec<f32> =
            (0..rows.len() * vocab_size).map(|_| fixture.random.random_range(-spread..spread)).collect();
        Case::new(&logits, vocab_size, &rows).check(&fixture, &format!("a spread of {spread}"));
    }
}

#[test]
fn a_vocabulary_that_several_blocks_count_gives_the_tokens_of_the_plain_definition() {
    let mut fixture = Fixture::new(68);
    let plain = SamplingRow::default();
    // Five pieces of two chunks, the last one not full.
    let vocab_size = 37_003;
    for spread in [0.5_f32, 9.0] {
        let rows: Vec<SamplingRow> = [
            plain,
            SamplingRow { temperature: 1.7, min_p: 0.4, ..plain },
            SamplingRow { top_p: 0.95, ..plain },
            SamplingRow { top_p: 0.95, min_p: 0.5, ..plain },
            SamplingRow { top_p: 0.6, typical_p: 0.8, ..plain },
            SamplingRow { top_p: 0.02, temperature: 3.0, top_n: 20, ..plain },
            SamplingRow { top_k: 50, top_p: 0.9, ..plain },
            SamplingRow { top_k: 1024, ..plain },
            SamplingRow { top_k: 1025, top_p: 0.9, ..plain },
            SamplingRow { top_k: 30_000, ..plain },
            SamplingRow { top_k: 30_000, top_p: 0.5, typical_p: 0.9, ..plain },
            SamplingRow { typical_p: 0.7, ..plain },
        ]
        .into_iter()
        .zip(0..)
        .map(|(row, position)| SamplingRow { seed: 99, position, ..row })
        .collect();
        let logits: Vec<f32> =
            (0..rows.len() * vocab_size).map(|_| fixture.random.random_range(-spread..spread)).collect();
        let sampled = Case::new(&logits, vocab_size, &rows).check(&fixture, &format!("a spread of {spread}"));
        // Not all from the first piece.
        assert!(sampled.iter().any(|sampled| sampled.token_id > 16_384), "{sampled:?}");
    }
}

#[test]
fn equally_likely_tokens_of_several_pieces_are_kept_by_id_and_drawn_evenly() {
    let fixture = Fixture::new(69);
    let vocab_size = 20_000;
    let rows: Vec<SamplingRow> = (0..20)
        .flat_map(|position| {
            let plain = SamplingRow { position, ..SamplingRow::default() };
            // 15000 of them.
            [plain, SamplingRow { top_p: 0.75, ..plain }, SamplingRow { top_k: 15_000, ..plain }]
        })
        .collect();
    let logits = vec![-3.5; rows.len() * vocab_size];
    let sampled = Case::new(&logits, vocab_size, &rows).check(&fixture, "equal logits");
    for (row, sampled) in rows.iter().zip(&sampled) {
        let is_truncated = row.top_k > 0 || row.top_p < 1.0;
        let kept = if is_truncated { 15_000 } else { vocab_size };
        assert!((sampled.token_id as usize) < kept, "{row:?}: {sampled:?}");
    }
    for third in 0..3_u32 {
        let from = third * 5000;
        let some = sampled.iter().any(|sampled| (from..from + 5000).contains(&sampled.token_id));
        assert!(some, "none of 60 rows chose within {from} .. {}", from + 5000);
    }
}

#[test]
fn of_equally_likely_tokens_the_lower_ids_are_kept() {
    let fixture = Fixture::new(63);
    let plain = SamplingRow { top_n: MAX_TOP_N as u32, ..SamplingRow::default() };
    let vocab_size = 3000;
    let mut rows = vec![SamplingRow { temperature: 0.0, ..plain }];
    for position in 0..12 {
        rows.push(SamplingRow { top_k: 4, position, ..plain });
        rows.push(SamplingRow { top_p: 0.0015, position, ..plain });
        rows.push(SamplingRow { typical_p: 0.0015, position, ..plain });
    }
    let logits = vec![1.25; rows.len() * vocab_size];
    let sampled = Case::new(&logits, vocab_size, &rows).check(&fixture, "equal logits");
    assert_eq!(sampled[0].token_id, 0);
    for (row, sampled) in rows.iter().zip(&sampled) {
        let most = if row.top_k > 0 { 4 } else { 5 };
        assert!(sampled.token_id < most, "{row:?}: {sampled:?}");
        assert_eq!(
            sampled.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(),
            (0..20).collect::<Vec<u32>>()
        );
    }
    let chosen: std::collections::BTreeSet<u32> = sampled.iter().map(|sampled| sampled.token_id).collect();
    assert!(chosen.len() > 2, "all rows chose among {chosen:?}");
}

#[test]
fn biases_penalties_and_grammars_change_what_is_chosen_and_not_the_log_probabilities() {
    let mut fixture = Fixture::new(64);
    let vocab_size = 5003;
    let num_rows = 24;
    let mut histories = Vec::new();
    for _ in 0..4 {
        let mut tokens = |n: usize| -> Vec<u32> {
            (0..n).map(|_| fixture.random.random_range(0..vocab_size as u32)).collect()
        };
        let (prompt, mut generated) = (tokens(900), tokens(700));
        generated.extend_from_within(..300);
        generated.push(vocab_size as u32 - 1);
        histories.push((prompt, generated));
    }
    let mut biases = Vec::new();
    let mut rows = Vec::new();
    for row in 0..num_rows {
        let first = biases.len() as u32 / 2;
        let mut tokens: Vec<u32> =
            (0..row as u32 * 3).map(|_| fixture.random.random_range(0..vocab_size as u32)).collect();
        tokens.sort_unstable();
        tokens.dedup();
        for &token in &tokens {
            biases.extend([token, fixture.random.random_range(-3.0_f32..6.0).to_bits()]);
        }
        let penalizes = row % 2 == 0;
        rows.push(SamplingRow {
            temperature: if row % 3 == 0 { 0.0 } else { 0.9 },
            repetition_penalty: if penalizes { 1.3 } else { 1.0 },
            frequency_penalty: if penalizes { 0.4 } else { 0.0 },
            presence_penalty: if row % 4 == 0 { -0.3 } else { 0.0 },
            slot: (row % 4) as u32,
            biases: (first, tokens.len() as u32),
            mask: if row % 5 == 4 { (row % 2) as u32 } else { NONE },
            ..mixed(&mut fixture, row)
        });
    }
    let logits = logits(&mut fixture, num_rows, vocab_size);
    let mut case = Case::new(&logits, vocab_size, &rows);
    case.biases = biases;
    case.histories = histories;
    let mask_words = vocab_size.div_ceil(32);
    let masks: Vec<u32> = (0..2 * mask_words)
        .map(|_| fixture.random.random::<u32>() & fixture.random.random::<u32>())
        .collect();
    case.masks = Some(Tensor::from_slice(&masks, 2, mask_words));
    let sampled = case.check(&fixture, "changed logits");
    for (row, sampled) in rows.iter().zip(&sampled).filter(|(row, _)| row.mask != NONE) {
        let word = masks[row.mask as usize * mask_words + sampled.token_id as usize / 32];
        assert_eq!(word >> (sampled.token_id % 32) & 1, 1, "the grammar forbids {}", sampled.token_id);
    }
}

#[test]
fn rows_without_a_distribution_or_without_an_allowed_token_have_no_token_and_others_beside_them_do() {
    let fixture = Fixture::new(65);
    let vocab_size = 70;
    let plain = SamplingRow::default();
    let masked = SamplingRow { mask: 0, ..plain };
    let rows = [plain, plain, plain, masked, plain, SamplingRow { token: 69, top_n: 3, ..plain }];
    let mut logits: Vec<f32> = (0..rows.len() * vocab_size).map(|i| (i % 13) as f32 / 4.0).collect();
    logits[30] = f32::NAN;
    logits[vocab_size + 69] = f32::INFINITY;
    logits[2 * vocab_size..3 * vocab_size].fill(f32::NEG_INFINITY);
    logits[5 * vocab_size..6 * vocab_size].fill(f32::NEG_INFINITY);
    logits[5 * vocab_size + 40] = 1.0;
    let mut case = Case::new(&logits, vocab_size, &rows);
    case.masks = Some(Tensor::from_slice(&[0_u32; 3], 1, 3));
    case.rows.push(SamplingRow::UNUSED);
    let mut padded = logits.clone();
    padded.extend(vec![f32::NAN; vocab_size]);
    case.logits = Tensor::from_slice(&padded, rows.len() + 1, vocab_size);
    let statuses: Vec<SampledStatus> =
        case.check(&fixture, "rows without tokens").iter().map(|sampled| sampled.status).collect();
    let (no_number, chosen) = (SampledStatus::NotFinite, SampledStatus::Chosen);
    let expected = [
        no_number,
        no_number,
        no_number,
        SampledStatus::NothingAllowed,
        chosen,
        chosen,
        SampledStatus::Unused,
    ];
    assert_eq!(statuses, expected);
}

#[test]
fn chosen_tokens_are_counted_and_remembered_by_slot() {
    let fixture = Fixture::new(66);
    let vocab_size = 101;
    let commit = |context: &Context| {
        let upload = |words: &[u32], rows: usize| {
            context.upload(&Tensor::from_slice(words, rows, words.len() / rows)).expect("memory")
        };
        let tokens = upload(&[100, 9, 9, 9, 7, 9, NONE, 9, 5, 9, 3, 9], 6);
        let slots = upload(&[2, 0, 1, 3, NONE, 9], 1);
        let mut last_tokens = upload(&[50, 51, 52, 53], 1);
        let mut counts = TokenCounts::new(context, 4, vocab_size).expect("memory");
        let (prompt, generated) = (upload(&[100, 3], 1), upload(&vec![100; 40_000], 1));
        counts.recount(context, 2, prompt.view(), generated.view()).expect("a slot");
        commit_tokens(
            context,
            tokens.view(),
            slots.view(),
            last_tokens.view_mut(),
            Some(&mut counts),
            vocab_size,
        )
        .expect("shapes fit");
        let mut remembered = vec![0_u32; 4];
        context.download(last_tokens.view(), &mut remembered).expect("the stream works");
        let mut words = vec![0_u32; 4 * vocab_size.div_ceil(8) * 4];
        context.download(counts.words(), &mut words).expect("the stream works");
        (remembered, words)
    };
    let (remembered, words) = commit(&fixture.cuda);
    assert_eq!(remembered, [9, 7, 100, 53]);
    let stride = words.len() / 4;
    // As many as 15 bits count, and in the prompt.
    assert_eq!((words[2 * stride + 50], words[2 * stride + 1]), (0xffff, 0x8000_0000));
    assert_eq!(words[4], 1 << 16);
    assert_eq!((remembered, words), commit(&fixture.cpu));
}

/// Pearson's test with fixed seeds: deterministic, and passed by a right sampler with these seeds.
#[test]
fn tokens_are_chosen_as_often_as_they_are_likely() {
    let fixture = Fixture::new(67);
    let plain = SamplingRow::default();
    let probabilities = [0.30_f64, 0.02, 0.18, 0.10, 0.15, 0.05, 0.12, 0.08];
    let logits: Vec<f32> = probabilities.iter().map(|probability| probability.ln() as f32).collect();
    let check = |what: &str, row: SamplingRow, expected: [f64; 8]| {
        const DRAWS: usize = 800;
        let rows: Vec<SamplingRow> =
            (0..DRAWS).map(|position| SamplingRow { seed: 5, position: position as u64, ..row }).collect();
        let sampled = Case::new(&logits.repeat(DRAWS), 8, &rows).run(&fixture.cuda);
        let mut counts = [0_u32; 8];
        for sampled in &sampled {
            counts[sampled.token_id as usize] += 1;
        }
        let total: f64 = expected.iter().sum();
        let mut chi_squared = 0.0;
        for (&count, probability) in counts.iter().zip(expected) {
            let expected = probability / total * DRAWS as f64;
            assert!(expected > 0.0 || count == 0, "{what}: {counts:?}");
            chi_squared +=
                if expected > 0.0 { (f64::from(count) - expected).powi(2) / expected } else { 0.0 };
        }
        // 99.9 % quantile for 7 degrees of freedom, the most there are here.
        assert!(chi_squared < 24.3, "{what}: chi squared {chi_squared}, counts {counts:?}");
    };
    let only = |kept: &[usize]| {
        let mut expected = [0.0; 8];
        for &token in kept {
            expected[token] = probabilities[token];
        }
        expected
    };
    check("as it is", plain, probabilities);
    check("temperature", SamplingRow { temperature: 2.0, ..plain }, probabilities.map(f64::sqrt));
    check("top-k", SamplingRow { top_k: 3, ..plain }, only(&[0, 2, 4]));
    check("top-p", SamplingRow { top_p: 0.7, ..plain }, only(&[0, 2, 4, 6]));
    check("min-p", SamplingRow { min_p: 0.32, ..plain }, only(&[0, 2, 4, 6, 3]));
    // Information of 1.70, 1.88, 2.11, 2.29 nats for 0.18, 0.15, 0.12, 0.10; the entropy is 1.85.
    check("typical-p", SamplingRow { typical_p: 0.4, ..plain }, only(&[4, 2, 6]));
    let mixture = SamplingRow { top_k: 6, top_p: 0.9, min_p: 0.2, typical_p: 0.5, ..plain };
    check("all together", mixture, only(&[2, 4, 6]));
}
