"""Sample images as small PNG files: the same pixels give the same bytes."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import Any, Final

from PIL import Image

from sidestep.protocol.messages import Json

MAX_SIDE_PIXELS: Final = 256
"""Longest side of a thumbnail; a larger image is scaled down, a smaller one stays."""

_MODES: Final = {1: "L", 3: "RGB"}


def image_cell(image: Json) -> dict[str, Any] | None:
    """Return the table cell of a sample's image.

    Args:
        image: ``{"shape": [h, w] or [h, w, c], "pixels": uint8 bytes}`` with 1 or 3 channels, or None.

    Returns:
        ``{"_type": "image", "png": base64}``, or None where there is no image of that layout.
    """
    if not isinstance(image, dict) or not isinstance(image.get("pixels"), bytes):
        return None
    shape = image.get("shape")
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        return None
    height, width, channels = (*shape, 1) if len(shape) == 2 else shape if len(shape) == 3 else (0, 0, 0)
    if channels not in _MODES or height * width * channels != len(image["pixels"]):
        return None
    png = _thumbnail(image["pixels"], height, width, channels)
    return {"_type": "image", "png": base64.b64encode(png).decode("ascii")}


@lru_cache(maxsize=64)
def _thumbnail(pixels: bytes, height: int, width: int, channels: int) -> bytes:
    picture = Image.frombytes(_MODES[channels], (width, height), pixels)
    longest = max(height, width)
    if longest > MAX_SIDE_PIXELS:
        size = tuple(max(1, round(side * MAX_SIDE_PIXELS / longest)) for side in (width, height))
        picture = picture.resize((size[0], size[1]), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=6)
    return file.getvalue()
