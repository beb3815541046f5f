"""Calls that never come though others do: said once, after two intervals."""

from __future__ import annotations

from sidestep.trainer_hooks.open_step import OpenStep
from sidestep.trainer_hooks.schedule import FAMILIES, Schedule

_INTERVALS = 2
_NO_BEFORE_CLIP = (
    "hooks.before_clip() is never called: gradients are taken at the optimizer's step, after any clipping "
    "(gradients/global/clipped is 1). Call it once per step, after the last backward."
)
_NO_AFTER_STEP = (
    "hooks.after_step(step) is never called: steps are counted by the optimizer's own calls and end when the next "
    "forward begins. Call it once per optimizer step, with your own step number."
)
_NO_BATCH = (
    "no training batch was seen: attach() to the module that the loop calls, after wrapping and compiling it, or pass "
    "batches to hooks.on_batch(input_ids=..., labels=..., logits=...)."
)
_NO_LABELS = (
    "no labels of the shape of input_ids were seen with any training batch: loss/* and data/* are absent. Pass both to "
    "the model's forward, or to hooks.on_batch(input_ids=..., labels=..., logits=...)."
)
_NO_GRADIENTS = (
    "no parameter had a gradient at the optimizer's step, two times that gradients were due: gradients/* is absent. "
    "Unfreeze what is to be trained; where gradients are freed before the step, call hooks.before_clip() before that."
)


class MissingCalls:
    """Watches which of the explicit calls a trainer makes."""

    def __init__(self, schedule: Schedule, *, takes_gradients: bool = True) -> None:
        self._takes_gradients = takes_gradients
        self._called: set[str] = set()
        self._patience_steps = _INTERVALS * schedule.shortest_interval_steps(*FAMILIES)
        self._batch_patience_steps = _INTERVALS * schedule.shortest_interval_steps("tokens", "loss", "answers")
        self._label_patience_steps = _INTERVALS * schedule.shortest_interval_steps("loss", "answers")
        self._num_steps = 0
        self._num_clipped = 0
        self._batch_seen = False
        self._labels_seen = False
        self._gradients_seen = False
        self._num_without_gradients = 0

    def called(self, name: str) -> None:
        """Remember a call."""
        self._called.add(name)

    def after_step(self, opened: OpenStep) -> list[tuple[str, str]]:
        """What is to be said after a step: codes and texts; the caller says each code once."""
        self._num_steps += 1
        said: list[tuple[str, str]] = []
        clipped = opened.gradients is not None and opened.gradients.clipped
        if clipped and self._called and "before_clip" not in self._called:
            self._num_clipped += 1
            if self._num_clipped >= _INTERVALS:
                said.append(("no-before-clip", _NO_BEFORE_CLIP))
        if self._called and "after_step" not in self._called and self._due(self._patience_steps):
            said.append(("no-after-step", _NO_AFTER_STEP))
        return said + self._missing_parts(opened)

    def _missing_parts(self, opened: OpenStep) -> list[tuple[str, str]]:
        """What no step has shown yet: batches, labels, gradients."""
        self._batch_seen = self._batch_seen or bool(opened.microbatches) or "on_batch" in self._called
        self._labels_seen = self._labels_seen or any(batch.has_labels for batch in opened.microbatches)
        self._gradients_seen = self._gradients_seen or opened.gradients is not None
        if opened.stepped and "gradients" in opened.due and self._takes_gradients and not self._gradients_seen:
            self._num_without_gradients += 1
        said: list[tuple[str, str]] = []
        if not self._batch_seen and self._due(self._batch_patience_steps):
            said.append(("no-batch", _NO_BATCH))
        elif not self._labels_seen and self._due(self._label_patience_steps):
            said.append(("no-labels", _NO_LABELS))
        if self._num_without_gradients >= _INTERVALS:
            said.append(("no-gradients", _NO_GRADIENTS))
        return said

    def _due(self, patience_steps: int) -> bool:
        return 0 < patience_steps <= self._num_steps
