//! Models on a GPU (or on the emulated driver: `make test-cuda`) compute what they compute on the CPU.

use kernels::Context;
use kernels::collective::Local;
use shard::models::{self, LoadOptions};
use shard::{Dtype, Quantization};

use crate::rank::{Chunk, GOLDENS, Rank, assert_close, golden, golden_dir, lora_adapters};

/// Of logits: f32 against f32 in another order of summation, on both sides.
const TOLERANCE: f32 = 5e-4;

const FLOAT32: LoadOptions = LoadOptions {
    dtype: Some(Dtype::Float32),
    kv_cache_dtype: None,
    quantize: None,
    partition: shard::weights::Partition { rank: 0, world_size: 1 },
};

fn on_gpu(name: &str, options: LoadOptions) -> Rank {
    with(Context::cuda(0, 1).unwrap(), name, options)
}

fn with(context: Context, name: &str, options: LoadOptions) -> Rank {
    let model = models::load(&context, &golden_dir(name), options).unwrap();
    Rank::on(context, model, Box::new(Local))
}

#[test]
fn logits_are_those_of_transformers() {
    for name in GOLDENS {
        let mut rank = on_gpu(name, FLOAT32);
        for (prompt, expected) in golden(name) {
            let logits = rank.prompt(&prompt.token_ids);
            assert_close(name, &logits[logits.len() - expected.len()..], &expected, TOLERANCE);
        }
    }
}

#[test]
fn logits_of_plain_kernels_are_those_of_transformers_too() {
    for name in GOLDENS {
        let mut rank = with(Context::cuda_with_plain_kernels(0, 1).unwrap(), name, FLOAT32);
        for (prompt, expected) in golden(name) {
            let logits = rank.prompt(&prompt.token_ids);
            assert_close(name, &logits[logits.len() - expected.len()..], &expected, TOLERANCE);
        }
    }
    let options = LoadOptions::default();
    let mut rank = with(Context::cuda_with_plain_kernels(0, 1).unwrap(), "llama_bf16", options);
    for ((prompt, expected), tolerance) in golden("llama_bf16").into_iter().zip(TRANSFORMERS_IN_BF16) {
        let logits = rank.prompt(&prompt.token_ids);
        assert_close("llama_bf16", &logits[logits.len() - expected.len()..], &expected, tolerance);
    }
}

/// How far transformers itself is off the logits of `llama_bf16` in bf16, by prompt (see the goldens' README).
const TRANSFORMERS_IN_BF16: [f32; 2] = [0.20, 0.41];

#[test]
fn bf16_is_as_close_to_the_reference_as_transformers_is_in_bf16() {
    let mut rank = on_gpu("llama_bf16", LoadOptions::default());
    for ((prompt, expected), tolerance) in golden("llama_bf16").into_iter().zip(TRANSFORMERS_IN_BF16) {
        let logits = rank.prompt(&prompt.token_ids);
        assert_close("llama_bf16", &logits[logits.len() - expected.len()..], &expected, tolerance);
    }
}

#[test]
fn f16_is_an_eighth_as_far_from_the_reference_as_bf16_may_be() {
    let mut rank = on_gpu("llama_f16", LoadOptions::default());
    for ((prompt, expected), tolerance) in golden("llama_f16").into_iter().zip(TRANSFORMERS_IN_BF16) {
        let logits = rank.prompt(&prompt.token_ids);
        assert_close("llama_f16", &logits[logits.len() - expected.len()..], &expected, tolerance / 8.0);
    }
}

#[test]
fn quantized_weights_give_what_they_give_on_the_cpu() {
    let options = LoadOptions { quantize: Some(Quantization::Eetq), ..FLOAT32 };
    let (mut gpu, mut cpu) = (on_gpu("llama", options), Rank::loaded(&golden_dir("llama"), options));
    for (prompt, _) in golden("llama") {
        assert_close("eetq", &gpu.prompt(&prompt.token_ids), &cpu.prompt(&prompt.token_ids), TOLERANCE);
    }
}

#[test]
fn chunks_and_company_give_what_a_whole_prompt_alone_does() {
    for name in ["llama", "qwen3"] {
        let mut rank = on_gpu(name, FLOAT32);
        let prompts: Vec<_> = golden(name).into_iter().map(|(prompt, _)| prompt.token_ids).collect();
        let alone: Vec<_> = prompts.iter().map(|prompt| rank.prompt(prompt)).collect();
        let mut chunked = Vec::new();
        for token_ids in prompts[1].chunks(7) {
            chunked.extend(rank.step(&[Chunk { sequence: 0, start: chunked.len(), token_ids }]));
        }
        assert_close(name, &chunked, &alone[1], TOLERANCE);

        // A decode row of the first beside a prompt of the second.
        let last = prompts[0].len() - 1;
        rank.step(&[Chunk { sequence: 0, start: 0, token_ids: &prompts[0][..last] }]);
        let decode = Chunk { sequence: 0, start: last, token_ids: &prompts[0][last..] };
        let mixed = rank.step(&[decode, Chunk { sequence: 1, start: 0, token_ids: &prompts[1] }]);
        assert_close(name, &mixed, &[&alone[0][last..], &alone[1]].concat(), TOLERANCE);
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    for name in ["llama", "qwen2_window"] {
        let mut rank = on_gpu(name, FLOAT32);
        for (prompt, _) in golden(name) {
            assert_eq!(rank.greedy(&prompt.token_ids, prompt.greedy.len()), prompt.greedy, "{name}");
        }
    }
}

#[test]
fn logits_with_adapters_are_those_of_peft_and_sequences_with_others_do_not_change_them() {
    let names = ["llama_lora/tone", "llama_lora/form"];
    let context = Context::cuda(0, 1).unwrap();
    let adapters = lora_adapters(&names.map(golden_dir));
    let model = models::load_with_adapters(&context, &golden_dir("llama"), FLOAT32, &adapters).unwrap();
    let mut rank = Rank::on(context, model, Box::new(Local));
    for (index, name) in names.into_iter().enumerate() {
        rank.adapters = [Some(index as u32), None];
        for (prompt, expected) in golden(name) {
            let logits = rank.prompt(&prompt.token_ids);
            assert_close(name, &logits[logits.len() - expected.len()..], &expected, TOLERANCE);
            assert_eq!(rank.greedy(&prompt.token_ids, 8), prompt.greedy[..8], "{name}");
        }
    }
    let prompts: Vec<_> = golden(names[0]).into_iter().map(|(prompt, _)| prompt.token_ids).collect();
    let whole = |sequence: usize| Chunk { sequence, start: 0, token_ids: &prompts[sequence] };
    rank.adapters = [Some(1), Some(0)];
    let alone: Vec<_> = (0..2).map(|sequence| rank.step(&[whole(sequence)])).collect();
    assert_close("together", &rank.step(&[whole(0), whole(1)]), &alone.concat(), TOLERANCE);
}
