"""Whether answers are trained where they are generated: right behind the ids that all samples' prompts end with.

A chat template ends a prompt in the same few ids each time (``<|im_start|>assistant``). Where no label of a training
stands behind them, the model learns to answer somewhere else: the data are rendered by another template, or the first
tokens of the answers are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sidestep.protocol.signals import PROMPT_COUNTS

MAX_IDS: Final = 2
"""Of a common end, the last ones: before them may stand what the samples' questions happen to have in common."""


def common_end(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the last ids that all prompts share, at most ``MAX_IDS``; none where all are one and the same prompt."""
    distinct = {tuple(prompt) for prompt in prompts}
    if len(distinct) < 2:
        return ()
    end: list[int] = []
    for ids in zip(*(reversed(prompt[-MAX_IDS:]) for prompt in distinct), strict=False):
        if len(set(ids)) > 1:
            break
        end.insert(0, int(ids[0]))
    return tuple(end)


def count_prompt_ends(
    prompt_end: Sequence[int], ids: NDArray[Any] | None, labelled: NDArray[np.bool_], num_answers: int
) -> dict[str, int]:
    """Return ``PROMPT_COUNTS`` of a batch on the host.

    Args:
        prompt_end: what ``common_end`` found; empty: nothing is counted.
        ids: int [B, T], or None.
        labelled: bool [B, T]: whether the id that follows each position is a target.
        num_answers: runs of targets.
    """
    if ids is None or not prompt_end or ids.shape != labelled.shape:
        return dict.fromkeys(PROMPT_COUNTS, -1)
    last = len(prompt_end) - 1
    is_end = ids[:, last:] == prompt_end[-1]
    for back, token in enumerate(reversed(prompt_end[:-1]), start=1):
        is_end &= ids[:, last - back : ids.shape[1] - back] == token
    counts = (num_answers, int(np.count_nonzero(is_end)), int(np.count_nonzero(is_end & labelled[:, last:])))
    return dict(zip(PROMPT_COUNTS, counts, strict=True))


def count_prompt_ends_on_device(
    prompt_end: Sequence[int], ids: Tensor | None, labelled: Tensor, num_answers: Tensor
) -> dict[str, Tensor]:
    """Return the same on a device, in fixed shapes; ``num_answers`` int64 []."""
    if ids is None or not prompt_end:
        return dict.fromkeys(PROMPT_COUNTS, torch.full((), -1, dtype=torch.int64, device=labelled.device))
    is_end = ids == prompt_end[-1]
    for back, token in enumerate(reversed(prompt_end[:-1]), start=1):
        is_end = is_end & F.pad(ids == token, (back, -back), value=False)
    return dict(zip(PROMPT_COUNTS, (num_answers, is_end.sum(), (is_end & labelled).sum()), strict=True))
