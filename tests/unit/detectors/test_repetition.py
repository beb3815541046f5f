"""Loops are found at every period, and real text of many kinds is none: English, code, CJK and tables."""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
import tarfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tests.support.detector_traces import context
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sidestep.worker.detectors.generation import GeneratedAnswers
from sidestep.worker.detectors.repetition import is_looping, is_nearly_looping, soft_period, suffix_loop
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence
from sidestep.worker.step_record import StepRecord

CHUNK = 256
NUM_CHUNKS = 40


def english() -> str:
    return "\n".join(pydoc_data.topics.topics.values())


def code() -> str:
    return "\n".join(inspect.getsource(module) for module in (argparse, inspect, tarfile))


def chinese_japanese_korean() -> str:
    found = find_spec("test.cjkencodings") or find_spec("test")
    places = [Path(place) for place in (found.submodule_search_locations or [])] if found is not None else []
    files = sorted(
        file for place in places for file in (*place.glob("*-utf8.txt"), *place.glob("cjkencodings/*-utf8.txt"))
    )
    if not files:
        pytest.skip("this Python has no test.cjkencodings")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def tables() -> str:
    rng = np.random.default_rng(0)
    rows = (
        f"| {rng.integers(1, 9_999)} | {rng.choice(['yes', 'no', 'n/a'])} | {rng.random():.3f} | {rng.integers(0, 2)} |"
        for _ in range(2_000)
    )
    return "| id | seen | score | flag |\n|---|---|---|---|\n" + "\n".join(rows)


TEXTS = {"english": english, "code": code, "cjk": chinese_japanese_korean, "tables": tables}


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of those texts."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2_000, show_progress=False)
    trained.train_from_iterator([english()[:150_000], code()[:100_000], tables()[:20_000]], trainer)
    return trained


@cache
def chunks(kind: str) -> list[list[int]]:
    ids = tokenizer().encode(TEXTS[kind]()).ids
    starts = np.linspace(0, max(len(ids) - CHUNK, 0), min(NUM_CHUNKS, max(len(ids) // 64, 2))).astype(int)
    return [ids[start : start + CHUNK] for start in starts]


def readings(generated: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> dict[str, bool]:
    samples = {"samples": [{"target_ids": list(ids)} for ids in targets]}
    sequences = tuple(TokenSequence(content=tuple(ids), has_ended=True) for ids in generated)
    rows = tuple(range(len(sequences)))
    made = GeneratedSamples(samples=rows, sequences=sequences, max_new_tokens=CHUNK)
    view = StepView(StepRecord(), context(samples=samples), made)
    return {each.name: each.is_beyond for each in GeneratedAnswers(DetectorSettings()).read(view)}


@pytest.mark.parametrize("kind", TEXTS)
def test_real_text_against_its_own_targets_is_no_repetition(kind: str) -> None:
    found = chunks(kind)
    generated, targets = found[::2], found[1::2]
    size = min(len(generated), len(targets), 16)
    for first in range(0, min(len(generated), len(targets)) - size + 1, size):
        said = readings(generated[first : first + size], targets[first : first + size])
        assert said["gen_repetition"] is False


@pytest.mark.parametrize("kind", ["english", "code", "cjk"])
def test_real_text_ends_in_no_loop(kind: str) -> None:
    found = chunks(kind)
    assert not [ids for ids in found if is_looping(ids)]
    assert sum(map(is_nearly_looping, found)) <= len(found) // 20


@pytest.mark.parametrize("period", range(1, 65))
def test_a_loop_of_any_period_is_found_at_256_tokens(period: int) -> None:
    rng = np.random.default_rng(period)
    unit = rng.choice(1_000, period, replace=False).tolist()
    beginning = rng.integers(1_000, 2_000, 40).tolist()
    ids = (beginning + unit * CHUNK)[:CHUNK]
    assert suffix_loop(ids) == period
    assert soft_period(ids) == 1.0
    assert readings([ids] * 4, chunks("english")[:4])["gen_repetition"] is True


def test_a_loop_with_noise_is_nearly_one() -> None:
    rng = np.random.default_rng(0)
    for period in (1, 3, 8, 20):
        ids = np.resize(rng.choice(1_000, period, replace=False), CHUNK)
        ids[rng.random(CHUNK) < 0.05] = 5_000
        assert is_nearly_looping(ids.tolist()), period
    counter = [token for number in range(64) for token in (7, 8, 100 + number, 9)]
    assert is_nearly_looping(counter)
    assert not is_looping(counter)


@pytest.mark.parametrize(
    ("ids", "period"),
    [
        ([], 0),
        ([1] * 11, 0),
        ([1] * 12, 1),
        ([1, 2] * 5, 0),
        ([1, 2] * 6, 2),
        ([1, 2, 3, 4, 5] * 2, 0),
        ([1, 2, 3, 4, 5] * 3, 5),
        ([*[1, 2, 3, 4, 5] * 3, 6], 0),
        ([1, 1, 1, 2] * 3, 4),
    ],
)
def test_what_a_loop_is(ids: list[int], period: int) -> None:
    assert suffix_loop(ids) == period


def test_short_sequences_have_no_soft_period() -> None:
    assert soft_period([1] * 24) == 0.0
    assert soft_period([1] * 25) == 1.0
