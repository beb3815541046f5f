"""A container's health check is ``sidestep status`` every few seconds: it loads little."""

from __future__ import annotations

import subprocess
import sys


def test_asking_a_worker_loads_no_array_no_database_and_no_metrics_library() -> None:
    script = (
        "import sys\nfrom sidestep.worker.commands import status\n"
        "heavy = {'numpy', 'msgpack', 'sqlite3', 'tokenizers', 'prometheus_client', 'zmq', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
