"""A trainer's own values as plain ones that can travel, secrets masked."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any

from sidestep.protocol.limits import MAX_NESTING_LEVELS
from sidestep.protocol.messages import Json

_MAX_TEXT_CHARACTERS = 16_384
_MAX_ENTRIES = 2_048
_INT64 = 1 << 63
_SECRETS = ("api_key", "apikey", "password", "passwd", "secret", "access_token", "auth_token", "hf_token", "credential")
_SECRET_VARIABLE = re.compile(r"(?i)(key|token|secret|passw(or)?d|credentials?)\Z")
_SHORTEST_SECRET_CHARACTERS = 16


def without_secrets(text: str) -> str:
    """``text`` with ``***`` for what stands in environment variables named like secrets (``WANDB_API_KEY``)."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET_CHARACTERS and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return text


def plain(value: Any, level: int = 0) -> Json:
    """A value as None, bool, int, float, text, list or dict with text keys.

    Dataclasses, mappings, ``argparse`` namespaces and other objects with attributes become dicts at the outermost
    levels; paths, enums, dtypes and all else become text. What is named like a secret (``api_key``, ``password``) is
    masked, and so is what the environment holds under such a name, wherever it stands.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float | str):
        return _scalar(value)
    if level >= MAX_NESTING_LEVELS - 1:
        return _text(value)
    if isinstance(value, list | tuple | AbstractSet):
        return [plain(item, level + 1) for item in list(value)[:_MAX_ENTRIES]]
    entries = _entries(value)
    if entries is None:
        return _text(value)
    return {
        str(name): "***" if is_secret(str(name)) and item else plain(item, level + 1)
        for name, item in list(entries.items())[:_MAX_ENTRIES]
    }


def _scalar(value: float | str | None) -> Json:
    """A scalar of exactly its plain type: subclasses (numpy's float64, a text enum) do not travel."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else str(value)
    return float(value) if isinstance(value, float) else without_secrets(str(value))[:_MAX_TEXT_CHARACTERS]


def plain_map(value: Any) -> dict[str, Json]:
    """A configuration as a map.

    Raises:
        ValueError: it is neither a mapping nor an object with attributes.
    """
    if value is None:
        return {}
    made = plain(value)
    if not isinstance(made, dict):
        raise ValueError(
            f"run_config must be a mapping, a dataclass or an object with attributes, not {type(value).__name__}"
        )
    return made


def is_secret(name: str) -> bool:
    """Whether a setting's name says that its value is nobody's business."""
    lowered = name.lower().replace("-", "_")
    return any(word in lowered for word in _SECRETS)


def _entries(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict) and not isinstance(value, type):
        told = to_dict()
        return told if isinstance(told, Mapping) else None
    if type(value).__module__ in {"argparse", "types"} and hasattr(value, "__dict__"):
        return {name: item for name, item in vars(value).items() if not name.startswith("_")}
    return None


def _text(value: Any) -> str:
    item = getattr(value, "item", None)
    if type(value).__module__ == "numpy" and callable(item) and getattr(value, "ndim", 1) == 0:
        return str(item())
    return without_secrets(str(value))[:_MAX_TEXT_CHARACTERS]
