"""What a training step costs without hooks, with Sidestep's, and with the same metrics taken inline.

    python benchmarks/step_overhead.py [--quick] [--json FILE]

Every mode trains the digits demo in a process of its own; the processes take turns of a few optimizer steps, so that
all modes see the same machine at the same time. A real worker runs beside them. Reported per mode: wall time, CPU of
the training thread and of the whole process per step, mean and median; and the CPU of every call of the hooks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where this is run from does not matter

from benchmarks.turns import TimedCalls, Turns, hook_milliseconds, machine, spread, take_turns, worker_beside

SHARED_MODES = ("none", "sidestep_without_generation", "sidestep", "inline_without_generation", "inline")
"""Those of ``large_model_step.py`` too."""
METRICS_ALONE = "sidestep_metrics"
"""All families but generation, and nothing for the detectors: what inline logging without generation gives."""
MODES = (SHARED_MODES[0], METRICS_ALONE, *SHARED_MODES[1:])
WARMUP_STEPS = 10
SHORTEST_INTERVAL_STEPS = 25
"""Of the defaults of ``HooksConfig``, which all modes use; the others are multiples of it."""


class NoHooks:
    """Calls that do nothing: what timing a call costs by itself is taken off every mode."""

    def on_batch(self, **_: Any) -> None:
        """Do nothing."""

    def before_clip(self) -> None:
        """Do nothing."""

    def after_step(self, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Observer:
    """Sees the demo's loop end its steps."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def after_forward(self, *_: Any) -> None:
        """Nothing to see here."""

    def before_clip(self, *_: Any) -> None:
        """Nor here."""

    def after_step(self, step: int, *_: Any) -> None:
        """Keep what the step cost."""
        self._turns.end_step(step)


def train_in_turns(mode: str, num_steps: int, threads: int, pipe: Any) -> None:
    """Train the demo in ``mode``, turn by turn; runs in a process of its own."""
    import torch  # noqa: PLC0415  # each process imports it for itself
    from benchmarks.inline_logger import InlineLogger  # noqa: PLC0415

    import sidestep  # noqa: PLC0415
    from sidestep.examples.digits_vqa.prompts import mixed_prompts  # noqa: PLC0415
    from sidestep.examples.digits_vqa.settings import Settings  # noqa: PLC0415
    from sidestep.examples.digits_vqa.training import build, generation_samples, train  # noqa: PLC0415

    torch.set_num_threads(threads)
    training = build(Settings(num_steps=num_steps + 1))
    config = sidestep.HooksConfig()  # 16 samples of at most 64 new tokens
    hooks: Any = NoHooks()
    if mode.startswith("sidestep"):
        if mode != "sidestep":
            config = replace(config, generation_eval_interval=0, collapse_detection_interval=0)
        if mode == METRICS_ALONE:
            config = replace(config, signal_rows_per_step=0)
        hooks = sidestep.attach(
            training.model, training.optimizer, tokenizer=training.tokenizer, samples=generation_samples(training),
            config=config, project="benchmark", name=mode,
        )  # fmt: skip
    elif mode.startswith("inline"):
        prompts = mixed_prompts(training.held_out, training.tokenizer, config.generation_samples)
        hooks = InlineLogger(
            training.model, training.optimizer, training.tokenizer, prompts if mode == "inline" else (), config
        )
    timed: Any = TimedCalls(hooks)
    pipe.send("ready")
    losses = train(training, timed, Observer(Turns(pipe, timed)))
    hooks.close()
    pipe.send(losses)


def measure(num_steps: int, threads: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]], bool]:
    """Return each mode's steps, what the hooks counted, and whether all modes trained with the very same losses."""
    with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as folder, worker_beside(Path(folder)):
        steps, losses = take_turns(MODES, train_in_turns, (num_steps, threads), num_steps)
        time.sleep(1.0)  # the worker stores what the goodbyes have just brought
        counted = hook_milliseconds(Path(folder) / "out" / "journal", first=WARMUP_STEPS)
    return steps, counted, all(values == losses["none"] for values in losses.values())


def summary(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a mode's step times in ms."""
    counted = [step for step in steps if step["step"] >= WARMUP_STEPS]
    found: dict[str, Any] = {"num_steps": len(counted)}
    for name in ("wall", "thread_cpu", "process_cpu"):
        values = [1e3 * step[name] for step in counted]
        found[f"{name}_mean_ms"], found[f"{name}_median_ms"] = statistics.mean(values), statistics.median(values)
    in_calls = [1e3 * sum(cpu for _, cpu, _ in step["calls"]) for step in counted]
    found["calls_cpu_mean_ms"] = statistics.mean(in_calls)
    return found


def per_call(steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, p99 and maximum of each call's CPU in ms; ``idle``: steps at which no family is due."""
    found: dict[str, dict[str, float]] = {}
    groups: dict[str, list[float]] = {}
    for step in steps:
        due = step["step"] % SHORTEST_INTERVAL_STEPS == 0
        if step["step"] >= WARMUP_STEPS:
            for name, cpu, _ in step["calls"]:
                groups.setdefault(f"{name} ({'due' if due else 'nothing due'})", []).append(1e3 * cpu)
    for name, values in sorted(groups.items()):
        found[name] = {"calls": len(values), **spread(values)}
    return found


def table(result: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [
        "| mode | wall, mean (median) ms | thread CPU ms | process CPU ms | in calls, CPU ms/step | share of a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode, row in result["modes"].items():
        cells = [
            f"{row[f'{n}_mean_ms']:.1f} ({row[f'{n}_median_ms']:.1f})" for n in ("wall", "thread_cpu", "process_cpu")
        ]
        lines.append(
            f"| {mode} | {' | '.join(cells)} | {row['calls_cpu_mean_ms']:.3f} | {result['share_of_step'][mode]:.2%} |"
        )
    lines += [
        "",
        "| Sidestep's call, without generation | calls | median ms | p99 ms | max ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["per_call_ms"].items():
        lines.append(f"| {name} | {row['calls']} | {row['median']:.3f} | {row['p99']:.3f} | {row['max']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch in each mode (%(default)s)")
    options = parser.parse_args()
    num_steps = 60 if options.quick else 210
    steps, counted, identical = measure(num_steps, options.threads)
    modes = {mode: summary(steps[mode]) for mode in MODES}
    none = modes["none"]
    share = {
        mode: (modes[mode]["calls_cpu_mean_ms"] - none["calls_cpu_mean_ms"]) / none["thread_cpu_mean_ms"]
        for mode in MODES
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **machine(),
        "steps_per_mode": num_steps,
        "threads": options.threads,
        "losses_identical_in_all_modes": identical,
        "metrics_share_of_step": share[METRICS_ALONE],
        "hooks_share_of_step": share["sidestep_without_generation"],
        "hooks_with_generation_share_of_step": share["sidestep"],
        "inline_share_of_step": share["inline"],
        "inline_without_generation_share_of_step": share["inline_without_generation"],
        "share_of_step": share,
        "hooks_own_count_mean_ms": {name: statistics.mean(values) for name, values in counted.items()},
        "per_call_ms": per_call(steps["sidestep_without_generation"]),
        "modes": modes,
    }
    print(table(result))
    for name, mean in result["hooks_own_count_mean_ms"].items():
        print(
            f"\n{name}: {mean:.3f} ms a step by the hooks' own count, which has the hooks on model and optimizer too",
            end="",
        )
    print(f"\nlosses identical in all modes: {identical}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
