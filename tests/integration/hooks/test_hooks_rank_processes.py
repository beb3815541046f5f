"""What the tests with ranks rely on: a hang is told from ours, tried once more, and nothing is left running."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.support.rank_processes import run_once, run_ranks, training_stacks

HANGING = """
import sys, threading, time
from tests.support.rank_processes import say_where_it_hangs

def wait_for_ever():
    time.sleep(60)

threading.Thread(target=wait_for_ever, daemon=True).start()  # the hooks have threads as well, in every dump
say_where_it_hangs(1.5, grace_seconds=1.5)  # enough for one that does not hang to end meanwhile
if sys.argv[1] == "0":
    wait_for_ever()
"""
WITH_A_GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def script(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "rank.py").write_text(text, encoding="utf-8")
    return str(folder / "rank.py")


def test_a_hang_outside_of_the_hooks_is_tried_once_more(tmp_path: Path) -> None:
    rank = script(tmp_path, HANGING)
    _, attempt = run_ranks(lambda attempt: [[sys.executable, rank, str(attempt)]] * 2, timeout_seconds=30)
    assert attempt == 1


def test_a_hang_within_the_hooks_is_a_failure_at_once(tmp_path: Path) -> None:
    rank = script(tmp_path / "trainer_hooks", HANGING)
    with pytest.raises(AssertionError, match=r"exit codes \(3,\), attempt 0") as caught:
        run_ranks(lambda attempt: [[sys.executable, rank, str(attempt)]], timeout_seconds=30)
    [stack] = training_stacks(str(caught.value))
    assert "wait_for_ever" in stack


def test_a_failure_is_no_hang(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \(7,\), attempt 0"):
        run_ranks(lambda _: [[sys.executable, "-c", "raise SystemExit(7)"]], timeout_seconds=30)


def test_when_time_is_up_the_whole_tree_is_gone(tmp_path: Path) -> None:
    ended = run_once([[sys.executable, script(tmp_path, WITH_A_GRANDCHILD)]], timeout_seconds=10)
    assert ended.codes == (None,)
    state = Path(f"/proc/{int(ended.said)}/stat")
    assert not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
