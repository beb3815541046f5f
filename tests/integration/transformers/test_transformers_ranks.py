"""Two ranks under DistributedDataParallel, as ``Trainer`` sets it up itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from tests.support.rank_processes import run_ranks

RANK = Path(__file__).with_name("smolvlm_ranks.py")
STEPS = [1, 2, 3, 4]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(640)]


def trained(folder: Path, *options: str) -> list[dict[str, Any]]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_ranks(lambda _: [[*command, str(RANK), str(folder), *options]], timeout_seconds=150)
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def test_two_ranks_are_one_run_with_averaged_gradients(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "with")
    alone, _ = trained(tmp_path / "without", "--without")
    assert first["wrapper"] == "DistributedDataParallel"
    assert first["failures"] == second["failures"] == {}
    assert first["weights"] == second["weights"] == alone["weights"]
    assert first["run_id"] == second["run_id"] != ""
    assert first["steps"] == second["steps"] == STEPS
    np.testing.assert_allclose(first["norms_sent"], first["norms"], rtol=1e-4)
    assert second["norms_sent"] == [], "of replicas the first alone sends gradients"
    by_step = [
        np.mean([loss for rank in (first, second) for at, loss in rank["losses"] if at == step]) for step in STEPS
    ]
    np.testing.assert_allclose(by_step, first["reported"], rtol=1e-5)
    assert second["reported"] == []
    assert (first["generations"], second["generations"]) == (2, 0)
