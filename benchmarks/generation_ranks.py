"""What splitting generation over data-parallel ranks saves: how long the slowest rank waits, by how many share it.

    python benchmarks/generation_ranks.py [--quick] [--json FILE] [--samples N]

The demo's model generates from its own samples, greedily, as the hooks do. All ranks wait for the slowest, so a step's
wait is that of one rank with its part: ``rank 0`` is everything on one rank (the default), ``1 of K`` is
``HooksConfig(split_generation=True)`` on K ranks. The shares take turns, so that all see the same machine; one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from sidestep.examples.digits_vqa.settings import Settings
from sidestep.examples.digits_vqa.training import build, generation_samples
from sidestep.trainer_hooks.generation import Generator

RANKS = (1, 2, 4, 8)


def measure(num_samples: int, rounds: int) -> dict[int, list[float]]:
    """Return ranks to the seconds of each round's generation of the first of them."""
    training = build(Settings(num_generation_samples=num_samples))
    generators = {
        ranks: Generator(
            training.model,
            generation_samples(training),
            eos_id=training.tokenizer.eos_token_id,
            pad_id=training.tokenizer.pad_token_id,
            max_new_tokens=training.settings.max_new_tokens,
            share=(0, ranks),
        )
        for ranks in RANKS
    }
    seconds: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    for turn in range(rounds + 1):
        for ranks, generator in generators.items():
            began = time.perf_counter()
            generator.run(turn)
            if turn:  # the first one warms up
                seconds[ranks].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Measure, print a table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds in place of 30: shows that it works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 30
    seconds = measure(options.samples, rounds)
    found = {
        "what": "generation_ranks",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "rounds": rounds,
        "samples": options.samples,
        "median_ms_by_ranks": {str(ranks): 1e3 * statistics.median(each) for ranks, each in seconds.items()},
    }
    for ranks, each in seconds.items():
        name = "rank 0 alone" if ranks == 1 else f"1 of {ranks} ranks"
        sys.stdout.write(f"{name:14} median {1e3 * statistics.median(each):8.1f} ms\n")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
