"""The benchmark of many ranks in its smallest form: every rank is served, every step has its row, nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.rank_messages import COUNTED, RankMessages, due_families

from sidestep.protocol.frames import decode
from sidestep.protocol.messages import Hello, Signals, StepEnd

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(240)
def test_every_simulated_rank_is_served_and_the_figures_are_there(tmp_path: Path) -> None:
    file = tmp_path / "ranks.json"
    command = [sys.executable, "benchmarks/ranks.py", "--ranks", "32", "--seconds", "3", "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=220, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(file.read_text(encoding="utf-8"))
    assert said["ranks"] == 32
    assert said["steps_closed"] == {"complete": 3}
    assert said["unacked_at_end"] == 0
    # Three kinds a rank and step; Tokens and Losses at step 0; and rank 0's own.
    assert said["messages"] == 32 * (3 * 3 + 2) + 3 + 3
    assert said["worker_health"]["receiver"]["journaled"] == said["messages"]
    assert said["worker_health"]["unprojected"] == 0
    assert said["messages_per_second"] > 0
    assert said["lag_p99_seconds"] >= said["ack_lag_p50_seconds"] > 0
    assert said["memory_growth_bytes"] >= 0
    assert said["worker_lag_p99_seconds"] > 0
    assert "| 32 |" in done.stdout


def test_what_a_rank_says_is_what_the_hooks_of_ddp_say() -> None:
    messages, world_size = RankMessages("run", 64), 64
    _, hello = decode(messages.hello(5))
    assert isinstance(hello, Hello)
    assert (hello.world_size, hello.topology["data_parallel_rank"]) == (world_size, 5)
    for step in (0, 1, 10, 25, 50, 100):
        num_with_rows = 0
        for rank in range(world_size):
            decoded = [decode(frame) for frame in messages.step(rank, step, 41, 1e9 + step)]
            envelopes, said = zip(*decoded, strict=True)
            end = said[-1]
            assert isinstance(end, StepEnd)
            assert [each.sequence for each in envelopes] == list(range(41, 41 + len(said)))
            assert {each.rank for each in envelopes} == {rank}
            assert (end.step, end.unix_time, end.due) == (step, 1e9 + step, due_families(step))
            assert end.sent == dict(Counter(each.kind.name.lower() for each in said[:-1]))
            assert envelopes[-1].accounts["step_end"] == (step + 1, 0, 0)
            assert set(COUNTED) <= set(envelopes[-1].accounts)
            signals = next(each for each in said if isinstance(each, Signals))
            num_with_rows += signals.targets.size > 0
            assert (signals.module_norms.size > 0) == (step % 10 == 0)
        assert 13 <= num_with_rows <= 15  # 14 take turns, and rank 0 always looks


def test_ranks_of_one_step_have_other_samples_and_the_same_weights() -> None:
    messages = RankMessages("run", 1_024)
    seen = {}
    for rank in range(1, 9):
        signals = next(each for _, each in map(decode, messages.step(rank, 3, 1, 1e9)) if isinstance(each, Signals))
        seen[rank] = (signals.sample_hashes.tobytes(), signals.image_hashes.tobytes(), signals.heartbeat.tobytes())
    assert len({samples for samples, _, _ in seen.values()}) == len(seen)
    assert len({images for _, images, _ in seen.values()}) == len(seen)
    assert len({weights for _, _, weights in seen.values()}) == 1


def test_a_worker_may_open_as_many_files_as_the_system_grants() -> None:
    program = (
        "import resource\n"
        "from sidestep.worker.commands.worker import allow_many_ranks\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "allow_many_ranks()\n"
        "soft, still = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "most = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)\n"
        "assert (soft, still) == (most, hard), (soft, still, hard)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
