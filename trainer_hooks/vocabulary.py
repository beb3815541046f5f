"""What a tokenizer says about its ids, whichever library it comes from; none is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from sidestep.protocol.messages import Json
from sidestep.trainer_hooks.config import HooksConfig

_EOS_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
_IMAGE_TOKENS = ("<|image|>", "<image>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The ids with a meaning, and the texts of all."""

    eos_id: int | None
    pad_id: int | None
    image_token_id: int | None
    size: int
    """Ids that there are, added ones included; 0 where nobody tells (docs/metrics.md, "Vocabulary size")."""
    special_ids: tuple[int, ...]
    content: bytes | None
    """A ``tokenizer.json``, where the tokenizer can be written as one."""
    texts: dict[int, str]
    """The text of each id, where it cannot."""

    def as_table(self) -> Json:
        """The table ``tokenizer`` as it travels by its hash."""
        kind: dict[str, Json] = {"kind": "texts", "texts": self.texts}
        if self.content is not None:
            kind = {"kind": "json", "content": self.content}
        return {
            **kind,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "vocabulary_size": self.size,
            "special_ids": list(self.special_ids),
            "image_token_id": self.image_token_id,
        }


def read_vocabulary(tokenizer: Any, config: HooksConfig) -> Vocabulary:
    """Read a ``tokenizers.Tokenizer``, a Hugging Face tokenizer, or anything with ``decode(ids)`` and ``len()``.

    What ``config`` names wins over what the tokenizer says. Without a tokenizer, only what ``config`` names is known.

    Raises:
        ValueError: a tokenizer that can neither be written as JSON nor decode.
    """
    if tokenizer is None:
        return Vocabulary(
            eos_id=config.eos_id,
            pad_id=config.pad_id,
            image_token_id=config.image_token_id,
            size=config.vocabulary_size or 0,
            special_ids=(),
            content=None,
            texts={},
        )
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    content = _as_json(backend)
    size = config.vocabulary_size or _size(tokenizer, backend)
    decode = getattr(tokenizer, "decode", None)
    if content is None and not callable(decode):
        raise ValueError(
            f"tokenizer: a {type(tokenizer).__name__} can neither be written as JSON (to_str, backend_tokenizer) nor "
            "decode ids; pass a tokenizers.Tokenizer or a Hugging Face tokenizer, or leave it out"
        )
    padding = getattr(backend, "padding", None)
    padding_id = padding.get("pad_id") if isinstance(padding, dict) else None
    return Vocabulary(
        eos_id=_first(config.eos_id, _attribute(tokenizer, "eos_token_id"), *_named(backend, _EOS_TOKENS)),
        pad_id=_first(config.pad_id, _attribute(tokenizer, "pad_token_id"), padding_id, *_named(backend, _PAD_TOKENS)),
        image_token_id=_first(
            config.image_token_id, _attribute(tokenizer, "image_token_id"), *_named(backend, _IMAGE_TOKENS)
        ),
        size=size,
        special_ids=_special_ids(tokenizer, backend),
        content=content,
        texts={} if content is not None or decode is None else _texts(decode, size),
    )


def with_image_token(config: HooksConfig, model: object) -> HooksConfig:
    """Return the configuration with the id that the model puts images in the place of, unless it names one."""
    own = getattr(model, "config", None)
    told = getattr(own, "image_token_id", getattr(own, "image_token_index", None))
    if config.image_token_id is not None or isinstance(told, bool) or not isinstance(told, int) or told < 0:
        return config
    return replace(config, image_token_id=told)


def _as_json(backend: Any) -> bytes | None:
    """The ``tokenizer.json``; None where there is none, as of one with a part that is written in Python."""
    write = getattr(backend, "to_str", None)
    try:
        text = write() if callable(write) else None
    except Exception:  # noqa: BLE001  (the library raises what it likes; the table of texts then says that it did)
        return None
    return text.encode("utf-8") if isinstance(text, str) else None


def _size(tokenizer: Any, backend: Any) -> int:
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    ask = getattr(backend, "get_vocab_size", None)
    return int(ask(with_added_tokens=True)) if callable(ask) else int(getattr(tokenizer, "vocab_size", 0) or 0)


def _special_ids(tokenizer: Any, backend: Any) -> tuple[int, ...]:
    told = getattr(tokenizer, "all_special_ids", None)
    if told is None:
        added = getattr(backend, "get_added_tokens_decoder", None)
        told = [i for i, token in added().items() if getattr(token, "special", False)] if callable(added) else ()
    return tuple(sorted({int(i) for i in told}))


def _texts(decode: Callable[[list[int]], str], size: int) -> dict[int, str]:
    """The text of every id; one that cannot be decoded (a hole in the vocabulary) has none."""
    texts = {}
    for i in range(size):
        try:
            texts[i] = str(decode([i]))
        except Exception:  # noqa: BLE001  (a hole raises whatever its library likes; its text is then its number)
            texts[i] = f"<{i}>"
    return texts


def _named(backend: Any, tokens: Iterable[str]) -> list[int | None]:
    ask = getattr(backend, "token_to_id", None)
    return [ask(token) for token in tokens] if callable(ask) else []


def _attribute(tokenizer: Any, name: str) -> int | None:
    value = getattr(tokenizer, name, None)
    return value if isinstance(value, int) else None


def _first(*values: int | None) -> int | None:
    return next((int(value) for value in values if value is not None), None)
