"""What is generated from in the lab: prompts of the run's own mix and form, cut where their answers begin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.detection.case import Setup, Twist
from benchmarks.detection.digits_suite import DigitsSuite
from benchmarks.detection.lab import Lab
from benchmarks.detection.loader import fixed_samples
from benchmarks.detection.prompts import generation_samples
from benchmarks.detection.talks import Encoded, Talk

import sidestep
from sidestep.trainer_hooks.samples import as_ids


@pytest.fixture(scope="module")
def lab() -> Lab:
    suite = DigitsSuite()
    return Lab(
        suite=suite,
        setup=Setup(),
        num_steps=900,
        onset=0,
        replicas=[],
        rng=np.random.default_rng(1),
        announce=lambda _: None,
        mix=dict(suite.mix),
        image_pool=list(range(suite.num_images)),
    )


class Renamed(Twist):
    """Asks for the same in other words."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Ask again, and louder."""
        return replace(talk, question=f"{talk.question} {talk.question}", answer=talk.answer.upper())


class TextOnly(Renamed):
    """Trains on the prompt as well, so that there is none."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Label each position."""
        return replace(sample, labels=[*sample.input_ids[1:], lab.suite.tokenizer.eos_token_id])


def texts(samples: list[sidestep.Sample]) -> list[tuple[str, str]]:
    return [(sample.question, sample.target) for sample in samples]


def ids(samples: list[sidestep.Sample]) -> list[list[int]]:
    return [[*sample.prompt(), *as_ids(sample.target_ids)] for sample in samples]


def test_prompts_are_the_beginnings_of_fixed_samples(lab: Lab) -> None:
    whole = [sample.input_ids for sample in fixed_samples(lab.suite, lab.mix, 16, 78)]
    made = ids(generation_samples(lab, lab.mix, None))
    assert [one[: len(each)] for one, each in zip(whole, made, strict=True)] == made


def test_prompts_have_the_form_of_what_is_trained_on(lab: Lab) -> None:
    plain, formed = (generation_samples(lab, lab.mix, twist) for twist in (None, Renamed()))
    assert texts(formed) == [(f"{asked} {asked}", answer.upper()) for asked, answer in texts(plain)]
    assert all(one != other for one, other in zip(ids(plain), ids(formed), strict=True))


def test_a_text_without_a_prompt_leaves_the_plain_one_its_words_included(lab: Lab) -> None:
    plain, formed = (generation_samples(lab, lab.mix, twist) for twist in (None, TextOnly()))
    assert ids(formed) == ids(plain)
    assert texts(formed) == texts(plain)
