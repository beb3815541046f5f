"""The user's own story: a data bug turns every answer into "A".

The detectors say so within steps and name the data as the cause; the user's four rules say so at the next check.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.support.demo_runs import finished, start
from tests.support.wandb_offline import read_fragments

from sidestep.protocol.metric_names import COLLAPSE_LINE

REASON = "single_token_dominance+identical_sequences"
LINE = COLLAPSE_LINE.format(reason=REASON)
NUM_STEPS = 120
ONSET = NUM_STEPS // 2
INTERVAL = 25
EXPECTED = {"collapse_reason": REASON, "most_common_token_text": "A", "most_common_ratio": 1.0, "unique_sequences": 1}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_model_that_learns_to_answer_a_is_called_collapsed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sidestep.worker.cli", "demo", "--out", str(tmp_path)]
    output = finished(start([*command, "--steps", str(NUM_STEPS), "--fail", "labels-to-A"]), 200)
    assert output.splitlines().count(LINE) == 1, output
    assert (tmp_path / "worker.log").read_text(encoding="utf-8").splitlines().count(LINE) == 1

    run = read_fragments(tmp_path)
    checks = {int(row["train/step"]): row for row in run.rows if "collapse/is_collapsed" in row}
    first_after = next(step for step in checks if step > ONSET)
    assert [checks[step]["collapse/is_collapsed"] for step in checks if INTERVAL <= step < ONSET] == [0] * 2
    assert first_after <= ONSET + INTERVAL
    found = {name: checks[first_after][f"collapse/{name}"] for name in EXPECTED}
    assert found == EXPECTED
    assert [text.startswith(LINE) for _, text, _ in run.alerts].count(True) == 1

    opened = [int(row["train/step"]) for row in run.rows if row.get("incidents/open")]
    assert ONSET < min(opened) <= ONSET + 10 < first_after, "the detectors are ahead of the rules"
    collapse = [text for _, text, _ in run.alerts if text.startswith(COLLAPSE_LINE.format(reason=""))]
    assert len(collapse) == 2, "one by the detectors, one by the rules"
    assert "'A'" in collapse[0]
    assert "likely cause: the training data have become one answer" in collapse[0]

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Model collapse detected" in page
    assert f"First alarm at step {min(opened)}: " in page
    assert f"The four rules saw it in the answers of step {first_after}." in page
