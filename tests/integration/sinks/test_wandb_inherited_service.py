"""A trainer with a live run of its own hands its wandb-core on by the environment; the sink must not share it."""

from __future__ import annotations

from pathlib import Path

from tests.integration.sinks.conftest import RunSink
from tests.support.outbox_writing import OutboxWriter, row_entry, run_entry
from tests.support.wandb_offline import read_fragments
from tests.support.wandb_supervising import FINISH


def test_a_core_named_by_the_environment_is_not_used(run_sink: RunSink, outbox: OutboxWriter, tmp_path: Path) -> None:
    outbox.write([run_entry(), row_entry(0), row_entry(1), FINISH])
    nobody = {"WANDB_SERVICE": "3-1-unix-/nonexistent/socket"}
    result = run_sink(outbox, tmp_path / "out", "--mode", "offline", env=nobody)
    assert result.exit_code == 0, result.log
    assert len(read_fragments(tmp_path / "out").rows) == 2
