"""Which runs a form of the lab has: the smoke's few, the full one's many, or those that are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.detection.campaign import SUITES
from benchmarks.detection.catalogue import GROUPS, TUNED, all_cases, find_case, twin_of
from benchmarks.detection.facts import Job

FULL_STEPS, SMOKE_STEPS = 900, 400
_SPLITS_OF = {group: ("tuned", "held_out_seeds") if group == TUNED else (f"{group}_kinds",) for group in GROUPS}
"""Group of cases to the splits that they run in, the tuner's own first."""
SPLITS = tuple(split for splits in _SPLITS_OF.values() for split in splits)
_SEEDS_OF_A_SPLIT = 1_000
"""From 1 on, split by split; nothing is tuned on the seeds of `held_out_seeds` and `held_out_kinds`."""

SMOKE_FAILURES = (
    "labels_become_a", "rate_times_30", "images_shuffled", "black_images", "unshifted_labels", "stuck_batch",
    "weight_is_nan", "projector_zeroed",
)  # fmt: skip
SMOKE_HEALTHY = ("mix", "yes_no_only", "mostly_a", "tables")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One run, and the split that it counts in."""

    job: Job
    split: str
    """One of `SPLITS`; a twin counts where the failure does that needs it."""


def smoke() -> list[Wanted]:
    """Return eight failures and four healthy runs of the first suite; one of these is the failures' twin."""
    return [
        Wanted(job=Job(case=name, suite=SUITES[0], seed=1, num_steps=SMOKE_STEPS), split=SPLITS[0])
        for name in (*SMOKE_FAILURES, *SMOKE_HEALTHY)
    ]


def full(num_seeds: int, num_steps: int, suites: Sequence[str], splits: Sequence[str]) -> list[Wanted]:
    """Return every case with `num_seeds` seeds in each of its splits, and the twins that failures need."""
    wanted: list[Wanted] = []
    for name, (_, group) in all_cases().items():
        for split in _SPLITS_OF[group]:
            if split in splits:
                wanted += _runs(name, split, _seeds(split, num_seeds), num_steps, suites)
    return with_twins(wanted)


def named(names: Sequence[str], num_seeds: int, num_steps: int, suites: Sequence[str]) -> list[Wanted]:
    """Return the named cases with their twins.

    Raises:
        KeyError: there is no case of that name.
    """
    wanted: list[Wanted] = []
    for name in names:
        split = _SPLITS_OF[find_case(name)[1]][0]
        wanted += _runs(name, split, _seeds(split, num_seeds), num_steps, suites)
    return with_twins(wanted)


def _seeds(split: str, num_seeds: int) -> range:
    first = SPLITS.index(split) * _SEEDS_OF_A_SPLIT + 1
    return range(first, first + num_seeds)


def _runs(name: str, split: str, seeds: Sequence[int], num_steps: int, suites: Sequence[str]) -> list[Wanted]:
    case, _ = find_case(name)
    length = round(num_steps * case.step_share)
    return [
        Wanted(job=Job(case=name, suite=suite, seed=seed, num_steps=length), split=split)
        for suite in (case.suites or SUITES)
        if suite in suites
        for seed in seeds
    ]


def twin_job(job: Job) -> Job:
    """Return the healthy run that a failure is held against."""
    case, _ = find_case(job.case)
    return Job(case=twin_of(case).name, suite=job.suite, seed=job.seed, num_steps=job.num_steps)


def with_twins(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Return these runs and the twins that are not among them, each once."""
    found = {each.job: each for each in wanted}
    for each in wanted:
        if find_case(each.job.case)[0].is_failure:
            twin = twin_job(each.job)
            found.setdefault(twin, Wanted(job=twin, split=each.split))
    return list(found.values())
