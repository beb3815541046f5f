"""nanoVLM's lines around the demo's model, which keeps its contract: one process, two ranks, real worker, forks."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import reference
from tests.support.rank_processes import run_ranks
from tests.support.wandb_offline import OfflineRun, read_fragments

TRAINER = Path(__file__).with_name("demo_as_nanovlm.py")
NUM_STEPS = 4
MODULES = {"MP": "modality_projector", "vision_encoder": "vision_encoder", "decoder": "decoder"}

pytestmark = pytest.mark.timeout(420)  # two hangs, and each tried again


class Trained:
    """Runs it without and with the lines."""

    def __init__(self, out: Path, num_ranks: int) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        trainer = [sys.executable, *(launcher if num_ranks > 1 else []), str(TRAINER)]
        (out / "off").mkdir()
        (out / "on").mkdir()
        run_ranks(lambda _: [[*trainer, str(out / "off"), "--unpatched"]], timeout_seconds=100)
        worker = [sys.executable, "-m", "sidestep.worker.cli", "run", "--out"]
        hooked = [*trainer, str(out / "on")]
        self.console, attempt = run_ranks(
            lambda attempt: [[*worker, str(out / f"run-{attempt}"), "--", *hooked]], timeout_seconds=100
        )
        self.off = [read(out / "off" / f"rank{rank}.npz") for rank in range(num_ranks)]
        self.on = [read(out / "on" / f"rank{rank}.npz") for rank in range(num_ranks)]
        size, eos, image = self.on[0]["vocabulary"].tolist()
        self.vocabulary = reference.Vocabulary(size=size, eos=eos, image=image)
        self.run: OfflineRun = read_fragments(out / f"run-{attempt}")
        self.by_step: dict[int, dict[str, Any]] = {}
        for row in self.run.rows:
            self.by_step.setdefault(int(row["train/step"]), {}).update(row)

    def batches(self, step: int) -> list[reference.RawBatch]:
        return [
            reference.RawBatch(
                input_ids=arrays[f"batch/{step}/{microstep}/input_ids"],
                labels=arrays[f"batch/{step}/{microstep}/labels"],
                mask=arrays[f"batch/{step}/{microstep}/mask"],
                logits=arrays[f"batch/{step}/{microstep}/logits"].astype(np.float64),
                loss=float(arrays[f"batch/{step}/{microstep}/loss"]),
                shifted=True,
            )
            for arrays in self.on
            for microstep in range(2)
        ]


def read(file: Path) -> dict[str, NDArray[Any]]:
    with np.load(file) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("contract"), request.param)


def assert_close(found: dict[str, Any], expected: dict[str, float], step: int) -> None:
    for key, value in expected.items():
        slack = 1e-5 * abs(value) + (1e-6 if key.startswith("loss/") else 0.0)
        if key.endswith("/mean"):
            slack += 1e-5 * expected[f"{key.removesuffix('/mean')}/std"]
        assert math.isclose(found[key], value, rel_tol=0.0, abs_tol=slack), f"step {step}: {key}"


def test_losses_and_weights_are_those_without_the_lines(trained: Trained) -> None:
    for off, on in zip(trained.off, trained.on, strict=True):
        np.testing.assert_array_equal(off["losses"], on["losses"])
        np.testing.assert_array_equal(off["weights"], on["weights"])


def test_tokens_and_losses_are_those_of_the_training_batches_of_all_ranks(trained: Trained) -> None:
    for step in range(NUM_STEPS):
        batches = trained.batches(step)
        assert_close(trained.by_step[step], reference.token_metrics(batches, trained.vocabulary), step)
        assert_close(trained.by_step[step], reference.loss_metrics(batches, trained.vocabulary), step)


def test_gradients_are_unclipped_under_nanovlms_modules(trained: Trained) -> None:
    for step in range(NUM_STEPS):
        gradients = {}
        for key, gradient in trained.on[0].items():
            if key.startswith(f"gradient/{step}/"):
                module, _, rest = key.removeprefix(f"gradient/{step}/").partition(".")
                gradients[f"{MODULES[module]}.{rest}"] = gradient.astype(np.float64)
        assert_close(trained.by_step[step], reference.gradient_metrics(gradients), step)


def test_one_run_holds_nanovlms_keys_and_ours(trained: Trained) -> None:
    assert trained.run.names == {("nanoVLM", "an-entity", "tiny")}
    assert trained.run.exit_codes == [0]
    for step in range(NUM_STEPS):
        row = trained.by_step[step]
        assert {"val_loss", "batch_loss", "grad_norm", "loss/total", "lr/modality_projector"} <= set(row)
        assert math.isclose(row["batch_loss"], trained.on[0]["losses"][2 * step + 1], rel_tol=1e-6)
    assert trained.by_step[0]["generation/failed"] == 0
    assert "generation/avg_length" in trained.by_step[3]
    assert "a measurement failed" not in trained.console
