#!/usr/bin/env python3
"""What summary.py makes of outputs as the stages print them."""
import contextlib
import io
import pathlib
import tempfile
import unittest

import summary

LOGS = {
    "environment": "copy: 4200 GB/s, read and written\nproduct: 780 TFLOP/s, bf16, 8192 x 8192 x 8192\n",
    "bench-shard": """loading: 16.06 GB of weights in 4.10 s, 0.255 s per GB, the start of the process included
| decode, 1 at 1024 | 250.3 | 3.995 | 3.9 | 0.000 | 3800.1 | 90 % |
| decode, 64 at 1024 | 8000.0 | 8.000 | 7.9 | 0.000 | 3000.1 | 71 % |
| decode, 256 at 1024 | 16000.0 | 16.000 | 15.9 | 0.000 | 3000.1 | 71 % |
| prefill, 8 × 1024 | 35000.0 | 234.057 | 234.0 | 0.000 | – | – |
""",
    "bench-device": """| sampling 64 x 128256, peaked: greedy | 21.0 | 1564 | 37 % |
| sampling 64 x 128256, flat: top-p 0.95 | 41.2 | 797 | 19 % |
| attention, 32 decode rows over 8192 tokens, BF16 | 282.0 | 3808 | 91 % |
| attention, 32 decode rows over 8192 tokens, F8E4M3 | 180.0 | 2982 | 71 % |
""",
    "bench-serving": "| Llama-3.1-8B shape | 1 at 1024 | 245.0 | 245.0 | 1.00 | – | 2.1 % |\n"
    "| Llama-3.1-8B shape | 64 at 1024 | 7000.0 | 109.4 | 28.57 | – | 12.1 % |\n",
    "transformers": '{"kind": "decode, static cache", "batch": 1, "context": 1024, "tokens_per_s": 125.15}\n'
    '{"kind": "continuous, prompts and answers", "batch": 64, "context": 1024, "tokens_per_s": 859}\n',
}


def summarized(logs):
    with tempfile.TemporaryDirectory() as directory:
        outcomes = pathlib.Path(directory, "outcomes")
        outcomes.mkdir()
        for number, (stage, text) in enumerate(logs.items()):
            pathlib.Path(directory, f"{stage}.log").write_text(text)
            (outcomes / f"{number:03}-{stage}").write_text(f"| {stage} | something | ok | 7 |\n")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            summary.main(directory)
        return out.getvalue()


class Summary(unittest.TestCase):
    def rows(self, logs, *expected):
        text = summarized(logs)
        for row in expected:
            self.assertIn(row, text)

    def test_each_aim_stands_beside_its_floor_and_what_was_reached(self):
        self.rows(
            LOGS,
            "| bench-shard | something | ok | 7 |",
            "| decode, batch 1, context 1k | 3.61 ms (277 tokens/s) | ≥ 240 tokens/s | 250 tokens/s | reached |",
            "| decode, batch 64, context 1k | 5.62 ms (11,390 tokens/s) | ≥ 9,000 tokens/s | 8,000 tokens/s | MISSED |",
            "| decode, batch 256, context 1k | 11.75 ms (21,779 tokens/s) | ≥ 15,500 tokens/s | 16,000 tokens/s | reached |",
            "| prefill, 8 × 1k | 55,874 tokens/s | ≥ 34,000 tokens/s | 35,000 tokens/s | reached |",
            "| paged decode attention, 8k context | 4,200 GB/s of a copy | ≥ 85% of it | 3,808 GB/s, 91% | reached |",
            "| sampler, 64 rows × 128k, peaked: greedy | – | ≤ 40 µs | 21.0 µs | reached |",
            "| sampler, 64 rows × 128k, flat: top-p 0.95 | – | ≤ 40 µs | 41.2 µs | MISSED |",
            "| through the router, batch 1, context 1k | 250 tokens/s of the shard alone | ≥ 97% of it | 245 tokens/s, 97.9% | reached |",
            "| through the router, batch 64, context 1k | 8,000 tokens/s of the shard alone | ≥ 97% of it | 7,000 tokens/s, 87.5% | MISSED |",
            "| loading | – | – | 0.255 s per GB | – |",
            "| decode, 1 behind 1k; generate, static cache and compile | 250 tokens/s | 125 tokens/s | 2.00 |",
            # 64 prompts of 1024 tokens and 64 answers of 64, at the rates above: 1.872 s + 0.512 s.
            "| 64 prompts of 1k and their answers; continuous batching | 1,718 tokens/s | 859 tokens/s | 2.00 |",
        )

    def test_what_was_not_measured_is_said_to_be_so(self):
        self.rows(
            {},
            "| decode, batch 64, context 1k | 5.49 ms (11,661 tokens/s) | ≥ 9,000 tokens/s | not measured | – |",
            "| sampler, 64 rows × 128k | – | ≤ 40 µs | not measured | – |",
            "| through the router, batch 256, context 1k | not measured of the shard alone | ≥ 97% of it | not measured | – |",
        )


if __name__ == "__main__":
    unittest.main()
