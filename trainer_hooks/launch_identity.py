"""What stays the same when torchrun's agent starts its processes again, so that the run goes on instead of a new one.

Neither of torchrun's own names will do: its run id repeats from launch to launch where it was given, and its restart
count stays 0 when the world grows. The agent itself stays: its process, since it began.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

_START_FIELD = 19
"""Of ``/proc/PID/stat`` after the command's name: when the process began, in clock ticks since the boot."""


def launch_identity(environment: Mapping[str, str]) -> str:
    """Return a name of the launch that this process belongs to, "" where no elastic agent started it."""
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return ""
    agent = os.getppid()
    try:
        ticks = Path(f"/proc/{agent}/stat").read_bytes().rpartition(b")")[2].split()[_START_FIELD].decode("ascii")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return ""  # no /proc here: each start is then a launch of its own
    parts = "\0".join((run_id, socket.gethostname(), boot, str(agent), ticks))
    return hashlib.sha256(parts.encode("utf-8")).hexdigest()[:16]


def num_nodes(environment: Mapping[str, str]) -> int:
    """Return how many hosts, or agents on one, the launcher says that there are; 1 where it does not say."""
    for name in ("GROUP_WORLD_SIZE", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        if environment.get(name, "").isdecimal():
            return max(1, int(environment[name]))
    world, local = environment.get("WORLD_SIZE", ""), environment.get("LOCAL_WORLD_SIZE", "")
    if world.isdecimal() and local.isdecimal() and int(local):
        return max(1, -(-int(world) // int(local)))
    return 1
