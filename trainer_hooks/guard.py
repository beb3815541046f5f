"""Nothing that a hook does reaches the training: exceptions are counted and said once, time is measured."""

from __future__ import annotations

import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from sidestep.trainer_hooks import courtesy
from sidestep.trainer_hooks.console import Console

Params = ParamSpec("Params")
Result = TypeVar("Result")

_MAX_SHOWN_CHARACTERS = 600
_set_grad_enabled: Any = torch._C._set_grad_enabled  # noqa: SLF001  (what torch.no_grad() itself calls)


class Guard:
    """What went wrong in hooks, and the time that they took of the training thread.

    Wall time: the thread's CPU clock is a system call, which among cold caches cost a fifth of what it measured.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._depth = 0
        self._began = 0.0
        self._seconds = 0.0
        self.is_shielded = False
        """Whether the compiler has been kept out in full for the current call."""
        self.grad_enabled = True
        """Whether gradients were on where the current call came from; off where it came from another of ours."""
        self.failures: Counter[str] = Counter()
        """Exceptions by where they were raised."""
        courtesy.watch(self)

    @property
    def is_inside(self) -> bool:
        """Whether the training thread is within a hook; any thread may ask."""
        return self._depth > 0

    def take_seconds(self) -> float:
        """Time in hooks since the last time this was asked, the current call's so far included."""
        now = time.perf_counter()
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

    def enter(self) -> bool:
        """Begin a call, with gradients off; the time of one within another belongs to the outer one.

        Returns:
            Whether gradients were on, which ``leave`` puts back.
        """
        records_gradients = torch.is_grad_enabled()
        self.grad_enabled = records_gradients
        if self._depth == 0:
            self._began = time.perf_counter()
        self._depth += 1
        if records_gradients:
            _set_grad_enabled(False)  # noqa: FBT003
        return records_gradients

    def leave(self, records_gradients: bool) -> None:  # noqa: FBT001  (what enter returned)
        """End a call."""
        if records_gradients:
            _set_grad_enabled(True)  # noqa: FBT003
        self._depth -= 1
        if self._depth == 0:
            self._seconds += time.perf_counter() - self._began


class Guarded(Protocol):
    """Whatever has a guard."""

    @property
    def guard(self) -> Guard:
        """Its guard."""
        ...


_CUDA_IS_BUILT: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]


def _is_capturing() -> bool:
    if not _CUDA_IS_BUILT:
        return False
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


_eval_frame: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)  # noqa: SLF001
_frame_callback: Callable[[], object] = getattr(_eval_frame, "get_eval_frame_callback", lambda: True)
"""What looks at every frame now, or None; where an older torch cannot tell, something always may."""


Owner = TypeVar("Owner", bound=Guarded)


def guarded(
    method: Callable[Concatenate[Owner, Params], Result],
) -> Callable[Concatenate[Owner, Params], Result | None]:
    """Make a method that raises nothing, is measured, records no gradient and is never traced by a compiler.

    An exception makes it return None. ``KeyboardInterrupt`` and ``SystemExit`` are the trainer's own and pass. While a
    CUDA graph is being captured it does nothing: what it launched would be replayed for ever.

    Written for caches that a training step has just emptied: ``torch.no_grad()`` and a full ``torch.compiler.disable``
    cost 25 and 11 microseconds there, so gradients are switched by the function beneath, and the compiler is kept out
    by a mark on the code (``recursive=False``), in full only where it is watching.
    """
    name = method.__name__.lstrip("_")

    @functools.wraps(method)
    def entrance(self: Owner, *args: Params.args, **kwargs: Params.kwargs) -> Result | None:
        guard = self.guard
        if _frame_callback() is not None and not guard.is_shielded:  # called from within a compiled function
            return shielded(self, *args, **kwargs)
        records_gradients = guard.enter()
        try:
            if _is_capturing():
                return None
            return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  (the hooks' failure is not the trainer's: counted, and said once)
            guard.failed(name, error)
            return None
        finally:
            guard.leave(records_gradients)

    untraced: Any = torch.compiler.disable(entrance)  # type: ignore[no-untyped-call]

    def shielded(self: Owner, *args: Params.args, **kwargs: Params.kwargs) -> Result | None:
        self.guard.is_shielded = True
        try:
            return untraced(self, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self.guard.is_shielded = False

    marked: Any = torch.compiler.disable(entrance, recursive=False)  # type: ignore[no-untyped-call]
    return marked  # type: ignore[no-any-return]
