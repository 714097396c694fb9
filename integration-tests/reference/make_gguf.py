#!/usr/bin/env python3
"""A checkpoint directory of the benchmark (config.json, model.safetensors; Llama or Qwen 2) as GGUF, for llama.cpp.

    target/llama-cpp/venv/bin/python integration-tests/reference/make_gguf.py DIRECTORY TYPE OUT

TYPE is f32, f16, bf16 (the weights as they are stored, which must be that type) or q8_0 (all matrices, as llama-quantize
has it). The vocabulary is left out: speed does not depend on it, and llama-bench asks for none."""
import argparse
import json
import pathlib

import gguf
import numpy

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
STORED = {"F32": numpy.float32, "F16": numpy.float16, "BF16": numpy.uint16}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("directory", type=pathlib.Path)
arguments.add_argument("type", choices=TYPES)
arguments.add_argument("out", type=pathlib.Path)
arguments = arguments.parse_args()

config = json.loads((arguments.directory / "config.json").read_text())
heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]


def tensors():
    """Names, element types and values, mapped from the file."""
    path = arguments.directory / "model.safetensors"
    with path.open("rb") as file:
        header_len = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_len))
    header.pop("__metadata__", None)
    for name, info in header.items():
        dtype, (begin, end) = STORED[info["dtype"]], info["data_offsets"]
        data = numpy.memmap(path, dtype, "r", 8 + header_len + begin, (end - begin) // dtype().itemsize)
        yield name, info["dtype"], data.reshape(info["shape"])


def gguf_name(name):
    base, end = name.rsplit(".", 1)
    if base.startswith("model.layers."):
        layer, base = base.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[base]}.{end}"
    return f"{NAMES[base]}.{end}"


def in_gguf_order(name, values):
    """llama.cpp turns neighbouring elements of Llama's queries and keys, transformers those half a head apart."""
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    num_heads = heads if "q_proj" in name else kv_heads
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, values.shape[1])
    return halves.swapaxes(1, 2).reshape(values.shape)


def as_f32(stored, values):
    return (values.astype(numpy.uint32) << 16).view(numpy.float32) if stored == "BF16" else values.astype(numpy.float32)


writer = gguf.GGUFWriter(arguments.out, config["model_type"])
writer.add_context_length(65536)
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(kv_heads)
writer.add_rope_dimension_count(config["hidden_size"] // heads)
writer.add_rope_freq_base(config["rope_theta"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_tokenizer_model("no_vocab")
for name, stored, values in tensors():
    values = in_gguf_order(name, values)
    if values.ndim == 1:
        writer.add_tensor(gguf_name(name), as_f32(stored, values))
    elif arguments.type == "q8_0":
        values = gguf.quants.quantize(as_f32(stored, values), TYPES["q8_0"])
        writer.add_tensor(gguf_name(name), values, raw_dtype=TYPES["q8_0"])
    else:
        assert stored.lower() == arguments.type, f"{name} is stored as {stored}, not as {arguments.type}"
        values = numpy.ascontiguousarray(values)
        writer.add_tensor(gguf_name(name), values.view(numpy.uint8), raw_dtype=TYPES[arguments.type])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
