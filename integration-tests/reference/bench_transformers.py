#!/usr/bin/env python3
"""The peer beside `make bench` and `make gpu-check`: speed of `transformers` on a checkpoint directory.

    target/reference-venv/bin/python integration-tests/reference/bench_transformers.py DIRECTORY [--dtype bfloat16] [--threads 2]
        [--kinds prefill decode long] [--device cuda]

Prints a JSON line for each workload: tokens/s of a prompt of 512 tokens, of decoding with 1 to 16 sequences, and of decoding
behind 8192 cached tokens. The model alone: no HTTP, no tokenizer, no sampling. The best of several.

On a GPU: eight prompts of 1024 tokens; `generate` with a static cache, which compiles the decode step, for 1, 64 and 256 sequences
behind 1024 tokens; `continuous`: transformers' own continuous batching of 64 and 256 such requests."""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

KINDS = ["prefill", "decode", "long", "continuous"]

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("directory")
arguments.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
arguments.add_argument("--threads", type=int, default=2)
arguments.add_argument("--kinds", nargs="*", default=KINDS[:3], choices=KINDS)
arguments.add_argument("--device", default="cpu")
arguments.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt on a GPU")
arguments.add_argument("--batches", type=int, nargs="*", default=[1, 64, 256], help="sequences on a GPU")
arguments = arguments.parse_args()

logging.disable_progress_bar()
torch.set_num_threads(arguments.threads)
dtype = getattr(torch, arguments.dtype)
model = AutoModelForCausalLM.from_pretrained(arguments.directory, dtype=dtype).eval().to(arguments.device)
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


def on_gpu():
    """What is asked of a GPU: the work of `make gpu-check`."""
    new = 64
    synchronize = torch.cuda.synchronize if arguments.device.startswith("cuda") else lambda: None

    def seconds(run):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    def ids(batch):
        return torch.randint(3, 300, (batch, arguments.prompt), device=arguments.device)

    def generate(batch, tokens):
        model.generate(
            ids(batch), attention_mask=torch.ones(batch, arguments.prompt, dtype=torch.long, device=arguments.device),
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation="static",
        )

    if "prefill" in arguments.kinds:
        prompts = ids(8)
        run = lambda: model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        run()
        report("prefill", 8, arguments.prompt, prompts.numel() / min(seconds(run) for _ in range(4)))
    if "decode" in arguments.kinds:
        for batch in arguments.batches:
            # The first call compiles. What the prompt and the first token take is taken off.
            generate(batch, new)
            whole = min(seconds(lambda: generate(batch, new)) for _ in range(2))
            first = min(seconds(lambda: generate(batch, 1)) for _ in range(2))
            report("decode, static cache", batch, arguments.prompt, batch * (new - 1) / (whole - first))
    if "continuous" in arguments.kinds:
        from transformers import GenerationConfig

        for batch in arguments.batches[1:]:
            settings = GenerationConfig(
                max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=True,
            )
            requests = ids(batch).tolist()
            run = lambda: model.generate_batch(inputs=requests, generation_config=settings, progress_bar=False)
            run()
            report("continuous, prompts and answers", batch, arguments.prompt, batch * new / seconds(run))


if arguments.device != "cpu":
    # Not inference_mode: continuous batching works in a thread of its own, which would not be in it.
    with torch.no_grad():
        on_gpu()
    raise SystemExit

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
