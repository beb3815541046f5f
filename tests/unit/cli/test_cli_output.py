"""The command line's own lines, where nobody reads them."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_reader_that_has_gone_does_not_change_what_is_done() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "from sidestep.worker.cli import say; say('a'); say('b'); raise SystemExit(7)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, timeout=30, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (7, b"")
