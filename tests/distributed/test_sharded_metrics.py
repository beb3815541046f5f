"""Real groups under DDP, FSDP2, HSDP, TP and FSDP2 + TP: each metric against whole tensors of the same run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import reference
from tests.support.rank_processes import run_ranks
from tests.support.run_balance import check_balance, rows_of
from tests.support.worker_process import WorkerProcess, wait_until

TRAINER = Path(__file__).with_name("sharded_training.py")
EXACT = ("ddp", "fsdp2", "hsdp", "tp", "fsdp2_tp")
NUM_STEPS, GRADIENT_INTERVAL = 3, 2
VOCABULARY = reference.Vocabulary(size=13, eos=2, image=12)
WRAPPER_NAMES = {"fsdp2_tp": "fsdp2+tp"}

pytestmark = pytest.mark.timeout(480)  # a busy machine takes ten times as long as an idle one


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a group of ranks left behind, under each wrapper."""

    out: Path
    journal: Path
    attempt: int
    num_ranks: int
    console: str

    def told(self, name: str) -> list[dict[str, Any]]:
        files = [self.out / f"{name}.{rank}.json" for rank in range(self.num_ranks)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def arrays(self, name: str) -> list[Any]:
        return [np.load(self.out / f"{name}.{rank}.npz") for rank in range(self.num_ranks)]

    def rows(self, name: str) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for row in rows_of(self.journal, f"{name}-{self.attempt}"):
            found.setdefault(int(row["train/step"]), {}).update(row)
        return found

    def batches(self, name: str, step: int) -> list[reference.RawBatch]:
        """The step's batches, each once: of ranks that see the same ones the first counts."""
        ranks = {tuple(told["data"]): rank for rank, told in reversed(list(enumerate(self.told(name))))}
        found = []
        for rank in sorted(ranks.values()):
            arrays = np.load(self.out / f"{name}.{rank}.npz")
            for microstep in range(2):
                place = f"batch/{step}/{microstep}"
                found.append(
                    reference.RawBatch(
                        input_ids=arrays[f"{place}/input_ids"],
                        labels=arrays[f"{place}/targets"],
                        mask=arrays[f"{place}/attention_mask"],
                        logits=arrays[f"{place}/logits"].astype(np.float64),
                        loss=float(arrays[f"{place}/loss"]),
                        shifted=True,
                    )
                )
        return found

    def gradients(self, name: str, step: int) -> dict[str, Any]:
        arrays, prefix = np.load(self.out / f"{name}.0.npz"), f"gradient/{step}/"
        return {
            key.removeprefix(prefix): arrays[key].astype(np.float64) for key in arrays.files if key.startswith(prefix)
        }


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    num_ranks: int = request.param
    out = tmp_path_factory.mktemp("ranks")
    worker = WorkerProcess()
    worker.start()
    names = (*EXACT, "sequence", "drifted", "fsdp1")

    def commands(attempt: int) -> list[list[str]]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        return [[*launcher, str(TRAINER), str(out), worker.address, str(attempt), *names]]

    try:
        _, attempt = run_ranks(commands, timeout_seconds=200)
        ended = "SELECT COUNT(*) FROM ending WHERE run_id LIKE '%-{}'"
        wait_until(lambda: worker.query(ended.format(attempt))[0][0] == len(names), "all runs end", 30.0)
        assert worker.terminate() == 0
        yield Trained(out=out, journal=worker.journal, attempt=attempt, num_ranks=num_ranks, console=worker.text())
    finally:
        worker.remove()


@pytest.mark.parametrize("name", EXACT)
def test_every_metric_of_the_run_equals_the_reference_over_whole_tensors(trained: Trained, name: str) -> None:
    rows = trained.rows(name)
    assert list(rows) == list(range(NUM_STEPS))
    lengths: list[int] = []
    for step, row in rows.items():
        batches = trained.batches(name, step)
        reference.assert_equal(row, reference.token_metrics(batches, VOCABULARY), step)
        reference.assert_equal(row, reference.loss_metrics(batches, VOCABULARY), step)
        lengths += [len(each.content) for batch in batches for each in reference.answers_of(batch, VOCABULARY.eos)]
        reference.assert_equal(row, reference.answer_length_metrics(lengths, 0), step)
        reference.assert_equal(row, {"lr/all": 0.01}, step)
        assert "sidecar/ranks_seen" not in row


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_whole_parameters(trained: Trained, name: str) -> None:
    rows = trained.rows(name)
    for step in range(0, NUM_STEPS, GRADIENT_INTERVAL):
        gradients = trained.gradients(name, step)
        assert len(gradients) == 10
        expected = reference.gradient_metrics(gradients)
        absolute = {
            key: 1e-5 * expected[f"{key.removesuffix('/mean')}/std"] for key in expected if key.endswith("/mean")
        }
        reference.assert_equal(rows[step], expected, step, absolute)
        is_whole_a_rank = name == "ddp" or (name == "hsdp" and trained.num_ranks == 2)
        assert rows[step].get("gradients/global/coverage") == (None if is_whole_a_rank else 1.0)
        for unwanted in ("params_incomplete", "params_partial", "params_apart"):
            assert f"gradients/global/{unwanted}" not in rows[step]
        for module in ("embedding", "block", "head"):
            found = rows[step][f"gradients/{module}/log10_histogram"]["counts"]
            counts = reference.log10_histogram([each for key, each in gradients.items() if key.startswith(module)])
            assert sum(found) == sum(counts)
            assert np.abs(np.cumsum(found) - np.cumsum(counts)).max() <= 3


@pytest.mark.parametrize("name", EXACT)
def test_hooks_add_no_collective_and_change_no_weight(trained: Trained, name: str) -> None:
    for told in trained.told(name):
        plain, hooked = told["collectives"]
        assert hooked == plain
        assert all(sum(step.values()) > 0 for step in plain), "nothing was counted"
        assert told["weights"][0] == told["weights"][1]
        assert told["failures"] == {}


@pytest.mark.parametrize("name", EXACT)
def test_the_detectors_norm_is_that_of_the_whole_gradient(trained: Trained, name: str) -> None:
    """Copies of the model have the same norm; with one copy there is nobody to compare it with."""
    rows = trained.rows(name)
    for step in range(0, NUM_STEPS, GRADIENT_INTERVAL):
        norms = [float(np.sqrt(np.square(each).sum())) for each in trained.gradients(name, step).values()]
        total = float(np.sqrt(np.square(norms).sum()))
        if name in {"ddp", "hsdp"}:
            assert rows[step]["sidecar/ranks/gradient_norm"] == pytest.approx(total, rel=1e-5)
            assert rows[step]["sidecar/ranks/gradient_norm_gap"] == pytest.approx(0.0, abs=1e-6 * total)
        else:
            assert "sidecar/ranks/gradient_norm" not in rows[step]


@pytest.mark.parametrize("name", EXACT)
def test_the_rank_that_stands_out_is_named(trained: Trained, name: str) -> None:
    rows = trained.rows(name)
    if trained.told(name)[0]["data"][1] > 1:
        losses = [rows[step]["sidecar/ranks/loss"] for step in rows]
        assert all(loss > rows[step]["loss/min"] for step, loss in enumerate(losses))
        assert all(rows[step]["sidecar/ranks/loss_gap"] >= 0 for step in rows)
    else:
        assert all("sidecar/ranks/loss" not in row for row in rows.values())
    assert all(0 <= rows[step]["sidecar/ranks/forward_seconds_rank"] < trained.num_ranks for step in (1, 2))


def test_partial_gradients_are_left_out_and_copies_that_differ_are_said(trained: Trained) -> None:
    """Sequence parallelism without FSDP: no rank has the norm's gradient, and nobody sums that of a plain parameter."""
    rows = trained.rows("sequence")
    for step in range(0, NUM_STEPS, GRADIENT_INTERVAL):
        row, gradients = rows[step], trained.gradients("sequence", step)
        assert row["gradients/global/params_partial"] == 2
        assert row["gradients/global/params_apart"] == 1
        assert not [key for key in row if key.startswith(("gradients/block/norm_", "gradients/global/total_norm"))]
        assert "gradients/block/norm" not in row
        for key in ("block.up.weight", "head.weight", "embedding.weight"):
            module, _, param = key.partition(".")
            norm = float(np.sqrt(np.square(gradients[key]).sum()))
            assert row[f"gradients/{module}/{param.replace('.', '_')}/norm"] == pytest.approx(norm, rel=1e-5)
        reference.assert_equal(row, reference.loss_metrics(trained.batches("sequence", step), VOCABULARY), step)
    for told in trained.told("sequence"):
        assert told["collectives"][0] == told["collectives"][1]
        assert told["failures"] == {}
    assert "hold the same share of block.gain" in trained.console
    assert "are partial sums" in trained.console


@pytest.mark.parametrize("name", EXACT)
def test_each_rank_says_whose_batches_it_sees_and_what_it_shares(trained: Trained, name: str) -> None:
    copies = {"ddp": trained.num_ranks, "hsdp": 2}.get(name, 1)
    for told in trained.told(name):
        topology, (data_rank, data_size) = told["topology"], told["data"]
        assert (topology["data_parallel_rank"], topology["data_parallel_size"]) == (data_rank, data_size)
        assert topology["shares"] == trained.num_ranks // copies
        assert topology["wrapper"] == WRAPPER_NAMES.get(name, name)
    assert {told["topology"]["copy"] for told in trained.told(name)} == set(range(copies))


def test_fsdp1_is_recognised_and_its_gradients_are_left_out(trained: Trained) -> None:
    """Pieces of flat parameters: nobody can tell which part of which parameter they are."""
    for step, row in trained.rows("fsdp1").items():
        batches = trained.batches("fsdp1", step)
        reference.assert_equal(row, reference.loss_metrics(batches, VOCABULARY), step)
        assert not [key for key in row if key.startswith(("gradients/", "sidecar/ranks/gradient_norm"))]
    for told in trained.told("fsdp1"):
        assert told["topology"]["wrapper"] == "fsdp1"
        assert told["collectives"][0] == told["collectives"][1]
        assert told["failures"] == {}


def test_copies_that_drift_apart_are_a_finding_and_shares_are_not_taken_for_copies(trained: Trained) -> None:
    last = trained.num_ranks - 1
    assert trained.rows("drifted")[2]["incidents/rank_desync"] == 1
    assert f"rank {last}: the sampled weights are not those of the lowest rank" in trained.console
    for name in (*EXACT, "sequence", "fsdp1"):
        assert not [key for row in trained.rows(name).values() for key in row if key == "incidents/rank_desync"]


def test_all_runs_replay_to_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    check_balance(trained.journal, tmp_path / "replayed")
