"""What the product generates from in the lab: held-out questions of the run's own mix."""

from __future__ import annotations

import numpy as np
from benchmarks.detection.lab import Suite
from numpy.typing import NDArray

import sidestep

_NUM_SAMPLES = 16
_SEED = 78
_SCREEN_SCALE = 8


def generation_samples(suite: Suite, mix: dict[str, float]) -> list[sidestep.Sample]:
    """Return 16 prompts, the same for every run with that mix."""
    rng = np.random.default_rng([_SEED, _NUM_SAMPLES])
    kinds, shares = list(mix), np.array(list(mix.values()))
    drawn = rng.choice(len(kinds), size=_NUM_SAMPLES, p=shares / shares.sum())
    images = suite.num_images + rng.permutation(suite.num_held_out)[:_NUM_SAMPLES]
    made = []
    for kind, image in zip(drawn, images, strict=True):
        talk = suite.draw(kinds[kind], int(image), rng)
        tiles = [] if talk.image is None else [suite.image(talk.image)]
        tokens = suite.tokenizer
        made.append(
            sidestep.Sample(
                question=talk.question,
                target=talk.answer,
                image=_shown(tiles[0].numpy()[0, 0]) if tiles else None,
                prompt_ids=tokens.encode_prompt(talk.question, num_images=len(tiles)),
                target_ids=tokens.encode_answer(talk.answer),
                inputs={"images": tiles},
            )
        )
    return made


def _shown(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    spread = float(pixels.max() - pixels.min()) or 1.0
    shades: NDArray[np.uint8] = np.round((pixels - pixels.min()) / spread * 255).astype(np.uint8)
    return shades.repeat(_SCREEN_SCALE, axis=0).repeat(_SCREEN_SCALE, axis=1)
