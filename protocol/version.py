"""The version of the wire, apart from the version of the package (docs/wire_protocol.md).

A change that an older peer can skip (a new field with a default, a new kind) raises ``WIRE_MINOR``. A change that it
cannot raises ``WIRE_MAJOR``: peers a major version apart do not talk (``Reject``).
"""

from __future__ import annotations

WIRE_MAJOR = 1
WIRE_MINOR = 5
