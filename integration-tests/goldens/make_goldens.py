#!/usr/bin/env python3
"""Makes the golden checkpoints: tiny models with random weights and what transformers computes with them in float32.

make_goldens.py [NAME ...]      all of them, or those named; each becomes a directory beside this file
make_goldens.py --check         loads each directory again with transformers and compares it with its golden
"""
import argparse
import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
VOCAB_SIZE = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, END_OF_TURN = 0, 2
PROMPTS = (
    "My lamp gives no light.",
    "Once upon a time, a young badger named Zoe baked 12 cakes for her neighbours.",
)
# Enough English for 125 merges; the goldens need a tokenizer, not a good one.
TOKENIZER_TEXT = """system user assistant tool function name arguments
In the evening the lamplighter walked through the town and lit the lamps, one after another, from the river to the old
castle. The children of the town liked to walk with her. "Why do you light the lamps before it is dark?" asked the smallest
of them. "Because nobody can find a lamp when it is already dark," said the lamplighter. They thought about that for a
while. When the last lamp was burning, they all went home, and the lamplighter looked back along the river. The water was
black and still, and every lamp stood in it a second time, upside down.
Once upon a time there was a fox who found a lamp. It was old and it did not burn, but the fox was proud of it and carried
it into the wood. "What is it for?" asked the owl. "It is for the night," said the fox. "We have the moon for the night,"
said the owl. "Then it is for the nights without a moon," said the fox, and that was a good answer. You are reading this
for the tokenizer: it needs words that come again, and these are words that come again. Please be brief.
"""
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who lit the lamp?"}]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY_TOKENS, LOGIT_POSITIONS = 32, 4
# Below this gap between the best two logits, rounding may decide which token is greedy; seeds are tried until none is.
MIN_GAP = 1e-2
MIN_DISTINCT = 10

BASE = {
    "attention_dropout": 0.0,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TURN,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
QWEN2 = {"max_window_layers": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True}
# name -> what differs from BASE, as checkpoints on the hub write it
CONFIGS = {
    "llama": LLAMA,
    "llama_bf16": {**LLAMA, "torch_dtype": "bfloat16"},
    "llama_f16": {**LLAMA, "torch_dtype": "float16"},
    "llama_sharded": LLAMA,
    # Of the wavelengths 6, 32, 167, ... the first is left alone, the second is in between and the others are scaled.
    "llama3": {**LLAMA, "head_dim": 16, "rope_theta": 500000.0, "tie_word_embeddings": True, "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}},
    "llama_bias": {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **QWEN2},
    "qwen2_window": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **QWEN2,
        "max_window_layers": 1, "sliding_window": 8, "use_sliding_window": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 32, **QWEN2},
}
# The same weights in other files: both must give the same numbers.
SHARES_WEIGHTS = {"llama_sharded": "llama"}
KEEPS_V5_CONFIG = {"llama3"}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def train_tokenizer():
    """A byte-level BPE with 384 ids: 3 special, 256 bytes and merges learnt from TOKENIZER_TEXT."""
    tokenizer = Tokenizer(models.BPE())
    split = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TOKENIZER_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def random_weights(config, seed):
    """Every tensor random, norms and biases too, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {}
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            weights[name] = 1 + 0.3 * noise
        elif name.endswith("bias"):
            weights[name] = 0.3 * noise
        elif "embed" in name or "lm_head" in name:
            weights[name] = 0.3 * noise
        else:
            weights[name] = 1.5 * noise * tensor.shape[1] ** -0.5
    return weights


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def reference(model, ids):
    """Greedy continuation and the smallest gap between the best two logits on the way, each step computed afresh."""
    logits, greedy, gap = logits_of(model, ids), [], float("inf")
    first = logits
    for _ in range(GREEDY_TOKENS):
        best = logits[-1].topk(2)
        greedy.append(int(best.indices[0]))
        gap = min(gap, float(best.values[0] - best.values[1]))
        logits = logits_of(model, ids + greedy)
    logprobs = first.log_softmax(-1)
    return {
        "logits": first[-LOGIT_POSITIONS:].contiguous(),
        "logprobs": [None] + [float(logprobs[i, token]) for i, token in enumerate(ids[1:])],
        "greedy": greedy,
        "min_top2_gap": gap,
    }


def is_clear(result):
    """Is the continuation one that a correct server must reproduce, and a wrong one hardly will?"""
    return result["min_top2_gap"] > MIN_GAP and len(set(result["greedy"])) >= MIN_DISTINCT and not {END_OF_TEXT, END_OF_TURN} & set(result["greedy"])


def write_weights(directory, weights, name):
    if name != "llama_sharded":
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    first = {n: t for n, t in weights.items() if "embed" in n or ".layers.0." in n}
    shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": {n: t for n, t in weights.items() if n not in first}}
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    write_json(directory / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in weights.values())},
        "weight_map": {tensor: file for file, tensors in sorted(shards.items()) for tensor in sorted(tensors)},
    })


def make(name, tokenizer, seeds):
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    hub_config = dict(sorted({**BASE, **CONFIGS[name]}.items()))
    write_json(directory / "config.json", hub_config)
    config = transformers.AutoConfig.from_pretrained(directory)
    stored = STORED[hub_config["torch_dtype"]]
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    given = seeds.get(SHARES_WEIGHTS.get(name))
    for seed in [given] if given is not None else range(1, 2000):
        weights = {n: t.to(stored) for n, t in random_weights(config, seed).items()}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        missing, unexpected = model.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        results = []
        for ids in prompts:
            results.append(reference(model, ids))
            if given is None and not is_clear(results[-1]):
                break
        else:
            break
    seeds[name] = seed

    write_weights(directory, weights, name)
    exact = [logits_of(model.double(), ids) for ids in prompts]
    noise = [float((result["logits"].double() - wide[-LOGIT_POSITIONS:]).abs().max()) for result, wide in zip(results, exact)]
    save_file({f"logits.{i}": result.pop("logits") for i, result in enumerate(results)}, directory / "golden.safetensors")
    rendered = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT) + "<|im_start|>assistant\n"
    write_json_compact(directory / "golden.json", {
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32 on a CPU",
        "seed": seed,
        "logits": f"golden.safetensors: logits.N = last {LOGIT_POSITIONS} positions of prompt N",
        "prompts": [
            {"text": text, "token_ids": ids, "logprobs": [lp if lp is None else round(lp, 6) for lp in result["logprobs"]], "greedy": result["greedy"],
             "greedy_text": tokenizer.decode(result["greedy"]), "min_top2_gap": round(result["min_top2_gap"], 6), "float32_noise": float(f"{n:.2g}")}
            for text, ids, result, n in zip(PROMPTS, prompts, results, noise)
        ],
        "chat": {"messages": CHAT, "rendered": rendered, "token_ids": tokenizer.encode(rendered).ids},
    })
    if name in KEEPS_V5_CONFIG:
        config.architectures = hub_config["architectures"]
        config.dtype = stored
        written = json.loads(config.to_json_string(use_diff=False))
        kept = (BASE.keys() | CONFIGS[name].keys() | {"dtype", "rope_parameters", "transformers_version", "pad_token_id"}) & written.keys()
        write_json(directory / "config.v5.json", {key: written[key] for key in sorted(kept)})
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    write_json(directory / "tokenizer_config.json", {
        "bos_token": SPECIAL[END_OF_TEXT], "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": SPECIAL[END_OF_TURN],
        "model_max_length": BASE["max_position_embeddings"], "pad_token": SPECIAL[END_OF_TEXT], "tokenizer_class": "PreTrainedTokenizerFast",
    })
    write_json(directory / "generation_config.json", {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TURN, "pad_token_id": END_OF_TEXT})
    for file in directory.iterdir():
        file.chmod(0o644)  # save_file makes files that only their owner can read
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{name}: seed {seed}, gaps {[round(r['min_top2_gap'], 4) for r in results]}, distinct {[len(set(r['greedy'])) for r in results]}, "
          f"noise {[f'{n:.1e}' for n in noise]}, {size // 1024} KB")


def write_json_compact(path, content):
    """One line per leaf list: readable, and small in a diff."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    out, depth = [], 0
    for line in text.split("\n"):
        stripped = line.strip()
        if depth:
            depth -= stripped.startswith("]")
            out[-1] += stripped + (" " if depth and stripped.endswith(",") else "")
            continue
        out.append(line)
        depth += stripped.endswith("[") and not stripped.startswith(('"prompts"', '"messages"'))
    path.write_text("\n".join(out) + "\n")
    assert json.loads(path.read_text()) == json.loads(text)


def check(name):
    """Loads the directory as any user of transformers would."""
    directory = HERE / name
    golden = json.loads((directory / "golden.json").read_text())
    logits = load_file(directory / "golden.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = golden["chat"]
    assert tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True) == chat["rendered"]
    configs = ["config.json"] + ["config.v5.json"] * (directory / "config.v5.json").exists()
    for file in configs:
        config = transformers.AutoConfig.from_pretrained(directory / file)
        model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32).eval()
        for index, prompt in enumerate(golden["prompts"]):
            assert tokenizer.encode(prompt["text"]) == prompt["token_ids"]
            ids = prompt["token_ids"]
            difference = (logits_of(model, ids)[-LOGIT_POSITIONS:] - logits[f"logits.{index}"]).abs().max()
            generated = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=GREEDY_TOKENS, do_sample=False)[0, len(ids):].tolist()
            assert difference < 2e-5 and generated == prompt["greedy"], (name, file, float(difference), generated, prompt["greedy"])
            print(f"{name} {file} prompt {index} ({len(ids)} tokens): logits differ by {float(difference):.1e}, greedy equal with a KV cache")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.names or list(CONFIGS)
    if arguments.check:
        for name in names:
            check(name)
        return
    tokenizer = train_tokenizer()
    print("prompt lengths", [len(tokenizer.encode(text)) for text in PROMPTS])
    seeds = {}
    for name in names:
        source = SHARES_WEIGHTS.get(name)
        if source and source not in seeds:
            seeds[source] = json.loads((HERE / source / "golden.json").read_text())["seed"]
        make(name, tokenizer, seeds)


if __name__ == "__main__":
    main()
