"""The data against what they were: targets, lengths, ends and sizes. A shift is news, not yet a failure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.exact import is_plain_text
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import RunningMoments, Window
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.token_table import Shares, is_among, pooled
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

MAX_COUNTED: Final = 32
"""Most frequent targets of a step that are remembered one by one; the others are one."""
MAX_USUAL: Final = 256
LENGTH_ERRORS: Final = 4.0
"""Standard deviations that a mean length must be away as well: few answers vary."""
TRUNCATED_ERRORS: Final = 6.0
TINY: Final = 1e-300
ENDED_SHARE: Final = 0.95
"""Share of answers with EOS from which a run's answers usually end."""


class DataShift:
    """``target_shift``, ``length_shift``, ``answers_truncated`` and ``batch_shrunk``."""

    name = "data"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._reset()

    def _reset(self) -> None:
        settings = self._settings
        self._usual = Shares(max_ids=MAX_USUAL, rate=settings.target_shift.rate)
        self._targets: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []  # ids, their shares, of the last steps
        self._rows: list[int] = []
        self._num_steps = 0
        self._length = RunningMoments(rate=settings.length_shift.rate, floor=0.02)
        self._ended = RunningMoments(rate=settings.answers_truncated.rate, floor=0.01)
        self._answers: list[list[int]] = []  # answers, those with EOS, of the last steps
        self._samples = Window(128)

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        return [*self._histogram(view), *self._lengths(record), *self._ends(record), *self._sizes(record)]

    def _histogram(self, view: StepView) -> Iterator[Reading]:
        """Jensen-Shannon divergence of the last steps' content and the usual one, in nats (at most 0.69)."""
        rule = self._settings.target_shift
        num_rows = view.num_content
        if not num_rows:
            return
        ids, counts = view.content_targets
        step = (ids[:MAX_COUNTED], counts[:MAX_COUNTED] / num_rows)
        self._targets = [*self._targets, step][-rule.pooled :]
        self._rows = [*self._rows, num_rows][-rule.pooled :]
        if self._num_steps >= rule.warmup and sum(self._rows) >= rule.min_rows and len(self._rows) == rule.pooled:
            yield self._shift()
        self._usual.learn(*step)
        self._num_steps += 1

    def _shift(self) -> Reading:
        rule = self._settings.target_shift
        total = sum(self._rows)
        weights = np.repeat([rows / total for rows in self._rows], [each[0].size for each in self._targets])
        ids, shares = pooled(
            np.concatenate([each[0] for each in self._targets]),
            np.concatenate([each[1] for each in self._targets]) * weights,
        )
        usual = self._usual.of(ids)
        value = _divergence(ids, shares, self._usual, usual)
        place = int((shares - usual).argmax())
        evidence = (
            f"the targets of the last {rule.pooled} steps are others (divergence {value:.2f}): {{token}} is "
            f"{shares[place]:.1%} of them, usually {usual[place]:.1%}"
        )
        return Reading(
            name="target_shift", value=value, limit=rule.threshold, is_beyond=value > rule.threshold,
            token=int(ids[place]), evidence=evidence,
        )  # fmt: skip

    def _lengths(self, record: StepRecord) -> Iterator[Reading]:
        """Mean labelled positions of an answer, against their own level, in a logarithm."""
        rule = self._settings.length_shift
        answers, labelled = record.count("answers"), record.count("labelled")
        if not answers or not labelled:
            return
        value = math.log(labelled / answers)
        if self._length.count >= rule.warmup:
            ratio = math.exp(abs(value - self._length.mean))
            is_far = abs(self._length.z(value)) > LENGTH_ERRORS
            usual = math.exp(self._length.mean)
            evidence = f"answers have {labelled / answers:.1f} labelled tokens on average, usually {usual:.1f}"
            yield Reading(
                name="length_shift", value=ratio, limit=rule.threshold, is_beyond=ratio > rule.threshold and is_far,
                reference=usual, evidence=evidence,
            )  # fmt: skip
        self._length.update(value)

    def _ends(self, record: StepRecord) -> Iterator[Reading]:
        """Share of answers that hold an EOS, where nearly all of them used to."""
        rule = self._settings.answers_truncated
        answers, ended = record.count("answers"), record.count("answers_with_eos")
        if not answers or ended is None or record.eos_id < 0:
            return
        if is_plain_text(record, self._settings.no_stop_token.text_share):
            return
        self._answers = [*self._answers, [answers, ended]][-rule.pooled :]
        total, with_eos = (sum(each[place] for each in self._answers) for place in (0, 1))
        usual = min(self._ended.mean, 1.0)
        if self._ended.count >= rule.warmup and total >= rule.min_rows and usual >= ENDED_SHARE:
            share = with_eos / total
            error = math.sqrt(max(usual * (1.0 - usual), 1.0 / total) / total)
            is_beyond = share < usual - rule.threshold and share < usual - TRUNCATED_ERRORS * error
            evidence = f"{share:.1%} of the last {total} answers have an EOS, usually {usual:.1%}: some are cut off"
            yield Reading(
                name="answers_truncated", value=share, limit=usual - rule.threshold, is_beyond=is_beyond,
                reference=usual, evidence=evidence,
            )  # fmt: skip
        self._ended.update(ended / answers)

    def _sizes(self, record: StepRecord) -> Iterator[Reading]:
        """Samples (or answers) of a step, against the median of the last ones."""
        rule = self._settings.batch_shrunk
        size = record.samples or record.count("answers") or 0
        if not size:
            return
        if len(self._samples) >= rule.warmup:
            usual = self._samples.median()
            # Where a step has so many tokens, one of long samples has always had few: so fewer than any step had, too.
            limit = min([rule.threshold * usual, *self._samples.values[: -rule.window]])
            is_beyond = usual >= rule.min_rows and size < limit
            evidence = f"{size} samples in the step, usually {usual:g}"
            yield Reading(
                name="batch_shrunk", value=float(size), limit=limit, is_beyond=is_beyond, reference=usual,
                evidence=evidence,
            )  # fmt: skip
        self._samples.add(float(size))

    def forget(self) -> None:
        """Learn anew what the data are."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "usual": self._usual.state(),
            "targets": [[ids.tobytes(), shares.tobytes()] for ids, shares in self._targets],
            "rows": self._rows,
            "steps": self._num_steps,
            "length": self._length.state(),
            "ended": self._ended.state(),
            "answers": self._answers,
            "samples": self._samples.values,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._usual.restore(state["usual"])
        self._targets = [(np.frombuffer(ids, "<i8"), np.frombuffer(shares, "<f8")) for ids, shares in state["targets"]]
        self._rows = [int(rows) for rows in state["rows"]]
        self._num_steps = int(state["steps"])
        self._length.restore(state["length"])
        self._ended.restore(state["ended"])
        self._answers = [[int(each) for each in pair] for pair in state["answers"]]
        self._samples.values = [float(value) for value in state["samples"]]


def _divergence(
    ids: NDArray[np.int64], shares: NDArray[np.float64], usual: Shares, theirs: NDArray[np.float64]
) -> float:
    """Jensen-Shannon divergence from what is usual, in nats; what neither names is one more id.

    Args:
        ids: ascending ids [k].
        shares: the share of each [k].
        usual: what is usual.
        theirs: the usual share of each [k].
    """
    absent = usual.shares[~is_among(usual.ids, ids)]
    p = np.concatenate([shares, np.zeros(absent.size), [max(0.0, 1.0 - float(shares.sum()))]])
    q = np.concatenate([theirs, absent, [max(0.0, 1.0 - float(usual.shares.sum()))]])
    middle = np.maximum((p + q) / 2, TINY)
    terms = p * np.log(np.maximum(p, TINY) / middle) + q * np.log(np.maximum(q, TINY) / middle)
    return float(terms.sum()) / 2
