"""Ids to text, from the ``tokenizer.json`` that travelled with the run, or from a table of texts; it never raises.

A token stands as the tokenizer decodes it by itself. What could not be seen (spaces, control characters, pieces of a
character) is shown by an escape or by the vocabulary's own spelling, an id that nothing is known of by ``<id 123>``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Final

from tokenizers import Tokenizer

from sidestep.protocol.messages import Json
from sidestep.worker.text.clipping import clip

MAX_TOKEN_BYTES: Final = 256
"""Longest text of one token."""

_CACHE_ENTRIES: Final = 1 << 16
_MAX_ID: Final = (1 << 32) - 1
_REPLACEMENT: Final = "\ufffd"  # what a decoder makes of a piece of a character


class Detokenizer:
    """The text of ids, by the run's tokenizer; without a usable one, ids stand for themselves.

    ``problem`` says what is wrong with the tokenizer that travelled, and is empty where nothing is.
    """

    def __init__(self, table: Mapping[str, Json]) -> None:
        """Read the table ``tokenizer`` (docs/wire_protocol.md); an unusable one is told in ``problem``."""
        self.problem = ""
        self._specials = _ids(table.get("special_ids"))
        self._texts = _texts(table.get("texts"))
        self._tokenizer: Any = None
        if table.get("kind") == "json":
            self._load(table.get("content"))
        self._piece: Callable[[int], str | None] = lru_cache(maxsize=_CACHE_ENTRIES)(self._find_piece)
        self._token: Callable[[int], str] = lru_cache(maxsize=_CACHE_ENTRIES)(self._find_token)

    def token(self, token_id: int) -> str:
        """Return the text of one id, made visible."""
        return self._token(int(token_id))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids in a row; special tokens are left out, unknown ids stand as ``<id 123>``."""
        shown = [int(i) for i in ids if int(i) not in self._specials]
        runs = [(known, list(run)) for known, run in groupby(shown, key=lambda i: self._piece(i) is not None)]
        return "".join(self._decode(run) if known else "".join(map(_stand_in, run)) for known, run in runs)

    def _load(self, content: Json) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except BaseException as error:  # noqa: BLE001
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        """Note what the tokenizer library raised, a panic of its native code included; nothing else is held back."""
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        if not self.problem:
            reason = clip(str(error) or type(error).__name__, MAX_TOKEN_BYTES)
            self.problem = f"the tokenizer that came with the run cannot be used, ids stand for tokens: {reason}"

    def _find_piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id; None where it has none."""
        if self._tokenizer is None:
            return self._texts.get(token_id)
        if not 0 <= token_id <= _MAX_ID:
            return None
        try:
            piece = self._tokenizer.id_to_token(token_id)
        except BaseException as error:  # noqa: BLE001
            self._tell(error)
            return None
        return None if piece is None else str(piece)

    def _find_token(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None:
            return _stand_in(token_id)
        decoded = self._decode([token_id], keep_specials=True)
        chosen = piece if not decoded or _REPLACEMENT in decoded else decoded
        return clip(_visible(chosen), MAX_TOKEN_BYTES) or _stand_in(token_id)

    def _decode(self, ids: list[int], *, keep_specials: bool = False) -> str:
        if self._tokenizer is None:
            return "".join(self._texts[i] for i in ids)
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=not keep_specials))
        except BaseException as error:  # noqa: BLE001
            self._tell(error)
            return "".join(map(_stand_in, ids))


def _visible(text: str) -> str:
    """Blank text as signs, control characters as escapes; all else as it is."""
    if text.strip(" ") == "":
        return "\u2423" * len(text)  # open box: the sign for a space
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode("ascii") for c in text)


def _stand_in(token_id: int) -> str:
    return f"<id {token_id}>"


def _ids(value: Json) -> frozenset[int]:
    return frozenset(i for i in value if isinstance(i, int)) if isinstance(value, list | tuple) else frozenset()


def _texts(value: Json) -> dict[int, str]:
    """Read id to text; keys that are no ids are left out."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    return {int(key): str(text) for key, text in pairs if isinstance(key, int) or str(key).isdecimal()}
