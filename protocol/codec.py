"""Messages to and from plain fields and arrays, strictly by the annotations of ``messages.py``.

Strict means: a required field must be there, a value must be of its declared type and within ``limits.py``; a field
that is not known is skipped, one that is missing takes its default (docs/wire_protocol.md, "Evolution").
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.array_frame import WIRE_DTYPES, check_array
from sidestep.protocol.errors import DecodeError, EncodeError, LimitExceededError
from sidestep.protocol.limits import MAX_BLOB_BYTES, MAX_MAP_ENTRIES, MAX_NESTING_LEVELS, MAX_TEXT_BYTES
from sidestep.protocol.messages import ArraySpec, Kind, Message

_INT64 = 1 << 63
_SHORT = MAX_TEXT_BYTES // 4
"""A text of so many characters is within the limit, whatever they are."""

Check = Callable[[str, object], Any]


class FieldSchema(NamedTuple):
    """One field: how it is checked, whether it is an array, whether it may be missing."""

    name: str
    check: Check
    array: ArraySpec | None
    raw_bytes: bool
    required: bool
    dtype: np.dtype[Any] | None
    """Of the array that it travels as; None for a plain field."""
    taken_as_it_is: type | None
    """A value of exactly this type needs no check."""


def _wrong(name: str, value: object, wanted: str) -> DecodeError:
    return DecodeError(f"field {name!r} is {type(value).__name__}, not {wanted}")


def _check_int(name: str, value: object) -> int:
    if type(value) is int and -_INT64 <= value < _INT64:
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(name, value, "an integer")
    value = int(value)
    if not -_INT64 <= value < _INT64:
        raise LimitExceededError(f"field {name!r} does not fit 64 bits")
    return value


def _check_float(name: str, value: object) -> float:
    if type(value) is float:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(_check_int(name, value))
    if not isinstance(value, float):
        raise _wrong(name, value, "a number")
    return float(value)


def _check_bool(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise _wrong(name, value, "a boolean")
    return value


def _check_str(name: str, value: object) -> str:
    if type(value) is str and len(value) <= _SHORT:
        return value
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    value = str.__str__(value)  # a member of a StrEnum is a text too
    if len(value) * 4 > MAX_TEXT_BYTES and len(value.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise LimitExceededError(f"field {name!r} is a text of more than {MAX_TEXT_BYTES} bytes")
    return value


def _check_json(name: str, value: object, level: int = 0) -> object:
    if level > MAX_NESTING_LEVELS:
        raise LimitExceededError(f"field {name!r} is nested deeper than {MAX_NESTING_LEVELS} levels")
    if isinstance(value, Mapping):
        _check_entries(name, len(value))
        return {_check_str(name, key): _check_json(name, item, level + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        _check_entries(name, len(value))
        return [_check_json(name, item, level + 1) for item in value]
    if isinstance(value, str):
        return _check_str(name, value)
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, int):
        return _check_int(name, value)
    if isinstance(value, float):
        return float(value)
    raise _wrong(name, value, "a plain value (None, bool, int, float, str, bytes, list, dict)")


def _check_entries(name: str, num_entries: int) -> None:
    if num_entries > MAX_MAP_ENTRIES:
        raise LimitExceededError(f"field {name!r} has {num_entries} entries, more than {MAX_MAP_ENTRIES}")


def _check_bytes(name: str, value: object) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise _wrong(name, value, "bytes")
    if len(value) > MAX_BLOB_BYTES:
        raise LimitExceededError(f"field {name!r} has {len(value)} bytes, more than {MAX_BLOB_BYTES}")
    return bytes(value)


def _mapping_of(check: Check) -> Check:
    def checked(name: str, value: object) -> dict[str, Any]:
        if type(value) is not dict and not isinstance(value, Mapping):
            raise _wrong(name, value, "a map")
        if not value:
            return {}
        _check_entries(name, len(value))
        if check is _check_int and _are_counts(value):
            return dict(value)
        return {_check_str(name, key): check(name, item) for key, item in value.items()}

    return checked


def _are_counts(value: Mapping[Any, Any]) -> bool:
    """Return whether all keys are texts and all values integers, without a call for each of them."""
    for key, item in value.items():
        if type(key) is not str or type(item) is not int or len(key) > _SHORT or not -_INT64 <= item < _INT64:
            return False
    return True


def _tuple_of(check: Check) -> Check:
    def checked(name: str, value: object) -> tuple[Any, ...]:
        if type(value) is not tuple and not isinstance(value, list | tuple):
            raise _wrong(name, value, "a list")
        if not value:
            return ()
        _check_entries(name, len(value))
        if (
            check is _check_str
            and type(value) is tuple
            and all(type(each) is str and len(each) <= _SHORT for each in value)
        ):
            return value
        return tuple([check(name, item) for item in value])

    return checked


_SCALARS: Mapping[object, Check] = {
    int: _check_int, float: _check_float, bool: _check_bool, str: _check_str, bytes: _check_bytes, Any: _check_json,
}  # fmt: skip


def _check_of(annotation: object) -> Check:
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple_of(_check_of(arguments[0]))
    if get_origin(annotation) is not None and issubclass(typing.cast("type", get_origin(annotation)), Mapping):
        return _mapping_of(_check_of(arguments[1]))
    raise TypeError(f"{annotation!r} has no form on the wire")


_SCHEMAS: dict[type[Message], tuple[FieldSchema, ...]] = {}


def _array_spec(annotation: object) -> ArraySpec | None:
    return next((item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, ArraySpec)), None)


def schema(message_type: type[Message]) -> tuple[FieldSchema, ...]:
    """Return the fields of ``message_type`` as they travel, in the order of the dataclass."""
    found = _SCHEMAS.get(message_type)
    if found is None:
        found = _SCHEMAS[message_type] = _read_schema(message_type)
    return found


def _read_schema(message_type: type[Message]) -> tuple[FieldSchema, ...]:
    hints = get_type_hints(message_type, include_extras=True)
    fields = []
    for field in dataclasses.fields(message_type):
        annotation = hints[field.name]
        spec = _array_spec(annotation)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        check = _check_json if spec else _check_of(annotation)
        raw_bytes = annotation is bytes
        dtype = WIRE_DTYPES[spec.dtype if spec else "uint8"] if spec or raw_bytes else None
        plain = annotation if annotation in (float, bool) else None
        fields.append(FieldSchema(field.name, check, spec, raw_bytes, required, dtype, plain))
    return tuple(fields)


def to_fields(message: Message) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the plain fields and the arrays of ``message``; byte strings travel as arrays of uint8.

    Raises:
        EncodeError: a value is not of its declared type, or over a limit.
    """
    plain: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for field in schema(type(message)):
        value = getattr(message, field.name)
        try:
            if field.array is not None:
                arrays[field.name] = check_array(field.name, value, field.array)
            elif field.raw_bytes:
                arrays[field.name] = np.frombuffer(field.check(field.name, value), np.uint8)
            else:
                plain[field.name] = field.check(field.name, value)
        except DecodeError as error:
            raise EncodeError(f"{type(message).__name__}: {error}") from error
    return plain, arrays


def from_fields(message_type: type[Message], plain: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Message:
    """Build a message of ``message_type``; unknown fields are skipped.

    Raises:
        DecodeError: a required field is missing, or a value is not of its declared type.
        LimitExceededError: a value is over a limit.
    """
    of_fields, of_arrays = _plan(message_type)
    values: dict[str, Any] = {}
    for name, check, taken_as_it_is, required in of_fields:
        if name in plain:
            value = plain[name]
            values[name] = value if type(value) is taken_as_it_is else check(name, value)
        elif required:
            raise DecodeError(f"{message_type.__name__} has no field {name!r}")
    for name, check, raw_bytes, dtype, axes, required in of_arrays:
        if name in arrays:
            array = arrays[name]
            if array.dtype != dtype or array.ndim != axes:
                raise DecodeError(f"field {name!r} is {array.dtype}[{array.ndim} axes], not {dtype}[{axes} axes]")
            values[name] = check(name, array.tobytes()) if raw_bytes else array
        elif required:
            raise DecodeError(f"{message_type.__name__} has no field {name!r}")
    return message_type(**values)


class _Plan(NamedTuple):
    """What ``from_fields`` asks of a schema, laid out for its two loops."""

    of_fields: tuple[tuple[str, Check, type | None, bool], ...]
    of_arrays: tuple[tuple[str, Check, bool, np.dtype[Any], int, bool], ...]


_PLANS: dict[type[Message], _Plan] = {}


def _plan(message_type: type[Message]) -> _Plan:
    found = _PLANS.get(message_type)
    if found is None:
        fields = schema(message_type)
        found = _PLANS[message_type] = _Plan(
            tuple((f.name, f.check, f.taken_as_it_is, f.required) for f in fields if f.dtype is None),
            tuple(
                (f.name, f.check, f.raw_bytes, f.dtype, f.array.axes if f.array else 1, f.required)
                for f in fields
                if f.dtype is not None
            ),
        )
    return found


def kind_name(kind: Kind) -> str:
    """Return the name by which accounts and ``StepEnd`` count a kind."""
    return kind.name.lower()
