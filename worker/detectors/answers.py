"""The content of the answers: targets that have become one and the same token, and a model that says one only.

The user's story, "A" to everything, is told here step by step, without generating: ``target_single`` says that the
training data are to blame, ``single_answer`` that the model does it. Data that are 85 % "A" are neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.binomial import is_clearly_below
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.token_table import Shares
from sidestep.worker.detectors.view import StepView

MAX_COUNTED: Final = 24
"""Most frequent ids of a step that are remembered one by one."""
MAX_USUAL: Final = 128
FIRST_WINDOWS: Final = 4
CHANCE: Final = 1e-6
"""Probability below which a window of one answer is not taken for chance: 10,000 steps hold many windows."""


@dataclass(frozen=True, slots=True)
class _Content:
    """What the window keeps of a step's content rows."""

    answers: int
    rows: int
    judged: int
    """Rows that have a prediction and its entropy."""
    targets: dict[int, int]
    surely: dict[int, int]
    """Predicted id to the rows at which it is predicted surely."""


class AnswerContent:
    """``target_single`` and ``single_answer``."""

    name = "answers"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._window: list[_Content] = []
        self._reset()

    def _reset(self) -> None:
        self._usual = Shares(max_ids=MAX_USUAL, rate=self._settings.single_answer.rate)
        self._num_steps = 0
        self._first = [0, -1]  # content rows so far, and the only token among their targets; -1: there are others

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge the window that ends with this step."""
        if not view.num_rows:
            return ()
        step = self._content(view)
        self._window = [*self._window, step][-max(self._settings.target_single.pooled, 1) :]
        self._count_first(step)
        chosen = self._chosen()
        found: list[Reading] = []
        is_single = False
        if chosen:
            self._window = chosen  # the next step needs no older ones
            for reading in self._targets(chosen):
                is_single = reading.is_beyond
                found.append(reading)
            found.extend(self._predictions(chosen, is_single=is_single))
        if step.rows and not any(reading.is_beyond for reading in found):
            counts = np.array(list(step.targets.values()), np.float64)
            self._usual.learn(np.array(list(step.targets), np.int64), counts / step.rows)
            self._num_steps += 1
        return found

    def _count_first(self, step: _Content) -> None:
        rows, token = self._first
        only = next(iter(step.targets), -1) if len(step.targets) == 1 else -1
        if step.rows:
            self._first = [min(rows + step.rows, 1 << 20), only if not rows or only == token else -1]

    def _content(self, view: StepView) -> _Content:
        content = view.content
        surely: dict[int, int] = {}
        judged = 0
        predictions, entropies = view.predictions, view.entropies
        if predictions is not None and entropies is not None:
            judged = view.num_content
            sure = content & (entropies < self._settings.single_answer.sure)
            surely = _most(predictions[sure])
        ids, counts = view.content_targets
        targets = dict(zip(ids[:MAX_COUNTED].tolist(), counts[:MAX_COUNTED].tolist(), strict=True))
        return _Content(int(view.starts.size), view.num_content, judged, targets, surely)

    def _chosen(self) -> list[_Content]:
        """Return the newest steps that are enough: so many content rows, or as many answers without any."""
        rows = answers = 0
        enough = self._settings.target_single.min_rows
        for number, each in enumerate(reversed(self._window), start=1):
            rows += each.rows
            answers += each.answers
            if rows >= enough or (rows == 0 and answers >= enough):
                return self._window[-number:]
        return []

    def _targets(self, chosen: list[_Content]) -> Iterator[Reading]:
        """Entropy of the content's targets; rare ids count as all different."""
        rule = self._settings.target_single
        counts = _joined(each.targets for each in chosen)
        rows = sum(each.rows for each in chosen)
        if not rows:
            evidence = f"none of {sum(each.answers for each in chosen)} answers has a token before its end"
            yield Reading(name="target_single", value=0.0, limit=rule.threshold, is_beyond=True, evidence=evidence)
            return
        entropy = sum(count / rows * math.log(rows / count) for count in counts.values())
        entropy += (rows - sum(counts.values())) / rows * math.log(rows)
        token = max(counts, key=lambda each: (counts[each], -each))
        evidence = f"{counts[token]} of the last {rows} content tokens among the targets are {{token}}"
        is_beyond = entropy < rule.threshold and self._is_unusual(token, rows - counts[token], rows)
        yield Reading(
            name="target_single", value=entropy, limit=rule.threshold, is_beyond=is_beyond, token=token,
            evidence=evidence,
        )  # fmt: skip

    def _is_unusual(self, token: int, others: int, rows: int) -> bool:
        """Whether so few other targets are no chance: data that are 95 % "A" have windows of almost nothing else.

        Before the usual share is known, it takes four windows' rows, from the first one on, without any other.
        """
        rule = self._settings.target_single
        if self._num_steps < rule.warmup:
            return self._first[1] >= 0 and self._first[0] >= FIRST_WINDOWS * rule.min_rows
        return is_clearly_below(others, rows, 1.0 - self._usual.share(token), likely=CHANCE)

    def _predictions(self, chosen: list[_Content], *, is_single: bool) -> Iterator[Reading]:
        """One token is predicted surely nearly everywhere, and the data of old were not like that."""
        rule = self._settings.single_answer
        rows = sum(each.judged for each in chosen)
        if rows < rule.min_rows or not (is_single or self._num_steps >= rule.warmup):
            return
        counts = _joined(each.surely for each in chosen)
        token = max(counts, key=lambda each: (counts[each], -each), default=-1)
        share = counts.get(token, 0) / rows
        usual = self._usual.share(token)
        meant = _joined(each.targets for each in chosen).get(token, 0) / max(sum(each.rows for each in chosen), 1)
        is_wrong = usual <= rule.usual and meant <= share - rule.wrong
        is_beyond = share >= rule.threshold and (is_single or is_wrong)
        evidence = f"{share:.0%} of the content tokens are surely predicted to be {{token}}; "
        evidence += (
            f"{usual:.0%} of the targets usually are" if self._num_steps else "so are the targets, from the start"
        )
        yield Reading(
            name="single_answer", value=share, limit=rule.threshold, is_beyond=is_beyond, reference=usual, token=token,
            evidence=evidence,
        )  # fmt: skip

    def forget(self) -> None:
        """Learn anew what the targets usually are."""
        self._window = []
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        window = [
            [each.answers, each.rows, each.judged, *_listed(each.targets), *_listed(each.surely)]
            for each in self._window
        ]
        return {"window": window, "usual": self._usual.state(), "steps": self._num_steps, "first": self._first}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._window = [
            _Content(int(answers), int(rows), int(judged), _mapped(t, tn), _mapped(p, pn))
            for answers, rows, judged, t, tn, p, pn in state["window"]
        ]
        self._usual.restore(state["usual"])
        self._num_steps = int(state["steps"])
        self._first = [int(each) for each in state.get("first", (0, -1))]


def _most(ids: Any) -> dict[int, int]:
    distinct, counts = np.unique(ids, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_COUNTED]
    return dict(zip(distinct[order].tolist(), counts[order].tolist(), strict=True))


def _joined(parts: Any) -> dict[int, int]:
    counts: dict[int, int] = {}
    for part in parts:
        for token, count in part.items():
            counts[token] = counts.get(token, 0) + count
    return counts


def _listed(counts: Mapping[int, int]) -> tuple[list[int], list[int]]:
    return list(counts), list(counts.values())


def _mapped(ids: Sequence[Any], counts: Sequence[Any]) -> dict[int, int]:
    return {int(token): int(count) for token, count in zip(ids, counts, strict=True)}
