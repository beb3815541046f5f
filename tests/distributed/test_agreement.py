"""Ranks of a real group take over what rank 0 says, and nobody's store is held up meanwhile."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.support.rank_processes import free_port, run_ranks

RANKS = str(Path(__file__).with_name("agreeing_ranks.py"))
WORLD = 2


@pytest.mark.timeout(280)
def test_all_ranks_agree_with_a_late_rank_0_and_the_store_serves_the_trainer_meanwhile(tmp_path: Path) -> None:
    def commands(_attempt: int) -> list[list[str]]:
        port = free_port()
        return [[sys.executable, RANKS, str(rank), str(WORLD), str(port), str(tmp_path)] for rank in range(WORLD)]

    run_ranks(commands, timeout_seconds=110)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    first = {"run_id": "run-0", "incarnation": "inc-0", "endpoint": "ipc:///tmp/s", "server_key": "k", "host": "h0"}
    assert [each["first"] for each in told] == [first] * WORLD
    for each in told[1:]:
        assert each["sets"] > 20, "while it asked for what was not there yet, the trainer's own client wrote on"
        assert each["second"] is None, "rank 0 said nothing the second time"
        assert 0.4 < each["waited"] < 10
