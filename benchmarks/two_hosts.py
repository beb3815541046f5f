"""A worker and a trainer on two hosts (network namespaces, CURVE), and what each way of parting them costs.

    python benchmarks/two_hosts.py [--quick] [--json FILE]

Real processes: ``sidestep worker`` on one host, a publisher at 50 steps a second on the other. Of each case: messages
made, dropped, sent again, lost without a word (made, and neither stored nor counted as dropped), and how long after
the network was whole again all of them were stored. Needs root, ``ip``, ``iptables`` and ``ss``. Ends with 1 where a
message was lost without a word, or a step doubled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the scene is a test's too, and lives with the tests

from tests.support.namespaces import WORKER, TwoHosts, why_not  # noqa: E402
from tests.support.rank_process import RankProcess  # noqa: E402
from tests.support.two_hosts import CUTS, PORT, Scene  # noqa: E402

from sidestep.worker.keys import make_keys  # noqa: E402

BEFORE_SECONDS, AFTER_SECONDS = 1.0, 1.0
SMALL_WINDOW_BYTES = 40_000

Case = Callable[[Scene, RankProcess], None]
"""Parts the hosts for a while, training on, and leaves the network whole."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one case cost."""

    case: str
    made: int
    dropped: int
    resent: int
    lost: int
    """Made, and neither stored nor counted as dropped."""
    doubled_steps: int
    whole_again_seconds: float
    """From the network being whole to the last of the messages being stored."""


def cut(name: str, seconds: float) -> Case:
    """Return a case that parts the hosts as ``CUTS`` says."""
    begin, end = CUTS[name]

    def run(scene: Scene, rank: RankProcess) -> None:
        begin(scene.hosts)
        scene.train(rank, seconds)
        end(scene.hosts)

    return run


def half_open(scene: Scene, rank: RankProcess) -> None:
    """One connection's packets vanish for good; the network is whole for every other."""
    for own_port in scene.hosts.connections_to(PORT):
        scene.hosts.drop("-p", "tcp", "--sport", str(own_port))
    scene.train(rank, 0.5)


def power_loss(scene: Scene, rank: RankProcess) -> None:
    """All processes of the worker's host end without a packet; after three seconds another worker opens its journal."""
    scene.hosts.link(WORKER, up=False)
    scene.hosts.kill_all(WORKER)
    scene.worker.kill()
    scene.train(rank, 3.0)
    scene.hosts.link(WORKER, up=True)
    scene.worker.start()


def measure(name: str, case: Case, window_bytes: int | None = None) -> Outcome:
    """Train, part the hosts, train on, and count when all has arrived."""
    settings = {} if window_bytes is None else {"RANK_WINDOW_BYTES": str(window_bytes)}
    with ExitStack() as stack:
        keys = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sidestep-hosts-"))) / "keys"
        make_keys(keys)
        scene = Scene(stack.enter_context(TwoHosts()), keys)
        stack.callback(scene.worker.remove)
        rank = stack.enter_context(scene.rank(**settings))
        scene.train(rank, BEFORE_SECONDS)
        case(scene, rank)
        whole_at = time.monotonic()
        while rank.accounts()["in_window"]:
            time.sleep(0.02)
        whole_again_seconds = time.monotonic() - whole_at
        scene.train(rank, AFTER_SECONDS)
        while rank.accounts()["in_window"]:
            time.sleep(0.02)
        told = rank.accounts()
        scene.finish(rank, keys.with_name("replayed"))
        stored = scene.worker.query("SELECT COUNT(*), COUNT(DISTINCT step) FROM step_closed WHERE reason != 'tail'")[0]
    return Outcome(
        case=name,
        made=told["produced"],
        dropped=told["dropped"],
        resent=told["resent"],
        lost=told["produced"] - told["accepted"] - told["dropped"] + len(scene.steps()) - stored[1],
        doubled_steps=stored[0] - stored[1],
        whole_again_seconds=round(whole_again_seconds, 2),
    )


def main() -> int:
    """Measure each case, print a table."""
    parser = argparse.ArgumentParser(description="Part a trainer's host from its worker's, and count what that costs.")
    parser.add_argument("--quick", action="store_true", help="two short cuts only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if reason := why_not():
        print(f"two hosts: {reason}")
        return 2
    seconds = (2.0,) if options.quick else (5.0, 20.0)
    names = list(CUTS)[:2] if options.quick else list(CUTS)
    cases: list[tuple[str, Case, int | None]] = [
        (f"{name}, {each:.0f} s", cut(name, each), None) for each in seconds for name in names
    ]
    if not options.quick:
        cases += [("half-open connection", half_open, None), ("power loss of the worker's host", power_loss, None)]
        small = f"packets vanish, 5 s, a window of {SMALL_WINDOW_BYTES} bytes"
        cases.append((small, cut("packets vanish", 5.0), SMALL_WINDOW_BYTES))
    print("| case | messages | dropped, counted | sent again | lost | steps doubled | whole again after, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    outcomes = []
    for name, case, window_bytes in cases:
        made = measure(name, case, window_bytes)
        outcomes.append(made)
        print(f"| {' | '.join(str(value) for value in asdict(made).values())} |", flush=True)
    if options.json is not None:
        report = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
            "cases": [asdict(each) for each in outcomes],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(each.lost or each.doubled_steps for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
