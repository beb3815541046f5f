"""Nothing that a hook does reaches the training: exceptions are counted and said once, time is measured."""

from __future__ import annotations

import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from sidestep.trainer_hooks.console import Console

Params = ParamSpec("Params")
Result = TypeVar("Result")

_MAX_SHOWN_CHARACTERS = 600


class Guard:
    """What went wrong in hooks, and the CPU time that they took of the training thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._depth = 0
        self._began = 0.0
        self._seconds = 0.0
        self.grad_enabled = True
        """Whether gradients were on where the current call came from."""
        self.failures: Counter[str] = Counter()
        """Exceptions by where they were raised."""

    def take_seconds(self) -> float:
        """CPU time in hooks since the last time this was asked, the current call's so far included."""
        now = time.thread_time()
        seconds = self._seconds + (now - self._began if self._depth else 0.0)
        self._seconds, self._began = 0.0, now
        return max(0.0, seconds)

    def exclude(self, seconds: float) -> None:
        """Leave time within the current call out of the account (generation, which is told on its own)."""
        self._began += seconds

    def failed(self, where: str, error: Exception) -> None:
        """Count an exception; the first of each place is shown."""
        self.failures[where] += 1
        if self.failures[where] == 1:
            last = traceback.extract_tb(error.__traceback__)[-1:]
            place = f" at {last[0].name}:{last[0].lineno}" if last else ""
            text = f"{type(error).__name__}: {error}"[:_MAX_SHOWN_CHARACTERS]
            self._console.once(
                f"failed-{where}",
                f"a measurement failed in {where} and is left out ({text}{place}); training goes on, more are counted.",
            )

    def enter(self) -> None:
        """Begin a call; the time of one within another belongs to the outer one."""
        self._depth += 1
        if self._depth == 1:
            self.grad_enabled = torch.is_grad_enabled()
            self._began = time.thread_time()

    def leave(self) -> None:
        """End a call."""
        self._depth -= 1
        if self._depth == 0:
            self._seconds += time.thread_time() - self._began


class Guarded(Protocol):
    """Whatever has a guard."""

    @property
    def guard(self) -> Guard:
        """Its guard."""
        ...


def _is_capturing() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


Owner = TypeVar("Owner", bound=Guarded)


def guarded(
    method: Callable[Concatenate[Owner, Params], Result],
) -> Callable[Concatenate[Owner, Params], Result | None]:
    """Make a method that raises nothing, is measured, records no gradient and is never traced by a compiler.

    An exception makes it return None. ``KeyboardInterrupt`` and ``SystemExit`` are the trainer's own and pass. While a
    CUDA graph is being captured it does nothing: what it launched would be replayed for ever.
    """

    @functools.wraps(method)
    def call(self: Owner, *args: Params.args, **kwargs: Params.kwargs) -> Result | None:
        guard = self.guard
        guard.enter()
        try:
            if _is_capturing():
                return None
            with torch.no_grad():
                return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  (the hooks' failure is not the trainer's: counted, and said once)
            guard.failed(method.__name__.lstrip("_"), error)
            return None
        finally:
            guard.leave()

    untraced: Any = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return untraced  # type: ignore[no-any-return]
