"""Exact checks of one step's labels and numbers: no warm-up, no reference, no false alarm (docs/detection.md).

What is wrong here is wrong whatever the model does: losses that are no numbers, labels that teach padding, answers that
never end. Checks of repeated data are in ``repeats.py``, of images in ``images.py``, of weights in ``updates.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.protocol.signals import PAIRS_ALIKE
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import median
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord


class ExactChecks:
    """Labels, losses and gradients of each step by themselves."""

    name = "exact"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._usual: list[float] = []  # share of targets that are the next input id, at the first readings

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        no_labels = self._no_labels(record)
        found = [no_labels] if no_labels is not None else []
        if no_labels is None or not no_labels.is_beyond:
            found.append(_nonfinite(record))
        found.extend(self._masked(record))
        found.extend(self._labelled_specials(view))
        found.extend(self._alignment(record))
        found.extend(self._stop_token(record))
        return found

    @staticmethod
    def _no_labels(record: StepRecord) -> Reading | None:
        """A whole step without labels; or one micro-batch without, where that made the loss no number."""
        labelled, without = record.count("labelled"), record.count("batches_without_labels")
        if labelled is None and without is None:
            return None
        is_nonfinite = record.nonfinite_trainer_losses > 0 or record.nonfinite_gradients > 0
        is_beyond = labelled == 0 or bool(without and is_nonfinite)
        evidence = (
            f"{without or 'all'} of {record.count('batches') or 'the'} micro-batches have no labelled position"
            if is_beyond
            else ""
        )
        return Reading(name="no_labels", value=float(labelled or 0), limit=0.0, is_beyond=is_beyond, evidence=evidence)

    def _masked(self, record: StepRecord) -> Iterator[Reading]:
        masked, labelled = record.count("labels_masked"), record.count("labelled")
        if masked is None or not labelled:
            return
        limit, share = self._settings.label_masked_pos.threshold, masked / labelled
        evidence = f"{masked} of {labelled} labelled positions are padding by the attention mask"
        yield Reading(name="label_masked_pos", value=share, limit=limit, is_beyond=share > limit, evidence=evidence)

    def _labelled_specials(self, view: StepView) -> Iterator[Reading]:
        """Targets that no answer holds: the padding id (where it is not EOS) and the image placeholder."""
        record = view.record
        if not view.num_rows:
            return
        for name, token, what in (
            ("pad_labelled", record.pad_id if record.pad_id != record.eos_id else -1, "padding id"),
            ("image_tokens_labelled", record.image_token_id, "image placeholder"),
        ):
            rule = self._settings.rule(name)
            if token < 0 or rule is None:
                continue
            limit = float(getattr(rule, "threshold", 0.0))
            share = float((record.targets == token).mean())
            evidence = f"{share:.1%} of the targets are the {what} {token}"
            yield Reading(name=name, value=share, limit=limit, is_beyond=share > limit, evidence=evidence)

    def _alignment(self, record: StepRecord) -> Iterator[Reading]:
        """What a target should equal is the next input id; how often it does is learned at the first readings."""
        rule = self._settings.label_alignment
        compared, own, following = map(record.count, ("compared", "labels_equal_ids", "labels_equal_next_ids"))
        if compared is None or own is None or following is None or compared < rule.min_targets:
            return
        share, leak = following / compared, own / compared
        leak_rule = self._settings.label_leak
        is_leak = leak >= leak_rule.threshold and share < leak_rule.threshold
        evidence = f"{leak:.1%} of the targets are the input id of their own position, {share:.1%} that of the next"
        yield Reading(name="label_leak", value=leak, limit=leak_rule.threshold, is_beyond=is_leak, evidence=evidence)
        if len(self._usual) < rule.learn_readings:
            self._usual.append(share)
        usual = median(self._usual)
        # Noise in the inputs on purpose lowers what is usual; next to none at all is no noise.
        limit = rule.threshold * (usual if usual >= 0.5 else 1.0)
        yield Reading(
            name="label_alignment",
            value=share,
            limit=limit,
            reference=usual,
            is_beyond=share < limit and not is_leak,
            evidence=f"{share:.1%} of the targets are the next input id (usually {usual:.1%})",
        )

    def _stop_token(self, record: StepRecord) -> Iterator[Reading]:
        rule = self._settings.no_stop_token
        answers, ended = record.count("answers"), record.count("answers_with_eos")
        if answers is None or ended is None or answers < rule.min_answers or record.eos_id < 0:
            return
        if is_plain_text(record, rule.text_share):
            return
        if _is_broken_up(record, rule.most_alike):
            answers = max((record.count("rows") or 0) - (record.count("rows_without_labels") or 0), ended, 1)
        share = ended / answers
        evidence = f"{answers - ended} of {answers} answers have no EOS (id {record.eos_id}) among their labels"
        yield Reading(
            name="no_stop_token", value=share, limit=rule.threshold, is_beyond=share < rule.threshold, evidence=evidence
        )

    def forget(self) -> None:
        """Learn anew what share of targets follows the inputs."""
        self._usual = []

    def state(self) -> Json:
        """Return the learned share."""
        return {"usual": self._usual}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._usual = [float(share) for share in state["usual"]]


def is_plain_text(record: StepRecord, share: float) -> bool:
    """Return whether so much of a step is labelled that it is text from end to end, whose pieces end nowhere."""
    positions, padding, labelled = map(record.count, ("positions", "padding", "labelled"))
    return bool(positions) and (labelled or 0) >= share * ((positions or 0) - (padding or 0))


def _is_broken_up(record: StepRecord, most_alike: float) -> bool:
    """Whether labels are left out by chance, which makes several pieces of an answer: no template stands before them.

    Then there is one EOS a row all the same.
    """
    pairs, alike = record.count("answer_pairs") or 0, record.count(PAIRS_ALIKE[0])
    answers, rows = record.count("answers") or 0, record.count("rows")
    return alike is not None and alike < most_alike * pairs and rows is not None and answers > rows


def _nonfinite(record: StepRecord) -> Reading:
    is_applied = record.applied is not False  # else a GradScaler finds its factor
    facts = {
        "losses of tokens": record.nonfinite_losses,
        "losses of micro-batches": record.nonfinite_trainer_losses,
        "the gradient": record.nonfinite_gradients,
        "modules' gradients": int(np.isnan(record.module_norms).sum()) if is_applied else 0,
        "ranks' weights": len(record.nonfinite_weight_ranks),
    }
    bad = {name: count for name, count in facts.items() if count}
    evidence = "NaN or infinite: " + ", ".join(f"{name} ({count})" for name, count in bad.items()) if bad else ""
    if record.nonfinite_weight_ranks:
        evidence += f"; weights of rank {', '.join(map(str, record.nonfinite_weight_ranks))}"
    value = float(sum(bad.values()))
    return Reading(name="nonfinite", value=value, limit=0.0, is_beyond=bool(bad), evidence=evidence)
