"""Losses and final weights are the same bits: hooks off, on, generating every 5 steps, and with the worker killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.demo_runs import (
    demo_command,
    finished,
    kill_worker,
    start,
    training_summary,
    wait_for_closed_steps,
    with_worker,
)

STEPS = ("--steps", "16")

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def without_hooks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], str]:
    out = tmp_path_factory.mktemp("off")
    finished(start(demo_command(out, *STEPS, "--no-hooks")), 120)
    summary = training_summary(out)
    return summary["losses"], summary["weights_sha256"]


@pytest.mark.parametrize("interval", ["25", "5"], ids=["hooks", "generating-every-5-steps"])
def test_hooks_change_no_bit(tmp_path: Path, without_hooks: tuple[list[float], str], interval: str) -> None:
    options = (*STEPS, "--generation-interval", interval, "--collapse-interval", interval)
    finished(start(with_worker(tmp_path, demo_command(tmp_path, *options))), 150)
    summary = training_summary(tmp_path)
    assert (summary["losses"], summary["weights_sha256"]) == without_hooks


def test_a_killed_worker_changes_no_bit(tmp_path: Path, without_hooks: tuple[list[float], str]) -> None:
    run = start(with_worker(tmp_path, demo_command(tmp_path, *STEPS, "--generation-interval", "5")))
    wait_for_closed_steps(tmp_path / "journal", 6, 100)
    kill_worker(tmp_path / "journal")
    finished(run, 120)
    summary = training_summary(tmp_path)
    assert (summary["losses"], summary["weights_sha256"]) == without_hooks


def test_two_runs_without_hooks_are_the_same_bits(tmp_path: Path, without_hooks: tuple[list[float], str]) -> None:
    """The control: where this fails, the other tests say nothing."""
    finished(start(demo_command(tmp_path, *STEPS, "--no-hooks")), 120)
    summary = training_summary(tmp_path)
    assert (summary["losses"], summary["weights_sha256"]) == without_hooks
