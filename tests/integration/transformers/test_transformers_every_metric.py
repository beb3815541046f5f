"""Sixty steps of the library's own ``Trainer``, killed and resumed, against the float64 reference from raw tensors."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import torch
from tests.support import reference
from tests.support.wandb_offline import OfflineRun, read_fragments

from sidestep.protocol.metric_names import METRICS, spec_of

ROOT = Path(__file__).resolve().parents[3]
TRAINER = Path(__file__).with_name("smolvlm_trainer.py")
NUM_STEPS, RESTART_AT, STEPS_PER_EPOCH, ACCUMULATION = 60, 30, 24, 2
BATCH_STEPS = range(5, NUM_STEPS + 1, 5)
GRADIENT_STEPS = range(10, NUM_STEPS + 1, 10)
GENERATION_STEPS = range(20, NUM_STEPS + 1, 20)
MODULES = ("model.vision_model", "model.connector", "model.text_model", "lm_head")

NEEDS_ANOTHER_RUN = {
    "loss/sampled_tokens": "only where the loss is sampled",
    "gradients/details": "only above 2,000 gradient keys",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Trained:
    """What the trainer recorded, and what the run says."""

    def __init__(self, out: Path, run: OfflineRun) -> None:
        self.out = out
        self.run = run
        self.arrays: dict[str, Any] = {}
        for part in ("first", "second"):
            with np.load(out / f"{part}.npz") as arrays:
                self.arrays |= dict(arrays)
        size, eos, image = self.arrays["vocabulary"].tolist()
        self.vocabulary = reference.Vocabulary(size=size, eos=eos, image=image)
        self.rows = [folded(row) for row in run.rows]
        self.by_step: dict[int, dict[str, Any]] = {}
        for row in self.rows:
            self.by_step.setdefault(int(row["train/step"]), {}).update(row)

    def batches(self, step: int) -> list[reference.RawBatch]:
        places = [f"batch/{step}/{number}" for number in range(ACCUMULATION)]
        return [
            reference.RawBatch(
                input_ids=self.arrays[f"{place}/input_ids"],
                labels=self.arrays[f"{place}/labels"],
                mask=self.arrays[f"{place}/mask"],
                logits=self.arrays[f"{place}/logits"].astype(np.float64),
                # The trainer sums what it divided by the whole step's items: the mean over micro-batches of
                # ACCUMULATION times as much is the step's loss.
                loss=float(self.arrays[f"{place}/loss"]) * ACCUMULATION,
                shifted=False,
            )
            for place in places
        ]

    def answer_lengths(self, epoch: int, up_to_step: int) -> list[int]:
        lengths = []
        for step in range(epoch * STEPS_PER_EPOCH + 1, up_to_step + 1):
            for microstep in range(ACCUMULATION):
                for row in self.arrays[f"batch/{step}/{microstep}/labels"]:
                    content, _ = reference.cut([int(i) for i in row if i >= 0], self.vocabulary.eos)
                    lengths.append(len(content))
        return lengths

    def gradients(self, step: int) -> dict[str, Any]:
        """Return gradients by name, the module as one word in front of the first dot."""
        prefix = f"gradient/{step}/"
        found = {}
        for key in self.arrays:
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                module = next(module for module in MODULES if name.startswith(f"{module}."))
                short = module.rpartition(".")[2]
                found[f"{short}{name.removeprefix(module)}"] = self.arrays[key].astype(np.float64)
        return found

    def generated(self, step: int) -> list[list[int]]:
        return [self.arrays[f"generated/{step}/{number}"].tolist() for number in range(4)]


def folded(row: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in row.items():
        name, _, leaf = key.rpartition(".")
        if name:
            values.setdefault(name, {})[leaf] = value
        else:
            values[key] = value
    return values


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out, plain = tmp_path_factory.mktemp("with"), tmp_path_factory.mktemp("without")
    script = [sys.executable, str(TRAINER), "--steps", str(NUM_STEPS)]
    worker = [sys.executable, "-m", "sidestep.worker.cli", "run", "--out", str(out), "--"]
    with subprocess.Popen(
        [*script, "--out", str(plain), "--without"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as alone:
        done = subprocess.run(
            [*worker, *script, "--out", str(out), "--restart-at", str(RESTART_AT)],
            capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        output, _ = alone.communicate(timeout=100)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert alone.returncode == 0, output
    (plain / "weights.pt").rename(out / "weights_without.pt")
    return Trained(out, read_fragments(out))


def test_the_weights_are_those_of_the_trainer_alone(trained: Trained) -> None:
    """With the callback, evaluations, generations and a restart: bit for bit what one undisturbed training makes."""
    mine = torch.load(trained.out / "weights.pt", weights_only=True)
    alone = torch.load(trained.out / "weights_without.pt", weights_only=True)
    assert mine.keys() == alone.keys()
    assert [name for name in mine if not torch.equal(mine[name], alone[name])] == []


def test_every_step_of_both_processes_is_in_one_run(trained: Trained) -> None:
    assert len(trained.run.names) == 1
    assert sorted(trained.by_step) == list(BATCH_STEPS), "no row twice, none of a step that was never taken"
    attempts = {int(row["train/step"]): int(row["train/attempt"]) for row in trained.rows}
    assert [attempts[step] for step in BATCH_STEPS] == [attempts[5]] * 6 + [attempts[60]] * 6
    assert attempts[5] != attempts[60]


def test_tokens_and_losses_equal_the_reference_at_every_due_step(trained: Trained) -> None:
    for step in BATCH_STEPS:
        batches = trained.batches(step)
        reference.assert_equal(trained.by_step[step], reference.token_metrics(batches, trained.vocabulary), step)
        reference.assert_equal(trained.by_step[step], reference.loss_metrics(batches, trained.vocabulary), step)
    assert not [key for key in trained.by_step.get(6, {}) if key.startswith(("tokens/", "loss/"))]


def test_gradients_are_those_before_clipping(trained: Trained) -> None:
    for step in GRADIENT_STEPS:
        expected = reference.gradient_metrics(trained.gradients(step))
        absolute = {
            key: 1e-5 * expected[f"{key.removesuffix('/mean')}/std"]
            for key in expected
            if key.endswith("/mean") and f"{key.removesuffix('/mean')}/std" in expected
        }
        reference.assert_equal(trained.by_step[step], expected, step, absolute)
        assert expected["gradients/global/total_norm"] > 0.5, "the trainer clips here: after it no norm is above 0.5"
        assert math.isclose(
            trained.by_step[step]["train/grad_norm"], expected["gradients/global/total_norm"], rel_tol=1e-4
        )


def test_learning_rates_are_those_that_the_step_was_taken_with(trained: Trained) -> None:
    for step in BATCH_STEPS:
        rates = trained.arrays[f"lr/{step}"].tolist()
        reference.assert_equal(trained.by_step[step], {f"lr/{number}": rate for number, rate in enumerate(rates)}, step)
    warming = [trained.by_step[step]["lr/0"] for step in (5, 10)]
    assert warming[0] == pytest.approx(3e-3 * 4 / 5), "not the rate after the scheduler's step, which is 3e-3"


def test_answer_lengths_are_counted_once_an_epoch_over_the_restart(trained: Trained) -> None:
    for step in BATCH_STEPS:
        epoch = (step - 1) // STEPS_PER_EPOCH
        lengths = trained.answer_lengths(epoch, step)
        reference.assert_equal(trained.by_step[step], reference.answer_length_metrics(lengths, epoch), step)
    assert not any("epoch_3" in key for row in trained.rows for key in row)


def test_generations_equal_the_models_own_one_by_one(trained: Trained) -> None:
    for step in GENERATION_STEPS:
        generated = trained.generated(step)
        reference.assert_equal(trained.by_step[step], reference.generation_metrics(generated, trained.vocabulary), step)
        reference.assert_equal(
            trained.by_step[step], dict(reference.collapse_metrics(generated, trained.vocabulary)), step
        )
    table, _ = trained.run.tables("generation/samples")[-1]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert all(row["question"].startswith("what is the colour") and row["image"] and row["target"] for row in rows)


def test_every_name_of_the_table_is_in_the_run(trained: Trained) -> None:
    keys = {key for row in trained.rows for key in row}
    names = {spec.key for key in keys if (spec := spec_of(key)) is not None}
    assert {spec.key for spec in METRICS} - set(NEEDS_ANOTHER_RUN) - names == set()
    others = {key for key in keys if spec_of(key) is None}
    allowed = re.compile(r"_step|_timestamp|_runtime|(train|eval|test)/\w+|sidecar/[\w/]+|epoch|train_\w+|total_flos")
    assert {key for key in others if not allowed.fullmatch(key)} == set()


def test_what_the_trainer_logs_is_in_the_run_under_its_own_names(trained: Trained) -> None:
    for step in BATCH_STEPS:
        row = trained.by_step[step]
        assert row["train/global_step"] == step
        assert row["train/epoch"] == pytest.approx(step / STEPS_PER_EPOCH)
        mean_of_five = np.mean([self_reported(trained, each) for each in range(step - 4, step + 1)])
        assert row["train/loss"] == pytest.approx(mean_of_five, rel=1e-5)
    assert [step for step, row in sorted(trained.by_step.items()) if "eval/loss" in row] == [20, 40, 60]
    assert "test/loss" in trained.by_step[NUM_STEPS], "what is evaluated after the training belongs to the run too"
    assert trained.by_step[NUM_STEPS]["train_runtime"] > 0
    assert {project for project, _, _ in trained.run.names} == {"tiny"}
    assert trained.run.config["max_steps"] == NUM_STEPS
    assert trained.run.config["model_type"] == "smolvlm"
    assert [code for code in trained.run.exit_codes if code] == []


def self_reported(trained: Trained, step: int) -> float:
    return sum(float(trained.arrays[f"loss/{step}/{number}"]) for number in range(ACCUMULATION))
