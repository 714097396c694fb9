//! Checkpoints as they come: under old and new keys, in other element types, damaged, and asking for what we cannot do.

use std::path::Path;

use crate::rank::{Rank, assert_close, golden, golden_dir, load, of_rank};
use kernels::DType;
use serde_json::{Value, json};
use shard::models::{LoadError, LoadOptions};
use shard::{Dtype, KvCacheDtype};
use tempfile::TempDir;

/// A copy of a golden's config.json and weights, to be changed.
pub(crate) fn copy_of(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "generation_config.json"] {
        std::fs::copy(golden_dir(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

/// Sets fields of config.json; null removes one, `"null"` sets it to null.
pub(crate) fn change_config(dir: &Path, changes: &Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        let fields = config.as_object_mut().unwrap();
        match value {
            Value::Null => drop(fields.remove(field)),
            Value::String(text) if text == "null" => drop(fields.insert(field.clone(), Value::Null)),
            value => drop(fields.insert(field.clone(), value.clone())),
        }
    }
    std::fs::write(path, config.to_string()).unwrap();
}

fn as_type(dtype: Option<Dtype>) -> LoadOptions {
    LoadOptions { dtype, ..LoadOptions::default() }
}

#[track_caller]
fn load_error(dir: &Path, world_size: usize) -> LoadError {
    load(dir, of_rank(0, world_size)).err().expect("refused")
}

#[test]
fn keys_of_transformers_5_mean_the_same() {
    let dir = copy_of("llama3");
    std::fs::copy(golden_dir("llama3").join("config.v5.json"), dir.path().join("config.json")).unwrap();
    let (prompt, _) = golden("llama3").swap_remove(1);
    let old = Rank::alone(&golden_dir("llama3")).prompt(&prompt.token_ids);
    assert_eq!(Rank::alone(dir.path()).prompt(&prompt.token_ids), old);
}

#[test]
fn a_configuration_that_cannot_be_served_is_refused_with_its_field() {
    #[track_caller]
    fn check(name: &str, changes: &Value, expected: &str) {
        let dir = copy_of(name);
        change_config(dir.path(), changes);
        let message = load_error(dir.path(), 1).to_string();
        let expected = format!("{}: {expected}", dir.path().join("config.json").display());
        assert!(message.starts_with(&expected), "{message}\nis not\n{expected}");
    }
    let supported = "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";
    check(
        "llama",
        &json!({"architectures": ["GPT2LMHeadModel"]}),
        &format!("architectures: GPT2LMHeadModel is not supported; {supported}"),
    );
    check(
        "llama",
        &json!({"architectures": null, "model_type": "gpt2"}),
        &format!("model_type: gpt2 is not supported; {supported}"),
    );
    check("llama", &json!({"hidden_act": "gelu"}), "hidden_act: gelu is not supported; silu is");
    check(
        "llama",
        &json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        "rope_scaling.rope_type: yarn is not supported; supported are default and llama3",
    );
    check(
        "llama",
        &json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}}),
        "rope_parameters.mrope_section: is not supported",
    );
    check(
        "llama",
        &json!({"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}),
        "rope_scaling.low_freq_factor: is missing",
    );
    check(
        "llama",
        &json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        "quantization_config: quantized weights (gptq) are not supported",
    );
    check("llama", &json!({"sliding_window": 8}), "sliding_window: 8 is not supported for LlamaForCausalLM");
    check("llama", &json!({"num_key_value_heads": 3}), "num_key_value_heads: 3 does not divide");
    check("llama", &json!({"num_attention_heads": 0}), "num_attention_heads: must be at least 1");
    check("llama", &json!({"head_dim": 15}), "head_dim: 15 is odd");
    check("llama", &json!({"num_hidden_layers": 4_000_000_000_u32}), "num_hidden_layers: 4000000000 is more");
    check("llama", &json!({"partial_rotary_factor": 2.0}), "partial_rotary_factor: 2 of head_dim 16");
    check("mistral", &json!({"attention_bias": true}), "attention_bias: true is not supported for Mistral");
    check("mistral", &json!({"sliding_window": 0}), "sliding_window: 0 is not a positive number");
    check("qwen2", &json!({"layer_types": ["full_attention"]}), "layer_types: has 1 entries");
    check(
        "qwen2",
        &json!({"layer_types": ["full_attention", "sliding_attention"]}),
        "layer_types: asks for sliding_attention",
    );
    check(
        "qwen3",
        &json!({"layer_types": ["full_attention", "linear_attention"]}),
        "layer_types: linear_attention is not supported",
    );
}

#[test]
fn windows_follow_from_each_architectures_own_fields() {
    #[track_caller]
    fn check(name: &str, changes: &Value, expected: [Option<usize>; 2]) {
        let dir = copy_of(name);
        change_config(dir.path(), changes);
        let model = load(dir.path(), LoadOptions::default()).unwrap();
        let windows: Vec<_> = model.decoder.spec().layers.iter().map(|layer| layer.window).collect();
        assert_eq!(windows, expected, "{name} with {changes}");
    }
    check("mistral", &json!({}), [Some(8), Some(8)]);
    check("mistral", &json!({"sliding_window": "null"}), [None, None]);
    check("mistral", &json!({"sliding_window": null}), [Some(4096), Some(4096)]);
    check("qwen2", &json!({"sliding_window": 16}), [None, None]);
    let used = json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1});
    check("qwen2", &used, [None, Some(16)]);
    check("qwen3", &used, [None, Some(16)]);
    let listed = json!({
        "sliding_window": 16,
        "use_sliding_window": true,
        "layer_types": ["sliding_attention", "full_attention"],
    });
    check("qwen2", &listed, [Some(16), None]);
    check("llama", &json!({"layer_types": ["full_attention", "full_attention"]}), [None, None]);
}

#[test]
fn sizes_that_do_not_divide_are_refused_before_weights_are_opened() {
    let dir = copy_of("llama");
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let message = load_error(dir.path(), 3).to_string();
    let expected = "num_attention_heads is 4, which 3 shards do not divide: use --num-shard 1 or 2";
    assert_eq!(message, expected);
    let message = load_error(dir.path(), 4).to_string();
    assert!(message.starts_with("num_key_value_heads is 2, which 4 shards do not divide"), "{message}");
}

#[test]
fn a_tensor_of_another_shape_is_refused_with_file_name_and_shapes() {
    let dir = copy_of("llama");
    change_config(dir.path(), &json!({"intermediate_size": 96}));
    let message = load_error(dir.path(), 1).to_string();
    let expected = format!(
        "{}: tensor model.layers.0.mlp.gate_proj.weight has shape [48, 64], but by config.json it is [96, 64]",
        dir.path().join("model.safetensors").display()
    );
    assert_eq!(message, expected);
}

#[test]
fn tensors_that_are_missing_or_left_over_are_refused() {
    let dir = copy_of("llama");
    change_config(dir.path(), &json!({"attention_bias": true}));
    let message = load_error(dir.path(), 1).to_string();
    assert!(message.contains("no tensor model.layers.0.self_attn.q_proj.bias of shape [64]"), "{message}");

    let dir = copy_of("qwen2");
    change_config(dir.path(), &json!({"architectures": ["LlamaForCausalLM"]}));
    let message = load_error(dir.path(), 1).to_string();
    assert!(message.contains("6 tensors are not used"), "{message}");
    assert!(message.contains("model.layers.0.self_attn.k_proj.bias"), "{message}");
}

#[test]
fn weights_stay_mapped_unless_the_type_asked_for_cannot_hold_them() {
    #[track_caller]
    fn check(name: &str, asked: Option<Dtype>, dtype: DType, bytes_of_each: u64) {
        let model = load(&golden_dir(name), as_type(asked)).unwrap();
        let vectors = 5 * 64; // Two norms in each of two layers, and the last; always f32.
        assert_eq!(model.dtype, dtype, "{name}");
        assert_eq!(
            model.weight_bytes,
            (model.num_parameters - vectors) * bytes_of_each + vectors * 4,
            "{name}"
        );
    }
    check("llama", None, DType::F32, 4);
    check("llama", Some(Dtype::Bfloat16), DType::BF16, 2);
    check("llama_bf16", None, DType::BF16, 2);
    check("llama_bf16", Some(Dtype::Float32), DType::F32, 2);
    check("llama_f16", Some(Dtype::Float32), DType::F32, 2);
    check("llama_f16", Some(Dtype::Bfloat16), DType::BF16, 2);
}

#[test]
fn keys_and_values_are_bf16_unless_weights_are_f32_or_another_type_is_asked_for() {
    #[track_caller]
    fn check(name: &str, dtype: Option<Dtype>, kv_cache_dtype: Option<KvCacheDtype>, expected: DType) {
        let options = LoadOptions { kv_cache_dtype, ..as_type(dtype) };
        assert_eq!(load(&golden_dir(name), options).unwrap().kv_dtype, expected, "{name}");
    }
    check("llama", None, None, DType::F32);
    check("llama", Some(Dtype::Bfloat16), None, DType::BF16);
    check("llama_bf16", None, None, DType::BF16);
    check("llama_bf16", Some(Dtype::Float32), None, DType::F32);
    check("llama_f16", None, None, DType::BF16);
    check("llama_f16", None, Some(KvCacheDtype::Float16), DType::F16);
    check("llama", None, Some(KvCacheDtype::Bfloat16), DType::BF16);
}

#[test]
fn keys_and_values_of_8_bits_are_refused_on_the_cpu() {
    let options = LoadOptions { kv_cache_dtype: Some(KvCacheDtype::Fp8E4m3fn), ..as_type(None) };
    let message = load(&golden_dir("llama"), options).err().expect("refused").to_string();
    assert!(message.contains("fp8_e4m3fn needs a GPU"), "{message}");
}

#[test]
fn converted_weights_compute_nearly_the_same() {
    let (prompt, _) = golden("llama").swap_remove(1);
    let stored = Rank::alone(&golden_dir("llama")).prompt(&prompt.token_ids);
    let converted =
        Rank::loaded(&golden_dir("llama"), as_type(Some(Dtype::Float16))).prompt(&prompt.token_ids);
    assert_ne!(converted, stored);
    // Half precision keeps 11 bits; logits are of the order of ten.
    assert_close("f16", &converted, &stored, 0.1);
}

#[test]
fn ranks_hold_their_share_of_the_weights() {
    let [whole, first, second] = [(0, 1), (0, 2), (1, 2)].map(|(rank, world_size)| {
        let model = load(&golden_dir("llama"), of_rank(rank, world_size)).unwrap();
        (model.num_parameters, model.weight_bytes)
    });
    let norms = 5 * 64 * 4;
    assert_eq!((first.0, second.0), (whole.0, whole.0));
    assert_eq!((first.1 - norms, second.1 - norms), ((whole.1 - norms) / 2, (whole.1 - norms) / 2));
}

#[test]
fn end_ids_come_from_generation_config_then_from_config() {
    let dir = copy_of("llama");
    let eos_token_ids = || load(dir.path(), LoadOptions::default()).unwrap().eos_token_ids;
    assert_eq!(eos_token_ids(), [2]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [5, 7]}"#).unwrap();
    assert_eq!(eos_token_ids(), [5, 7]);
    std::fs::write(dir.path().join("generation_config.json"), "{}").unwrap();
    change_config(dir.path(), &json!({"eos_token_id": 9}));
    assert_eq!(eos_token_ids(), [9]);
    std::fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    change_config(dir.path(), &json!({"eos_token_id": null}));
    assert!(eos_token_ids().is_empty());
}

#[test]
fn tensors_at_odd_bytes_are_copied() {
    let dir = copy_of("llama");
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    // One more space at the end of the header moves all tensors by a byte.
    let mut moved = (header_len + 1).to_le_bytes().to_vec();
    moved.extend(&bytes[8..8 + header_len as usize]);
    moved.push(b' ');
    moved.extend(&bytes[8 + header_len as usize..]);
    std::fs::write(&path, moved).unwrap();
    let (prompt, _) = golden("llama").swap_remove(1);
    let aligned = Rank::alone(&golden_dir("llama")).prompt(&prompt.token_ids);
    assert_eq!(Rank::alone(dir.path()).prompt(&prompt.token_ids), aligned);
}

#[test]
fn an_index_that_points_elsewhere_is_refused() {
    let dir = copy_of("llama");
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let message = load_error(dir.path(), 1).to_string();
    assert!(message.contains("neither model.safetensors nor model.safetensors.index.json"), "{message}");
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"lm_head.weight": "../model.safetensors"}}"#).unwrap();
    let message = load_error(dir.path(), 1).to_string();
    assert!(message.contains(r#""../model.safetensors" is not the name of a file beside it"#), "{message}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_file_is_an_error_or_other_numbers_but_never_a_panic(
        place in 0_usize..2600,
        byte: u8,
        len in proptest::option::of(0_usize..4000),
    ) {
        let dir = copy_of("llama");
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[place] = byte;
        bytes.truncate(len.unwrap_or(usize::MAX));
        std::fs::write(&path, &bytes).unwrap();
        let result = load(dir.path(), LoadOptions::default());
        proptest::prop_assert!(len.is_none() || result.is_err());
    }
}
