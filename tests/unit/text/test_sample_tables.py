"""Thumbnails and the table of generated samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sidestep.worker.metrics.measurement import Table
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence
from sidestep.worker.records import RunContext
from sidestep.worker.text.images import MAX_SIDE_PIXELS, image_cell
from sidestep.worker.text.tables import samples_table, table_payload


class Numbers:
    """Ids as numbers."""

    def token(self, token_id: int) -> str:
        return f"t{token_id}"

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(self.token, ids))


def picture(*shape: int) -> dict[str, Any]:
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    return {"shape": list(shape), "pixels": pixels.tobytes()}


def opened(cell: dict[str, Any] | None) -> Image.Image:
    assert cell is not None
    assert cell["_type"] == "image"
    return Image.open(io.BytesIO(base64.b64decode(cell["png"])))


@pytest.mark.parametrize(("shape", "mode"), [((8, 6), "L"), ((8, 6, 1), "L"), ((8, 6, 3), "RGB")])
def test_a_small_image_keeps_its_pixels(shape: tuple[int, ...], mode: str) -> None:
    image = picture(*shape)
    shown = opened(image_cell(image))
    assert (shown.size, shown.mode) == ((6, 8), mode)
    assert shown.tobytes() == image["pixels"]
    assert image_cell(image) == image_cell(dict(image))


@pytest.mark.parametrize(
    ("shape", "size"), [((1_000, 500, 3), (128, 256)), ((300, 3_000), (256, 26)), ((1, 9_999), (256, 1))]
)
def test_a_large_image_becomes_a_thumbnail(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    shown = opened(image_cell(picture(*shape)))
    assert shown.size == size
    assert max(shown.size) == MAX_SIDE_PIXELS


@pytest.mark.parametrize(
    "image",
    [
        None,
        "x",
        {},
        {"shape": [2, 2], "pixels": b"abc"},
        {"shape": [2, 2, 2], "pixels": b"abcdefgh"},
        {"shape": [0, 4], "pixels": b""},
        {"shape": [4], "pixels": b"abcd"},
        {"shape": [-2, -2], "pixels": b"abcd"},
        {"shape": "22", "pixels": b"abcd"},
        {"shape": [2, 2], "pixels": "abcd"},
    ],
)
def test_what_is_no_image_has_no_cell(image: Any) -> None:
    assert image_cell(image) is None


GENERATED = GeneratedSamples(
    samples=(0, 1, 7),
    sequences=(
        TokenSequence(content=(5, 6), has_ended=True),
        TokenSequence(content=(), has_ended=True),
        TokenSequence(content=(8,), has_ended=False),
    ),
)


def context(*samples: dict[str, Any]) -> RunContext:
    return RunContext(run_id="r", attempt=0, text=Numbers(), samples={"samples": list(samples)})


def test_the_samples_table_has_the_users_columns() -> None:
    asked = context(
        {"question": "What digit?", "target": "seven", "image": picture(4, 4)}, {"question": "Odd?", "target": "yes"}
    )
    table = samples_table(GENERATED, asked, 50)
    assert table is not None
    assert table.key == "generation/samples"
    assert table.columns == ("step", "image", "question", "generated", "target", "length")
    assert table.rows[0] == (50, image_cell(picture(4, 4)), "What digit?", "t5 t6", "seven", 2)
    assert table.rows[1] == (50, None, "Odd?", "", "yes", 0)
    assert table.rows[2] == (50, None, "", "t8", "", 1), "a row that the table of samples lacks is still shown"


def test_without_images_there_is_no_image_column() -> None:
    table = samples_table(
        GENERATED, context({"question": "q", "target": "t", "image": {"shape": [9], "pixels": b""}}), 0
    )
    assert table is not None
    assert table.columns == ("step", "question", "generated", "target", "length")
    assert samples_table(GeneratedSamples(samples=(), sequences=()), context(), 0) is None


def test_a_payload_names_its_table_and_cuts_its_texts() -> None:
    table = Table(key="generation/samples", columns=("a", "b"), rows=(("x" * 9_000, 1.5),))
    payload = table_payload(table, attempt=2, step=50, unix_time=7.0)
    ((text, number),) = payload.pop("rows")
    assert len(text.encode()) == 2_048
    assert number == 1.5
    assert payload == {
        "_timestamp": 7.0,
        "train/step": 50,
        "train/attempt": 2,
        "sidecar/table_id": "generation/samples-2-50",
        "key": "generation/samples",
        "columns": ["a", "b"],
    }
