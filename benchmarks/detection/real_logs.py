"""The detectors of the loss on real logs: per-step losses of runs that ended well, kept outside of the project.

The file holds one float32 array per run. Only the loss is known of these runs, so that what is tried is what reads the
loss alone: `loss_cusum`, `loss_regress`, `loss_spike`, and what is absolute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.detection.baselines import kill_loss_spike, olmo_rule
from benchmarks.detection.score import ALERTS, poisson_upper_95

from sidestep.worker.records import RunContext
from sidestep.worker.step_record import StepRecord
from sidestep.worker.watch import Watch

DEFAULT_FILE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "modded_nanogpt_losses.npz"


class _NoText:
    """There are no tokens in a log of losses."""

    def token(self, token_id: int) -> str:
        """Return the id as text."""
        return str(token_id)

    def text(self, ids: object) -> str:
        """Return ids as text."""
        return str(ids)


def judge_real_logs(file: Path, most_steps: int = 0) -> dict[str, Any]:
    """Judge every run of the file, of each at most `most_steps` (0: all); says why where there is no file."""
    if not file.is_file():
        return {"skipped": f"{file.name} is not there"}
    with np.load(file) as logs:
        runs = [logs[name].astype(float)[: most_steps or None].tolist() for name in logs.files]
    incidents = [name for losses in runs for name in _incidents(losses)]
    num_steps = sum(map(len, runs))
    return {
        "runs": len(runs),
        "steps": num_steps,
        "incidents": len(incidents),
        "names": sorted(set(incidents)),
        "per_10k_upper_95": round(poisson_upper_95(len(incidents)) * 1e4 / num_steps, 4),
        "olmo_6sd_loss": sum(len(olmo_rule(losses)) for losses in runs),
        "kill_loss_spike": sum(len(kill_loss_spike(losses)) for losses in runs),
    }


def _incidents(losses: list[float]) -> list[str]:
    watch = Watch()
    context = RunContext(run_id="log", attempt=0, text=_NoText())
    opened = []
    for step, loss in enumerate(losses):
        verdict = watch.observe_record(StepRecord(step=step, loss=loss, applied=True), context)
        opened += [each.title for each in verdict.announcements if each.level in ALERTS]
    return opened
