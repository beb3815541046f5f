"""``gradients/``: norms, means, spreads and extremes of one step's gradients (docs/metrics.md, ``gradients/``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS, GRADIENT_HISTOGRAM_LOG10_RANGE
from sidestep.protocol.merge import root_sum_of_squares
from sidestep.protocol.messages import Gradients
from sidestep.worker.metrics.gradient_merge import MergedGradients, Report, merge_gradients
from sidestep.worker.metrics.measurement import Measurement, Table, histogram, messages_of, notice_once
from sidestep.worker.metrics.parameters import ParameterRow, ParameterTables
from sidestep.worker.records import Part, RunContext

MAX_KEYS = 2_000
"""Charts beyond which W&B's page freezes: above it the details go into one table."""

DETAIL_COLUMNS = ("module", "param", "norm", "mean", "std", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What one line of charts describes: a parameter, or a block of them."""

    module: str
    param: str
    report: Report


def measure_gradients(parts: Sequence[Part], context: RunContext, *, detail: str = "param") -> Measurement:
    """Return ``gradients/*`` of one step from the ``Gradients`` of all its ranks.

    ``detail`` is ``param``, ``block`` (parameters of one numbered block together) or ``module``.
    """
    found = Measurement()
    received = messages_of(parts, Gradients)
    tables = ParameterTables(context)
    merged = merge_gradients(received, tables)
    found.malformed_parts = merged.malformed_parts
    if len(received) == merged.malformed_parts:
        return found
    step = received[0][1].step
    _measure_groups(merged, detail, _num_charts(received[0][0], tables, detail), step, found)
    _measure_modules(merged, found)
    _measure_all(merged, found)
    _tell_ranks(merged, tables, [rank for rank, _ in received], step, found)
    return found


def _tell_ranks(
    merged: MergedGradients, tables: ParameterTables, ranks: Sequence[int], step: int, found: Measurement
) -> None:
    """Say how much of the gradients came, and which of it no rank has or several say differently."""
    are_shares = any(tables.holds_shares(rank) for rank in ranks)
    if are_shares:
        found.put_ratio("gradients/global/coverage", merged.num_covered, merged.num_elements)
    if merged.incomplete:
        text = (
            f"gradients of {len(merged.incomplete)} parameters (the first: {merged.incomplete[0]}) came without all "
            "their shares: they are left out, and gradients/global/total_norm with them"
        )
        found.put("gradients/global/params_incomplete", len(merged.incomplete))
        found.notices.append(notice_once("gradients_incomplete", text, step))
    if merged.partial:
        text = (
            f"gradients of {len(merged.partial)} parameters (the first: {merged.partial[0]}) are partial sums "
            "(sequence parallelism without FSDP) or lie otherwise than their parameter: no rank has their values, they "
            "are left out, and gradients/global/total_norm with them"
        )
        found.put("gradients/global/params_partial", len(merged.partial))
        found.notices.append(notice_once("gradients_partial", text, step, level="info"))
    if merged.apart and are_shares:
        first = merged.apart[0]
        text = (
            f"ranks {first.ranks[0]} and {first.ranks[1]} hold the same share of {first.name}, and its gradient has "
            f"norm {first.norms[0]:g} on one and {first.norms[1]:g} on the other ({len(merged.apart)} parameters in "
            "all): the copies drift apart, as where the gradient of a copied parameter is not summed over the "
            "tensor-parallel ranks; the lowest rank's is shown"
        )
        found.put("gradients/global/params_apart", len(merged.apart))
        found.notices.append(notice_once("gradients_apart", text, step))


def _num_charts(rank: int, tables: ParameterTables, detail: str) -> int:
    """Keys of a step with all gradients present: the same at every step, so that charts do not come and go."""
    trainable = [row for row in tables.rows(rank) if row.trainable]
    lines = {(row.module, _line(row, detail)) for row in trainable} if detail != "module" else set()
    return 4 * len(lines) + 2 * len({row.module for row in trainable}) + 6


def _line(row: ParameterRow, detail: str) -> str:
    return row.block if detail == "block" else row.param


def _groups(merged: MergedGradients, detail: str) -> Iterator[_Group]:
    lines: dict[tuple[str, str], list[Report]] = {}
    for row, report in merged.whole:
        lines.setdefault((row.module, _line(row, detail)), []).append(report)
    for (module, param), reports in lines.items():
        yield _Group(module=module, param=param, report=Report.merged(reports))


def _measure_groups(merged: MergedGradients, detail: str, num_charts: int, step: int, found: Measurement) -> None:
    if detail == "module":
        return
    groups = [group for group in _groups(merged, detail) if group.report.moments.count]
    as_table = num_charts > MAX_KEYS
    for group in groups:
        prefix, moments = f"gradients/{group.module}/{group.param}", group.report.moments
        found.put(f"{prefix}/norm", moments.norm)
        if not as_table:
            found.put(f"{prefix}/mean", moments.value_mean)
            found.put(f"{prefix}/std", moments.std)
            found.put(f"{prefix}/max", group.report.absmax)
    if as_table and groups:
        rows = tuple(_detail_row(group) for group in groups)
        found.tables.append(Table(key="gradients/details", columns=DETAIL_COLUMNS, rows=rows))
        text = (
            f"{num_charts} gradient charts are more than a W&B page bears ({MAX_KEYS}): the norms stay, mean, std and "
            'max are in the table gradients/details (gradient_detail="block" or "module" shows fewer charts)'
        )
        found.notices.append(notice_once("gradient_details_in_table", text, step, level="info"))


def _detail_row(group: _Group) -> tuple[str | float | None, ...]:
    """What is absent (the std of a single element) is an empty cell."""
    moments = group.report.moments
    numbers = (moments.norm, moments.value_mean, moments.std, group.report.absmax)
    return (group.module, group.param, *(n if n is not None and math.isfinite(n) else None for n in numbers))


def _norm_of(reports: Iterable[Report]) -> float | None:
    norms = [norm for report in reports if (norm := report.moments.norm) is not None]
    return root_sum_of_squares(norms) if norms else None


def _measure_modules(merged: MergedGradients, found: Measurement) -> None:
    incomplete = merged.incomplete_modules
    modules: dict[str, list[Report]] = {}
    for row, report in merged.whole:
        modules.setdefault(row.module, []).append(report)
    for module, reports in modules.items():
        if module not in incomplete:
            found.put(f"gradients/{module}/norm", _norm_of(reports))
    low, high = GRADIENT_HISTOGRAM_LOG10_RANGE
    edges = np.linspace(low, high, GRADIENT_HISTOGRAM_BINS + 1) - merged.histogram_shift
    for module, counts in merged.histograms.items():
        if module not in incomplete and counts.any():
            found.values[f"gradients/{module}/log10_histogram"] = histogram(counts, edges)


def _measure_all(merged: MergedGradients, found: Measurement) -> None:
    reports = [report for _, report in merged.whole]
    norms = [norm for report in reports if (norm := report.moments.norm) is not None]
    if norms and not merged.incomplete and not merged.partial:
        found.put("gradients/global/total_norm", root_sum_of_squares(norms))
        found.put("gradients/global/avg_norm", sum(norms) / len(norms))
    num_finite = sum(report.moments.count for report in reports)
    found.put("gradients/global/nonfinite", sum(report.num_nonfinite for report in reports))
    found.put_ratio("gradients/global/zero_ratio", sum(report.num_zeros for report in reports), num_finite)
    found.put("gradients/global/params_without_grad", merged.without_gradient)
    found.put("gradients/global/clipped", int(merged.clipped))
