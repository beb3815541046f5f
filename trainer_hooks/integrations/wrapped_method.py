"""One method of one instance, wrapped for a while; no class is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class WrappedMethod:
    """Puts ``around(method)`` in the place of one method of one instance, until ``undo``."""

    def __init__(self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._owner = owner
        self._name = name
        self._was_own = name in vars(owner)
        self._original = getattr(owner, name)
        self._wrapper = around(self._original)
        setattr(owner, name, self._wrapper)

    def undo(self) -> None:
        """Put back what was there, unless somebody has put something else there since."""
        if vars(self._owner).get(self._name) is not self._wrapper:
            return
        if self._was_own:
            setattr(self._owner, self._name, self._original)
        else:
            delattr(self._owner, self._name)
