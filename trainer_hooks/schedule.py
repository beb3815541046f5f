"""When a family of metrics is due (docs/metrics.md, "Conventions")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sidestep.trainer_hooks.config import HooksConfig

FAMILIES: Final = ("tokens", "loss", "gradients", "generation", "collapse", "answers", "lr")
"""The families by the names that ``StepEnd.due`` uses."""


class Schedule:
    """The intervals of a configuration, by family.

    A family is due when ``step % interval == 0``, step 0 included; an interval of 0 is never due.
    """

    __slots__ = ("_intervals",)

    def __init__(self, config: HooksConfig) -> None:
        self._intervals: Mapping[str, int] = {
            "tokens": config.token_stats_interval,
            "loss": config.loss_breakdown_interval,
            "gradients": config.gradient_log_interval,
            "generation": config.generation_eval_interval,
            "collapse": config.collapse_detection_interval,
            "answers": config.answer_length_interval,
            "lr": config.lr_interval,
        }

    def due(self, family: str, step: int) -> bool:
        """Whether a family is due at an optimizer step; raises KeyError for an unknown family."""
        interval = self._intervals[family]
        return interval > 0 and step % interval == 0

    def due_families(self, step: int) -> tuple[str, ...]:
        """All families that are due at a step, in the order of ``FAMILIES``."""
        return tuple([name for name, interval in self._intervals.items() if interval > 0 and step % interval == 0])

    def shortest_interval_steps(self, *families: str) -> int:
        """The smallest interval among some families that are not switched off; 0 where all are."""
        return min((self._intervals[name] for name in families if self._intervals[name] > 0), default=0)
