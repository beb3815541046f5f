"""The user's words out of a prompt's ids, for the samples table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_ROLES = re.compile(r"^\s*(system|user|assistant|human|model)\b[:\n]?\s*", re.IGNORECASE)
_MARKER = re.compile(r"<[|/]?[^<>\s]{1,40}>")


def question_text(tokenizer: Any, ids: Sequence[int], image_token_id: int | None = None) -> str:
    """What the last user turn of a prompt says, template and image tokens removed (docs/metrics.md, ``generation/``).

    Works on ChatML-like templates, where a turn is ``<marker>role newline words <marker>``; any other text comes back
    as it is, without its special tokens.

    Args:
        tokenizer: anything with ``decode(ids)``, and perhaps ``all_special_ids``.
        ids: the prompt [t].
        image_token_id: the image placeholder.
    """
    special = {*(getattr(tokenizer, "all_special_ids", None) or ())} | {image_token_id}
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token in special:
            pieces.append([])
        else:
            pieces[-1].append(int(token))
    texts = [_MARKER.sub("\0", decode(tokenizer, piece)) for piece in pieces if piece]
    parts = [part for text in texts for part in text.split("\0")]
    turns: list[tuple[str, str]] = [("", "")]
    for part in parts:
        role = _ROLES.match(part)
        if role:
            turns.append((role[1].lower(), part[role.end() :]))
        else:
            turns[-1] = (turns[-1][0], turns[-1][1] + part)
    asked = [words for role, words in turns if role in {"user", "human"}]
    return (asked[-1] if asked else "".join(words for _, words in turns)).strip()


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Ids to text with special tokens kept, whichever way the tokenizer is asked for that."""
    try:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))
    except TypeError:
        return str(tokenizer.decode(list(ids)))  # a plain decode(ids)
