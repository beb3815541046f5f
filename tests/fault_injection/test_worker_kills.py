"""Kill -9 of the worker, alone and with its W&B child, under a steady publisher: nothing is lost, nothing doubled.

The campaign of a hundred kills is ``benchmarks/worker_kills.py``; this is its short form.
"""

from __future__ import annotations

import random

import pytest
from tests.support.kill_campaign import KillPlan, run_campaign

NUM_KILLS = 5

pytestmark = pytest.mark.timeout(150)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_every_row_is_there_once_after_kills_of_the_worker(mode: str) -> None:
    plan = KillPlan(mode=mode, kills=NUM_KILLS, seed=random.randrange(1 << 30), settle_seconds=90.0)
    said: list[str] = []
    result = run_campaign(plan, said.append)
    assert result["wrong"] == [], (said, plan, result["counts"])
    counts = result["counts"]
    assert counts["journal"]["steps"] == result["published"]["steps"] > 100
    assert counts["journal"]["tables"] >= 4, "there are tables among the rows"
    assert sum(result["killed"].values()) == NUM_KILLS
    received = [counts[name]["rows"] for name in counts if name not in {"journal", "replay"}]
    assert set(received) == {counts["journal"]["rows"]}
