"""Generation over ranks: split under DDP, together under FSDP2 and TP, and a forward that raises hangs nobody."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.rank_processes import run_once, run_ranks

TRAINER = Path(__file__).with_name("generating_training.py")
NUM_RANKS, NUM_STEPS = 2, 3
CASES = ("fsdp2", "tp", "ddp", "fsdp2-off")

pytestmark = pytest.mark.timeout(480)  # a busy machine takes ten times as long as an idle one


def commands(out: Path, *cases: str) -> list[list[str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    return [[*launcher, str(TRAINER), str(out), *cases]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("generating")
    run_ranks(lambda _attempt: commands(out, *CASES), timeout_seconds=200)
    files = {case: [out / f"{case}.{rank}.json" for rank in range(NUM_RANKS)] for case in CASES}
    return {case: [json.loads(file.read_text(encoding="utf-8")) for file in each] for case, each in files.items()}


def rows(generated: dict[str, list[int]]) -> dict[int, list[int]]:
    return {int(row): ids for row, ids in generated.items()}


@pytest.mark.parametrize("case", ["fsdp2", "tp"])
def test_all_ranks_generate_what_the_whole_model_would_and_the_first_one_sends_it(
    told: dict[str, list[dict[str, Any]]], case: str
) -> None:
    first, second = told[case]
    assert [rows(made) for made in first["made"]] == [dict(enumerate(wanted)) for wanted in first["wanted"]]
    assert first["wanted"] == second["wanted"]
    assert second["made"] == []
    lengths = {len(ids) for made in first["made"] for ids in made.values()}
    assert len(lengths) > 1, "no answer ended before the longest one"
    assert first["failures"] == second["failures"] == {}
    assert first["is_sharded_again"] == (case == "fsdp2")


def test_under_ddp_each_rank_generates_its_part(told: dict[str, list[dict[str, Any]]]) -> None:
    first, second = told["ddp"]
    for step in range(NUM_STEPS):
        parts = rows(first["made"][step]), rows(second["made"][step])
        assert [sorted(part) for part in parts] == [[0, 2], [1, 3]]
        assert {**parts[0], **parts[1]} == dict(enumerate(first["wanted"][step]))


def test_a_sharded_model_is_not_generated_from_unless_asked_for(told: dict[str, list[dict[str, Any]]]) -> None:
    for each in told["fsdp2-off"]:
        assert each["made"] == []
        assert each["support"]["generation"].startswith("absent: the model is sharded")
        assert each["support"]["image probe"].startswith("absent: the model is sharded")


def test_a_forward_that_raises_on_one_rank_ends_the_job_and_hangs_nobody(tmp_path: Path) -> None:
    ended = run_once(commands(tmp_path, "fsdp2-raises"), timeout_seconds=200)  # a busy machine ends ranks slowly
    assert ended.codes not in {(0,), (None,)}, ended.said[-3_000:]
    assert "Timeout (" not in ended.said, "a rank was still there when it had to say where it hangs"
    assert "CollectiveGenerationError: generation failed on this rank (ValueError: a broken forward)" in ended.said
    reached = {(tmp_path / f"fsdp2-raises.{rank}.step").read_text(encoding="utf-8") for rank in range(NUM_RANKS)}
    assert reached == {"0"}, "a rank went on training after the generation that failed"
