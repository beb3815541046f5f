"""Every name of docs/metrics.md in an offline run of W&B, against an independent float64 reference from raw tensors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import reference
from tests.support.wandb_offline import OfflineRun, read_fragments

from sidestep.protocol.metric_names import METRICS, spec_of

ROOT = Path(__file__).resolve().parents[3]
TRAINER = ROOT / "tests" / "support" / "recording_trainer.py"
NUM_STEPS = 7
EXPECTED_GROUPS = ("modality_projector", "vision_encoder", "language_model")

NEEDS_ANOTHER_RUN = {
    "loss/sampled_tokens": "only where the loss is sampled",
    "gradients/details": "only above 2,000 gradient keys",
}
"""Names that a healthy, exact run of this size must not have."""


def folded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with histograms and tables as one value: W&B stores their fields as ``key.field``."""
    values: dict[str, Any] = {}
    for key, value in row.items():
        name, _, leaf = key.rpartition(".")
        if name:
            values.setdefault(name, {})[leaf] = value
        else:
            values[key] = value
    return values


class Recorded:
    """What the trainer recorded, and what the run says."""

    def __init__(self, record: Path, run: OfflineRun, *, shifted: bool) -> None:
        self.arrays = np.load(record)
        self.run = run
        self.shifted = shifted
        size, eos, image = self.arrays["vocabulary"].tolist()
        self.vocabulary = reference.Vocabulary(size=size, eos=eos, image=image)
        self.rows = [folded(row) for row in run.rows]
        self.by_step: dict[int, dict[str, Any]] = {}
        for row in self.rows:
            self.by_step.setdefault(int(row["train/step"]), {}).update(row)

    def batches(self, step: int) -> list[reference.RawBatch]:
        found: list[reference.RawBatch] = []
        while f"batch/{step}/{len(found)}/logits" in self.arrays:
            place = f"batch/{step}/{len(found)}"
            labels = self.arrays[f"{place}/labels"]
            if not self.shifted:
                moved = np.full_like(labels, reference.IGNORE)
                moved[:, 1:] = labels[:, :-1]
                labels = moved
            found.append(
                reference.RawBatch(
                    input_ids=self.arrays[f"{place}/input_ids"],
                    labels=labels,
                    mask=self.arrays[f"{place}/mask"],
                    logits=self.arrays[f"{place}/logits"].astype(np.float64),
                    loss=float(self.arrays[f"{place}/loss"]),
                    shifted=self.shifted,
                )
            )
        return found

    def answer_lengths(self, up_to_step: int) -> list[int]:
        """Content lengths of every answer of steps 0..up_to_step, due or not."""
        lengths = []
        for key in self.arrays.files:
            match = re.fullmatch(r"batch/(\d+)/\d+/labels", key)
            if match and int(match[1]) <= up_to_step:
                for row in self.arrays[key]:
                    for run in re.findall(r"(?:\d+,)+", "".join("|" if i < 0 else f"{i}," for i in row)):
                        content, _ = reference.cut([int(i) for i in run.split(",")[:-1]], self.vocabulary.eos)
                        lengths.append(len(content))
        return lengths

    def generated(self, step: int) -> list[list[int]]:
        prefix = f"generated/{step}/"
        names = [key for key in self.arrays.files if key.startswith(prefix)]
        return [self.arrays[f"{prefix}{number}"].tolist() for number in range(len(names))]

    def gradients(self, step: int) -> dict[str, Any]:
        prefix = f"gradient/{step}/"
        return {
            key.removeprefix(prefix): self.arrays[key].astype(np.float64)
            for key in self.arrays.files
            if key.startswith(prefix)
        }


@pytest.fixture(scope="module", params=[(1, True), (4, True), (1, False)], ids=["acc1", "acc4", "unshifted"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    accumulation, shifted = request.param
    out = tmp_path_factory.mktemp("run")
    record = out / "tensors.npz"
    trainer = [sys.executable, str(TRAINER), "--record", str(record), "--accumulation", str(accumulation)]
    trainer += [] if shifted else ["--unshifted"]
    command = [sys.executable, "-m", "sidestep.worker.cli", "run", "--out", str(out), "--", *trainer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return Recorded(record, read_fragments(out), shifted=shifted)


pytestmark = pytest.mark.timeout(180)


def test_tokens_and_losses_equal_the_reference_at_every_due_step(recorded: Recorded) -> None:
    for step in range(0, NUM_STEPS, 2):
        batches = recorded.batches(step)
        reference.assert_equal(recorded.by_step[step], reference.token_metrics(batches, recorded.vocabulary), step)
        reference.assert_equal(recorded.by_step[step], reference.loss_metrics(batches, recorded.vocabulary), step)
        assert recorded.by_step[step]["tokens/answer_most_common_token_text"]
    assert not [key for key in recorded.by_step.get(1, {}) if key.startswith(("tokens/", "loss/"))]


def test_gradients_equal_the_reference_at_every_due_step(recorded: Recorded) -> None:
    for step in range(0, NUM_STEPS, 3):
        gradients = recorded.gradients(step)
        expected = reference.gradient_metrics(gradients)
        absolute = {
            key: 1e-5 * expected[f"{key.removesuffix('/mean')}/std"] for key in expected if key.endswith("/mean")
        }
        reference.assert_equal(recorded.by_step[step], expected, step, absolute)
        for module in {name.partition(".")[0] for name in gradients}:
            of_module = [value for name, value in gradients.items() if name.startswith(f"{module}.")]
            histogram = recorded.by_step[step][f"gradients/{module}/log10_histogram"]
            counts = reference.log10_histogram(of_module)
            assert sum(histogram["values"]) == sum(counts)
            moved = np.abs(np.cumsum(histogram["values"]) - np.cumsum(counts)).max()
            assert moved <= max(3, 1e-4 * sum(counts)), "float32 logarithms may move a value over a bin's edge"


def test_answer_lengths_of_every_step_are_counted_once(recorded: Recorded) -> None:
    for step in range(0, NUM_STEPS, 2):
        lengths = recorded.answer_lengths(step)
        reference.assert_equal(recorded.by_step[step], reference.answer_length_metrics(lengths, 0), step)
        histogram = recorded.by_step[step]["data/answer_length_histogram_epoch_0"]
        by_length = {
            round((low + high) / 2): count
            for low, high, count in zip(histogram["bins"][:-1], histogram["bins"][1:], histogram["values"], strict=True)
            if count
        }
        assert by_length == {length: lengths.count(length) for length in set(lengths)}


def test_generations_equal_the_models_own_one_by_one(recorded: Recorded) -> None:
    for step in range(0, NUM_STEPS, 3):
        generated = recorded.generated(step)
        reference.assert_equal(
            recorded.by_step[step], reference.generation_metrics(generated, recorded.vocabulary), step
        )
        reference.assert_equal(
            recorded.by_step[step], dict(reference.collapse_metrics(generated, recorded.vocabulary)), step
        )


def test_learning_rates_are_those_that_the_step_was_taken_with(recorded: Recorded) -> None:
    for step in range(0, NUM_STEPS, 2):
        rates = recorded.arrays[f"lr/{step}"].tolist()
        expected = {f"lr/{name}": rate for name, rate in zip(EXPECTED_GROUPS, rates, strict=True)}
        reference.assert_equal(recorded.by_step[step], expected, step)


def test_the_samples_table_shows_question_target_and_generation(recorded: Recorded) -> None:
    tables = recorded.run.tables("generation/samples")
    assert len(tables) == 3
    newest, files = tables[-1]
    columns = newest["columns"]
    for name in ("step", "image", "question", "generated", "target", "length"):
        assert name in columns
    rows = [dict(zip(columns, row, strict=True)) for row in newest["data"]]
    assert len(rows) == 8
    assert all(row["question"] and row["target"] and "<|" not in row["question"] for row in rows)
    lengths = [len(reference.cut(ids, recorded.vocabulary.eos)[0]) for ids in recorded.generated(6)]
    assert [row["length"] for row in rows] == lengths
    assert all(files[row["image"]["path"]].read_bytes().startswith(b"\x89PNG") for row in rows)


def test_every_name_of_the_table_is_in_the_run_and_no_other(recorded: Recorded) -> None:
    keys = {key for row in recorded.rows for key in row}
    names = {spec.key for key in keys if (spec := spec_of(key)) is not None}
    wanted = {spec.key for spec in METRICS} - set(NEEDS_ANOTHER_RUN)
    assert wanted - names == set()
    assert names & set(NEEDS_ANOTHER_RUN) == set()
    others = {key for key in keys if spec_of(key) is None}
    allowed = re.compile(r"_step|_timestamp|_runtime|train/\w+|sidecar/[\w/]+|epoch|val_loss|note")
    assert {key for key in others if not allowed.fullmatch(key)} == set()


def test_what_the_trainer_logged_itself_is_in_the_same_run(recorded: Recorded) -> None:
    assert recorded.by_step[NUM_STEPS - 1]["val_loss"] == 1.25
    assert recorded.by_step[NUM_STEPS - 1]["note"] == "own"
    assert {project for project, _, _ in recorded.run.names} == {"sidestep-demo"}
    assert recorded.run.exit_codes == [0]
