//! Weights that are quantized when they are loaded: what they are by definition, and that ranks mean the same ones.

use std::path::Path;

use kernels::collective::Local;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as StoredType, TensorView};
use shard::Quantization;
use shard::models::LoadOptions;

use crate::checkpoints::copy_of;
use crate::goldens::on_two_ranks;
use crate::lora::ADAPTERS;
use crate::rank::{Rank, assert_close, golden, golden_dir, load, load_with_adapters, of_rank};

/// Of logits: the same numbers in another order of summation, as for the goldens.
const TOLERANCE: f32 = 2e-4;

const EETQ: LoadOptions = LoadOptions {
    dtype: None,
    kv_cache_dtype: None,
    quantize: Some(Quantization::Eetq),
    partition: shard::weights::Partition { rank: 0, world_size: 1 },
};

#[test]
fn eetq_computes_what_the_dense_model_with_the_rounded_weights_does() {
    for name in ["llama", "llama3", "llama_bf16", "llama_f16", "mistral", "qwen2", "qwen3"] {
        let rounded = copy_of(name);
        round_linear_weights(&rounded.path().join("model.safetensors"));
        for (prompt, original) in golden(name) {
            let expected = Rank::alone(rounded.path()).prompt(&prompt.token_ids);
            let found = Rank::loaded(&golden_dir(name), EETQ).prompt(&prompt.token_ids);
            assert_close(name, &found, &expected, TOLERANCE);
            // And it is not what the stored weights give.
            let last = &found[found.len() - original.len()..];
            let differs = last.iter().flatten().zip(original.iter().flatten());
            assert!(
                differs.into_iter().any(|(a, b)| (a - b).abs() > 10.0 * TOLERANCE),
                "{name} is not quantized"
            );
        }
    }
}

#[test]
fn an_adapter_changes_eetq_weights_as_it_changes_dense_ones() {
    let rounded = copy_of("llama");
    round_linear_weights(&rounded.path().join("model.safetensors"));
    let adapters = ADAPTERS.map(golden_dir);
    let model = load_with_adapters(&golden_dir("llama"), EETQ, &adapters).unwrap();
    let mut quantized = Rank::new(model, Box::new(Local));
    let mut dense = Rank::adapted(rounded.path(), &adapters);
    for (index, name) in ADAPTERS.into_iter().enumerate() {
        quantized.adapters = [Some(index as u32); 2];
        dense.adapters = quantized.adapters;
        for (prompt, _) in golden(name) {
            let (found, expected) = (quantized.prompt(&prompt.token_ids), dense.prompt(&prompt.token_ids));
            assert_close(name, &found, &expected, TOLERANCE);
        }
    }
}

#[test]
fn eetq_means_the_same_weights_on_two_ranks() {
    let (prompt, _) = golden("llama").swap_remove(1);
    let alone = Rank::loaded(&golden_dir("llama"), EETQ).prompt(&prompt.token_ids);
    let options = |rank| LoadOptions { quantize: EETQ.quantize, ..of_rank(rank, 2) };
    let [first, second] = on_two_ranks(&golden_dir("llama"), options, |rank| rank.prompt(&prompt.token_ids));
    assert!(first == second, "the ranks drifted apart");
    assert_close("two ranks", &first, &alone, TOLERANCE);
}

#[test]
fn eetq_takes_a_byte_for_a_linear_weight_and_leaves_embedding_head_and_norms() {
    // Shapes of the golden: hidden 64, 4 and 2 heads of 16, MLP 48, vocabulary 384, two layers; f32.
    let model = load(&golden_dir("llama"), EETQ).unwrap();
    let (outputs, linear) = (64 + 2 * 32 + 64 + 2 * 48 + 64, 64 * (64 + 2 * 32 + 64 + 3 * 48));
    let (embedding_and_head, norms) = (2 * 384 * 64, 5 * 64);
    assert_eq!(model.num_parameters, 2 * linear + embedding_and_head + norms);
    assert_eq!(model.weight_bytes, 2 * (linear + 4 * outputs) + 4 * (embedding_and_head + norms));
    assert_eq!(model.dtype, kernels::DType::F32);
}

#[test]
fn weights_that_are_not_finite_cannot_be_quantized() {
    let dir = copy_of("llama");
    let path = dir.path().join("model.safetensors");
    change_weights(&path, |name, values, _| {
        if name == "model.layers.1.mlp.up_proj.weight" {
            values[130] = f32::INFINITY;
        }
    });
    let message = load(dir.path(), EETQ).err().expect("refused").to_string();
    let expected =
        format!("{}: tensor model.layers.1.mlp.up_proj.weight cannot be quantized: ", path.display());
    assert!(message.starts_with(&expected), "{message}");
    assert!(message.contains("[2, 2] is inf"), "{message}");
}

/// EETQ's definition, in f64: the scale of an output is its greatest magnitude / 128; halves are rounded away from zero.
fn round_linear_weights(file: &Path) {
    change_weights(file, |name, values, shape| {
        if !name.contains("_proj.weight") {
            return;
        }
        for row in values.chunks_exact_mut(shape[1]) {
            let scale = row.iter().fold(0.0_f32, |greatest, value| greatest.max(value.abs())) / 128.0;
            for value in row {
                let integer = (f64::from(*value) / f64::from(scale)).round().clamp(-128.0, 127.0);
                *value = (integer * f64::from(scale)) as f32;
            }
        }
    });
}

/// Rewrites a file in f32 with changed values.
fn change_weights(file: &Path, change: impl Fn(&str, &mut [f32], &[usize])) {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let changed = tensors.iter().map(|(name, tensor)| {
        let mut values = as_f32(&tensor);
        change(name, &mut values, tensor.shape());
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        (name.to_owned(), tensor.shape().to_vec(), data)
    });
    let changed: Vec<_> = changed.collect();
    let views = changed.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(StoredType::F32, shape.clone(), data).unwrap())
    });
    std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn as_f32(tensor: &TensorView<'_>) -> Vec<f32> {
    let data = tensor.data();
    match tensor.dtype() {
        StoredType::F32 => data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        StoredType::F16 => {
            data.as_chunks().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect()
        }
        StoredType::BF16 => {
            data.as_chunks().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect()
        }
        other => panic!("no golden is stored as {other:?}"),
    }
}
