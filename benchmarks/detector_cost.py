"""What the detectors cost the worker per step: all of them together, with the record's building and the state's bytes.

    python benchmarks/detector_cost.py [--quick] [--json FILE]

Every step stands for 4,096 labelled tokens of a vocabulary of 49,218 over some ranks: 1,024 rows of them travel, as the
trainer's budget has it, with the 64 ids of the mean prediction, hashes of every sample and image, module norms and
sampled weights. Targets are drawn by Zipf's law, which is what a tokenizer's ids look like, and the model is healthy.
Timed is what the projection does with a closed step: ``Watch.observe`` (record included) and ``Watch.state`` as bytes.
The parts are timed in a pass of their own. Times are CPU time of the process; the goal is 2 ms a step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sidestep.protocol.messages import Kind, Signals, StepEnd
from sidestep.protocol.tables import encode_table
from sidestep.worker.detectors.families import make_families
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.record_building import build_record
from sidestep.worker.records import AssembledStep, Part, RunContext
from sidestep.worker.text.detokenizer import Detokenizer
from sidestep.worker.watch import Watch

VOCABULARY = 49_218
LABELLED = 4_096
ROWS = 1_024
ANSWER_TOKENS = 16
RANKS = (1, 4, 8)
WARM_STEPS = 150
"""Steps before the timed ones: every detector has its warm-up behind it, and the tables are full."""
MODULES = ("vision_encoder", "modality_projector", "language_model")
NUM_PARAMETERS = 440
"""Rows of the table: those of nanoVLM-460M."""
EOS = 1
GOAL_MS = 2.0


def make_step(step: int, ranks: int, rng: np.random.Generator) -> AssembledStep:
    """Return a step of a healthy run, as ``ranks`` ranks send it."""
    parts = tuple(Part(rank=rank, message=_signals(step, ranks, rng)) for rank in range(ranks))
    end = StepEnd(step=step, unix_time=float(step))
    return AssembledStep(
        run_id="bench",
        attempt=0,
        step=step,
        reason="complete",
        parts={Kind.SIGNALS: parts},
        ends=dict.fromkeys(range(ranks), end),
        ranks_expected=ranks,
        ranks_seen=ranks,
    )


def _signals(step: int, ranks: int, rng: np.random.Generator) -> Signals:
    rows, labelled = ROWS // ranks, LABELLED // ranks
    targets = np.minimum(rng.zipf(1.3, rows) + 10, VOCABULARY - 1).astype(np.int32)
    places = (np.arange(rows) % ANSWER_TOKENS).astype(np.uint8)
    targets[places == ANSWER_TOKENS - 1] = EOS
    losses = np.abs(rng.normal(1.5, 0.8, rows))
    ids, counts = np.unique(targets, return_counts=True)
    top = np.argsort(-counts, kind="stable")[:64]
    answers = rows // ANSWER_TOKENS
    total_answers = labelled // ANSWER_TOKENS
    known = {
        "positions": 4 * labelled, "padding": labelled, "compared": labelled, "labelled": labelled,
        "labels_equal_ids": 0, "labels_equal_next_ids": labelled, "labels_masked": 0, "answers": total_answers,
        "answers_with_eos": total_answers, "batches": 1, "batches_without_labels": 0,
    }  # fmt: skip
    return Signals(
        step=step,
        counts=np.array(list(known.values()), np.int64),
        labelled=labelled,
        sampled=True,
        vocabulary=VOCABULARY,
        targets=targets,
        predictions=np.where(rng.random(rows) < 0.6, targets, 11).astype(np.int32),
        losses=losses.astype(np.float16),
        entropies=np.abs(losses + rng.normal(0.0, 0.3, rows)).astype(np.float16),
        eos_probabilities=np.full(rows, 0.05, np.float16),
        places=places,
        answers=np.repeat(np.arange(answers), ANSWER_TOKENS).astype(np.uint16),
        top_probability=0.6,
        mean_ids=ids[top].astype(np.int32),
        mean_probabilities=(counts[top] / rows).astype(np.float32),
        trainer_losses=np.array([losses.mean()], np.float32),
        sample_hashes=rng.integers(1, 1 << 62, 256 // ranks),
        image_hashes=rng.integers(1, 1 << 62, 256 // ranks),
        image_deviations=np.full(256 // ranks, 0.2, np.float32),
        projector_rms=0.5,
        projector_spread=0.1,
        gradient_norm=np.array([1.0 + 0.1 * rng.random()], np.float32),
        module_norms=np.array([0.2, 0.1, 0.9], np.float32),
        heartbeat=np.full(64, float(step), np.float32),
        heartbeat_digest=3,
        rates=np.array([1e-3, 1e-4, 1e-4]),
        step_seconds=0.2,
    )


def milliseconds(steps: list[AssembledStep], work: Callable[[AssembledStep], object]) -> list[float]:
    """Return the CPU milliseconds of ``work`` on each step."""
    spent: list[float] = []
    for step in steps:
        begin = time.process_time_ns()
        work(step)
        spent.append((time.process_time_ns() - begin) / 1e6)
    return spent


def measure(ranks: int, num_steps: int) -> Mapping[str, Any]:
    """Return the figures for one number of ranks."""
    rng = np.random.default_rng(0)
    steps = [make_step(step, ranks, rng) for step in range(WARM_STEPS + num_steps)]
    table = {
        "modules": list(MODULES),
        "parameters": [{"module": place % len(MODULES)} for place in range(NUM_PARAMETERS)],
    }
    context = RunContext(run_id="bench", attempt=0, text=Detokenizer({}), parameters=table, tokenizer={"eos_id": EOS})
    watch = Watch()
    for step in steps[:WARM_STEPS]:
        watch.observe(step, context)
    spoke = 0

    def judge(step: AssembledStep) -> None:
        nonlocal spoke
        spoke += len(watch.observe(step, context).announcements)
        encode_table(watch.state())

    spent = milliseconds(steps[WARM_STEPS:], judge)
    record = build_record(steps[-1], context)
    return {
        "ranks": ranks,
        "steps": num_steps,
        "median_ms": round(float(np.median(spent)), 3),
        "p90_ms": round(float(np.quantile(spent, 0.9)), 3),
        "mean_ms": round(float(np.mean(spent)), 3),
        "record_bytes": len(record.as_bytes()),
        "state_bytes": len(encode_table(watch.state())),
        "announcements": spoke,
        "parts_median_ms": _parts(steps, context),
    }


def _parts(steps: list[AssembledStep], context: RunContext) -> Mapping[str, float]:
    """Time the record and each family by itself, over the same steps."""
    families = make_families(DetectorSettings())
    spent: dict[str, list[float]] = {"record": milliseconds(steps, lambda step: build_record(step, context))}
    for step in steps:
        view = StepView(build_record(step, context), context)
        for family in families:
            begin = time.process_time_ns()
            family.read(view)
            spent.setdefault(family.name, []).append((time.process_time_ns() - begin) / 1e6)
    medians = {name: float(np.median(values[WARM_STEPS:])) for name, values in spent.items()}
    return {name: round(value, 3) for name, value in sorted(medians.items(), key=lambda pair: -pair[1])}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one number of ranks and few steps: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    load = os.getloadavg()
    runs = [measure(ranks, 40 if options.quick else 1_000) for ranks in (RANKS[:1] if options.quick else RANKS)]
    for run in runs:
        print(
            f"{run['ranks']} ranks: median {run['median_ms']} ms a step, p90 {run['p90_ms']} ms (goal {GOAL_MS}); "
            f"record {run['record_bytes']} bytes, state {run['state_bytes']} bytes"
        )
        print("  " + ", ".join(f"{name} {value}" for name, value in run["parts_median_ms"].items()))
    if options.json is not None:
        result = {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python benchmarks/detector_cost.py" + (" --quick" if options.quick else ""),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_before": [round(each, 2) for each in load],
            "python": platform.python_version(),
            "numpy": np.__version__,
            "labelled_tokens": LABELLED,
            "rows": ROWS,
            "vocabulary": VOCABULARY,
            "goal_ms": GOAL_MS,
            "runs": runs,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
