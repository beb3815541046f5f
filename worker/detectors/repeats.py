"""Exact checks of data that come again: the same batch, the same samples in one batch or on several ranks.

``data_repeats`` is their slow relative: a small subset that comes round and round, against how often samples came again
before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.images import FLAT_SHARE
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import RunningMoments
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

MIN_SAMPLES: Final = 4
MAX_NAMED_RANKS: Final = 8
SKETCHED_STEPS: Final = 16
"""Earlier steps whose samples are remembered in part."""
REMEMBERED_BATCHES: Final = 1_024
"""Last batches by which data that begin anew are known."""


class RepeatedData:
    """Samples by their hashes."""

    name = "repeats"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._digests: list[int] = []
        self._num_distinct = 0  # batches unlike their predecessors, so far
        self._sketches: list[list[int]] = []
        self._own: dict[int, int] = {}  # digest of each rank's last batch
        self._batches: dict[int, int] = {}  # 32 bits of each of the last batches' digests, to their step
        self._again = [0, 0]  # how many steps ago the last batches came, and how many in a row have come so
        self._usual = self._new_usual()

    def _new_usual(self) -> RunningMoments:
        return RunningMoments(rate=self._settings.data_repeats.rate, floor=0.02)

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        found = [*self._batch(record), *self._rewound(record), *self._within(record), *self._subset(record)]
        if record.samples and record.ranks_seen > 1:
            ranks = ", ".join(map(str, record.duplicate_ranks))
            evidence = f"rank {ranks}: the same samples as a lower rank's" if ranks else ""
            value = float(len(record.duplicate_ranks))
            found.append(Reading(name="dup_ranks", value=value, limit=0.0, is_beyond=bool(ranks), evidence=evidence))
        return found

    def _batch(self, record: StepRecord) -> Iterator[Reading]:
        """The batch before comes again; or one of a few before it, once there were more different ones than that."""
        if not record.batch_digest:
            return
        recent = self._digests[::-1]
        age = recent.index(record.batch_digest) + 1 if record.batch_digest in recent else 0
        is_beyond = age == 1 or (age > 1 and self._num_distinct > 2 * age)
        if not age:
            self._num_distinct = min(self._num_distinct + 1, 1 << 20)
        self._digests = [*self._digests, record.batch_digest][-self._settings.dup_batch.history :]
        evidence = f"the {record.samples} samples are those of {age} step{'s' if age > 1 else ''} before" if age else ""
        stuck = self._stuck(record)
        if stuck and not is_beyond:
            is_beyond, age = True, 1
            evidence = f"rank {', '.join(map(str, stuck))}: the samples are those of the step before"
        yield Reading(name="dup_batch", value=float(age), limit=0.0, is_beyond=is_beyond, evidence=evidence)

    def _rewound(self, record: StepRecord) -> Iterator[Reading]:
        """Batches of before come again, one after another in the same order."""
        if not record.batch_digest:
            return
        digest = record.batch_digest & 0xFFFFFFFF
        lag, length = self._again
        # By steps: a resumed attempt may repeat some, and each with its own batch.
        age = record.step - self._batches.pop(digest, record.step)
        is_again = age > self._settings.dup_batch.history
        length = (length + 1 if age == lag else 1) if is_again else 0
        self._again = [age if is_again else 0, length]
        self._batches[digest] = record.step
        if len(self._batches) > REMEMBERED_BATCHES:
            del self._batches[next(iter(self._batches))]
        limit = self._settings.data_rewound.threshold
        evidence = f"the last {length} batches are those of {age} steps before, in the same order" if length else ""
        yield Reading(
            name="data_rewound", value=float(length), limit=limit, is_beyond=length >= limit, evidence=evidence
        )

    def _stuck(self, record: StepRecord) -> list[int]:
        """Return the ranks that have the batch of the step before again, though others have not (the first 8)."""
        now = dict(zip(record.batch_ranks.tolist(), record.batch_digests.tolist(), strict=True))
        last, self._own = self._own, now
        return [rank for rank, digest in now.items() if last.get(rank) == digest][:MAX_NAMED_RANKS]

    def _within(self, record: StepRecord) -> Iterator[Reading]:
        """Few of the samples differ. Questions alike on many images are told apart by their images."""
        if record.samples < MIN_SAMPLES or _is_blank(record):
            return
        limit = self._settings.dup_in_batch.threshold
        shares = [record.distinct_samples / record.samples]
        if record.images:
            shares.append(record.distinct_images / record.images)
        share = max(shares)
        evidence = f"{record.distinct_samples} of {record.samples} samples differ"
        yield Reading(name="dup_in_batch", value=share, limit=limit, is_beyond=share < limit, evidence=evidence)

    def _subset(self, record: StepRecord) -> Iterator[Reading]:
        """Share of the sketched samples that were there within the last steps, against what is usual."""
        rule = self._settings.data_repeats
        sketch = record.sketch.tolist()
        if len(sketch) < rule.min_rows or _is_blank(record):
            return
        known = set[int]().union(*self._sketches)
        share = sum(key in known for key in sketch) / len(sketch)
        self._sketches = [*self._sketches, sketch][-SKETCHED_STEPS:]
        usual = self._usual.mean
        is_beyond = self._usual.count >= rule.warmup and share > usual + rule.threshold
        if self._usual.count >= rule.warmup:
            evidence = f"{share:.0%} of the samples were there within {SKETCHED_STEPS} steps (usually {usual:.0%})"
            yield Reading(
                name="data_repeats", value=share, limit=usual + rule.threshold, reference=usual,
                is_beyond=is_beyond, evidence=evidence,
            )  # fmt: skip
        self._usual.update(share)

    def resume(self) -> None:
        """Another attempt repeats steps, and with them their samples."""
        self._digests, self._sketches, self._own = [], [], {}

    def forget(self) -> None:
        """Learn anew how often samples come again."""
        self._usual = self._new_usual()
        self._sketches = []
        self._batches, self._again = {}, [0, 0]

    def state(self) -> Json:
        """Return the remembered hashes."""
        return {
            "digests": self._digests,
            "distinct": self._num_distinct,
            "sketches": self._sketches,
            "usual": self._usual.state(),
            "own": [list(self._own), list(self._own.values())],
            "batches": [np.array(list(each), "<u4").tobytes() for each in (self._batches, self._batches.values())],
            "again": self._again,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._digests = [int(digest) for digest in state["digests"]]
        self._num_distinct = int(state["distinct"])
        self._sketches = [[int(key) for key in sketch] for sketch in state["sketches"]]
        self._usual.restore(state["usual"])
        ranks, digests = state.get("own", ((), ()))
        self._own = {int(rank): int(digest) for rank, digest in zip(ranks, digests, strict=True)}
        seen, numbers = (np.frombuffer(each, "<u4").tolist() for each in state.get("batches", (b"", b"")))
        self._batches = dict(zip(seen, numbers, strict=True))
        self._again = [int(each) for each in state.get("again", (0, 0))]


def _is_blank(record: StepRecord) -> bool:
    """Whether the images do not tell samples apart because they show nothing: ``image_constant`` says that."""
    return record.images > 0 and record.flat_images >= FLAT_SHARE * record.images
