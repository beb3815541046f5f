"""One rank that attaches long before, or long after, the others; its own use of the store goes on meanwhile.

agreeing_ranks.py RANK WORLD PORT OUT
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tests.support.rank_processes import say_where_it_hangs
from torch.distributed import distributed_c10d

from sidestep.trainer_hooks.agreement import Agreed, agree

LATE_SECONDS = 2.0


def main() -> None:
    """Agree twice: once with rank 0 late, once with rank 0 silent."""
    rank, world, port = map(int, sys.argv[1:4])
    say_where_it_hangs(70.0)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    store = distributed_c10d._get_default_store()
    mine = Agreed(
        run_id=f"run-{rank}", incarnation=f"inc-{rank}", endpoint="ipc:///tmp/s", server_key="k", host=f"h{rank}"
    )
    told: dict[str, object] = {}
    if rank == 0:
        time.sleep(LATE_SECONDS)
        told["first"] = asdict(agree(mine, rank, world) or mine)
    else:
        heard: list[Agreed | None] = []
        asking = threading.Thread(target=lambda: heard.append(agree(mine, rank, world)))
        asking.start()
        sets = 0
        while asking.is_alive():
            store.set(f"trainer/{rank}", str(sets))  # as a trainer's own groups use it
            sets += 1
            time.sleep(0.01)
        told["first"] = asdict(heard[0]) if heard[0] is not None else None
        told["sets"] = sets
        began = time.monotonic()
        told["second"] = agree(mine, rank, world, wait_seconds=0.5)
        told["waited"] = time.monotonic() - began
    dist.barrier()
    Path(sys.argv[4], f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
