#!/usr/bin/env python3
"""summary.py DIR: what the outputs of run.sh's stages come to, as Markdown: outcomes, what was to be reached and was, and all
tables."""
import json
import pathlib
import re
import sys

# Of Llama-3.1-8B in bf16: what a decode step reads, of weights and for each token of context; what a prompt's token multiplies.
WEIGHT_BYTES = 15.01e9
KV_BYTES_PER_TOKEN = 131_072
FLOP_PER_TOKEN = 13.96e9
CONTEXT = 1024
# Of an answer, in bench_transformers.py.
NEW_TOKENS = 64
# Rates of an H200, where this GPU's were not measured.
H200_COPY_GB_PER_S = 4300
H200_TFLOP_PER_S = 788

# What is to be reached on an H200, in tokens/s.
DECODE = {1: 240, 64: 9000, 256: 15_500}
PREFILL = 34_000
ATTENTION_SHARE = 0.85
SAMPLER_US = 40
ROUTER_SHARE = 0.97


class Results:
    """The outputs of stages, by name."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)

    def text(self, stage):
        path = self.directory / f"{stage}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def number(self, stage, pattern):
        found = re.search(pattern, self.text(stage), re.MULTILINE)
        return float(found.group(1)) if found else None

    def decode(self, batch, context=CONTEXT, stage="bench-shard"):
        return self.number(stage, rf"^\| decode, {batch} at {context} \| ([0-9.]+) \|")

    def served(self, batch, context=CONTEXT):
        return self.number("bench-serving", rf"^\|[^|]*\| {batch} at {context} \| ([0-9.]+) \|")

    def transformers(self):
        """(kind, batch): tokens/s."""
        rows = [line for line in self.text("transformers").splitlines() if line.startswith('{"kind"')]
        rows = [json.loads(row) for row in rows]
        return {(row["kind"], row["batch"]): row["tokens_per_s"] for row in rows}


def shown(value, unit="tokens/s"):
    if value is None:
        return "not measured"
    digits = 1 if value < 100 else 0
    return f"{value:,.{digits}f} {unit}"


def verdict(reached, aim, at_most=False):
    if reached is None:
        return "–"
    return "reached" if (reached <= aim if at_most else reached >= aim) else "MISSED"


def performance(results):
    """Rows of what was to be reached."""
    copy = results.number("environment", r"^copy: ([0-9.]+) GB/s") or H200_COPY_GB_PER_S
    product = results.number("environment", r"^product: ([0-9.]+) TFLOP/s") or H200_TFLOP_PER_S
    for batch, aim in DECODE.items():
        seconds = (WEIGHT_BYTES + batch * CONTEXT * KV_BYTES_PER_TOKEN) / (copy * 1e9)
        reached = results.decode(batch)
        yield f"decode, batch {batch}, context 1k", f"{1e3 * seconds:.2f} ms ({shown(batch / seconds)})", f"≥ {shown(aim)}", \
            shown(reached), verdict(reached, aim)
    reached = results.number("bench-shard", r"^\| prefill, 8 × 1024 \| ([0-9.]+) \|")
    floor = product * 1e12 / FLOP_PER_TOKEN
    yield "prefill, 8 × 1k", shown(floor), f"≥ {shown(PREFILL)}", shown(reached), verdict(reached, PREFILL)
    reached = results.number("bench-device", r"^\| attention, \d+ decode rows over 8192 tokens, BF16 \| [0-9.]+ \| ([0-9.]+) \|")
    share = reached and reached / copy
    yield "paged decode attention, 8k context", f"{copy:,.0f} GB/s of a copy", f"≥ {ATTENTION_SHARE:.0%} of it", \
        "not measured" if share is None else f"{reached:,.0f} GB/s, {share:.0%}", verdict(share, ATTENTION_SHARE)
    pattern = r"^\| sampling 64 x 128256, (\w+: [^|]*?) \| ([0-9.]+) \|"
    rows = re.findall(pattern, results.text("bench-device"), re.MULTILINE)
    if not rows:
        yield "sampler, 64 rows × 128k", "–", f"≤ {SAMPLER_US} µs", "not measured", "–"
    for what, us in rows:
        yield f"sampler, 64 rows × 128k, {what}", "–", f"≤ {SAMPLER_US} µs", shown(float(us), "µs"), \
            verdict(float(us), SAMPLER_US, at_most=True)
    for batch in DECODE:
        shard, served = results.decode(batch), results.served(batch)
        share = served / shard if shard and served else None
        yield f"through the router, batch {batch}, context 1k", f"{shown(shard)} of the shard alone", f"≥ {ROUTER_SHARE:.0%} of it", \
            "not measured" if share is None else f"{shown(served)}, {share:.1%}", verdict(share, ROUTER_SHARE)
    loaded = results.number("bench-shard", r"^loading: .* ([0-9.]+) s per GB")
    yield "loading", "–", "–", "not measured" if loaded is None else f"{loaded:.3f} s per GB", "–"


def beside_transformers(results):
    """Rows of the same work, here and there."""
    theirs = results.transformers()
    prefill = results.number("bench-shard", r"^\| prefill, 8 × 1024 \| ([0-9.]+) \|")
    work = [("prefill, 8 × 1k", prefill, ("prefill", 8))]
    work += [(f"decode, {batch} behind 1k; generate, static cache and compile", results.decode(batch), ("decode, static cache", batch))
             for batch in DECODE]
    for batch in (64, 256):
        decode = results.decode(batch)
        # As theirs is counted: tokens of answers, while prompts are computed too.
        ours = 1 / (CONTEXT / NEW_TOKENS / prefill + 1 / decode) if prefill and decode else None
        work.append((f"{batch} prompts of 1k and their answers; continuous batching", ours,
                     ("continuous, prompts and answers", batch)))
    for what, ours, key in work:
        ratio = f"{ours / theirs[key]:.2f}" if ours and theirs.get(key) else "–"
        yield what, shown(ours), shown(theirs.get(key)), ratio


def table(*rows):
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")
    print()


def main(directory):
    results = Results(directory)
    print("| stage | what | outcome | seconds |\n|---|---|---|---|")
    outcomes = sorted((results.directory / "outcomes").glob("*"))
    print("".join(path.read_text() for path in outcomes))
    for path in outcomes:
        stage = path.name.split("-", 1)[1]
        for line in results.text(stage).splitlines():
            if line.startswith("test result") or re.match(r"(memcheck|racecheck): \w+ is clean", line):
                print(f"- {stage}: {line}")
    print("\n## What was to be reached\n\nFloors are of this GPU's own rates where they were measured; aims are for an H200.\n")
    table(("work", "floor", "aim", "reached", "verdict"), *performance(results))
    print("## Beside transformers, on the same weights\n")
    table(("work", "here", "transformers", "ratio"), *beside_transformers(results))
    for path in outcomes:
        stage = path.name.split("-", 1)[1]
        lines = [line for line in results.text(stage).splitlines() if re.match(r"\||\*\*|[A-Za-z0-9. ]+: .*\d|\{\"kind\"", line)]
        if lines and not stage.startswith("test-"):
            print(f"## {stage}\n\n```\n" + "\n".join(lines) + "\n```\n")


if __name__ == "__main__":
    main(sys.argv[1])
