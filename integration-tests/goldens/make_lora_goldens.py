#!/usr/bin/env python3
"""Makes the golden adapters below llama_lora/: random LoRA adapters of the golden `llama`, and what peft and transformers
compute with each in float32.

make_lora_goldens.py            needs peft in the environment of make_goldens.py: pip install --no-deps peft accelerate psutil
"""
import json
import shutil

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_goldens import HERE, LOGIT_POSITIONS, PROMPTS, is_clear, reference, write_json, write_json_compact

BASE = "llama"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> configuration, and the type in which the factors are stored
ADAPTERS = {
    "tone": (LoraConfig(r=8, lora_alpha=16, target_modules=ALL), torch.float32),
    # Ranks that differ, one of them odd; in the first layer only some modules; scales by the root of the rank.
    "form": (LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=r".*\.(1\..*(q|k|v|gate|down)_proj|0\..*(v|o)_proj)",
                        rank_pattern={"k_proj": 3, r"layers\.1\.mlp\..*": 12}, alpha_pattern={"v_proj": 2.5}), torch.float16),
}


def randomize(model, seed, stored):
    """Both factors random: PEFT begins with zeros in one, which changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            size = 0.8 if "lora_A" in name else 0.6
            noise = size * torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.data.copy_(noise.to(stored).float())


def make(name, tokenizer):
    config, stored = ADAPTERS[name]
    directory = HERE / f"{BASE}_lora" / name
    shutil.rmtree(directory, ignore_errors=True)
    base = AutoModelForCausalLM.from_pretrained(HERE / BASE, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    without = [result["greedy"] for result in (reference(base, ids) for ids in prompts)]
    model = get_peft_model(base, config).eval()
    for seed in range(1, 2000):
        randomize(model, seed, stored)
        results = []
        for ids, greedy in zip(prompts, without):
            results.append(reference(model, ids))
            if not is_clear(results[-1]) or results[-1]["greedy"][:4] == greedy[:4]:
                break
        else:
            break
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    tensors = {n: t.to(stored).contiguous() for n, t in load_file(directory / "adapter_model.safetensors").items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    # Sets are written in an order of their own.
    written = json.loads((directory / "adapter_config.json").read_text())
    if isinstance(written["target_modules"], list):
        written["target_modules"].sort()
    write_json(directory / "adapter_config.json", written)
    save_file({f"logits.{i}": result.pop("logits") for i, result in enumerate(results)}, directory / "golden.safetensors")
    write_json_compact(directory / "golden.json", {
        "made_with": f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32 on a CPU",
        "seed": seed,
        "logits": f"golden.safetensors: logits.N = last {LOGIT_POSITIONS} positions of prompt N",
        "prompts": [
            {"text": text, "token_ids": ids, "logprobs": [lp if lp is None else round(lp, 6) for lp in result["logprobs"]], "greedy": result["greedy"],
             "greedy_text": tokenizer.decode(result["greedy"]), "min_top2_gap": round(result["min_top2_gap"], 6)}
            for text, ids, result in zip(PROMPTS, prompts, results)
        ],
    })
    for file in directory.iterdir():
        file.chmod(0o644)
    print(f"{name}: seed {seed}, gaps {[round(r['min_top2_gap'], 4) for r in results]}, {sum(f.stat().st_size for f in directory.iterdir()) // 1024} KB")


def main():
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(HERE / BASE)
    for name in ADAPTERS:
        make(name, tokenizer)


if __name__ == "__main__":
    main()
