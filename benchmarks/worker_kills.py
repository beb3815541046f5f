"""Kill -9 of the worker, a hundred times, under a publisher at 50 steps a second; every row counted at the end.

    python benchmarks/worker_kills.py [--kills 100] [--mode online|offline] [--seed 0] [--json FILE]

Real processes: ``sidestep worker``, its W&B child and wandb-core, and a publisher. Gaps between kills are 0.1 to 3 s;
half of the kills take the whole tree, half the worker alone. Ends with 1 where any count is wrong: a scalar row lost,
doubled, out of place or overwritten with other values, a table or an alert that never arrived, a replay that differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the campaign is a test's too, and lives with the tests

from tests.support.kill_campaign import KillPlan, run_campaign  # noqa: E402


def main() -> int:
    """Run the campaign, print its counts."""
    parser = argparse.ArgumentParser(description="Kill the worker again and again and count what is left.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--mode", choices=("online", "offline"), default="online")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-per-second", type=float, default=50.0)
    parser.add_argument("--tree-share", type=float, default=0.5, help="kills that take the W&B child too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sidestep-kills-") as folder:
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "XDG_RUNTIME_DIR"):
            place = Path(folder) / name.lower()
            place.mkdir(mode=0o700)
            os.environ[name] = str(place)
        os.environ["OMP_NUM_THREADS"] = "1"
        plan = KillPlan(
            mode=options.mode,
            kills=options.kills,
            seed=options.seed,
            steps_per_second=options.steps_per_second,
            tree_share=options.tree_share,
            settle_seconds=1200.0,  # a replay of some 20,000 steps is within it
        )
        result = run_campaign(plan, lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", flush=True))
    result["made_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    for name, counts in result["counts"].items():
        print(name, {key: value for key, value in counts.items() if value})
    print("WRONG: " + "; ".join(result["wrong"]) if result["wrong"] else "every count is right")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
