"""``sidestep run``: a command with a worker beside it; signals, exit codes, and a worker that is killed half-way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.worker_process import wait_until

ROOT = Path(__file__).parents[3]

TRAINER = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from tests.support.wire_trainer import WireTrainer, make_hello
from sidestep.protocol.messages import Welcome

journal = pathlib.Path({journal!r})
with WireTrainer(os.environ["SIDESTEP_ENDPOINT"], run_id=os.environ["SIDESTEP_RUN_ID"]) as trainer:
    trainer.greet()
    for step in range(10):
        trainer.send_step(step)
        if step == 4 and {kill}:
            trainer.wait_for_acks(range(1, 13))
            pid = json.loads((journal / "worker.json").read_text())["pid"]
            os.kill(pid, signal.SIGKILL)
            heard = []
            while not any(isinstance(each, Welcome) for each in heard):
                trainer.say(make_hello())
                heard.append(trainer.receive(0.5))
            trainer.resend_unacked()
    trainer.goodbye(9)
    trainer.wait_for_acks(range(1, trainer.sequence + 1), 30.0)
print("trained", os.environ["SIDESTEP_ENDPOINT"])
sys.exit({exit_code})
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ss-"))
    yield made
    shutil.rmtree(made)


def environment(folder: Path) -> dict[str, str]:
    (folder / "rt").mkdir(mode=0o700, exist_ok=True)
    return {**os.environ, "SIDESTEP_HOME": str(folder / "home"), "SIDESTEP_RUNTIME": str(folder / "rt")}


def sidestep_run(folder: Path, *command: str, mode: str = "disabled") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sidestep.worker.cli", "run", "--out", str(folder / "out"), "--wandb-mode", mode, "--",
         *command],
        env=environment(folder), capture_output=True, text=True, timeout=55, check=False,
    )  # fmt: skip


def trainer(folder: Path, *, kill: bool = False, exit_code: int = 0) -> list[str]:
    script = folder / "train.py"
    journal = str(folder / "out" / "journal")
    script.write_text(TRAINER.format(root=str(ROOT), journal=journal, kill=kill, exit_code=exit_code))
    return [sys.executable, str(script)]


def query(folder: Path, text: str) -> list[tuple[object, ...]]:
    with closing(
        sqlite3.connect(f"file:{folder / 'out' / 'journal' / 'index.sqlite'}?mode=ro", uri=True)
    ) as connection:
        return connection.execute(text).fetchall()


def test_a_run_ends_with_report_journal_and_the_commands_exit_code(folder: Path) -> None:
    done = sidestep_run(folder, *trainer(folder, exit_code=7), mode="offline")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "trained ipc://" in done.stdout
    for said in ("report.html", "journal", "wandb leet"):
        assert said in done.stdout
    assert (folder / "out" / "report.html").stat().st_size > 1_000
    assert len(list((folder / "out" / "wandb").glob("offline-run-*"))) == 1
    assert "sidestep: run " in (folder / "out" / "worker.log").read_text()
    assert list((folder / "rt").iterdir()) == []  # the private socket's folder is gone
    assert [kind for (kind,) in query(folder, "SELECT kind FROM outbox ORDER BY position")][-1] == "finish"


def test_a_worker_that_is_killed_half_way_is_started_again_and_nothing_is_missing(folder: Path) -> None:
    done = sidestep_run(folder, *trainer(folder, kill=True))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started again" in (folder / "out" / "worker.log").read_text()
    closed = query(folder, "SELECT attempt, step, reason FROM step_closed ORDER BY closed_number")
    assert closed == [(0, step, "complete") for step in range(10)]
    rates = [
        json.loads(str(payload, "utf-8"))["train/step"]  # type: ignore[call-overload]
        for (payload,) in query(folder, "SELECT payload FROM outbox WHERE kind = 'row' ORDER BY position")
        if b"lr/vision_encoder" in payload  # type: ignore[operator]
    ]
    assert rates == list(range(10))


def test_a_command_that_never_attaches_is_told_of(folder: Path) -> None:
    done = sidestep_run(folder, sys.executable, "-c", "print('nothing')")
    assert done.returncode == 0
    assert "no report" in done.stdout
    assert "attach()" in done.stdout


def test_a_command_that_does_not_exist_gives_the_shells_code(folder: Path) -> None:
    done = sidestep_run(folder, "no-such-command-here")
    assert done.returncode == 127
    assert "no such command" in done.stdout


def test_sigterm_reaches_the_command_and_the_worker_is_not_left_behind(folder: Path) -> None:
    mark = folder / "ready"
    script = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "sidestep.worker.cli", "run", "--out", str(folder / "out"),
            "--wandb-mode", "disabled", "--", sys.executable, "-c", script,
        ],
        env=environment(folder), stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(mark.exists, "the command runs")
    worker = json.loads((folder / "out" / "journal" / "worker.json").read_text())["pid"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", "--commit-messages", "0", "--", "true"],
            "commit_messages: '0' (from the command line's --commit-messages)",
        ),
        (["run", "--endpoint", "http://x", "--", "true"], "'http://x' is neither ipc://PATH nor tcp://HOST:PORT"),
        (["run"], "name the command to run after --"),
        (["worker", "--endpoint", "ipc://relative"], "needs an absolute path"),
        (["worker", "--config", "/none.toml"], "config: '/none.toml' (from --config) cannot be read"),
        (["worker", "--bogus"], "--bogus"),
        (["fly"], "fly"),
        (["status", "--", "x"], "takes nothing after --"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_started(folder: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidestep.worker.cli", *arguments],
        env=environment(folder), capture_output=True, text=True, timeout=30, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert not (folder / "home").exists()
    assert not (folder / "sidestep-runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["worker", "--endpoint", "tcp://0.0.0.0:7777"], "no key files", 2),
        (["status"], "no run is known", 1),
        (["report", "/usr"], "/usr is not a journal", 1),
        (["replay", "/none"], "/none is not a journal", 1),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(folder: Path, arguments: list[str], said: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidestep.worker.cli", *arguments],
        env=environment(folder), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version_load_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sidestep.worker import cli\n"
        "try:\n    cli.main(['--version'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'numpy', 'zmq', 'wandb', 'plotly', 'tokenizers', 'sqlite3', 'msgpack'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sidestep ")
