"""SIGTERM at the W&B sink: it may come at any moment of the main thread, and many times."""

from __future__ import annotations

import subprocess
import sys

# Python's own wait() holds the event's lock for a moment before it sleeps. The signals come in just that moment.
_WHILE_THE_MAIN_THREAD_IS_ABOUT_TO_WAIT = """
import os, signal, threading
from sidestep.worker.sinks.wandb_follow import Wishes
from sidestep.worker.sinks.wandb_sink import _listen

wishes = Wishes(stop=threading.Event(), orphaned=threading.Event(), stop_run=threading.Event())
_listen(wishes, owner_on_stdin=False)
with wishes.stop._cond:
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
assert wishes.stop.wait(30), "nobody heard it"
assert not wishes.orphaned.is_set()
print("it stops")
"""


def test_a_stop_that_comes_while_the_sink_is_about_to_wait_does_not_hang_it() -> None:
    command = [sys.executable, "-c", _WHILE_THE_MAIN_THREAD_IS_ABOUT_TO_WAIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "it stops\n"), done.stderr
