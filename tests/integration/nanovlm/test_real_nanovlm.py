"""nanoVLM's own train.py with the lines of docs/nanovlm.md: every family against the reference, and nothing changed.

Outside of CI: ``SIDESTEP_NANOVLM`` names a checkout of it at the commit that the page names, and
``SIDESTEP_NANOVLM_PYTHON`` a Python that has what nanoVLM needs, and Sidestep (left out, this one).
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import reference
from tests.support.wandb_offline import OfflineRun, read_fragments

ROOT = Path(__file__).resolve().parents[3]
TRAINER = Path(__file__).with_name("nanovlm_training.py")
PAGE = ROOT / "docs" / "nanovlm.md"
CHECKOUT = os.environ.get("SIDESTEP_NANOVLM", "")
PYTHON = os.environ.get("SIDESTEP_NANOVLM_PYTHON", sys.executable)
NUM_STEPS = 30
BATCH_INTERVAL, GRADIENT_INTERVAL, GENERATION_INTERVAL, ANSWER_INTERVAL = 3, 5, 10, 6
NUM_SAMPLES = 6
MODULES = {"MP": "modality_projector", "vision_encoder": "vision_encoder", "decoder": "decoder"}
GROUPS = ("modality_projector", "vision_encoder", "language_model")

pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="SIDESTEP_NANOVLM names no checkout of nanoVLM"),
    pytest.mark.timeout(900),
    pytest.mark.slow,
]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How nanoVLM is run."""

    accumulation: int = 1
    compiled: bool = False
    ranks: int = 1
    reads_out: bool = False
    """With the page's second part: its own host reads are taken out."""
    conversations: int = 400


WAYS = {
    "acc1": Way(conversations=120),  # so few that epochs begin within the run
    "acc8": Way(accumulation=8, conversations=2600),
    "leftovers": Way(accumulation=4, conversations=300),  # an epoch ends between two updates
    "compiled": Way(compiled=True),
    "two-ranks": Way(ranks=2, accumulation=2, conversations=1200),
    "without-its-reads": Way(reads_out=True),
}


def diffs() -> list[str]:
    return re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def patched(out: Path, count: int) -> Path:
    """Apply the first ``count`` diffs of the page to nanoVLM's train.py, as a user would."""
    folder = out / f"patched-{count}"
    folder.mkdir()
    target = folder / "train.py"
    target.write_bytes((Path(CHECKOUT) / "train.py").read_bytes())
    for number, text in enumerate(
        re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[:count]
    ):
        patch = folder / f"{number}.diff"
        patch.write_text(text, encoding="utf-8")
        subprocess.run(["git", "apply", patch.name], cwd=folder, check=True, timeout=30)
    return target


def run(command: list[str], out: Path) -> str:
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "hf"), "PYTHONPATH": str(ROOT / "src")}
    environment = os.environ | own
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout + done.stderr


def training(way: Way, train_py: Path, out: Path, data: Path, *further: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(way.ranks)]
    return [
        PYTHON, *(launcher if way.ranks > 1 else []), str(TRAINER), "train", CHECKOUT, *map(str, (train_py, data, out)),
        "--accumulation", str(way.accumulation), "--steps", str(NUM_STEPS), *(["--compile"] if way.compiled else []),
        *further,
    ]  # fmt: skip


def read(file: Path) -> dict[str, NDArray[Any]]:
    with np.load(file) as arrays:
        return dict(arrays)


class Trained:
    """What the trainers with and without the lines recorded, and what the run says."""

    def __init__(self, way: Way, out: Path) -> None:
        self.way = way
        data = out / "data"
        run([PYTHON, str(TRAINER), "prepare", str(data), "--conversations", str(way.conversations)], out)
        run(training(way, patched(out, 0), out / "off", data, "--unpatched"), out)
        lines = patched(out, 2 if way.reads_out else 1)
        hooked = training(way, lines, out / "on", data, "--record")
        self.console = run([PYTHON, "-m", "sidestep.worker.cli", "run", "--out", str(out / "run"), "--", *hooked], out)
        self.off = [read(out / "off" / f"rank{rank}.npz") for rank in range(way.ranks)]
        self.on = [read(out / "on" / f"rank{rank}.npz") for rank in range(way.ranks)]
        self.run: OfflineRun = read_fragments(out / "run")
        size, eos, image = self.on[0]["vocabulary"].tolist()
        self.vocabulary = reference.Vocabulary(size=size, eos=eos, image=image)
        self.by_step: dict[int, dict[str, Any]] = {}
        for row in self.run.rows:
            self.by_step.setdefault(int(row["train/step"]), {}).update(row)

    def batches(self, step: int) -> list[reference.RawBatch]:
        places = [
            (arrays, place)
            for arrays in self.on
            for place in sorted({key.rpartition("/")[0] for key in arrays if key.startswith(f"batch/{step}/")})
        ]
        return [
            reference.RawBatch(
                input_ids=arrays[f"{place}/input_ids"],
                labels=arrays[f"{place}/labels"],
                mask=arrays[f"{place}/mask"],
                logits=arrays[f"{place}/logits"].astype(np.float64),
                loss=float(arrays[f"{place}/loss"]),
                shifted=True,
            )
            for arrays, place in places
        ]

    def answer_lengths(self, up_to_step: int) -> dict[int, list[int]]:
        """The content lengths of every answer so far, by the epoch that its micro-batch was taken from."""
        found: dict[int, list[NDArray[Any]]] = {}
        for arrays in self.on:
            for key in arrays:
                match = re.fullmatch(r"(batch/(\d+)/\d+)/labels", key)
                if match and int(match[2]) <= up_to_step:
                    found.setdefault(int(arrays[f"{match[1]}/epoch"]), []).extend(arrays[key])
        return {epoch: [length for row in rows for length in self._lengths(row)] for epoch, rows in found.items()}

    def _lengths(self, row: NDArray[Any]) -> list[int]:
        text = "".join("|" if i < 0 else f"{i}," for i in row)
        answers = [answer.split(",")[:-1] for answer in re.findall(r"(?:\d+,)+", text)]
        return [len(reference.cut([int(i) for i in answer], self.vocabulary.eos)[0]) for answer in answers]

    def gradients(self, step: int) -> dict[str, Any]:
        """By full name, nanoVLM's ``MP`` as the hooks show it."""
        prefix, arrays = f"gradient/{step}/", self.on[0]
        found = {}
        for key in arrays:
            if key.startswith(prefix):
                module, _, rest = key.removeprefix(prefix).partition(".")
                found[f"{MODULES[module]}.{rest}"] = arrays[key].astype(np.float64)
        return found

    def generated(self, step: int) -> list[list[int]]:
        return [self.on[0][f"generated/{step}/{number}"].tolist() for number in range(NUM_SAMPLES)]


@pytest.fixture(scope="module", params=list(WAYS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(WAYS[request.param], tmp_path_factory.mktemp("nanovlm"))


def test_losses_and_weights_are_those_of_the_run_without_the_lines(trained: Trained) -> None:
    for off, on in zip(trained.off, trained.on, strict=True):
        assert len(on["losses"]) >= NUM_STEPS * trained.way.accumulation
        assert np.isfinite(on["losses"]).all()
        np.testing.assert_array_equal(off["losses"], on["losses"])
        np.testing.assert_array_equal(off["weights"], on["weights"])


def test_tokens_and_losses_equal_the_reference(trained: Trained) -> None:
    for step in range(0, NUM_STEPS, BATCH_INTERVAL):
        batches = trained.batches(step)
        assert len(batches) >= trained.way.accumulation * trained.way.ranks
        reference.assert_equal(trained.by_step[step], reference.token_metrics(batches, trained.vocabulary), step)
        reference.assert_equal(trained.by_step[step], reference.loss_metrics(batches, trained.vocabulary), step)


def test_gradients_equal_the_reference(trained: Trained) -> None:
    for step in range(0, NUM_STEPS, GRADIENT_INTERVAL):
        expected = reference.gradient_metrics(trained.gradients(step))
        absolute = {
            key: 1e-5 * expected[f"{key.removesuffix('/mean')}/std"] for key in expected if key.endswith("/mean")
        }
        reference.assert_equal(trained.by_step[step], expected, step, absolute)


def test_answer_lengths_equal_the_reference_in_every_epoch(trained: Trained) -> None:
    shown: dict[str, Any] = {}
    for step in range(0, NUM_STEPS, ANSWER_INTERVAL):
        lengths = trained.answer_lengths(step)
        newest = max(lengths)
        reference.assert_equal(
            trained.by_step[step], reference.answer_length_metrics(lengths.pop(newest), newest), step
        )
        shown |= trained.by_step[step]
        for epoch, of_it in lengths.items():  # those that have ended keep their closing values
            closed = reference.answer_length_metrics(of_it, epoch)
            reference.assert_equal(shown, {key: closed[key] for key in closed if f"_epoch_{epoch}" in key}, step)
    assert newest > 1 or trained.way.conversations > 300


def test_prompts_are_what_its_chat_template_makes_of_the_first_question(trained: Trained) -> None:
    for number in range(NUM_SAMPLES):
        for kind in ("prompt", "tiles"):
            made, anew = (trained.on[0][f"{kind}/{number}/{which}"] for which in ("made", "anew"))
            np.testing.assert_array_equal(made, anew)


def test_generations_and_collapse_equal_its_own_generate(trained: Trained) -> None:
    for step in range(0, NUM_STEPS, GENERATION_INTERVAL):
        generated = trained.generated(step)
        assert step or len({tuple(ids) for ids in generated}) > 1, "the prompts are to tell themselves apart"
        reference.assert_equal(trained.by_step[step], reference.generation_metrics(generated, trained.vocabulary), step)
        reference.assert_equal(
            trained.by_step[step], dict(reference.collapse_metrics(generated, trained.vocabulary)), step
        )
    table, files = trained.run.tables("generation/samples")[-1]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    decoded = [str(text) for text in trained.on[0][f"texts/{NUM_STEPS - GENERATION_INTERVAL}"]]
    assert [row["generated"] for row in rows] == decoded
    assert {row["question"] for row in rows} == {"Which colour is it?"}
    assert {row["target"] for row in rows} <= {"red", "green", "blue", "white"}
    assert all(files[row["image"]["path"]].read_bytes().startswith(b"\x89PNG") for row in rows)


def test_learning_rates_are_those_of_the_step(trained: Trained) -> None:
    for step in range(0, NUM_STEPS, BATCH_INTERVAL):
        rates = trained.on[0][f"lr/{step}"].tolist()
        expected = {f"lr/{name}": rate for name, rate in zip(GROUPS, rates, strict=True)}
        reference.assert_equal(trained.by_step[step], expected, step)


def test_its_own_keys_are_in_the_same_run_at_their_own_steps(trained: Trained) -> None:
    for step in range(NUM_STEPS):
        row = trained.by_step[step]
        assert math.isclose(row["grad_norm"], float(trained.on[0][f"norm/{step}"]), rel_tol=1e-6)
        assert {"batch_loss", "val_loss"} <= set(row)
    if trained.way.ranks == 1:
        per_step = trained.on[0]["losses"][trained.way.accumulation - 1 :: trained.way.accumulation]
        for step, loss in enumerate(per_step[:NUM_STEPS] if trained.way.accumulation == 1 else []):
            assert math.isclose(trained.by_step[step]["batch_loss"], loss, rel_tol=1e-6)
        [lmms] = [row for row in trained.run.rows if "lmms_eval/mmstar" in row]
        assert (lmms["<lmms-eval-step>"], lmms["lmms_eval/mmstar"]) == (4, 0.25)
        assert trained.run.axes["lmms_eval/mmstar"] == "<lmms-eval-step>"
    for step in range(0, NUM_STEPS, 5):
        assert "training_stats/avg_tokens_per_second" in trained.by_step[step]
    keys = {key for row in trained.run.rows for key in row}
    assert {"epoch_loss", "epoch_duration", "epoch_tokens_per_second", "avg_epoch_time", "avg_time_per_sample"} <= keys


def test_it_is_one_run_with_its_name_and_both_configurations(trained: Trained) -> None:
    assert trained.run.names == {("nanoVLM", "an-entity", "tiny")}
    assert trained.run.exit_codes == [0]
    shown = str(trained.run.config)
    assert "'lm_hidden_dim': 48" in shown
    assert f"'gradient_accumulation_steps': {trained.way.accumulation}" in shown
    assert "sidestep: a measurement failed" not in trained.console


def test_labels_that_transformers_5_ignores_are_one_warning_and_no_crash(tmp_path: Path) -> None:
    run([PYTHON, str(TRAINER), "prepare", str(tmp_path / "data"), "--conversations", "120"], tmp_path)
    hooked = training(Way(), patched(tmp_path, 1), tmp_path / "on", tmp_path / "data", "--as-is")
    said = run([PYTHON, "-m", "sidestep.worker.cli", "run", "--out", str(tmp_path / "run"), "--", *hooked], tmp_path)
    assert "no samples could be made of the validation loader" in said
    assert said.count("had a batch without one labelled position") == 1
