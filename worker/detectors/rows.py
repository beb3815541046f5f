"""What the rows of a batch hold: samples without labels, begun twice, labelled too late, in another template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.protocol.signals import PAIRS_ALIKE, PROMPT_COUNTS
from sidestep.worker.detectors.count_sums import CountSums
from sidestep.worker.detectors.exact import is_plain_text
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

PAIR_COUNTS: Final = ("answer_pairs", *PAIRS_ALIKE)


class Rows:
    """``rows_without_labels``, ``begun_twice``, ``labels_late`` and ``template_differs``; padding rows are none."""

    name = "rows"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._empty: list[tuple[int, int]] = []  # rows, and those without a label, of the last steps
        self._begun = CountSums("rows", "rows_begun_twice")
        self._pairs = CountSums(*PAIR_COUNTS)
        self._prompts = CountSums(*PROMPT_COUNTS)

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        return [
            *self._without_labels(record), *self._begun_twice(record), *self._late(record), *self._template(record)
        ]  # fmt: skip

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
        rule = self._settings.begun_twice
        num_rows = record.count("rows")
        if not num_rows or record.images >= 2 * num_rows:
            return  # rows may begin with the placeholders of two images
        sums = self._begun.take(record, rule.min_rows)
        if sums is None:
            return
        rows, twice = sums
        share = twice / rows
        evidence = f"{twice} of {rows} samples begin with one and the same token twice"
        yield Reading(
            name="begun_twice", value=share, limit=rule.threshold, is_beyond=share >= rule.threshold, evidence=evidence
        )

    def _late(self, record: StepRecord) -> Iterator[Reading]:
        """What stands before an answer is the template's end, alike for all; what stands in it is not.

        Where the ids right before the first targets differ, and those before them do not, answers have begun already.
        """
        rule = self._settings.labels_late
        sums = self._pairs.take(record, rule.min_pairs)
        if sums is None:
            return
        pairs, *alike = sums
        before, *earlier = (count / pairs for count in alike)
        place = next((place for place, share in enumerate(earlier, start=1) if share >= rule.threshold), 0)
        evidence = (
            f"the tokens right before the first labels of answers are alike in {before:.0%} of {pairs} pairs, those "
            f"{place} further ahead in {earlier[place - 1]:.0%}: so many tokens of each answer have no label"
        )
        yield Reading(
            name="labels_late",
            value=before,
            limit=rule.most_alike,
            is_beyond=place > 0 and before <= rule.most_alike,
            evidence=evidence,
        )

    def _template(self, record: StepRecord) -> Iterator[Reading]:
        """An answer behind the end of a prompt is enough: trainings have parts in other forms."""
        rule = self._settings.template_differs
        sums = None if is_plain_text(record, rule.text_share) else self._prompts.take(record, rule.min_answers)
        if sums is None:
            return
        answers, ends, labelled = sums
        if labelled:
            evidence = f"{labelled} of {answers} answers begin where prompts end"
        else:
            where = f"stands in {ends} places without a label behind it" if ends else "the inputs do not hold"
            prompts_end = f"what all samples' prompts end with, which {where}"
            evidence = f"none of {answers} answers is trained right behind {prompts_end}"
        yield Reading(
            name="template_differs",
            value=labelled / answers,
            limit=rule.threshold,
            is_beyond=labelled <= rule.threshold * answers,
            evidence=evidence,
        )

    def forget(self) -> None:
        """Pool nothing with the rows of another stage."""
        self._empty = []
        for sums in (self._begun, self._pairs, self._prompts):
            sums.clear()

    def state(self) -> Json:
        """Return what is pooled."""
        return {
            "empty": [list(each) for each in self._empty],
            "begun": self._begun.state(),
            "pairs": self._pairs.state(),
            "prompts": self._prompts.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._empty = [(int(rows), int(empty)) for rows, empty in state["empty"]]
        self._begun.restore(state["begun"])
        self._pairs.restore(state.get("pairs", ()))
        self._prompts.restore(state.get("prompts", ()))
