"""A trainer that only publishes: the real publisher, a fixed number of steps a second, until it is told to end.

    python -m tests.support.steady_publisher ADDRESS FOLDER --steps-per-second 50

Every step has rates and scalars of its own, so every step is a row. Each ``TABLE_STEPS`` it has losses and
generates, which makes two tables; generations turn identical for ``EPISODE_STEPS`` at a time, so that alerts are among
the entries. It ends when the file ``stop`` is in ``FOLDER``, and leaves ``published.json`` there: its accounts, and how
late its loop ever was.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tests.support.wire_trainer import CONTENTS, TABLES

from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Generation, Hello, LearningRates, Losses, Message, Role, Scalars, StepEnd
from sidestep.protocol.tables import digest, encode_table
from sidestep.trainer_hooks.publisher import Publisher

RUN_ID = "steady"
INCARNATION = "steady-1"
TABLE_STEPS = 50
EPISODE_STEPS = 500
STOP_FILE, RESULT_FILE = "stop", "published.json"
NUM_SAMPLES = 4
_CLOSE_SECONDS = 60.0

_SAMPLES = encode_table(
    {"samples": [{"question": f"question {n}", "target": "A", "target_ids": [1, 0]} for n in range(NUM_SAMPLES)]}
)
BLOBS = {**CONTENTS, digest(_SAMPLES): _SAMPLES}


def make_hello() -> Hello:
    """Return the Hello of this process."""
    return Hello(
        project="trials",
        name="steady",
        topology={"host": socket.gethostname(), "pid": os.getpid()},
        settings={
            "lr_interval": 1,
            "loss_breakdown_interval": TABLE_STEPS,
            "generation_eval_interval": TABLE_STEPS,
            "collapse_detection_interval": TABLE_STEPS,
        },
        run_config={"lr": 0.1},
        tables={**TABLES, "samples": digest(_SAMPLES)},
    )


def step_messages(step: int, started_at: float) -> Iterator[Message]:
    """Yield all that the rank says of a step."""
    yield LearningRates(step=step, rates=np.array([0.1 / (step + 1), 0.2], np.float64))
    yield Scalars(step=step, values={"trainer/loss": float(np.random.default_rng(step).random()), "trainer/step": step})
    sent = {"learning_rates": 1, "scalars": 1}
    due = ["lr"]
    if step % TABLE_STEPS == 0:
        yield _losses(step)
        yield _generation(step)
        sent |= {"generation": 1, "losses": 1}
        due += ["loss", "generation", "collapse"]
    yield StepEnd(step=step, unix_time=started_at + 0.02 * step, sent=sent, due=tuple(due))


def _losses(step: int) -> Losses:
    return Losses(
        step=step,
        microstep=0,
        labelled=3,
        losses=np.random.default_rng(step).random(3).astype(np.float32),
        target_ids=np.array([1, 2, 0], np.int32),
        roles=np.array([Role.FIRST | Role.CONTENT, Role.LATER | Role.CONTENT, Role.LATER], np.uint8),
    )


def _generation(step: int) -> Generation:
    """Answers of two tokens and EOS: each another one, or all the same in every other episode."""
    is_collapsed = step // EPISODE_STEPS % 2 == 1
    answers = [[1, 1, 0] if is_collapsed else [1 + row % 3, 1 + (row + step) % 3, 0] for row in range(NUM_SAMPLES)]
    ids = np.array([token for answer in answers for token in answer], np.int32)
    offsets = np.arange(0, ids.size + 1, 3, dtype=np.int64)
    return Generation(step=step, samples=np.arange(NUM_SAMPLES, dtype=np.int32), offsets=offsets, ids=ids)


def publish(address: str, folder: Path, steps_per_second: float) -> dict[str, object]:
    """Publish until the stop file is there; return what became of it."""
    identity = Envelope(run_id=RUN_ID, incarnation=INCARNATION, rank=0)
    publisher = Publisher(address, identity, make_hello(), blobs=BLOBS).start()
    started_at, begin, step, latest, slowest = time.time(), time.monotonic(), 0, 0.0, 0.0
    while not (folder / STOP_FILE).exists():
        now = time.monotonic()
        due = begin + step / steps_per_second
        if now < due:
            time.sleep(due - now)
        latest = max(latest, time.monotonic() - due)
        for message in step_messages(step, started_at):
            before = time.perf_counter()
            publisher.submit(message)
            slowest = max(slowest, time.perf_counter() - before)
        step += 1
    publisher.close(_CLOSE_SECONDS)
    accounts = {kind.name.lower(): asdict(account) for kind, account in publisher.accounts().items()}
    return {
        "steps": step,
        "accounts": accounts,
        "statistics": asdict(publisher.statistics()),
        "latest_step_seconds": latest,
        "slowest_submit_seconds": slowest,
    }


def main() -> int:
    """Publish as the command line says."""
    parser = argparse.ArgumentParser(description="Publish steadily.")
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps-per-second", type=float, default=50.0)
    options = parser.parse_args()
    result = publish(options.address, options.folder, options.steps_per_second)
    draft = options.folder / f".{RESULT_FILE}"
    draft.write_text(json.dumps(result), encoding="utf-8")
    draft.replace(options.folder / RESULT_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
