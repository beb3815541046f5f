"""How often the worker looks for cycles of objects that nobody holds any more."""

from __future__ import annotations

import gc
from typing import Final

NEW_OBJECTS: Final = 20_000
"""Objects that are made and not freed, from one look at the youngest to the next: some 2,000 messages."""
_LOOKS: Final = 20
"""Of those looks, every so manyth takes in the next older ones."""


def collect_seldom() -> None:
    """Look for cycles every 2,000 messages or so, and never among what stands by now.

    Python's own 700 objects are 70 messages: a look each time took a fifth of the receiver's time and found nothing,
    for what a message is made of holds no cycle and is freed as soon as it has been used.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, _LOOKS, _LOOKS)
