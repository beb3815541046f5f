"""Which notices a run has shown: one with a code is shown once, repeats are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from sidestep.protocol.messages import Json, Notice
from sidestep.worker.text.clipping import clip

MAX_CODES: Final = 256
"""Codes that are told apart; further ones are counted together and not shown."""

MAX_CODE_BYTES: Final = 256
"""Longest code that is remembered."""

_OTHERS: Final = "others"


class NoticeBoard:
    """Counts notices by their codes."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def is_new(self, notice: Notice) -> bool:
        """Count a notice; returns whether it is to be shown. One without a code always is."""
        if not notice.code:
            return True
        code = clip(notice.code, MAX_CODE_BYTES)
        code = code if code in self._seen or len(self._seen) < MAX_CODES else _OTHERS
        self._seen[code] += 1
        return self._seen[code] == 1 and code != _OTHERS

    def repeats(self) -> dict[str, int]:
        """Return code to how often it came up again."""
        repeated = {code: n - (code != _OTHERS) for code, n in sorted(self._seen.items())}
        return {code: n for code, n in repeated.items() if n}

    def state(self) -> Json:
        """Return the counts."""
        return dict(sorted(self._seen.items()))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._seen = Counter({str(code): int(count) for code, count in state.items()})
