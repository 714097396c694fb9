#!/usr/bin/env python3
"""Writes a training state as a Hugging Face checkpoint (bf16) beside the tokenizer in checkpoint/.

convert.py target/demo-model/state.pt
"""
import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model import Shape

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight", "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight", "mlp_norm.weight": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
}


def hub_name(name):
    if name == "embedding":
        return "model.embed_tokens.weight"
    if name == "norm.weight":
        return "model.norm.weight"
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{LAYER_NAMES[rest]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("state", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    state = torch.load(arguments.state, map_location="cpu")
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    end_of_text, end_of_turn = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    shape = Shape(vocab_size=tokenizer.get_vocab_size())
    tensors = {hub_name(name): tensor.to(torch.bfloat16).contiguous() for name, tensor in state["model"].items()}
    arguments.out.mkdir(exist_ok=True)
    # Renamed into place: a server may have the old file mapped.
    partial = arguments.out / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(arguments.out / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": end_of_text,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    # A text without roles ends with <|endoftext|>, an answer with <|im_end|>.
    generation = {"bos_token_id": end_of_text, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (arguments.out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(sum(t.numel() for t in tensors.values()), "parameters;", state["done"])


if __name__ == "__main__":
    main()
