"""A coverage-guided campaign of frames against the decoder and the receiver's front.

    python -m tests.fuzz.fuzz_frames --frames 1000000 [--json FILE] [--engine atheris|loop] [--seed N] [--keep DIR]

``atheris`` (libFuzzer under Python) is used where it is installed: `pip install atheris`. Else the loop of
``coverage_loop.py`` is. Both begin with the golden frames, and mutate heads as the structures they are. The address
space is limited to what is in use at the start and ``--spare-mib``: an allocation beyond it is a crash. A frame that
crashes is kept in ``--keep`` and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

INSTRUMENTED: Final = [
    "sidestep.protocol", *(f"sidestep.worker.intake.{name}" for name in ("admission", "feed", "peers", "reception")),
]  # fmt: skip
"""What the guide sees the ways of."""
PROGRESS_FRAMES: Final = 50_000
"""The report is also written so often, for a campaign that is ended early."""
REOPEN_FRAMES: Final = 20_000
"""The journal is opened again so often, as by another worker; in an empty folder every fifth time."""


class Campaign:
    """Counts frames and what they did, and writes the report when there have been enough."""

    def __init__(self, options: argparse.Namespace, engine: str) -> None:
        """Open the front."""
        from tests.fuzz.front import Front  # noqa: PLC0415  (atheris instruments what is imported under it)

        self._options = options
        self._engine = engine
        self._front = Front()
        self._began = time.monotonic()
        self.crashes: dict[str, str] = {}
        self.num_crashes = 0
        self._num_opened = 0
        self._reopen_at = REOPEN_FRAMES
        self._progress_at = PROGRESS_FRAMES

    def take(self, frame: bytes) -> None:
        """Take one frame; what must not happen is counted and kept, and the campaign goes on with a new front."""
        try:
            self._front.take(frame)
            if self._front.counts["frames"] >= self._reopen_at:
                self._num_opened += 1
                self._reopen_at += REOPEN_FRAMES
                self._front.reopen(afresh=self._num_opened % 5 == 0)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is what the campaign looks for)
            self._crashed(frame, error)
        if self._front.counts["frames"] >= self._progress_at:
            self._progress_at += PROGRESS_FRAMES
            self._write(self._report())

    def _crashed(self, frame: bytes, error: Exception) -> None:
        self.num_crashes += 1
        place = traceback.extract_tb(error.__traceback__)[-1]
        name = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"[:200]
        if name not in self.crashes:
            kept = self._options.keep / f"crash-{hashlib.sha256(frame).hexdigest()[:16]}.frame"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(frame)
            self.crashes[name] = str(kept)
            traceback.print_exception(error)
        self._front.reopen(afresh=True)

    @property
    def is_over(self) -> bool:
        """Whether there have been enough frames."""
        return self._front.counts["frames"] >= int(self._options.frames)

    def _report(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._began
        counts = self._front.counts
        return {
            "command": " ".join(["python -m tests.fuzz.fuzz_frames", *sys.argv[1:]]),
            "engine": self._engine,
            "seed": self._options.seed,
            "frames": counts["frames"],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "frames_per_second": round(counts["frames"] / seconds),
            "crashes": self.num_crashes,
            "distinct_crashes": self.crashes,
            "hangs_over_1_s": counts["hangs"],
            "slowest_frame_seconds": round(self._front.slowest_seconds, 4),
            "peak_resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "counts": dict(sorted(counts.items())),
        }

    def _write(self, report: Mapping[str, Any]) -> None:
        if self._options.json is not None:
            self._options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def finish(self, **more: Any) -> int:
        """Write the report; return the exit code."""
        self._front.close()
        report = {**self._report(), **more}
        self._write(report)
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return 1 if self.num_crashes or self._front.counts["hangs"] else 0


def limit_address_space(spare_mib: int) -> None:
    """Let an allocation of more than ``spare_mib`` beyond what is in use fail."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (spare_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz_by_loop(options: argparse.Namespace) -> int:
    """Run the campaign by the loop of this folder."""
    from tests.fuzz.coverage_loop import CoverageLoop  # noqa: PLC0415  (the front is imported with it)
    from tests.fuzz.front import seeds  # noqa: PLC0415

    loop = CoverageLoop(seeds(), options.seed)
    campaign = Campaign(options, "loop")
    limit_address_space(options.spare_mib)
    loop.run(campaign.take, options.frames)
    return campaign.finish(corpus=len(loop.corpus), ways=len(loop.ways))


def fuzz_by_atheris(options: argparse.Namespace, atheris: Any) -> None:
    """Run the campaign by libFuzzer; does not return."""
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.front import seeds  # noqa: PLC0415
    from tests.fuzz.mutations import Mutator  # noqa: PLC0415

    corpus = options.keep / "seeds"
    corpus.mkdir(parents=True, exist_ok=True)
    for at, frame in enumerate(seeds()):
        (corpus / f"seed-{at:03d}.frame").write_bytes(frame)
    campaign = Campaign(options, f"atheris {getattr(atheris, '__version__', '')}".strip())
    mutator = Mutator(options.seed, seeds())

    def take(frame: bytes) -> None:
        campaign.take(frame)
        if campaign.is_over:
            code = campaign.finish()
            sys.stdout.flush()
            os._exit(code)

    def mutate(frame: bytes, max_bytes: int, seed: int) -> bytes:
        if seed % 4 == 0:
            return bytes(atheris.Mutate(frame, max_bytes))
        mutator.rng.seed(seed)
        return mutator.mutate(frame)[:max_bytes]

    found = options.keep / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    arguments = ["fuzz_frames", str(found), str(corpus), "-max_len=65536", "-timeout=30", "-rss_limit_mb=0"]
    arguments += [f"-seed={options.seed}", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup(arguments, take, custom_mutator=mutate)
    limit_address_space(options.spare_mib)
    atheris.Fuzz()


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000, help="so many (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--engine", choices=("atheris", "loop"), help="default: atheris where it is installed")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (%(default)s)")
    keep = Path(tempfile.gettempdir()) / "sidestep-fuzz"
    parser.add_argument("--keep", type=Path, default=keep, metavar="DIR", help="for what is found (%(default)s)")
    parser.add_argument("--spare-mib", type=int, default=1_024, help="address space to grow by (%(default)s)")
    options = parser.parse_args()
    if options.engine != "loop":
        try:
            atheris = importlib.import_module("atheris")  # optional, and a fuzzer's own
        except ImportError:
            if options.engine == "atheris":
                parser.error("atheris is not installed")
        else:
            fuzz_by_atheris(options, atheris)
    return fuzz_by_loop(options)


if __name__ == "__main__":
    sys.exit(main())
