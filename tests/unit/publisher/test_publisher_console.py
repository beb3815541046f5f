"""Lines on the trainer's console."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from sidestep.trainer_hooks import console as console_module
from sidestep.trainer_hooks.console import Console


def test_lines_go_to_the_stderr_of_the_moment_exactly_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Console().line("⚠️ MODEL COLLAPSE DETECTED: {reason} %s")
    assert capsys.readouterr().err == "⚠️ MODEL COLLAPSE DETECTED: {reason} %s\n"


def test_a_line_with_a_code_is_shown_once() -> None:
    lines: list[str] = []
    console = Console(lines.append)
    assert [console.once("a", "x"), console.once("a", "y"), console.once("b", "z")] == [True, False, True]
    assert lines == ["sidestep: x\n", "sidestep: z\n"]


def test_a_missing_or_closed_stderr_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console()
    monkeypatch.setattr(sys, "stderr", None)
    console.line("x")
    with open(os.devnull, "w") as closed:  # noqa: PTH123
        pass
    monkeypatch.setattr(sys, "stderr", closed)
    console.line("x")
    assert console.num_lines_lost == 2


def test_a_fork_waits_for_a_line_that_is_being_written_but_not_for_ever() -> None:
    writing = threading.Event()
    done = threading.Event()

    def slow(_text: str) -> None:
        writing.set()
        done.wait(10)

    thread = threading.Thread(target=Console(slow).line, args=("x",))
    thread.start()
    writing.wait(10)
    console_module._before_fork()
    held = console_module._held_for_fork
    assert not held, "a console that hangs does not hang the fork"
    console_module._after_fork_in_parent()
    done.set()
    thread.join(10)
    console_module._before_fork()
    held = console_module._held_for_fork
    assert held
    console_module._after_fork_in_parent()
    assert not console_module._writing.locked()
