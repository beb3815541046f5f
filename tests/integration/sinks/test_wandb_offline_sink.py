"""The W&B child process, offline: what it writes is read back by W&B's own protobuf."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.integration.sinks.conftest import RunSink, Supervise
from tests.support.outbox_writing import START_SECONDS, OutboxWriter, row_entry, run_entry, table_entry
from tests.support.wandb_backend import WandbBackend
from tests.support.wandb_offline import OfflineRun, read_fragments
from tests.support.wandb_supervising import assert_every_row_once, sync_fragments, until

from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.sinks.wandb_position import fragment_folders

Run = tuple[OfflineRun, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, run_sink: RunSink) -> Run:
    """Bring one run with one entry of every kind to W&B."""
    folder = tmp_path_factory.mktemp("whole")
    outbox = OutboxWriter(folder / "journal")
    histogram = {"_type": "histogram", "counts": [3, 1], "edges": [0.0, 1.0, 2.0]}
    outbox.write([run_entry()])
    outbox.write(
        [row_entry(0), row_entry(1, **{"gradients/vision/histogram": histogram, "collapse/collapse_reason": "none"})]
    )
    outbox.write(
        [
            table_entry(2, "t-2", rows=3),
            entry("notice", {"text": "⚠️ MODEL COLLAPSE DETECTED: x", "level": "critical", "code": "c"}),
        ]
    )
    outbox.write(
        [
            entry(
                "alert",
                {"id": "inc-1", "title": "Model collapse " * 9, "text": "all answers are A", "level": "critical"},
            )
        ]
    )
    own = {
        "val/accuracy": 0.5,
        "val/epoch": 2,
        "loss/val": 1.5,
        "_axes": {"val/accuracy": "val/epoch", "loss/val": "val/epoch"},
    }
    epoch = {"data/answer_length_mean": 3.5, "data/answer_length_mean_epoch_2": 3.5, "epoch": 2}
    outbox.write([row_entry(3, **own), row_entry(4, **epoch), entry("finish", {"exit_code": 3, "reason": "killed"})])
    outbox.close()
    temporary = tmp_path_factory.mktemp("temporary")
    result = run_sink(outbox, folder / "out", env={**os.environ, "TMPDIR": str(temporary)})
    assert result.exit_code == 0, result.log
    assert [place for place in temporary.rglob("*") if place.is_file()] == []
    assert not (folder / "out" / "wandb-sink-run1.tmp").exists()
    return read_fragments(folder / "out"), result.reports


def test_row_k_of_the_outbox_is_step_k_with_its_own_time(whole_run: Run) -> None:
    run, reports = whole_run
    assert [row["train/step"] for row in run.rows] == [0, 25, 50, 75, 100]
    assert [row["_timestamp"] for row in run.rows] == [START_SECONDS + k for k in range(5)]
    assert [row.get("loss/total") for row in run.rows] == [0.0, 0.5, None, 1.5, 2.0]
    assert reports[-1]["state"] == "finished"
    assert (reports[-1]["num_rows"], reports[-1]["position"], reports[-1]["alerts_sent"]) == (5, 8, 1)
    assert reports[-1]["confirmed_position"] == 8
    assert not any(report["tables_undone"] for report in reports)


def test_a_histogram_is_its_counts_and_edges(whole_run: Run) -> None:
    row = whole_run[0].rows[1]
    assert row["gradients/vision/histogram._type"] == "histogram"
    assert row["gradients/vision/histogram.values"] == [3, 1]
    assert row["gradients/vision/histogram.bins"] == [0.0, 1.0, 2.0]


def test_a_table_has_its_pictures(whole_run: Run) -> None:
    run, _ = whole_run
    ((table, files),) = run.tables("generation/samples")
    assert table["columns"] == ["step", "image", "question", "generated", "target", "length"]
    assert [row[2] for row in table["data"]] == ["question 0", "question 1", "question 2"]
    for shade, row in enumerate(table["data"]):
        with Image.open(files[row[1]["path"]]) as picture:
            assert (picture.size, picture.getpixel((0, 0))) == ((4, 3), (shade, 2 * shade, 255 - shade))
    assert run.rows[2]["sidecar/table_id"] == "t-2"
    assert run.rows[2]["generation/samples.nrows"] == 3


def test_an_alert_names_its_incident(whole_run: Run) -> None:
    ((title, text, level),) = whole_run[0].alerts
    assert text == "all answers are A\n[incident inc-1]"
    assert level == "ERROR"
    assert len(title) < 64


def test_a_notice_is_a_line_of_the_log(whole_run: Run) -> None:
    assert [line.rstrip("\n") for line in whole_run[0].log_lines] == ["⚠️ MODEL COLLAPSE DETECTED: x"]


def test_the_run_carries_the_trainers_configuration(whole_run: Run) -> None:
    run, _ = whole_run
    assert run.config["lr"] == 0.001
    assert run.config["model"] == {"depth": 4}
    assert run.config["_sidestep"]["environment"]["git_commit"] == "0123abc"
    assert run.config["_sidestep"]["environment"]["command"] == ["python", "train.py"]
    assert run.config["_sidestep"]["settings"] == {"collapse_deadline": 500}
    assert run.names == {("digits", "lab", "first try")}
    assert run.tags == {"a", "b"}
    assert run.exit_codes == [3]


def test_every_key_has_one_axis(whole_run: Run) -> None:
    axes = whole_run[0].axes
    assert axes["loss/*"] == axes["gradients/*"] == axes["generation/*"] == axes["collapse/*"] == "train/step"
    assert axes["data/answer_length_mean_epoch_*"] == axes["train/attempt"] == "train/step"
    assert axes["data/answer_length_mean"] == "epoch"
    assert axes["val/accuracy"] == "val/epoch"
    assert axes["train/step"] == axes["epoch"] == axes["val/epoch"] == ""
    assert "loss/val" not in axes
    assert not any("_axes" in key for row in whole_run[0].rows for key in row)


def test_temporary_files_of_tables_and_of_killed_sinks_are_removed(
    outbox: OutboxWriter, supervise: Supervise, tmp_path: Path
) -> None:
    scratch = tmp_path / "out" / "wandb-sink-run1.tmp"
    scratch.mkdir(parents=True)
    (scratch / "left-by-a-killed-sink").write_text("x")
    supervisor = supervise()
    outbox.write([run_entry(), *(table_entry(number, f"t-{number}") for number in range(5))])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().num_rows == 5)
    assert [place for place in scratch.rglob("*") if place.is_file()] == []
    assert {place.name.split("wandb-")[-1] for place in scratch.iterdir()} == {"artifacts", "media"}


def test_disabled_needs_nothing(outbox: OutboxWriter, tmp_path: Path, run_sink: RunSink) -> None:
    result = run_sink(outbox, tmp_path / "out", "--mode", "disabled")
    assert (result.exit_code, [report["state"] for report in result.reports]) == (0, ["disabled"])
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_opened_again_until_there_is_more(
    outbox: OutboxWriter, tmp_path: Path, run_sink: RunSink
) -> None:
    out = tmp_path / "out"
    outbox.write([run_entry(), row_entry(0), entry("finish", {"exit_code": 1, "reason": "crashed"})])
    assert run_sink(outbox, out).last["state"] == "finished"
    again = run_sink(outbox, out)
    assert (again.exit_code, again.last["state"], again.last["position"]) == (0, "finished", 2)
    assert read_fragments(out).exit_codes == [1]

    outbox.write([row_entry(1), entry("finish", {"exit_code": 0, "reason": ""})])  # a second attempt of the run
    assert run_sink(outbox, out).last["num_rows"] == 2
    run = read_fragments(out)
    assert [row["train/step"] for row in run.rows] == [0, 25]
    assert run.exit_codes == [1, 0]
    # A folder is named by the second in which W&B was asked for a run; `starts` says when it had one.
    assert len(fragment_folders(out, "run1")) == len(run.starts) == 2
    assert run.starts == sorted(run.starts)


def test_a_row_that_cannot_be_told_keeps_its_number(outbox: OutboxWriter, tmp_path: Path, run_sink: RunSink) -> None:
    ragged = {"_timestamp": 1.7e9, "train/step": 5, "key": "generation/samples", "columns": ["a"], "rows": [[1, 2]]}
    torn = {**ragged, "rows": [[{"_type": "image", "png": "bm8gcGljdHVyZQ=="}]]}
    crooked = {"_type": "histogram", "counts": [1], "edges": [0.0]}
    outbox.write(
        [run_entry(), entry("table", ragged), entry("table", torn), row_entry(2, **{"loss/histogram": crooked})]
    )
    outbox.write(
        [entry("row", {}), OutboxEntry(kind="row", payload=b"no json"), OutboxEntry(kind="row", payload=b"[1]")]
    )
    outbox.write([row_entry(6, _step=99, _runtime=1), row_entry(7), entry("finish", {"exit_code": 0, "reason": ""})])
    result = run_sink(outbox, tmp_path / "out")
    assert (result.last["num_rows"], result.last["entries_refused"]) == (8, 6)
    run = read_fragments(tmp_path / "out")
    rows = run.rows
    assert run.own_steps == [list(range(8))]
    assert [row.get("train/step") for row in rows] == [None, None, None, None, None, None, 150, 175]
    assert all("sidecar/refused_row" in row for row in rows[:6])
    assert "other columns" in rows[0]["sidecar/refused_row"]


@pytest.mark.parametrize("cut", [32 * 1024, 40_000], ids=["a kill: at a block's end", "a full disk: anywhere"])
def test_a_torn_log_keeps_no_fragment_from_the_sync(
    outbox: OutboxWriter, tmp_path: Path, run_sink: RunSink, backend: WandbBackend, cut: int
) -> None:
    out, finish = tmp_path / "out", entry("finish", {"exit_code": 0, "reason": ""})
    outbox.write([run_entry(), *(row_entry(number, **{"loss/note": "x" * 600}) for number in range(60)), finish])
    assert run_sink(outbox, out).last["state"] == "finished"
    (log,) = (out / "wandb").glob("offline-run-*/run-run1.wandb")
    os.truncate(log, cut)
    outbox.write([row_entry(60), finish])
    assert run_sink(outbox, out).last["num_rows"] == 61
    assert log.stat().st_size < cut
    sync_fragments(out, backend)
    assert_every_row_once(backend.runs["run1"], 61)


def test_rows_of_another_outbox_end_the_sink_for_good(tmp_path: Path, run_sink: RunSink) -> None:
    for journal, rows, code in (("first", 3, 0), ("second", 2, 65)):
        outbox = OutboxWriter(tmp_path / journal)
        outbox.write([run_entry(), *map(row_entry, range(rows)), entry("finish", {"exit_code": 0, "reason": ""})])
        outbox.close()
        result = run_sink(outbox, tmp_path / "out")
        assert result.exit_code == code
        (tmp_path / "out" / "wandb-sink-run1.json").unlink(missing_ok=True)  # lost with the first journal
    assert result.last["state"] == "failed"
    assert "has 3 rows, this outbox 2" in result.last["detail"]
    assert len(read_fragments(tmp_path / "out").rows) == 3


def test_a_call_that_fails_is_reported_with_its_reason(outbox: OutboxWriter, tmp_path: Path, run_sink: RunSink) -> None:
    outbox.write([run_entry(project="no/slash"), row_entry(0)])
    result = run_sink(outbox, tmp_path / "out")
    assert (result.exit_code, result.last["state"]) == (75, "failed")
    assert "no/slash" in result.last["detail"]
