"""The campaign's harness at work, small: the loop finds its way, and a crash would not go unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz.coverage_loop import CoverageLoop
from tests.fuzz.front import Front, chunked, seeds
from tests.fuzz.mutations import IN_CHUNKS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.close()


def test_the_loop_follows_new_ways(front: Front) -> None:
    loop = CoverageLoop(seeds(), seed=5)
    num_seeds = len(loop.corpus)
    loop.run(front.take, num_seeds)
    ways = len(loop.ways)
    loop.run(front.take, 600)
    assert len(loop.ways) > ways > 0
    assert len(loop.corpus) > num_seeds
    front.reopen()
    assert front.counts["front_journaled"] > 0
    assert front.counts["joined"] > 0


def test_chunks_of_a_campaign_are_joined(front: Front) -> None:
    whole = next(frame for frame in seeds() if len(frame) > 400)
    front.take(IN_CHUNKS + b"\x04" + whole)
    assert front.counts["joined"] == 1
    assert len(chunked(IN_CHUNKS + b"\x84" + whole)) < len(chunked(IN_CHUNKS + b"\x04" + whole))


@pytest.mark.parametrize("given", [b"", IN_CHUNKS, IN_CHUNKS + b"\xff", IN_CHUNKS + b"\x03SST"])
def test_the_harness_takes_whatever_a_fuzzer_makes(front: Front, given: bytes) -> None:
    front.take(given)
    front.serve_the_good_one()


def test_a_campaign_reports_and_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.fuzz_frames", "--engine", "loop", "--frames", "300"]
    command += ["--json", str(tmp_path / "report.json"), "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["frames"] >= 300
    assert (report["crashes"], report["hangs_over_1_s"]) == (0, 0)
    assert not (tmp_path / "kept").exists()


def test_a_crash_is_kept_counted_and_told(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tests.fuzz import front, fuzz_frames\n"
        "front.Front._decode = lambda self, frame: 1 / 0\n"
        f"sys.argv[1:] = ['--engine', 'loop', '--frames', '3', '--keep', {str(tmp_path)!r}]\n"
        "sys.exit(fuzz_frames.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1
    assert '"crashes": 3' in done.stdout
    assert len(list(tmp_path.glob("crash-*.frame"))) == 1, "the first of a kind, and no more of the same"
