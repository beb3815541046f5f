"""A coverage-guided loop of its own: a frame that makes the code take a way not seen before is mutated further.

Ways are pairs of lines that follow each other in the modules that are fuzzed, as ``sys.settrace`` tells them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final

from tests.fuzz.mutations import Mutator

TRACED: Final = ("/protocol/", "/intake/reception.py", "/intake/peers.py", "/intake/admission.py")
MAX_CORPUS_FRAMES: Final = 4_000
Take = Callable[[bytes], None]


class CoverageLoop:
    """Runs frames and keeps those that were worth it."""

    def __init__(self, seeds: Sequence[bytes], seed: int) -> None:
        """Begin with ``seeds``."""
        self.corpus = list(seeds)
        self.ways: set[tuple[str, int, int]] = set()
        self._mutator = Mutator(seed, self.corpus)
        self._line = 0
        self._is_traced: dict[str, bool] = {}

    def run(self, take: Take, num_frames: int) -> None:
        """Give ``take`` so many frames, the seeds first; what it raises is raised."""
        for number in range(num_frames):
            if number < len(self.corpus) and number < MAX_CORPUS_FRAMES and not self.ways:
                frame = self.corpus[number]
            else:
                frame = self._mutator.mutate(self._mutator.rng.choice(self.corpus))
            before = len(self.ways)
            self._traced(take, frame)
            if len(self.ways) > before and len(self.corpus) < MAX_CORPUS_FRAMES and len(frame) < 1 << 16:
                self.corpus.append(frame)

    def _traced(self, take: Take, frame: bytes) -> None:
        outer = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            take(frame)
        finally:
            sys.settrace(outer)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if name not in self._is_traced:
            self._is_traced[name] = any(part in name for part in TRACED)
        return self._on_line if self._is_traced[name] else None

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.ways.add((frame.f_code.co_filename, self._line, frame.f_lineno))
            self._line = frame.f_lineno
        return self._on_line
