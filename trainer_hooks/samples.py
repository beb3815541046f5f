"""What the model is asked to generate from: prompts that end before the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.trainer_hooks.question import question_text

MAX_IMAGE_SIDE_PIXELS = 256
"""Longer sides are thinned out before an image travels: the table shows it small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt with what is shown beside its generation (docs/metrics.md, ``generation/``).

    Raises:
        ValueError: a field cannot be used; the text names it.
    """

    question: str
    """What the user turn says, for the table."""
    target: str
    """The gold answer, for the table."""
    image: Any = None
    """For the table: a PIL image, or an array or tensor [h, w], [h, w, c] or [c, h, w]."""
    prompt_ids: Sequence[int] | torch.Tensor | None = None
    """Ids up to where the answer begins [t]; None: ``question``, encoded by the tokenizer at attach."""
    target_ids: Sequence[int] | torch.Tensor = ()
    """Ids of the gold answer, for the verdict ``target_relative`` [k]."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the model by name, such as ``{"images": [tiles]}``.

    In a batch, lists become a list of each sample's list, and tensors are joined along their first axis.
    """

    def __post_init__(self) -> None:
        for name in ("question", "target"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"Sample.{name} must be text, not {type(getattr(self, name)).__name__}")
        if not isinstance(self.inputs, Mapping):
            raise ValueError(f"Sample.inputs must map argument names to values, not {type(self.inputs).__name__}")
        if self.prompt_ids is not None and not len(self.prompt_ids):
            raise ValueError("Sample.prompt_ids is empty: a generation needs at least one token to go on from")

    def prompt(self) -> list[int]:
        """The prompt's ids as a list; empty where the tokenizer is to make them."""
        return as_ids(self.prompt_ids) if self.prompt_ids is not None else []


def as_ids(ids: Sequence[int] | torch.Tensor) -> list[int]:
    """Ids as a plain list, from a list, an array or a tensor [t] or [1, t]."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().reshape(-1).tolist()
    return [int(i) for i in ids]


def image_pixels(image: Any) -> NDArray[np.uint8]:
    """An image as uint8 [h, w, c] with c 1 or 3, thinned out to ``MAX_IMAGE_SIDE_PIXELS``.

    Floating-point pixels are taken as [0, 1], or stretched from their own range where they leave it (normalised input).

    Raises:
        ValueError: it has not the axes of an image.
    """
    pixels: NDArray[Any] = (
        image.detach().cpu().float().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    )
    while pixels.ndim > 3 and pixels.shape[0] >= 1:
        pixels = pixels[0]  # tiles, batches: the first one stands for all
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"Sample.image must have the axes [h, w], [h, w, c] or [c, h, w], not {pixels.ndim} of them")
    if pixels.shape[0] in {1, 3, 4} and pixels.shape[2] not in {1, 3, 4}:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[2] not in {1, 3, 4}:
        raise ValueError(f"Sample.image must have 1, 3 or 4 channels, not {pixels.shape[2]}")
    step = max(1, -(-max(pixels.shape[:2]) // MAX_IMAGE_SIDE_PIXELS))
    pixels = pixels[::step, ::step, : 3 if pixels.shape[2] == 4 else None]
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    as_float = np.nan_to_num(pixels.astype(np.float32))
    low, high = float(as_float.min(initial=0.0)), float(as_float.max(initial=0.0))
    if low < 0.0 or high > 255.0 or (high > 1.0 and not np.issubdtype(pixels.dtype, np.integer)):
        as_float = (as_float - low) / max(high - low, 1e-12)
    elif np.issubdtype(pixels.dtype, np.integer):
        as_float /= 255.0
    return np.ascontiguousarray((as_float * 255.0).round().astype(np.uint8))


def samples_table(samples: Sequence[Sample]) -> dict[str, Any]:
    """The table ``samples`` as it travels by its hash."""
    rows = []
    for sample in samples:
        pixels = None if sample.image is None else image_pixels(sample.image)
        rows.append({
            "question": sample.question,
            "target": sample.target,
            "target_ids": as_ids(sample.target_ids),
            "image": None if pixels is None else {"shape": list(pixels.shape), "pixels": pixels.tobytes()},
        })  # fmt: skip
    return {"samples": rows}


def samples_from_dataset(
    items: Iterable[Any],
    tokenizer: Any,
    *,
    count: int = 16,
    shifted: bool,
    ignore_index: int = -100,
    image_token_id: int | None = None,
    question_of: Callable[[Mapping[str, Any]], str] | None = None,
) -> list[Sample]:
    """Cut prompts out of training rows: each prompt is a row's first conversation up to where its first answer begins.

    Args:
        items: a dataset of rows or a loader of batches; each a mapping with ``input_ids`` and ``labels`` [t] or [b, t],
            perhaps ``attention_mask`` and ``images`` (a list of tile tensors a row, as in nanoVLM). Positions with mask
            0 separate packed conversations.
        tokenizer: anything with ``decode(ids)``.
        count: how many samples to make; at most.
        shifted: True where ``labels[t]`` is the target of position t (nanoVLM), False where it is the id at t.
        ignore_index: the label of a position without a target.
        image_token_id: the image placeholder, by which a packed row's images are told apart; None: all are taken.
        question_of: makes the question's text from an item, in place of the decoded user turn.

    Raises:
        ValueError: there is no row with a labelled position after a prompt.
    """
    found: list[Sample] = []
    for item in items:
        for row in _rows(item):
            cut = _cut(row, ignore_index, shifted=shifted)
            if cut is None:
                continue
            prompt, answer = cut
            images = _images_of(row, prompt, image_token_id)
            question = (
                question_of(item) if question_of is not None else question_text(tokenizer, prompt, image_token_id)
            )
            found.append(
                Sample(
                    question=question,
                    target=question_text(tokenizer, answer, image_token_id),
                    image=images[0] if images else None,
                    prompt_ids=prompt,
                    target_ids=answer,
                    inputs={"images": images} if images is not None else {},
                )
            )
            if len(found) >= count:
                return found
    if not found:
        raise ValueError(
            "no sample could be made: no row has a labelled position after a prompt (are labels all ignored?)"
        )
    return found


def _rows(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A dataset's row as it is, a loader's batch row by row."""
    ids = torch.as_tensor(item["input_ids"])
    names = [name for name in ("input_ids", "labels", "attention_mask") if item.get(name) is not None]
    if ids.dim() == 1:
        return [{**{name: torch.as_tensor(item[name]) for name in names}, "images": item.get("images")}]
    rows = []
    for i in range(ids.shape[0]):
        images = item.get("images")
        row = {name: torch.as_tensor(item[name])[i] for name in names}
        rows.append({**row, "images": None if images is None else images[i]})
    return rows


def _cut(row: Mapping[str, Any], ignore_index: int, *, shifted: bool) -> tuple[list[int], list[int]] | None:
    """The ids before the row's first answer, within its conversation, and that answer's own."""
    ids: list[int] = row["input_ids"].tolist()
    labels: list[int] = row["labels"].tolist()
    mask: list[int] = row["attention_mask"].tolist() if "attention_mask" in row else [1] * len(ids)
    labelled = [label != ignore_index for label in labels]
    if True not in labelled:
        return None
    first = labelled.index(True)
    end = next((t for t in range(first, len(ids)) if not labelled[t]), len(ids))
    stop = first + 1 if shifted else first  # the answer's first token is the target of the position before it
    start = next((t + 1 for t in range(stop - 1, -1, -1) if not mask[t]), 0)
    prompt = ids[start:stop]
    return (prompt, labels[first:end]) if prompt else None


def _images_of(row: Mapping[str, Any], prompt: Sequence[int], image_token_id: int | None) -> list[Any] | None:
    """The row's images that the prompt shows: those whose placeholders it holds."""
    images = row["images"]
    if images is None:
        return None
    listed = list(images) if isinstance(images, list | tuple) else [images]
    if image_token_id is None:
        return listed
    tiles = [int(image.shape[0]) if getattr(image, "ndim", 0) == 4 else 1 for image in listed]
    in_row = int((row["input_ids"] == image_token_id).sum())
    if not in_row or not sum(tiles):
        return []
    wanted = sum(i == image_token_id for i in prompt) * sum(tiles) // in_row
    shown: list[Any] = []
    for image, count in zip(listed, tiles, strict=True):
        if wanted < count:
            break
        wanted -= count
        shown.append(image)
    return shown
