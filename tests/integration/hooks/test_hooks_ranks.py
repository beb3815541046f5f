from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.support.rank_processes import free_port, run_ranks

TRAINER = Path(__file__).with_name("ddp_trainer.py")


def train(folder: Path, name: str) -> list[dict[str, Any]]:
    outs = [folder / f"{name}-{rank}.json" for rank in range(2)]

    def commands(_attempt: int) -> list[list[str]]:
        port = str(free_port())
        return [[sys.executable, str(TRAINER), str(rank), port, str(out), name] for rank, out in enumerate(outs)]

    run_ranks(commands, timeout_seconds=80)
    return [json.loads(out.read_text(encoding="utf-8")) for out in outs]


@pytest.mark.timeout(340)
def test_ranks_share_run_and_incarnation_and_train_as_without_hooks(tmp_path: Path) -> None:
    hooked, plain = train(tmp_path, "hooked"), train(tmp_path, "plain")
    for mine, theirs in zip(hooked, plain, strict=True):
        assert mine["losses"] == theirs["losses"]
        assert mine["weights"] == theirs["weights"]
        assert mine["failures"] == {}
        assert (mine["topology"]["wrapper"], mine["topology"]["data_parallel_size"]) == ("ddp", 2)
    assert hooked[0]["run_id"] == hooked[1]["run_id"]
    assert hooked[0]["incarnation"] == hooked[1]["incarnation"]
    assert [found["rank"] for found in hooked] == [0, 1]
    of_all = {"TOKENS": 3, "LOSSES": 3, "ANSWERS": 3, "STEP_END": 3}
    counted = [Counter(kind for kind in found["kinds"] if kind != "SIGNALS") for found in hooked]
    assert counted[0] == {**of_all, "GRADIENTS": 3, "LEARNING_RATES": 3}  # replicas count once
    assert counted[1] == of_all
