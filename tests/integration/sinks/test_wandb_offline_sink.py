"""The W&B child process, offline: what it writes is read back by W&B's own protobuf."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.outbox_writing import START_SECONDS, OutboxWriter, row_entry, run_entry, table_entry
from tests.support.wandb_offline import OfflineRun, read_fragments

from sidestep.worker.outbox import entry


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[OutboxWriter]:
    writer = OutboxWriter(tmp_path / "journal")
    yield writer
    writer.close()


def run_sink(outbox: OutboxWriter, out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Run a child to its end; return its exit code and its reports."""
    command = [
        sys.executable, "-m", "sidestep.worker.sinks.wandb_sink",
        "--journal", str(outbox.folder), "--run", outbox.run_id, "--out", str(out), *options,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, timeout=50)
    assert done.stdout, done.stderr.decode()
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfflineRun, list[dict[str, Any]]]:
    """Bring one run with one entry of every kind to W&B."""
    folder = tmp_path_factory.mktemp("whole")
    outbox = OutboxWriter(folder / "journal")
    histogram = {"_type": "histogram", "counts": [3, 1], "edges": [0.0, 1.0, 2.0]}
    outbox.write([run_entry()])
    outbox.write([row_entry(0), row_entry(1, **{"gradients/vision/histogram": histogram, "collapse/collapse_reason": "none"})])
    outbox.write([table_entry(2, "t-2", rows=3), entry("notice", {"text": "⚠️ MODEL COLLAPSE DETECTED: x", "level": "critical", "code": "c"})])
    outbox.write([entry("alert", {"id": "inc-1", "title": "Model collapse " * 9, "text": "all answers are A", "level": "critical"})])
    own = {"val/accuracy": 0.5, "val/epoch": 2, "loss/val": 1.5, "_axes": {"val/accuracy": "val/epoch", "loss/val": "val/epoch"}}
    epoch = {"data/answer_length_mean": 3.5, "data/answer_length_mean_epoch_2": 3.5, "epoch": 2}
    outbox.write([row_entry(3, **own), row_entry(4, **epoch), entry("finish", {"exit_code": 3, "reason": "killed"})])
    outbox.close()
    code, reports = run_sink(outbox, folder / "out")
    assert code == 0, reports
    return read_fragments(folder / "out"), reports


def test_row_k_of_the_outbox_is_step_k_with_its_own_time(whole_run: tuple[OfflineRun, list[dict[str, Any]]]) -> None:
    run, reports = whole_run
    assert [row["train/step"] for row in run.rows] == [0, 25, 50, 75, 100]
    assert [row["_timestamp"] for row in run.rows] == [START_SECONDS + k for k in range(5)]
    assert [row.get("loss/total") for row in run.rows] == [0.0, 0.5, None, 1.5, 2.0]
    assert reports[-1]["state"] == "finished"
    assert (reports[-1]["num_rows"], reports[-1]["position"], reports[-1]["alerts_sent"]) == (5, 8, 1)
    assert sorted(number for report in reports for number in report["tables"]) == [2]


def test_a_histogram_is_its_counts_and_edges(whole_run: tuple[OfflineRun, list[dict[str, Any]]]) -> None:
    row = whole_run[0].rows[1]
    assert row["gradients/vision/histogram._type"] == "histogram"
    assert row["gradients/vision/histogram.values"] == [3, 1]
    assert row["gradients/vision/histogram.bins"] == [0.0, 1.0, 2.0]


def test_a_table_has_its_pictures(whole_run: tuple[OfflineRun, list[dict[str, Any]]]) -> None:
    run, _ = whole_run
    (table,) = run.tables("generation/samples")
    assert table["columns"] == ["step", "image", "question", "generated", "target", "length"]
    assert [row[2] for row in table["data"]] == ["question 0", "question 1", "question 2"]
    assert [(row[1]["_type"], row[1]["width"], row[1]["height"]) for row in table["data"]] == [("image-file", 4, 3)] * 3
    assert run.rows[2]["sidecar/table_id"] == "t-2"
    assert run.rows[2]["generation/samples.nrows"] == 3


def test_an_alert_names_its_incident(whole_run: tuple[OfflineRun, list[dict[str, Any]]]) -> None:
    ((title, text, level),) = whole_run[0].alerts
    assert text == "all answers are A\n[incident inc-1]"
    assert level == "ERROR"
    assert len(title) < 64


def test_a_notice_is_a_line_of_the_log(whole_run: tuple[OfflineRun, list[dict[str, Any]]]) -> None:
    assert [line.rstrip("\n") for line in whole_run[0].log_lines] == ["⚠️ MODEL COLLAPSE DETECTED: x"]


def test_the_run_carries_the_trainers_configuration(whole_run: tuple[OfflineRun, list[dict[str, Any]]]) -> None:
    run, _ = whole_run
    assert run.config["lr"] == 0.001
    assert run.config["model"] == {"depth": 4}
    assert run.config["_sidestep"]["environment"]["git_commit"] == "0123abc"
    assert run.config["_sidestep"]["environment"]["command"] == ["python", "train.py"]
    assert run.config["_sidestep"]["settings"] == {"collapse_deadline": 500}
    assert run.names == {("digits", "lab", "first try")}
    assert run.tags == {"a", "b"}
    assert run.exit_codes == [3]


def test_every_key_has_one_axis(whole_run: tuple[OfflineRun, list[dict[str, Any]]]) -> None:
    axes = whole_run[0].axes
    assert axes["loss/*"] == axes["gradients/*"] == axes["generation/*"] == axes["collapse/*"] == "train/step"
    assert axes["data/answer_length_mean_epoch_*"] == axes["train/attempt"] == "train/step"
    assert axes["data/answer_length_mean"] == "epoch"
    assert axes["val/accuracy"] == "val/epoch"
    assert axes["train/step"] == axes["epoch"] == axes["val/epoch"] == ""
    assert "loss/val" not in axes
    assert not any("_axes" in key for row in whole_run[0].rows for key in row)
