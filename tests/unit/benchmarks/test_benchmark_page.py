"""The page: every outcome of every part has its place on it, and every figure its column."""

from __future__ import annotations

import re
from typing import Any

import pytest
from benchmarks.page import page
from benchmarks.suite import PARTS
from benchmarks.table import TABLES, kernels, large_model_step, markdown, publish_cost

SPREAD = {"mean": 110.0, "median": 100.0, "p99": 130.0, "max": 140.0}
CLOCKS = ("wall", "thread_cpu", "process_cpu")
RATIOS = {f"{clock}_{which}": 1.25 for clock in CLOCKS for which in ("median", "mean", "p99")}
MODE = {
    **dict.fromkeys(CLOCKS, SPREAD),
    "steps": 200, "in_calls_cpu_mean": 0.5, "in_calls_wall_mean": 0.75, "times_none": RATIOS, "share_of_step": 0.005,
    "peak_device_gib": 12.3,
}  # fmt: skip
FIGURES: dict[str, dict[str, Any]] = {
    "step_overhead": {
        "modes": {
            mode: {
                **{f"{clock}_{which}_ms": 100.0 + more for clock in CLOCKS for which in ("mean", "median")},
                "calls_cpu_mean_ms": 0.1 + more,
            }
            for mode, more in (("none", 0.0), ("sidestep", 2.0))
        },
        "share_of_step": {"none": 0.0, "sidestep": 0.02},
        "per_call_ms": {"after_step (due)": {"calls": 8, "mean": 2.0, "median": 1.0, "p99": 3.0, "max": 4.0}},
        "steps_per_mode": 210, "losses_identical_in_all_modes": True,
    },
    "large_model_step": {
        "modes": {"none": MODE, "sidestep": MODE}, "tensors": 440, "parameters": 460_113_984, "device": "a device",
        "setting": {"num_rows": 2, "positions": 1_024, "accumulation": 1}, "losses_identical_in_all_modes": False,
        "losses_differ_by_at_most": 3e-6, "failures": {},
    },
    "nanovlm_step": {
        "modes": {"none": MODE, "own": MODE}, "times_none": {"none": RATIOS, "own": RATIOS}, "nanovlm": "abc1234",
        "steps_per_mode": 200, "losses_identical_in_all_modes": True, "failures": {},
    },
    "kernels": {
        "machine": "a device", "copy_terabytes_per_second": 4.3, "kernels that failed": None,
        "gradients, torch.float32": {
            "floor_ms": 0.4, "kernel": {"median_ms": 0.5, "quartiles_ms": [0.45, 0.55], "times_floor": 1.25},
        },
    },
    "publish_cost": {
        "sidestep": {"calls": 3_000, "median_ms": 0.02, "p99_ms": 0.1, "slowest_ms": 0.5},
        "peers": {
            "wandb": {"calls": 300, "median_ms": 5.0, "p99_ms": 8.0, "slowest_ms": 9.0},
            "trackio": {"not_measured": "not installed"},
        },
    },
    "detector_cost": {
        "goal_ms": 2.0,
        "runs": [{"ranks": 8, "steps": 1_000, "median_ms": 1.5, "p90_ms": 1.75, "mean_ms": 1.625,
                  "record_bytes": 5_000, "state_bytes": 70_000}],
    },
    "worker_throughput": {
        "python": "3.11",
        "worker": {"messages": 1_000_000, "acked_per_second": 20_000.0, "messages_per_second": 19_000.0,
                   "cpu_us_per_message": 50.0, "resident_mib": [90.0, 95.0], "growth_after_first_tenth_mib": 1.5},
    },
    "ranks": {
        "ranks": 1_024, "steps": 60, "messages_per_second": 3_000.0, "bytes_per_second": 3e6, "worker_cpu_share": 0.46,
        "worker_cpu_us_per_message": 145.0, "ack_lag_p50_seconds": 0.1, "ack_lag_p99_seconds": 0.6,
        "row_lag_p50_seconds": 0.2, "row_lag_p99_seconds": 0.9, "memory_end_bytes": 166 << 20,
        "memory_growth_bytes": 15 << 20, "late_p99_seconds": 0.01,
    },
}  # fmt: skip


def result(**parts: dict[str, Any]) -> dict[str, Any]:
    machine = {
        "hardware": "x86_64, 2 cores", "processor": "a processor", "cores": 2, "usable_cores": 2, "python": "3.11.7",
        "load_before": 0.25, "device": "", "device_bytes": 0, "commit": "abc1234+", "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return {
        "command": "python -m benchmarks", "date": "2026-01-02", "quick": False, "machine": machine, "parts": parts
    }  # fmt: skip


def measured(name: str, note: str = "") -> dict[str, Any]:
    return {
        "status": "measured", "command": f"python benchmarks/{name}.py", "seconds": 61.4, "load_before": 0.5,
        "figures": FIGURES[name], "note": note,
    }  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_what_it_was_measured_on_stands_on_top() -> None:
    top = page(result()).split("##")[0]
    for told in (
        "# Benchmarks, 2026-01-02: a processor", "python -m benchmarks", "x86_64, 2 cores (2 usable)", "no CUDA device",
        "load at the start: 0.25", "commit: abc1234+", "Python: 3.11.7", "torch 2.13.0",
    ):  # fmt: skip
        assert told in top
    assert "quick" not in top


def test_a_quick_page_says_that_its_figures_mean_nothing() -> None:
    assert "Its figures mean nothing" in page({**result(), "quick": True})


def test_a_page_has_one_section_for_each_part_in_the_order_of_the_suite() -> None:
    text = page(result(**{name: measured(name) for name in reversed(FIGURES)}))
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [part.question for part in PARTS]


@pytest.mark.parametrize("name", TABLES)
def test_a_measured_part_has_a_table_and_how_it_was_made(name: str) -> None:
    text = page(result(**{name: measured(name, note="no tracker")}))
    assert len(rows_of(text)) >= 3
    assert f"`python benchmarks/{name}.py`, 61 s, load before it 0.50. Note: no tracker." in text


def test_a_skipped_part_says_why() -> None:
    text = page(result(kernels={"status": "skipped", "reason": "not installed: torch"}))
    assert "Skipped: not installed: torch." in text
    assert not rows_of(text)


def test_a_failed_part_shows_its_last_line_and_how_to_run_it() -> None:
    failed = {
        "status": "failed", "reason": "EOFError: `pipe`", "command": "python benchmarks/ranks.py", "seconds": 3.0,
        "load_before": 1.0, "note": "", "exit_status": 1,
    }  # fmt: skip
    text = page(result(ranks=failed, kernels=measured("kernels")))
    assert "**Failed**: `EOFError: 'pipe'`" in text
    assert "`python benchmarks/ranks.py`, 3 s" in text
    assert len(rows_of(text)) == 4  # the kernels' table is there


def test_a_steps_modes_stand_beside_no_hooks() -> None:
    rows = rows_of(TABLES["step_overhead"](FIGURES["step_overhead"]))
    pair = "102.0 (102.0)"
    assert rows[3] == ["Sidestep", pair, pair, pair, "1.020 (1.020)", "2.00", "2.00%"]


def test_a_kernel_stands_beside_its_floor() -> None:
    rows = rows_of(kernels(FIGURES["kernels"]))[2:]
    assert rows == [
        ["gradients, torch.float32", "the floor", "0.400", "", "1"],
        ["gradients, torch.float32", "kernel", "0.500", "0.450 to 0.550", "1.25"],
    ]
    assert "4.30 TB/s" in kernels(FIGURES["kernels"])


def test_kernels_that_failed_are_told() -> None:
    assert "rows: 2" in kernels({**FIGURES["kernels"], "kernels that failed": {"rows": 2}}).replace("'", "")


def test_the_trackers_stand_beside_sidestep_and_an_absent_one_is_named() -> None:
    rows = rows_of(publish_cost(FIGURES["publish_cost"]))[2:]
    assert [row[0] for row in rows] == ["Sidestep", "W&B", "Trackio"]
    assert [row[-1] for row in rows] == ["1.0", "250.0", ""]
    assert rows[2][1] == "not installed"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"losses_identical_in_all_modes": True}, "the very same"),
        ({}, "differ by at most 3.0e-06"),
        ({"device": ""}, "**Losses are not the same"),
        ({"failures": {"sidestep": {"on_batch": 1}}}, "**The hooks failed"),
    ],
)
def test_losses_and_failures_are_told(changes: dict[str, Any], told: str) -> None:
    assert told in large_model_step({**FIGURES["large_model_step"], **changes})


def test_a_row_with_other_cells_than_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cells under 2 columns"):
        markdown(("a", "b"), [["1", "2", "3"]])


def test_a_bar_within_a_cell_does_not_end_it() -> None:
    assert rows_of(markdown(("a", "b"), [["x|y", "1"]]))[2] == ["x/y", "1"]
