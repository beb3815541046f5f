"""Samples drawn, changed by the twist, and collated: the loader of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from benchmarks.detection.case import Twist
from benchmarks.detection.lab import Lab, Suite
from benchmarks.detection.talks import Encoded, Talk, encode_talk

from sidestep.examples.digits_vqa.packing import Batch, EncodedSample, collate, pack


class Loader:
    """An endless stream of steps; the same seed gives the same samples, whatever the twist does with them."""

    def __init__(self, lab: Lab, seed: int) -> None:
        """Draw images from `lab.image_pool` in shuffled epochs."""
        self._lab = lab
        self._rng = np.random.default_rng([seed, 1])
        self._twisting = np.random.default_rng([seed, 2])
        self._waiting: list[int] = []
        self._pool: list[int] = []
        self.epoch = -1

    def step(self, twist: Twist | None) -> list[list[Batch]]:
        """Return the micro-batches of a step, by rank; `twist` changes talks and samples."""
        lab = self._lab
        samples = [self._sample(twist) for _ in range(lab.setup.batch_samples)]
        ranks = lab.setup.num_ranks
        return [self._microbatches(samples[rank::ranks]) for rank in range(ranks)]

    def _sample(self, twist: Twist | None) -> Encoded:
        lab = self._lab
        kinds, shares = list(lab.mix), np.array(list(lab.mix.values()))
        kind = kinds[int(np.searchsorted(np.cumsum(shares) / shares.sum(), self._rng.random(), side="right"))]
        talk = lab.suite.draw(kind, self._next_image(), self._rng)
        if twist is not None:
            talk = twist.talk(lab, talk, self._twisting)
        sample = encoded(lab.suite, talk)
        return sample if twist is None else twist.sample(lab, sample, self._twisting)

    def _next_image(self) -> int:
        if not self._waiting or self._pool is not self._lab.image_pool:
            self._pool = self._lab.image_pool
            self._waiting = [self._pool[each] for each in self._rng.permutation(len(self._pool))]
            self.epoch += 1
        return self._waiting.pop()

    def _microbatches(self, samples: Sequence[Encoded]) -> list[Batch]:
        share = self._lab.setup.accumulation_steps
        return [
            batch_of(samples[part::share], self._lab.suite, self._lab.setup.samples_per_row, max(0, self.epoch))
            for part in range(share)
        ]


def batch_of(samples: Sequence[Encoded], suite: Suite, samples_per_row: int, epoch: int) -> Batch:
    """Return samples as one batch; each row as long as the longest one needs."""
    rows = [samples[first : first + samples_per_row] for first in range(0, len(samples), samples_per_row)]
    length = max(sum(len(sample.input_ids) + 1 for sample in row) for row in rows)
    pad = suite.tokenizer.pad_token_id
    return collate([pack([_plain(each) for each in row], length=length, pad_token_id=pad, epoch=epoch) for row in rows])


def _plain(sample: Encoded) -> EncodedSample:
    return EncodedSample(input_ids=sample.input_ids, labels=sample.labels, images=sample.images)


def encoded(suite: Suite, talk: Talk) -> Encoded:
    """Return a talk in ids and pixels, by the suite's tokenizer and images."""
    return encode_talk(talk, None if talk.image is None else suite.image(talk.image), suite.tokenizer)


def fixed_talks(suite: Suite, mix: dict[str, float], number: int, seed: int) -> list[Talk]:
    """Return held-out talks of a mix, the same for every run with that mix."""
    rng = np.random.default_rng([seed, number])
    kinds, shares = list(mix), np.array(list(mix.values()))
    drawn = rng.choice(len(kinds), size=number, p=shares / shares.sum())
    images = suite.num_images + rng.permutation(suite.num_held_out)[:number]
    return [suite.draw(kinds[kind], int(image), rng) for kind, image in zip(drawn, images, strict=True)]


def fixed_samples(suite: Suite, mix: dict[str, float], number: int, seed: int) -> list[Encoded]:
    """Return the talks of `fixed_talks` as samples."""
    return [encoded(suite, talk) for talk in fixed_talks(suite, mix, number, seed)]
