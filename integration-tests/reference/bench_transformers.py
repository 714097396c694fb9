#!/usr/bin/env python3
"""The peer beside `make bench`: speed of `transformers` on a checkpoint directory, on the CPU.

    target/reference-venv/bin/python integration-tests/reference/bench_transformers.py DIRECTORY [--dtype bfloat16] [--threads 2]
        [--kinds prefill decode long]

Prints a JSON line for each workload: tokens/s of a prompt of 512 tokens, of decoding with 1 to 16 sequences, and of decoding
behind 8192 cached tokens. The model alone: no HTTP, no tokenizer, no sampling. The best of several."""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

KINDS = ["prefill", "decode", "long"]

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("directory")
arguments.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
arguments.add_argument("--threads", type=int, default=2)
arguments.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
arguments = arguments.parse_args()

logging.disable_progress_bar()
torch.set_num_threads(arguments.threads)
dtype = getattr(torch, arguments.dtype)
model = AutoModelForCausalLM.from_pretrained(arguments.directory, dtype=dtype).eval()
config = model.config

DECODE_STEPS = 8
SECONDS = 0.5


def best_seconds(run):
    begin, best = time.perf_counter(), float("inf")
    while best == float("inf") or time.perf_counter() - begin < SECONDS:
        best = min(best, run())
    return best


def prefill(tokens):
    ids = torch.randint(3, 300, (1, tokens))
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def decode(batch, context):
    """Seconds of a step."""
    cache = DynamicCache()
    if context:
        shape = (batch, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
    ids = torch.randint(3, 300, (batch, 1))
    start = time.perf_counter()
    for _ in range(DECODE_STEPS):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return (time.perf_counter() - start) / DECODE_STEPS


def report(kind, batch, context, tokens_per_s):
    row = {"kind": kind, "batch": batch, "context": context, "tokens_per_s": tokens_per_s}
    print(json.dumps(row), flush=True)


with torch.inference_mode():
    decode(1, 0)
    if "prefill" in arguments.kinds:
        report("prefill", 1, 512, 512 / best_seconds(lambda: prefill(512)))
    if "decode" in arguments.kinds:
        for batch in (1, 2, 4, 8, 16):
            report("decode", batch, 0, batch / best_seconds(lambda batch=batch: decode(batch, 0)))
    if "long" in arguments.kinds:
        for batch in (1, 4):
            report("long", batch, 8192, batch / best_seconds(lambda batch=batch: decode(batch, 8192)))
