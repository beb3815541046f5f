"""Texts cut to a size in bytes: W&B and the outbox take short ones (docs/delivery.md)."""

from __future__ import annotations

from typing import Final

MAX_TEXT_BYTES: Final = 2_048
"""Longest text of a row or of a table's cell."""

_ELLIPSIS: Final = "\u2026"


def clip(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return ``text``, or its beginning and an ellipsis, in at most ``max_bytes`` bytes of UTF-8."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode("utf-8")
    kept = encoded[: max(max_bytes - len(_ELLIPSIS.encode()), 0)].decode("utf-8", "ignore")
    return kept + _ELLIPSIS
