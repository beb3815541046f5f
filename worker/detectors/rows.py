"""What the rows of a batch hold: samples without a label, and samples whose beginning stands twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord


class Rows:
    """``rows_without_labels`` and ``begun_twice``; padding rows are none."""

    name = "rows"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._empty: list[tuple[int, int]] = []  # rows, and those without a label, of the last steps
        self._begun = (0, 0)  # rows since the last reading, and those that begin twice

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        return [*self._without_labels(view.record), *self._begun_twice(view.record)]

    def _without_labels(self, record: StepRecord) -> Iterator[Reading]:
        """Of several steps together; a step that has no label at all is ``no_labels``' business."""
        rows, empty = record.count("rows"), record.count("rows_without_labels")
        if not rows or empty is None or not record.count("labelled"):
            return
        rule = self._settings.rows_without_labels
        self._empty = [*self._empty, (rows, empty)][-max(rule.pooled, rule.most_pooled) :]
        pool = self._pool()
        if pool is None:
            return
        steps, rows, empty = pool
        share = empty / rows
        evidence = f"{empty} of {rows} samples of the last {steps} steps have no labelled position"
        yield Reading(
            name="rows_without_labels",
            value=share,
            limit=rule.threshold,
            is_beyond=share >= rule.threshold,
            evidence=evidence,
        )

    def _pool(self) -> tuple[int, int, int] | None:
        """Return steps, rows and rows without a label of the newest steps that are enough; None where none are."""
        rule = self._settings.rows_without_labels
        rows = empty = 0
        for steps, (more_rows, more_empty) in enumerate(reversed(self._empty), start=1):
            rows, empty = rows + more_rows, empty + more_empty
            if steps >= rule.pooled and (rows >= rule.min_rows or steps >= rule.most_pooled):
                return steps, rows, empty
        return None

    def _begun_twice(self, record: StepRecord) -> Iterator[Reading]:
        rows, twice = record.count("rows"), record.count("rows_begun_twice")
        if not rows or twice is None:
            return
        rule = self._settings.begun_twice
        rows, twice = self._begun[0] + rows, self._begun[1] + twice
        self._begun = (rows, twice)
        if rows < rule.min_rows:
            return
        self._begun = (0, 0)
        share = twice / rows
        evidence = f"{twice} of {rows} samples begin with one and the same token twice"
        yield Reading(
            name="begun_twice", value=share, limit=rule.threshold, is_beyond=share >= rule.threshold, evidence=evidence
        )

    def forget(self) -> None:
        """Pool nothing with the rows of another stage."""
        self._empty, self._begun = [], (0, 0)

    def state(self) -> Json:
        """Return what is pooled."""
        return {"empty": [list(each) for each in self._empty], "begun": list(self._begun)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._empty = [(int(rows), int(empty)) for rows, empty in state["empty"]]
        rows, twice = state["begun"]
        self._begun = (int(rows), int(twice))
