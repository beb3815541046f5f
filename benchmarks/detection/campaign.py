"""Many runs, in processes of one thread each: trained where no recording of them is there, and judged.

A recording is found again by what it was made from: the case, the suite, the seed, the number of steps, and a digest
of all code that trains (the lab's, the hooks', the protocol's, the demo's, and the file that the case stands in). Code
that judges is not in it.
"""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from benchmarks.detection.baselines import scalar_rules, user_rules
from benchmarks.detection.case import Case
from benchmarks.detection.catalogue import find_case
from benchmarks.detection.digits_suite import DigitsSuite
from benchmarks.detection.facts import Facts, Job, read_facts, write_facts
from benchmarks.detection.judge import Judged, assembled_steps, judge
from benchmarks.detection.lab import Suite
from benchmarks.detection.recording import FRAMES_FILE
from benchmarks.detection.scenes_suite import ScenesSuite
from benchmarks.detection.training import Run

from sidestep.protocol.messages import Kind, Signals

SUITES = ("digits", "scenes")
_OWN_MODULES = (
    "case", "digits_suite", "evaluation", "lab", "loader", "prompts", "recording", "replicas", "scenes_suite", "talks",
    "training", "warm_start",
)  # fmt: skip
_PACKAGES = ("sidestep.trainer_hooks", "sidestep.protocol", "sidestep.examples.digits_vqa")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run, and what was made of it."""

    job: Job
    facts: Facts
    judged: Judged | None
    """None where nothing was to be judged."""
    baselines: dict[str, list[int]]
    """Rule to the steps at which it speaks."""
    num_checks: int = 0
    """Generations that the user's rules looked at."""


@lru_cache(maxsize=len(SUITES))
def suite_named(name: str) -> Suite:
    """Return a suite; made once per process.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "digits":
        return DigitsSuite()
    if name == "scenes":
        return ScenesSuite()
    raise ValueError(f"no suite is called {name!r}")


def _sources() -> list[Path]:
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in _OWN_MODULES]
    for package in _PACKAGES:
        folder = Path(importlib.import_module(package).__path__[0])
        files += sorted(folder.rglob("*.py"))
    return files


@lru_cache(maxsize=1)
def _training_digest() -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for file in _sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def digest_of(case: Case) -> str:
    """Return what stands for all that a run of this case is made by."""
    digest = hashlib.sha256(_training_digest().encode())
    module = sys.modules.get(case.twist.__module__)
    file = getattr(module, "__file__", None)
    if file is not None:
        digest.update(Path(file).read_bytes())
    digest.update(repr((case.setup, case.onset_share)).encode())
    return digest.hexdigest()[:16]


def folder_of(traces: Path, job: Job) -> Path:
    """Return where a run's recording stands."""
    return traces / job.suite / f"{job.case}-seed{job.seed}-{job.num_steps}"


def make(job: Job, traces: Path, *, accept_older: bool) -> Facts:
    """Train a run, unless a recording of it is there.

    Args:
        job: which one.
        traces: the folder of all recordings.
        accept_older: take a recording that older code has made as well.
    """
    case, _ = find_case(job.case)
    folder, digest = folder_of(traces, job), digest_of(case)
    known = read_facts(folder)
    if known is not None and (accept_older or known.digest == digest):
        return known
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    began = time.process_time()
    run = Run(case, suite_named(job.suite), seed=job.seed, num_steps=job.num_steps, folder=folder)
    trained = run.train()
    cpu_seconds = time.process_time() - began
    facts = Facts(
        case=job.case,
        suite=job.suite,
        seed=job.seed,
        num_steps=job.num_steps,
        onset=trained.onset,
        digest=digest,
        held_out_loss=trained.evaluation.loss,
        held_out_accuracy=trained.evaluation.accuracy,
        image_gap=trained.evaluation.image_gap,
        final_loss=trained.final_loss,
        seconds=trained.seconds,
        cpu_seconds=cpu_seconds,
        hook_failures=trained.hook_failures,
        losses=trained.losses,
        gradient_norms=trained.gradient_norms,
        **_overhead(folder / FRAMES_FILE),
    )
    write_facts(folder, facts)
    return facts


def _overhead(path: Path) -> dict[str, float]:
    hooks = waits = signals = rows = 0.0
    num_steps = 0
    for step, _ in assembled_steps(path):
        hooks += sum(end.hook_seconds for end in step.ends.values())
        own = [part.message for part in step.parts.get(Kind.SIGNALS, ()) if isinstance(part.message, Signals)]
        waits += sum(each.wait_seconds for each in own)
        signals += sum(each.signal_seconds for each in own)
        if own:
            rows += own[0].rows_share
            num_steps += 1
    return {
        "hook_seconds": hooks,
        "wait_seconds": waits,
        "signal_seconds": signals,
        "rows_share": rows / max(1, num_steps),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """How runs are made."""

    traces: Path
    """The folder of all recordings."""
    accept_older: bool = False
    """Take recordings that older code has made as well."""
    is_judging: bool = True
    num_processes: int = 2
    changes: Mapping[str, str] = field(default_factory=dict)
    """Thresholds that are others than the product's."""

    def outcome(self, job: Job) -> Outcome:
        """Make one run and judge it, in this process."""
        facts = make(job, self.traces, accept_older=self.accept_older)
        if not self.is_judging:
            return Outcome(job=job, facts=facts, judged=None, baselines={})
        path = folder_of(self.traces, job) / FRAMES_FILE
        by_rule, num_checks = user_rules(path)
        return Outcome(
            job=job,
            facts=facts,
            judged=judge(path, self.changes),
            baselines={**scalar_rules(facts.losses, facts.gradient_norms), **by_rule},
            num_checks=num_checks,
        )

    def outcomes(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Make and judge all of them, in whatever order they come."""
        if self.num_processes <= 1:
            yield from map(self.outcome, jobs)
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(self.num_processes, len(jobs)) or 1) as pool:
            yield from pool.imap_unordered(self.outcome, jobs)
