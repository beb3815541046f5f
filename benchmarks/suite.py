"""The parts of ``python -m benchmarks``: each is a script here, run as a process, that writes its figures as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.surroundings import Surroundings, is_installed

ROOT = Path(__file__).resolve().parents[1]
MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"
FULL_LIMIT_SECONDS, QUICK_LIMIT_SECONDS = 3600.0, 600.0
LARGE_MODEL_BYTES = 72 << 30
"""Device memory that the five modes of a 460M model take together."""
DEMO_NEEDS = ("torch", "sklearn", "tokenizers", "tqdm", "wandb")

Says = Callable[[Surroundings], str]
"""What a machine lacks for a part; empty where it lacks nothing."""


def _nothing(_machine: Surroundings) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One question, and the script that answers it."""

    name: str
    """The script's name, without its ending."""
    question: str
    """The heading of its tables."""
    full: tuple[str, ...] = ()
    """Further arguments."""
    quick: tuple[str, ...] = ()
    """Further arguments of the quick form."""
    needs: tuple[str, ...] = ("torch",)
    """Packages without which nothing of it can be measured."""
    lacks: Says = _nothing
    """Why else nothing of it can be measured here."""
    note: Says = _nothing
    """What a reader must know: what of it is not measured here."""

    def command(self, *, quick: bool) -> list[str]:
        """Return the script and its arguments, as one would type them in the checkout."""
        return [f"benchmarks/{self.name}.py", *(("--quick", *self.quick) if quick else self.full)]

    def reason_to_skip(self, machine: Surroundings) -> str:
        """Return why this machine cannot do it; empty where it can."""
        missing = [package for package in self.needs if not is_installed(package)]
        return f"not installed: {', '.join(missing)}" if missing else self.lacks(machine)


def _two_cores(machine: Surroundings) -> str:
    return "" if machine.usable_cores > 1 else "two cores are needed, for the worker and for the sender"


def _large_device(machine: Surroundings) -> str:
    if machine.quick:
        return ""
    if not machine.device:
        return (
            "no CUDA device, and a CPU takes many seconds for a step of 460M parameters (--quick runs it scaled down)"
        )
    if machine.device_bytes < LARGE_MODEL_BYTES:
        return (
            f"the five modes need {LARGE_MODEL_BYTES >> 30} GiB of the device's memory, and "
            f"{machine.device_bytes / (1 << 30):.0f} GiB are there"
        )
    return ""


def _scaled_down(machine: Surroundings) -> str:
    return "2 layers of a small width: it shows that it runs, and nothing about 460M" if machine.quick else ""


def _kernels_without_device(machine: Surroundings) -> str:
    return "" if machine.device else "no CUDA device: no logits, and no kernel of Triton's; the gradients on the host"


def _trackers(_machine: Surroundings) -> str:
    missing = [name for name in ("trackio", "tensorboard") if not is_installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _checkout(_machine: Surroundings) -> str:
    if not os.environ.get("SIDESTEP_NANOVLM"):
        return "no checkout of nanoVLM was named (--nanovlm CHECKOUT or SIDESTEP_NANOVLM)"
    return "" if is_installed("transformers") else "not installed: transformers, which nanoVLM needs"


PARTS = (
    Part(name="step_overhead", question="What do the hooks add to a step of the demo?", needs=DEMO_NEEDS),
    Part(
        name="large_model_step",
        question="What do the hooks add to a step of a model of nanoVLM-460M's shape?",
        quick=("--layers", "2"),
        needs=("torch", "tokenizers", "wandb"),
        lacks=_large_device,
        note=_scaled_down,
    ),
    Part(
        name="nanovlm_step",
        question="What do the hooks add to a step of nanoVLM's own (small) model and loop?",
        lacks=_checkout,
    ),
    Part(
        name="kernels",
        question="How near are the large reductions to one read of the memory that they look at?",
        note=_kernels_without_device,
    ),
    Part(
        name="publish_cost",
        question="What does handing over 1,760 statistics cost the training thread, beside the trackers?",
        full=("--messages", "0"),
        quick=("--messages", "0"),
        note=_trackers,
    ),
    Part(name="detector_cost", question="What do the detectors cost the worker?", needs=("numpy",)),
    Part(
        name="worker_throughput",
        question="How many small messages a second does a worker take in on one core?",
        needs=("zmq",),
        lacks=_two_cores,
    ),
    Part(
        name="ranks",
        question="How many ranks does one worker serve, at a step a second?",
        quick=("--ranks", "128"),
        needs=("zmq", "wandb"),
    ),
)


def select(names: Sequence[str] | None) -> tuple[Part, ...]:
    """Return the named parts in the suite's order; all of them for None.

    Raises:
        ValueError: there is no such part.
    """
    unknown = sorted(set(names or ()) - {part.name for part in PARTS})
    if unknown:
        raise ValueError(f"no such part: {', '.join(unknown)}; there are {', '.join(part.name for part in PARTS)}")
    return tuple(part for part in PARTS if names is None or part.name in names)


def run_parts(parts: Iterable[Part], machine: Surroundings, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Run the parts one after another; return the outcome of each by its name."""
    limit_seconds = QUICK_LIMIT_SECONDS if machine.quick else FULL_LIMIT_SECONDS
    outcomes: dict[str, dict[str, Any]] = {}
    for part in parts:
        reason = part.reason_to_skip(machine)
        if reason:
            outcomes[part.name] = {"status": SKIPPED, "reason": reason}
            say(f"{part.name}: skipped: {reason}")
            continue
        command = part.command(quick=machine.quick)
        say(f"{part.name}: {' '.join(['python', *command])}")
        outcome = run_script(command, limit_seconds=limit_seconds)
        outcomes[part.name] = {**outcome, "note": part.note(machine)}
        say(f"{part.name}: {outcome['status']} in {outcome['seconds']:.0f} s{_why(outcome)}")
    return outcomes


def _why(outcome: Mapping[str, Any]) -> str:
    return f": {outcome['reason']}" if "reason" in outcome else ""


def run_script(command: Sequence[str], *, limit_seconds: float) -> dict[str, Any]:
    """Run a script of the checkout that writes its figures to ``--json``; it and what it started end with it.

    Returns:
        Its status, the figures or the reason why there are none (the last line that it wrote), and how long it took.
    """
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ss-suite-") as folder:
        figures, log = Path(folder) / "figures.json", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, "--json", str(figures)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            reason = _wait(process, limit_seconds)
        said = {
            "command": " ".join(["python", *command]),
            "seconds": time.monotonic() - began,
            "load_before": load,
        }
        if not reason and process.returncode == 0 and figures.exists():
            found = json.loads(figures.read_text(encoding="utf-8"))
            return {"status": MEASURED, **said, "figures": {**found, "command": said["command"]}}
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = reason or (lines[-1].strip() if lines else f"exit status {process.returncode}, and not a word")
        return {"status": FAILED, **said, "reason": reason, "exit_status": process.returncode}


def _wait(process: subprocess.Popen[bytes], limit_seconds: float) -> str:
    """Wait for the end of a process, and end its whole group if it takes too long or this one is interrupted."""
    try:
        process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return ""
