"""The tables of ``python -m benchmarks``: from a part's figures to Markdown, one function a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MODES = {
    "none": "no hooks",
    "own": "nanoVLM's own logging",
    "sidestep_metrics": "Sidestep, without detectors and generation",
    "sidestep_without_generation": "Sidestep, without generation",
    "sidestep": "Sidestep",
    "inline_without_generation": "the same metrics inline, without generation",
    "inline": "the same metrics inline",
}
"""The modes of a step's benchmarks, in plain words."""
WAYS = {
    "sidestep": "Sidestep",
    "raw_zeromq": "a raw ZeroMQ send",
    "wandb": "W&B",
    "trackio": "Trackio",
    "tensorboard": "TensorBoard",
}
"""The ways to hand statistics over, in the order in which they are shown."""

Figures = Mapping[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, num_texts: int = 1) -> str:
    """Return a Markdown table; all columns but the first ``num_texts`` stand to the right.

    Raises:
        ValueError: a row has more or fewer cells than the head.
    """
    lines = [_line(head), "|" + " --- |" * num_texts + " ---: |" * (len(head) - num_texts)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells under {len(head)} columns: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _sentences(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _pair(median: float, mean: float, *, digits: int = 1) -> str:
    return f"{median:.{digits}f} ({mean:.{digits}f})"


def _same_losses(figures: Figures) -> str:
    said = "Losses are the very same in all modes."
    if not figures["losses_identical_in_all_modes"]:
        said = "**Losses are not the same in all modes.**"
        if figures.get("device"):
            said = (
                f"Losses differ by at most {figures['losses_differ_by_at_most']:.1e} of themselves between the modes: "
                "the device's operations were not made deterministic (`tests/gpu` does that, and compares bits)."
            )
    failures = figures.get("failures")
    return f"{said} **The hooks failed: {failures}.**" if failures else said


def step_overhead(figures: Figures) -> str:
    """Return the modes of the demo's step, and each call of Sidestep's."""
    modes, none = figures["modes"], figures["modes"]["none"]
    head = (
        "mode", "wall, median (mean) ms", "training thread's CPU, median (mean) ms", "process CPU, median (mean) ms",
        "thread's CPU, of no hooks: median (mean)", "in the calls, CPU ms a step", "share of a step",
    )  # fmt: skip
    rows = [
        [
            MODES.get(mode, mode),
            *(_pair(row[f"{c}_median_ms"], row[f"{c}_mean_ms"]) for c in ("wall", "thread_cpu", "process_cpu")),
            _pair(*(row[f"thread_cpu_{w}_ms"] / none[f"thread_cpu_{w}_ms"] for w in ("median", "mean")), digits=3),
            f"{row['calls_cpu_mean_ms'] - none['calls_cpu_mean_ms']:.2f}",
            f"{figures['share_of_step'][mode]:.2%}",
        ]
        for mode, row in modes.items()
    ]
    calls = [
        [f"`{name}`", str(row["calls"]), *(f"{row[which]:.3f}" for which in ("median", "p99", "max"))]
        for name, row in figures["per_call_ms"].items()
    ]
    return _sentences(
        markdown(head, rows),
        markdown(("call of Sidestep's, without generation", "calls", "median ms", "p99 ms", "max ms"), calls),
        f"{figures['steps_per_mode']} steps a mode. {_same_losses(figures)}",
    )


def large_model_step(figures: Figures) -> str:
    """Return the modes of the large model's step."""
    head = (
        "mode", "wall, median (mean) ms", "wall, of no hooks: median (mean)", "training thread's CPU, mean ms",
        "in the calls, CPU (wall) ms a step", "CPU in the calls, share of a step", "most device memory, GiB",
    )  # fmt: skip
    rows = [
        [
            MODES.get(mode, mode),
            _pair(row["wall"]["median"], row["wall"]["mean"]),
            _pair(row["times_none"]["wall_median"], row["times_none"]["wall_mean"], digits=4),
            f"{row['thread_cpu']['mean']:.1f}",
            _pair(row["in_calls_cpu_mean"], row["in_calls_wall_mean"], digits=3),
            f"{row['share_of_step']:.2%}",
            f"{row['peak_device_gib']:.1f}" if row["peak_device_gib"] else "",
        ]
        for mode, row in figures["modes"].items()
    ]
    setting = figures["setting"]
    return _sentences(
        markdown(head, rows),
        f"{figures['tensors']} tensors, {figures['parameters']:,} parameters on {figures['device'] or 'the CPU'}; "
        f"{setting['num_rows']} rows of {setting['positions']:,} positions, accumulation {setting['accumulation']}, "
        f"{figures['modes']['none']['steps']} steps a mode; medians over turns of five steps. "
        f"{_same_losses(figures)}",
    )


def nanovlm_step(figures: Figures) -> str:
    """Return the modes of nanoVLM's step."""
    clocks = ("wall", "thread_cpu", "process_cpu")
    head = (
        "mode", "wall, median (mean) ms", "training thread's CPU, median (mean) ms", "process CPU, median (mean) ms",
        "thread's CPU, of no logging: median (mean)", "in logging calls, CPU ms a step",
    )  # fmt: skip
    rows = [
        [
            "no logging" if mode == "none" else MODES.get(mode, mode),
            *(_pair(row[clock]["median"], row[clock]["mean"]) for clock in clocks),
            _pair(*(figures["times_none"][mode][f"thread_cpu_{which}"] for which in ("median", "mean")), digits=3),
            f"{row['in_calls_cpu_mean']:.2f}",
        ]
        for mode, row in figures["modes"].items()
    ]
    return _sentences(
        markdown(head, rows),
        f"nanoVLM {figures['nanovlm']}, {figures['steps_per_mode']} steps a mode. {_same_losses(figures)}",
    )


def kernels(figures: Figures) -> str:
    """Return each way beside the floor: the same bytes at the rate of a large copy, or on a host one sum over them."""
    rows: list[list[str]] = []
    for name, ways in figures.items():
        if not isinstance(ways, Mapping) or "floor_ms" not in ways:
            continue
        rows.append([name, "the floor", f"{ways['floor_ms']:.3f}", "", "1"])
        rows += [
            [name, way, f"{row['median_ms']:.3f}", " to ".join(f"{q:.3f}" for q in row["quartiles_ms"]),
             f"{row['times_floor']:.2f}"]
            for way, row in ways.items() if way != "floor_ms"
        ]  # fmt: skip
    rate = figures.get("copy_terabytes_per_second")
    failed = figures.get("kernels that failed")
    return _sentences(
        markdown(("of", "way", "median ms", "quartiles ms", "times the floor"), rows, num_texts=2),
        f"A large copy moves {rate:.2f} TB/s; the floor is one read at that rate." if rate else
        "The floor is one sum over each gradient, by the training thread's CPU.",
        f"**Kernels that failed: {failed}.**" if failed else "",
    )  # fmt: skip


def publish_cost(figures: Figures) -> str:
    """Return each way to hand 1,760 statistics over."""
    ours = figures["sidestep"]["median_ms"]
    rows = []
    found = {"sidestep": figures["sidestep"], **figures["peers"]}
    for way in sorted(found, key=list(WAYS).index):
        row = found[way]
        if "not_measured" in row:
            rows.append([WAYS[way], row["not_measured"], *[""] * 4])
        else:
            figures_of_way = (f"{row[which]:.3f}" for which in ("median_ms", "p99_ms", "slowest_ms"))
            rows.append([WAYS[way], str(row["calls"]), *figures_of_way, f"{row['median_ms'] / ours:.1f}"])
    return markdown(("way", "calls", "median ms", "p99 ms", "slowest ms", "median, of Sidestep's"), rows)


def detector_cost(figures: Figures) -> str:
    """Return all detectors' CPU per step."""
    rows = [
        [str(run["ranks"]), str(run["steps"]), *(f"{run[f'{which}_ms']:.2f}" for which in ("median", "p90", "mean")),
         f"{figures['goal_ms']:.1f}", f"{run['record_bytes']:,}", f"{run['state_bytes']:,}"]
        for run in figures["runs"]
    ]  # fmt: skip
    head = ("ranks", "steps", "median ms a step", "p90 ms", "mean ms", "goal ms", "record, bytes", "state, bytes")
    return markdown(head, rows)


def worker_throughput(figures: Figures) -> str:
    """Return the whole worker, and its intake alone."""
    head = (
        "part", "messages", "acked a second", "closed a second", "CPU us a message", "memory MiB",
        "its growth after the first tenth, MiB",
    )  # fmt: skip
    rows = [
        [name, f"{row['messages']:,}", f"{row['acked_per_second']:,.0f}", f"{row['messages_per_second']:,.0f}",
         f"{row['cpu_us_per_message']:.1f}", f"{row['resident_mib'][-1]:.0f}",
         f"{row['growth_after_first_tenth_mib']:+.1f}"]
        for name, row in figures.items() if isinstance(row, Mapping)
    ]  # fmt: skip
    return markdown(head, rows)


def ranks(figures: Figures) -> str:
    """Return what so many ranks cost one worker, and how far behind it is."""
    head = (
        "ranks", "messages a second", "MB a second", "worker, of a core", "CPU us a message",
        "until acked, p50 / p99 s", "until the row, p50 / p99 s", "memory MiB", "its growth, MiB",
    )  # fmt: skip
    row = [
        f"{figures['ranks']:,}", f"{figures['messages_per_second']:,.0f}", f"{figures['bytes_per_second'] / 1e6:.1f}",
        f"{figures['worker_cpu_share']:.2f}", f"{figures['worker_cpu_us_per_message']:.0f}",
        f"{figures['ack_lag_p50_seconds']:.2f} / {figures['ack_lag_p99_seconds']:.2f}",
        f"{figures['row_lag_p50_seconds']:.2f} / {figures['row_lag_p99_seconds']:.2f}",
        f"{figures['memory_end_bytes'] / (1 << 20):.0f}", f"{figures['memory_growth_bytes'] / (1 << 20):+.1f}",
    ]  # fmt: skip
    late = (
        f"The ranks' own processes were late by {figures['late_p99_seconds']:.2f} s (p99) in {figures['steps']} steps."
    )
    return _sentences(markdown(head, [row]), late)


TABLES: Mapping[str, Callable[[Figures], str]] = {
    made.__name__: made
    for made in (
        step_overhead, large_model_step, nanovlm_step, kernels, publish_cost, detector_cost, worker_throughput, ranks,
    )
}  # fmt: skip
"""A part's name to what makes its tables."""
