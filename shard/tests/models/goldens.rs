//! The decoder computes what transformers computes, however a prompt is cut, whoever is in the batch, on any number of
//! ranks. How the goldens were made, and where the tolerance comes from: `integration-tests/goldens/README.md`.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use kernels::collective::SharedMemory;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use shard::models::{LoadOptions, Model};

use crate::checkpoints::{change_config, copy_of};
use crate::rank::{Chunk, GOLDENS, Rank, assert_close, golden, golden_dir, load, of_rank};

/// Of logits and log-probabilities; f32 against f32 in another order of summation.
pub(crate) const TOLERANCE: f32 = 2e-4;

#[test]
fn every_golden_is_tested() {
    let dirs = std::fs::read_dir(golden_dir("")).unwrap().map(Result::unwrap);
    let found: BTreeSet<String> = dirs
        .filter(|entry| entry.path().join("golden.json").is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    assert_eq!(found, GOLDENS.iter().map(|name| (*name).to_owned()).collect());
}

#[test]
fn logits_are_those_of_transformers() {
    for name in GOLDENS {
        let mut rank = Rank::alone(&golden_dir(name));
        for (prompt, expected) in golden(name) {
            let logits = rank.prompt(&prompt.token_ids);
            let last = &logits[logits.len() - expected.len()..];
            assert_close(name, last, &expected, TOLERANCE);
        }
    }
}

/// How far transformers itself is off the logits of `llama_bf16` in bf16, by prompt (see the goldens' README).
const TRANSFORMERS_IN_BF16: [f32; 2] = [0.20, 0.41];

#[test]
fn products_of_bf16_are_closer_to_the_reference_than_transformers_is_in_bf16() {
    let mut rank = Rank::alone(&golden_dir("llama_bf16")).with_products_of_its_cpu();
    for ((prompt, expected), tolerance) in golden("llama_bf16").into_iter().zip(TRANSFORMERS_IN_BF16) {
        let logits = rank.prompt(&prompt.token_ids);
        assert_close("llama_bf16", &logits[logits.len() - expected.len()..], &expected, tolerance);
    }
}

#[test]
fn a_sequence_gets_the_bits_of_one_alone_with_products_of_bf16_too() {
    let mut rank = Rank::alone(&golden_dir("llama_bf16")).with_products_of_its_cpu();
    let prompts: Vec<_> = golden("llama_bf16").into_iter().map(|(prompt, _)| prompt.token_ids).collect();
    let alone: Vec<_> = prompts.iter().map(|prompt| rank.prompt(prompt)).collect();
    let whole = |sequence: usize| Chunk { sequence, start: 0, token_ids: &prompts[sequence] };
    assert_eq!(rank.step(&[whole(0), whole(1)]), alone.concat());
    let one_by_one = prompts[0].iter().enumerate();
    let one_by_one = one_by_one.flat_map(|(start, id)| {
        rank.step(&[Chunk { sequence: 0, start, token_ids: std::slice::from_ref(id) }])
    });
    assert_eq!(one_by_one.collect::<Vec<_>>(), alone[0]);
}

#[test]
fn prompt_logprobs_are_those_of_transformers() {
    for name in GOLDENS {
        let mut rank = Rank::alone(&golden_dir(name));
        for (prompt, _) in golden(name) {
            let logits = rank.prompt(&prompt.token_ids);
            for (i, expected) in prompt.logprobs.iter().enumerate().skip(1) {
                let row = &logits[i - 1];
                let normalizer = row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
                let found = (f64::from(row[prompt.token_ids[i] as usize]) - normalizer) as f32;
                let expected = expected.expect("only the first token has none");
                assert!(
                    (found - expected).abs() <= TOLERANCE,
                    "{name}, token {i}: {found} is not {expected}"
                );
            }
        }
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    for name in GOLDENS {
        let mut rank = Rank::alone(&golden_dir(name));
        for (prompt, _) in golden(name) {
            assert_eq!(rank.greedy(&prompt.token_ids, prompt.greedy.len()), prompt.greedy, "{name}");
        }
    }
}

#[test]
fn a_prompt_in_chunks_gives_the_bits_of_a_whole_one() {
    for name in GOLDENS {
        let mut rank = Rank::alone(&golden_dir(name));
        for (prompt, _) in golden(name) {
            let whole = rank.prompt(&prompt.token_ids);
            for chunk_len in [1, 3, 7] {
                let mut chunked = Vec::new();
                for token_ids in prompt.token_ids.chunks(chunk_len) {
                    chunked.extend(rank.step(&[Chunk { sequence: 0, start: chunked.len(), token_ids }]));
                }
                assert_eq!(chunked, whole, "{name} in chunks of {chunk_len}");
            }
        }
    }
}

#[test]
fn a_sequence_in_a_batch_gives_the_bits_of_one_alone() {
    for name in GOLDENS {
        let mut rank = Rank::alone(&golden_dir(name));
        let prompts: Vec<_> = golden(name).into_iter().map(|(prompt, _)| prompt.token_ids).collect();
        let alone: Vec<_> = prompts.iter().map(|prompt| rank.prompt(prompt)).collect();

        let whole = |sequence: usize| Chunk { sequence, start: 0, token_ids: &prompts[sequence] };
        assert_eq!(rank.step(&[whole(0), whole(1)]), alone.concat(), "{name}: two prompts");

        // A decode row of the first beside a prefill chunk of the second, which it overtakes.
        let last = prompts[0].len() - 1;
        rank.step(&[Chunk { sequence: 0, start: 0, token_ids: &prompts[0][..last] }]);
        let decode = Chunk { sequence: 0, start: last, token_ids: &prompts[0][last..] };
        let mixed = rank.step(&[whole(1), decode]);
        let expected = [alone[1].as_slice(), &alone[0][last..]].concat();
        assert_eq!(mixed, expected, "{name}: decode beside prefill");
    }
}

#[test]
fn sharded_files_give_the_bits_of_a_single_one() {
    let (prompt, _) = golden("llama").swap_remove(1);
    let single = Rank::alone(&golden_dir("llama")).prompt(&prompt.token_ids);
    assert_eq!(Rank::alone(&golden_dir("llama_sharded")).prompt(&prompt.token_ids), single);
}

#[test]
fn two_ranks_compute_what_one_does() {
    for name in GOLDENS {
        let dir = golden_dir(name);
        let ranks = on_two_ranks(
            &dir,
            |rank| of_rank(rank, 2),
            |rank| {
                let results = golden(name).into_iter().map(|(prompt, _)| {
                    (rank.prompt(&prompt.token_ids), rank.greedy(&prompt.token_ids, prompt.greedy.len()))
                });
                results.collect::<Vec<_>>()
            },
        );
        let [first, second] = ranks;
        assert!(first == second, "{name}: the ranks drifted apart");
        let mut alone = Rank::alone(&dir);
        for ((logits, greedy), (prompt, _)) in first.into_iter().zip(golden(name)) {
            assert_close(name, &logits, &alone.prompt(&prompt.token_ids), TOLERANCE);
            assert_eq!(greedy, prompt.greedy, "{name}");
        }
    }
}

#[test]
fn a_vocabulary_that_two_does_not_divide_is_held_by_both_ranks() {
    let (prompt, _) = golden("llama").swap_remove(1);
    let mut expected = Rank::alone(&golden_dir("llama")).prompt(&prompt.token_ids);
    for row in &mut expected {
        row.truncate(383);
    }

    let dir = copy_of("llama");
    change_config(dir.path(), &serde_json::json!({"vocab_size": 383}));
    cut_last_row(&dir.path().join("model.safetensors"), &["model.embed_tokens.weight", "lm_head.weight"]);
    let [first, second] =
        on_two_ranks(dir.path(), |rank| of_rank(rank, 2), |rank| rank.prompt(&prompt.token_ids));
    assert!(first == second, "the ranks drifted apart");
    assert_close("383 tokens", &first, &expected, TOLERANCE);
}

/// What `run` returns on each of two ranks that meet in shared memory; `options`: of a rank.
pub(crate) fn on_two_ranks<T: Send>(
    dir: &Path,
    options: impl Fn(usize) -> LoadOptions + Sync,
    run: impl Fn(&mut Rank) -> T + Sync,
) -> [T; 2] {
    on_two_ranks_with(|rank| load(dir, options(rank)).unwrap(), run)
}

/// The same with the model that `load` gives a rank.
pub(crate) fn on_two_ranks_with<T: Send>(
    load: impl Fn(usize) -> Model + Sync,
    run: impl Fn(&mut Rank) -> T + Sync,
) -> [T; 2] {
    let meeting_place = tempfile::tempdir().unwrap();
    let path = meeting_place.path().join("ranks");
    let run = |rank: usize| {
        let group = SharedMemory::join(&path, rank, 2, Duration::from_mins(1)).unwrap();
        run(&mut Rank::new(load(rank), Box::new(group)))
    };
    std::thread::scope(|scope| {
        let second = scope.spawn(|| run(1));
        [run(0), second.join().unwrap()]
    })
}

fn cut_last_row(file: &Path, names: &[&str]) {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let cut = tensors.iter().map(|(name, tensor)| {
        let (mut shape, mut data) = (tensor.shape().to_vec(), tensor.data());
        if names.contains(&name) {
            data = &data[..data.len() / shape[0] * (shape[0] - 1)];
            shape[0] -= 1;
        }
        (name.to_owned(), TensorView::new(tensor.dtype(), shape, data).unwrap())
    });
    let cut: Vec<_> = cut.collect();
    std::fs::write(file, safetensors::serialize(cut, None).unwrap()).unwrap();
}
