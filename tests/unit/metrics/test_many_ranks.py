"""What is worked out for all ranks at once equals what it was one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sidestep.protocol.messages import Answers, Losses
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.answers import count_answers
from sidestep.worker.metrics.highest_tokens import highest_tokens
from sidestep.worker.metrics.measurement import copies
from sidestep.worker.records import Part, RunContext
from sidestep.worker.text.detokenizer import Detokenizer


def _context(places: dict[int, int]) -> RunContext:
    topologies = {rank: {"data_parallel_rank": place} for rank, place in places.items()}
    return RunContext(run_id="run", attempt=0, text=Detokenizer({}), topologies=topologies)


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_those_with_a_lower_rank_of_the_same_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = {int(rank): int(rng.integers(0, 12)) for rank in rng.choice(40, 24, replace=False)}
    ranks = range(48)  # some have said no Hello: they stand for themselves
    expected = {
        rank
        for rank in ranks
        if any(other < rank and place == places.get(rank, rank) for other, place in places.items())
    }
    assert copies(ranks, _context(places)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_answers_of_many_ranks_count_as_if_each_came_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = []
    for rank in range(30):
        lengths = np.sort(rng.choice(9, int(rng.integers(0, 5)), replace=False)).astype(np.int32)
        message = Answers(
            step=int(rng.integers(0, 3)),
            epoch=int(rng.integers(0, 6)),
            lengths=lengths - np.int32(rank == 7),  # one of them may hold a negative length
            counts=rng.integers(0, 4, lengths.size),
            labelled=5,
            batches=1,
            batches_without_labels=int(rng.integers(0, 2)),
        )
        parts.append(Part(rank, message))
    together, alone = AnswerCounts(), AnswerCounts()
    malformed = count_answers(parts, _context({}), 0, together).malformed_parts
    assert malformed == sum(count_answers([part], _context({}), 0, alone).malformed_parts for part in parts)
    assert together.state() == alone.state()


def _losses(rng: np.random.Generator, form: int) -> Losses:
    size = int(rng.integers(0, 50))
    losses: NDArray[np.float32] = (rng.integers(0, 9, size) / 4).astype(np.float32)  # many are equal
    losses[rng.random(size) < 0.1] = np.nan
    losses[rng.random(size) < 0.1] = np.inf
    count = min(size, 32)
    highest = rng.permutation(size)[:count].astype(np.int32)
    if count > 2:
        highest[0], highest[1] = -1, size  # places that are none
    contexts = rng.integers(-1, 5, (count if rng.random() < 0.7 else count + 1, 3)).astype(np.int32)
    return Losses(
        step=0,
        microstep=0,
        labelled=size,
        losses=losses,
        target_ids=rng.integers(0, 99, size).astype(np.int32),
        roles=np.zeros(size, np.uint8),
        highest=highest if form == 0 else highest[:0],
        highest_losses=losses[:count] if form == 1 else losses[:0],
        highest_targets=np.arange(count, dtype=np.int32) if form == 1 else highest[:0],
        contexts=contexts,
    )


def _one_by_one(batches: list[tuple[int, Losses]]) -> list[tuple[float, int, tuple[int, ...], int]]:
    found = []
    for rank, batch in batches:
        contexts, size = batch.contexts, batch.losses.size
        if batch.highest.size:
            pairs = [
                (float(batch.losses[at]), int(batch.target_ids[at])) if 0 <= at < size else None
                for at in batch.highest.tolist()
            ]
        elif batch.highest_losses.size:
            pairs = list(zip(batch.highest_losses.tolist(), batch.highest_targets.tolist(), strict=True))
        else:
            finite = [at for at in range(size) if math.isfinite(batch.losses[at])]
            chosen = sorted(finite, key=lambda at: -batch.losses[at])[:32]
            pairs, contexts = [(float(batch.losses[at]), int(batch.target_ids[at])) for at in chosen], contexts[:0]
        has_contexts = len(contexts) == len(pairs)
        for place, pair in enumerate(pairs):
            if pair is not None and math.isfinite(pair[0]):
                before = tuple(each for each in contexts[place].tolist() if each >= 0) if has_contexts else ()
                found.append((*pair, before, rank))
    return sorted(found, key=lambda each: -each[0])[:32]


@pytest.mark.parametrize("seed", range(20))
def test_the_highest_tokens_of_many_ranks_are_those_of_one_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [(rank, _losses(rng, int(rng.integers(0, 3)))) for rank in range(int(rng.integers(0, 12)))]
    context = _context({})
    expected = [
        (context.text.token(target), context.text.text(before), loss, rank)
        for loss, target, before, rank in _one_by_one(batches)
    ]
    table = highest_tokens(batches, context)
    assert (list(table.rows) if table is not None else []) == expected
