"""Who has a journal, what a commit means to the disk below, and what a copy of the folder is worth."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.wire_trainer import WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.messages import Welcome
from sidestep.worker.intake.journal import Journal

WRITE_TWO_SEGMENTS = """
import sys
from pathlib import Path
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.segments import Row
journal = Journal(Path(sys.argv[1]), segment_bytes=1 << 16)
for number in range(20):
    journal.segments.append([Row("inc", 0, number + 1, 13, -1, 1, 0, 1.5, number, b"y" * 8_000)])
    print(f"acked {number}", flush=True)
journal.close()
"""


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    yield made
    made.remove()


def test_a_second_worker_is_told_which_process_has_the_journal(worker: WorkerProcess) -> None:
    worker.start()
    assert worker.process is not None
    second = worker.run("worker", "--endpoint", f"ipc://{worker.folder}/other", "--journal", str(worker.journal))
    assert second.returncode == 1
    assert f"another worker has the journal {worker.journal} open (pid {worker.process.pid})" in second.stderr
    assert "name another folder with --journal" in second.stderr
    with WireTrainer(worker.address) as trainer:
        trainer.greet()  # the first one is not concerned
        trainer.wait_for_acks(trainer.send_step(0))


def test_the_lock_of_a_killed_worker_is_no_obstacle(worker: WorkerProcess) -> None:
    worker.start()
    assert worker.process is not None
    first = worker.process.pid
    worker.kill()
    assert (worker.journal / "lock").read_text().strip() == str(first)
    worker.start()
    assert (worker.journal / "lock").read_text().strip() == str(worker.process.pid)
    assert worker.terminate() == 0


def test_a_copy_made_beside_a_worker_is_a_journal_of_its_own(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks(trainer.send_step(0))
        wait_until(worker.closed_steps, "the step closes")
        copy = worker.folder / "copy"
        shutil.copytree(worker.journal, copy)
        journal = Journal(copy)
        assert journal.segments.committed("inc-1", 0).ranges().tolist() == [[1, 4]]
        assert len(journal.index.closings("run-1")) == 2  # its tables, and the step
        assert journal.missing_messages("run-1") == ""
        journal.close()
        worker.kill()
        shutil.rmtree(worker.journal)
        shutil.copytree(copy, worker.journal)
        (worker.journal / "worker.json").unlink()
        worker.start()
        trainer.say(make_hello())
        assert trainer.wait_for(Welcome).committed.tolist() == [[1, 4]]
        trainer.wait_for_acks(trainer.send_step(1))
        wait_until(lambda: len(worker.closed_steps()) == 2, "the copy goes on")


def test_every_ack_follows_an_fsync_and_every_new_segment_one_of_the_folder(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("there is no strace to see system calls with")
    folder, log = tmp_path / "journal", tmp_path / "calls"
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write", "-o", str(log), sys.executable, "-c",
         WRITE_TWO_SEGMENTS, str(folder)],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    if "ptrace" in done.stderr or "PTRACE" in done.stderr:
        pytest.skip(f"strace may not look at processes here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    acks = [at for at, call in enumerate(calls) if '"acked' in call]
    assert len(acks) == 20, log.read_text()[-2_000:]
    before = 0
    for ack in acks:
        synced = [re.findall(r"(?:fsync|fdatasync)\(\d+<([^>]*)>", call) for call in calls[before:ack]]
        assert any("segment-" in name and name.endswith("-wal") for names in synced for name in names)
        before = ack
    of_folder = [call for call in calls if re.search(rf"fsync\(\d+<{re.escape(os.path.realpath(folder))}>\)", call)]
    assert len(of_folder) >= len(list(folder.glob("segment-*.sqlite")))
