#!/usr/bin/env python3
"""The peer beside `make bench-serving`: decode speed of `transformers` on a checkpoint directory, on the CPU.

    target/reference-venv/bin/python integration-tests/reference/bench_transformers.py DIRECTORY [--dtype bfloat16] [--threads 2]

Prints tokens/s of greedy decoding with a KV cache at batch 1 and 8 (64-token prompts, 32 new tokens), in the model
alone: no HTTP, no tokenizer, no sampling."""
import argparse
import time

import torch
from transformers import AutoModelForCausalLM

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("directory")
arguments.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
arguments.add_argument("--threads", type=int, default=2)
arguments = arguments.parse_args()

torch.set_num_threads(arguments.threads)
model = AutoModelForCausalLM.from_pretrained(arguments.directory, dtype=getattr(torch, arguments.dtype)).eval()

PROMPT, NEW = 64, 32


@torch.inference_mode()
def decode_seconds(batch: int) -> float:
    ids = torch.randint(3, 300, (batch, PROMPT))
    output = model(input_ids=ids, use_cache=True)
    start = time.perf_counter()
    for _ in range(NEW):
        output = model(
            input_ids=output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True
        )
    return time.perf_counter() - start


for batch in (1, 8):
    decode_seconds(batch)
    seconds = min(decode_seconds(batch) for _ in range(3))
    print(f"transformers {arguments.dtype} batch {batch}: {batch * NEW / seconds:.1f} tokens/s")
