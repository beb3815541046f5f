"""Gradient partials of all ranks, merged into one report per parameter (docs/metrics.md, ``gradients/``).

A share of a parameter is known by its name, offset and shape: replicas send the same share, and the lowest rank's
counts; different shares are merged, and a parameter is whole only when they cover all its elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS
from sidestep.protocol.merge import Moments, merge_moments
from sidestep.protocol.messages import Gradients
from sidestep.worker.metrics.measurement import same_length
from sidestep.worker.metrics.parameters import ParameterRow, ParameterTables

_MAX_EXPONENT = 1_100
"""Over float64's own range: a larger one is no power of two of a real gradient."""

ShardKey: TypeAlias = tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]

APART = 0.01
"""Relative difference of the norms from which copies of a share are not the same: rounding of other kernels is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The gradient of one share of a parameter, of a parameter, or of several; unscaled."""

    count: int
    """Elements, non-finite ones included."""
    num_nonfinite: int
    num_zeros: int
    moments: Moments
    """Of the finite elements."""
    absmax: float

    @staticmethod
    def merged(reports: Sequence[Report]) -> Report:
        """Return the report of all ``reports`` together."""
        return Report(
            count=sum(report.count for report in reports),
            num_nonfinite=sum(report.num_nonfinite for report in reports),
            num_zeros=sum(report.num_zeros for report in reports),
            moments=merge_moments(report.moments for report in reports),
            absmax=max((report.absmax for report in reports if report.moments.count), default=0.0),
        )


@dataclass(slots=True, kw_only=True)
class MergedGradients:
    """One step's gradients over all ranks."""

    whole: list[tuple[ParameterRow, Report]] = field(default_factory=list)
    """Parameters of which every element was reported, in the tables' order."""
    incomplete: list[str] = field(default_factory=list)
    """Names of those of which shares are missing, or do not fit together."""
    incomplete_modules: set[str] = field(default_factory=set)
    """The modules that those belong to."""
    without_gradient: int = 0
    partial: list[str] = field(default_factory=list)
    """Names of those whose gradient is a term of a sum over ranks: no rank has its values."""
    apart: list[Apart] = field(default_factory=list)
    """Shares that several ranks hold and say different things of, one a parameter."""
    num_elements: int = 0
    """Elements of all parameters of which anything was reported."""
    num_covered: int = 0
    """Elements that were reported, each share once."""
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Module to counts of log10 of the absolute value, in bins shifted by ``histogram_shift``."""
    histogram_shift: float = 0.0
    """log10 of the GradScaler's factor that the histograms still carry."""
    clipped: bool = False
    malformed_parts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """Two ranks that hold the same share of a parameter, and whose gradients of it differ."""

    name: str
    ranks: tuple[int, int]
    norms: tuple[float, float]


@dataclass(slots=True, kw_only=True)
class _Shares:
    """What the ranks sent, by parameter and share."""

    rows: dict[str, ParameterRow] = field(default_factory=dict)
    reports: dict[str, dict[ShardKey, Report]] = field(default_factory=dict)
    """Of each share the lowest rank's."""
    holders: dict[ShardKey, int] = field(default_factory=dict)
    """That rank."""
    apart: dict[str, Apart] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    partial: dict[str, str] = field(default_factory=dict)
    """Parameters whose values no rank has, to their modules."""

    def add(self, rank: int, part: Gradients, table: Sequence[ParameterRow]) -> None:
        for place, number in enumerate(part.parameters.tolist()):
            row = table[number]
            self.rows.setdefault(row.name, row)
            key, report = (row.name, row.shard), _report(part, place)
            kept = self.reports.setdefault(row.name, {}).setdefault(key, report)
            first = self.holders.setdefault(key, rank)
            if first != rank and row.name not in self.apart and _is_apart(kept, report):
                norms = (kept.moments.norm or 0.0, report.moments.norm or 0.0)
                self.apart[row.name] = Apart(name=row.name, ranks=(first, rank), norms=norms)
        self.missing.update(table[number].name for number in part.without_gradient.tolist())
        self.partial.update({table[number].name: table[number].module for number in part.partial.tolist()})


def merge_gradients(parts: Sequence[tuple[int, Gradients]], tables: ParameterTables) -> MergedGradients:
    """Merge (rank, ``Gradients``) by parameter and share; a part that breaks its layout is left out and counted."""
    merged = MergedGradients()
    sound = [(rank, part) for rank, part in parts if _is_sound(part, len(tables.rows(rank)))]
    merged.malformed_parts = len(parts) - len(sound)
    merged.clipped = any(part.clipped for _, part in sound)
    shares = _Shares()
    for rank, part in sound:
        shares.add(rank, part, tables.rows(rank))
    merged.apart, merged.partial = list(shares.apart.values()), list(shares.partial)
    merged.incomplete_modules.update(shares.partial.values())
    for name, by_share in shares.reports.items():
        row, report = shares.rows[name], Report.merged([by_share[key] for key in sorted(by_share)])
        merged.num_elements += row.numel
        merged.num_covered += min(report.count, row.numel)
        if report.count != row.numel:
            merged.incomplete.append(name)
            merged.incomplete_modules.add(row.module)
        elif name not in shares.partial:
            merged.whole.append((row, report))
    merged.without_gradient = len(shares.missing - shares.reports.keys() - shares.partial.keys())
    _merge_histograms(sound, tables, shares.reports, shares.rows, merged)
    return merged


def _is_sound(part: Gradients, num_rows: int) -> bool:
    counts = (part.parameters, part.counts, part.nonfinite, part.zeros, part.exponents)
    if not same_length(*counts, part.means, part.m2, part.absmax):
        return False
    if not (math.isfinite(part.scale) and part.scale > 0):
        return False
    numbers = np.concatenate([part.parameters, part.without_gradient, part.partial])
    if numbers.size and (numbers.min() < 0 or numbers.max() >= num_rows):
        return False
    finite = part.counts - part.nonfinite
    return bool(
        (part.nonfinite >= 0).all()
        and (finite >= 0).all()
        and (part.zeros >= 0).all()
        and (part.zeros <= finite).all()
        and (np.abs(part.exponents.astype(np.int64)) <= _MAX_EXPONENT).all()
        and np.isfinite(part.means[finite > 0]).all()
        and np.isfinite(part.m2[finite > 0]).all()
        and (part.m2[finite > 0] >= 0).all()
        and np.isfinite(part.absmax[finite > 0]).all()
        and part.histograms.size == part.histogram_modules.size * GRADIENT_HISTOGRAM_BINS
    )


def _is_apart(one: Report, other: Report) -> bool:
    """Whether copies of a share differ by more than rounding; of what is not finite, how many elements are."""
    if (one.count, one.num_nonfinite) != (other.count, other.num_nonfinite):
        return True
    norms = one.moments.norm or 0.0, other.moments.norm or 0.0
    return abs(norms[0] - norms[1]) > APART * max(norms)


def _report(part: Gradients, place: int) -> Report:
    count, nonfinite = int(part.counts[place]), int(part.nonfinite[place])
    moments = Moments.from_scaled(
        count - nonfinite, float(part.means[place]), float(part.m2[place]), int(part.exponents[place])
    )
    return Report(
        count=count,
        num_nonfinite=nonfinite,
        num_zeros=int(part.zeros[place]),
        moments=moments.scaled_by(1.0 / part.scale),
        absmax=float(part.absmax[place]) / part.scale if count > nonfinite else 0.0,
    )


def _merge_histograms(
    parts: Sequence[tuple[int, Gradients]],
    tables: ParameterTables,
    shares: dict[str, dict[ShardKey, Report]],
    rows: dict[str, ParameterRow],
    merged: MergedGradients,
) -> None:
    """Sum the histograms of disjoint shares; one whose shares were counted already is a replica's.

    A module keeps its histogram only when what was summed covers every share that was reported of it.
    """
    scales = {part.scale for _, part in parts}
    if len(scales) != 1:
        return
    merged.histogram_shift = math.log10(scales.pop())
    wanted: dict[str, set[ShardKey]] = {}
    for name, by_share in shares.items():
        keys = {key for key, report in by_share.items() if report.count}
        wanted.setdefault(rows[name].module, set()).update(keys)
    counted: dict[str, set[ShardKey]] = {}
    sums: dict[str, NDArray[np.int64]] = {}
    for rank, part in parts:
        table, modules = tables.rows(rank), tables.module_names(rank)
        held: dict[str, set[ShardKey]] = {}
        for row in (table[number] for number in part.parameters[part.counts > 0].tolist()):
            if row.is_first:
                held.setdefault(row.module, set()).add((row.name, row.shard))
        for place, number in enumerate(part.histogram_modules.tolist()):
            module = modules[number] if 0 <= number < len(modules) else ""
            keys, done = held.get(module, set()), counted.setdefault(module, set())
            if keys and not keys & done:
                done |= keys
                sums[module] = sums.get(module, 0) + part.histograms[place].astype(np.int64)
    for module, keys in wanted.items():
        if module in sums and counted[module] == keys:
            merged.histograms[module] = sums[module]
