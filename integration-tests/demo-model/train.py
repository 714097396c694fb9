#!/usr/bin/env python3
"""Trains the demo model on text made on the fly; no example is seen twice.

The learning rate follows the time that is left, not a number of steps, so that a run on a busy machine still ends annealed:
    train.py --minutes 60 --state target/demo-model-training.pt     start, or go on where the state file stands

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) for the matrices, AdamW for the embedding and the norms.
"""
import argparse
import json
import os
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from generate_text import document
from model import Model, Shape

HERE = pathlib.Path(__file__).parent
# Rows of one length: (positions, rows per step, share of the steps at first, share after SHORT_UNTIL of the time). Short
# rows cost half as much per token and are where copying is learnt; the long ones, conversations of many turns, then keep
# attention in order far beyond the first paragraph.
ROWS = ((128, 48, 0.6, 0.4), (256, 24, 0.32, 0.34), (512, 12, 0.08, 0.18), (1024, 6, 0.0, 0.07), (2048, 3, 0.0, 0.01))
SHORT_UNTIL = 0.5
MUON_RATE, ADAM_RATE, WARM_UP, DECAY_FROM = 0.02, 0.003, 0.01, 0.45
SAMPLES = (
    "Hello!", "Who are you?", "Tell me a story about a brave fox named Quentin.", "What is the capital of Norway?", "What is 4 + 5?",
    "Make a JSON object for Saskia, age 31, who lives in Oslo.", "Repeat after me: the green trellow sings", "Name three fruits.",
)


class Rows:
    """Packs whole documents into rows; a row begins with a document and no document is cut."""

    POOL = 200

    def __init__(self, tokenizer, seed, next_document):
        self.tokenizer, self.seed, self.next_document = tokenizer, seed, next_document
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.random = random.Random(f"rows/{seed}/{next_document}")
        # Documents that wait for a row, by the shortest row that holds them. Those for long rows are drawn on purpose.
        self.waiting = {length: [] for length, *_ in ROWS}

    def encode(self, long):
        segments = document(self.seed, self.next_document, long)
        self.next_document += 1
        tokens, learnt = [], []
        for encoding, (_, learn) in zip(self.tokenizer.encode_batch([text for text, _ in segments]), segments):
            tokens += encoding.ids
            learnt += [learn] * len(encoding.ids)
        # Only text without roles is learnt to its end; a conversation ends with <|im_end|>.
        return tokens + [self.end], learnt + [len(segments) == 1]

    def fill(self, length):
        while len(self.waiting[length]) < self.POOL:
            drawn = self.encode(long=length >= 1024)
            holds = next((l for l, *_ in ROWS if len(drawn[0]) <= l), None)
            if holds is not None and len(self.waiting[holds]) < 10 * self.POOL:
                self.waiting[holds].append(drawn)

    def take(self, length, room):
        """Any waiting document that fits, or else the longest that does."""
        self.fill(length)
        pool = self.waiting[length]
        for _ in range(8):
            index = self.random.randrange(len(pool))
            if len(pool[index][0]) <= room:
                break
        else:
            index = max(range(len(pool)), key=lambda i: (len(pool[i][0]) <= room) * len(pool[i][0]))
        if len(pool[index][0]) > room:
            return None
        pool[index], pool[-1] = pool[-1], pool[index]
        return pool.pop()

    def batch(self, length, rows):
        """tokens [rows, length], targets [rows, length] (-100 where nothing is to be learnt)."""
        tokens = torch.full((rows, length), self.end)
        targets = torch.full((rows, length), -100)
        for row in range(rows):
            at = 0
            pools = [l for l, *_ in ROWS if l <= length]
            while pools:
                if (taken := self.take(pools[-1], length - at)) is None:
                    pools.pop()
                    continue
                ids, learnt = taken
                tokens[row, at : at + len(ids)] = torch.tensor(ids)
                next_ids = torch.tensor([i if learn else -100 for i, learn in zip(ids[1:], learnt[1:])])
                targets[row, at : at + len(ids) - 1] = next_ids
                at += len(ids)
        return tokens, targets


def orthogonalize(matrices):
    """Newton-Schulz iteration: the nearest semi-orthogonal matrices to a stack of gradients."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalize(torch.stack(updates))):
                    parameter.mul_(1 - group["lr"] * 0.01).add_(update, alpha=-group["lr"] * scale)


def rate(progress):
    """Warm up, stay, then fall to zero in a straight line."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return min(1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


@torch.no_grad()
def answer(model, tokenizer, request, limit=80):
    device = model.embedding.device
    ids = tokenizer.encode(f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n").ids
    start, stop = len(ids), tokenizer.token_to_id("<|im_end|>")
    while len(ids) - start < limit:
        ids.append(int(model.logits(model.hidden(torch.tensor([ids], device=device))[:, -1]).argmax()))
        if ids[-1] == stop:
            break
    return tokenizer.decode(ids[start:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="wall time to train for, all runs together")
    parser.add_argument("--state", type=pathlib.Path, required=True, help="written every two minutes; read at start if it is there")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")

    tokenizer = Tokenizer.from_file(str(HERE / "checkpoint/tokenizer.json"))
    model = Model(Shape(vocab_size=tokenizer.get_vocab_size())).to(arguments.device)
    matrices = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [Muon(matrices, MUON_RATE), torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]
    rates = (MUON_RATE, ADAM_RATE)
    done = {"step": 0, "tokens": 0, "learnt": 0, "documents": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    if arguments.state.exists():
        state = torch.load(arguments.state, map_location=arguments.device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        done = state["done"]
    rows = Rows(tokenizer, arguments.seed, done["documents"])
    hidden = torch.compile(model.hidden, dynamic=False)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, starting at {done}", flush=True)

    def save():
        saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "done": done, "seed": arguments.seed}
        torch.save(saved, partial := arguments.state.with_suffix(".partial"))
        os.replace(partial, arguments.state)

    last, saved_at, sampled_at = time.time(), time.time(), done["seconds"]
    cpu = time.process_time()
    running, window = 0.0, 0
    draws = torch.Generator().manual_seed(arguments.seed + done["step"])
    while (progress := done["seconds"] / (60 * arguments.minutes)) < 1:
        shares = torch.tensor([late if progress > SHORT_UNTIL else early for _, _, early, late in ROWS])
        length, count, *_ = ROWS[int(torch.multinomial(shares, 1, generator=draws))]
        tokens, targets = (t.to(arguments.device) for t in rows.batch(length, count))
        chosen = (targets != -100).reshape(-1).nonzero().squeeze(1)
        states = hidden(tokens).reshape(-1, model.shape.hidden_size).index_select(0, chosen)
        loss = F.cross_entropy(model.logits(states), targets.reshape(-1)[chosen])
        loss.backward()
        for optimizer, base in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = base * rate(progress)
            optimizer.step()
        model.zero_grad()

        now = time.time()
        done["step"] += 1
        done["tokens"] += tokens.numel()
        done["learnt"] += chosen.numel()
        done["documents"] = rows.next_document
        done["seconds"] += now - last
        last = now
        done["cpu_seconds"] += time.process_time() - cpu
        cpu = time.process_time()
        running, window = running + loss.item(), window + 1
        if done["step"] % 50 == 0:
            print(f"{done['seconds'] / 60:6.1f} min  step {done['step']:5}  tokens {done['tokens'] / 1e6:6.2f} M  learnt {done['learnt'] / 1e6:6.2f} M  "
                  f"loss {running / window:.4f}  rate {rate(progress):.3f}  cpu {done['cpu_seconds'] / 60:.1f} min", flush=True)
            running, window = 0.0, 0
        if done["seconds"] - sampled_at > 480:
            sampled_at = done["seconds"]
            for request in SAMPLES:
                print("   >", request, "\n    ", json.dumps(answer(model, tokenizer, request)), flush=True)
        if now - saved_at > 120:
            save()
            saved_at = time.time()
    save()
    print("done", done, flush=True)


if __name__ == "__main__":
    main()
