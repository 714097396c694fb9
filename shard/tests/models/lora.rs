//! What PEFT computes with an adapter, whoever has another one in the same step, on any number of ranks. How the golden adapters
//! were made: `integration-tests/goldens/make_lora_goldens.py`.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use shard::models::LoadOptions;

use crate::checkpoints::copy_of;
use crate::goldens::{TOLERANCE, on_two_ranks_with};
use crate::rank::{Chunk, Rank, assert_close, golden, golden_dir, load_with_adapters, of_rank};

/// In the order in which sequences number them.
pub(crate) const ADAPTERS: [&str; 2] = ["llama_lora/tone", "llama_lora/form"];

fn adapted() -> Rank {
    Rank::adapted(&golden_dir("llama"), &ADAPTERS.map(golden_dir))
}

#[test]
fn logits_and_greedy_continuations_with_an_adapter_are_those_of_peft() {
    let mut rank = adapted();
    for (index, name) in ADAPTERS.into_iter().enumerate() {
        rank.adapters = [Some(index as u32); 2];
        for (prompt, expected) in golden(name) {
            let logits = rank.prompt(&prompt.token_ids);
            assert_close(name, &logits[logits.len() - expected.len()..], &expected, TOLERANCE);
            assert_eq!(rank.greedy(&prompt.token_ids, prompt.greedy.len()), prompt.greedy, "{name}");
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_beside_sequences_of_other_adapters() {
    let mut rank = adapted();
    let prompts: Vec<_> = golden("llama").into_iter().map(|(prompt, _)| prompt.token_ids).collect();
    let whole = |sequence: usize| Chunk { sequence, start: 0, token_ids: &prompts[sequence] };
    let choices = [None, Some(0), Some(1)];
    for (first, second) in choices.into_iter().flat_map(|first| choices.map(|second| (first, second))) {
        rank.adapters = [first, second];
        let alone: Vec<_> = (0..2).map(|sequence| rank.step(&[whole(sequence)])).collect();
        assert_eq!(rank.step(&[whole(0), whole(1)]), alone.concat(), "{first:?} beside {second:?}");

        // A decode row of the first beside a prefill chunk of the second.
        let last = prompts[0].len() - 1;
        rank.step(&[Chunk { sequence: 0, start: 0, token_ids: &prompts[0][..last] }]);
        let decode = Chunk { sequence: 0, start: last, token_ids: &prompts[0][last..] };
        let mixed = rank.step(&[decode, whole(1)]);
        assert_eq!(mixed, [&alone[0][last..], alone[1].as_slice()].concat(), "decode beside prefill");

        let one_by_one = prompts[1].iter().enumerate();
        let one_by_one = one_by_one.flat_map(|(start, id)| {
            rank.step(&[Chunk { sequence: 1, start, token_ids: std::slice::from_ref(id) }])
        });
        assert_eq!(one_by_one.collect::<Vec<_>>(), alone[1], "in chunks of one");
    }
}

#[test]
fn sequences_without_an_adapter_have_the_bits_of_a_model_without_any() {
    let mut without = Rank::alone(&golden_dir("llama"));
    let mut with = adapted();
    for (prompt, _) in golden("llama") {
        assert_eq!(with.prompt(&prompt.token_ids), without.prompt(&prompt.token_ids));
    }
}

#[test]
fn two_ranks_compute_with_an_adapter_what_one_does() {
    let adapters = ADAPTERS.map(golden_dir);
    let results = |rank: &mut Rank| {
        let of_adapter = |rank: &mut Rank, index: usize| {
            rank.adapters = [Some(index as u32); 2];
            let prompts = golden(ADAPTERS[index]).into_iter();
            prompts.map(|(prompt, _)| rank.prompt(&prompt.token_ids)).collect::<Vec<_>>()
        };
        [of_adapter(rank, 0), of_adapter(rank, 1)].concat()
    };
    let load = |rank: usize| {
        load_with_adapters(&golden_dir("llama"), of_rank(rank, 2), &adapters).expect("two divides all sizes")
    };
    let [first, second] = on_two_ranks_with(load, results);
    assert!(first == second, "the ranks drifted apart");
    for (found, expected) in first.iter().zip(&results(&mut adapted())) {
        assert_close("two ranks", found, expected, TOLERANCE);
    }
}

#[test]
fn an_adapter_computes_what_the_merged_model_does() {
    let mut rank = adapted();
    let ranks_of_form = |layer: &str| match layer.rsplit('.').next() {
        Some("k_proj") => 3,
        _ if layer.contains("layers.1.mlp.") => 12,
        _ => 4,
    };
    let scales: [&dyn Fn(&str) -> f64; 2] = [&|_| 2.0, &|layer| {
        let alpha = if layer.ends_with("v_proj") { 2.5 } else { 6.0 };
        alpha / f64::from(ranks_of_form(layer)).sqrt()
    }];
    for (index, name) in ADAPTERS.into_iter().enumerate() {
        let dir = copy_of("llama");
        merge(&dir.path().join("model.safetensors"), &golden_dir(name), scales[index]);
        let mut merged = Rank::alone(dir.path());
        rank.adapters = [Some(index as u32); 2];
        for (prompt, _) in golden(name) {
            let (found, expected) = (rank.prompt(&prompt.token_ids), merged.prompt(&prompt.token_ids));
            assert_close(name, &found, &expected, TOLERANCE);
        }
    }
}

type Values = (Vec<usize>, Vec<f32>);

fn read(file: &Path) -> BTreeMap<String, Values> {
    let bytes = std::fs::read(file).unwrap();
    let values = |tensor: &TensorView<'_>| -> Vec<f32> {
        if tensor.dtype() == Dtype::F32 {
            return tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        }
        let halves = tensor.data().as_chunks::<2>().0.iter();
        halves.map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect()
    };
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .iter()
        .map(|(name, tensor)| (name.to_owned(), (tensor.shape().to_vec(), values(&tensor))))
        .collect()
}

/// Adds the factors' product to the weights of an f32 checkpoint, in f64.
fn merge(file: &Path, adapter: &Path, scale: &dyn Fn(&str) -> f64) {
    let (mut weights, factors) = (read(file), read(&adapter.join("adapter_model.safetensors")));
    for (name, (shape_a, a)) in factors.iter().filter(|(name, _)| name.ends_with("lora_A.weight")) {
        let layer = name.strip_prefix("base_model.model.").unwrap().strip_suffix(".lora_A.weight").unwrap();
        let (_, b) = &factors[&name.replace("lora_A", "lora_B")];
        let (rank, inputs) = (shape_a[0], shape_a[1]);
        let (_, weight) = weights.get_mut(&format!("{layer}.weight")).unwrap();
        for (i, weight) in weight.iter_mut().enumerate() {
            let (output, input) = (i / inputs, i % inputs);
            let products =
                (0..rank).map(|j| f64::from(b[output * rank + j]) * f64::from(a[j * inputs + input]));
            *weight = (f64::from(*weight) + scale(layer) * products.sum::<f64>()) as f32;
        }
    }
    let bytes: BTreeMap<_, _> = weights
        .into_iter()
        .map(|(name, (shape, values))| {
            (name, (shape, values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<_>>()))
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, (shape, data))| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    std::fs::write(file, safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()).unwrap();
}

#[test]
fn adapters_that_cannot_be_served_are_refused_with_what_is_wrong() {
    let refused = |change: &dyn Fn(&Path), base: &str, part: &str| {
        let dir = tempfile::tempdir().unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(golden_dir(ADAPTERS[0]).join(file), dir.path().join(file)).unwrap();
        }
        change(dir.path());
        let adapters = [dir.path().to_owned()];
        let outcome = load_with_adapters(&golden_dir(base), LoadOptions::default(), &adapters);
        let message = outcome.err().expect("it cannot be served").to_string();
        assert!(message.contains(part), "{part}: {message}");
    };
    let config = |change: Value| {
        move |dir: &Path| {
            let path = dir.join("adapter_config.json");
            let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            std::fs::write(path, config.to_string()).unwrap();
        }
    };
    let renamed = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let path = dir.join("adapter_model.safetensors");
            let bytes = std::fs::read(&path).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let tensors: Vec<_> =
                tensors.iter().map(|(name, tensor)| (name.replace(from, to), tensor)).collect();
            std::fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        }
    };
    let removed = |name: &'static str| move |dir: &Path| std::fs::remove_file(dir.join(name)).unwrap();
    refused(&removed("adapter_config.json"), "llama", "adapter_config.json: ");
    refused(&removed("adapter_model.safetensors"), "llama", "adapter_model.safetensors is not there");
    refused(&config(json!({"use_dora": true})), "llama", "use_dora is true, which is not supported");
    refused(&config(json!({"modules_to_save": ["lm_head"]})), "llama", "modules_to_save is [\"lm_head\"]");
    refused(&config(json!({"r": 4})), "llama", "has shape [8, 64]");
    refused(&config(json!({"r": 300})), "llama", "has rank 300; the most that is supported is 256");
    refused(
        &renamed("layers.1.mlp.up_proj.lora_A", "lm_head.lora_A"),
        "llama",
        "up_proj.lora_A.weight is not there",
    );
    refused(
        &renamed("model.layers.1.mlp.up_proj", "lm_head"),
        "llama",
        "lm_head.lora_A.weight belongs to nothing",
    );
    refused(&|_| (), "qwen3", "is the adapter of another model?");
}
