"""What is worked out over all ranks or ids at once is, bit for bit, what a plain form gives: replays stay equal."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from sidestep.protocol.messages import Signals
from sidestep.worker.detectors.running import MAD_TO_SD, Window, median
from sidestep.worker.detectors.token_table import Places, Shares, is_among
from sidestep.worker.record_batches import batch_facts
from sidestep.worker.record_rows import mean_facts, row_facts, sound_rows


def signals(seed: int, rows: int = 40) -> Signals:
    """A rank's rows, of which some cannot be read."""
    rng = np.random.default_rng(seed)
    losses = rng.exponential(1.0, rows).astype(np.float16)
    losses[rng.integers(0, rows, 2)] = np.nan
    targets = rng.integers(0, 30, rows).astype(np.int32)
    targets[rng.integers(0, rows)] = -1
    ids = rng.permutation(40)[:8].astype(np.int32)
    return Signals(
        step=0,
        counts=np.zeros(0, np.int64),
        labelled=3 * rows + seed,
        targets=targets,
        predictions=rng.integers(0, 30, rows).astype(np.int32),
        losses=losses,
        entropies=rng.exponential(1.0, rows).astype(np.float16),
        places=(np.arange(rows) % 7).astype(np.uint8),
        mean_ids=ids,
        mean_probabilities=(rng.random(8) / 8).astype(np.float32),
        sample_hashes=rng.integers(1, 20, 16),
        image_hashes=rng.integers(1, 5, 16),
        image_deviations=rng.random(16).astype(np.float32),
        image_means=rng.random(15 + seed % 2).astype(np.float32),
    )


def test_rows_of_all_ranks_are_those_of_each_rank_joined() -> None:
    sent = [(rank, signals(rank, rows=30 + 5 * rank)) for rank in range(6)]
    sent[2] = (2, replace(sent[2][1], losses=sent[2][1].losses[:-1]))  # contradicts itself
    together = sound_rows(sent)
    alone = [sound_rows([each]) for each in sent if each[0] != 2]
    assert together.ranks == (0, 1, 3, 4, 5)
    assert together.sizes == tuple(each.sizes[0] for each in alone)
    assert together.nonfinite == sum(each.nonfinite for each in alone) > 0
    for name, values in together.columns.items():
        assert values.tobytes() == b"".join(each.columns[name].tobytes() for each in alone), name
    facts, parts = row_facts(together), [row_facts(each) for each in alone]
    totals = [each.weights[0] * each.sizes[0] for each in alone]
    sums = [
        each.weights[0] * float(each.columns["losses"].sum(dtype=np.float64)) for each in alone
    ]  # rank by rank: the order in which a mean is added up is part of it
    assert facts["loss"] == sum(sums) / sum(totals)
    assert facts["rank_rows"].tolist() == [int(each["rank_rows"][0]) for each in parts]


def test_a_target_s_share_is_added_up_row_by_row() -> None:
    sent = [(rank, signals(rank, rows=23 + rank)) for rank in range(3)]
    facts = mean_facts([message for _, message in sent], sound_rows(sent))
    weights = np.array([float(message.labelled) for _, message in sent])
    weights /= weights.sum()
    shares = dict.fromkeys(facts["mean_ids"].tolist(), 0.0)
    for weight, (_, message) in zip(weights, sent, strict=True):
        for target in message.targets.tolist():
            if target in shares:
                shares[target] += weight / message.targets.size
    assert facts["mean_shares"].tolist() == [float(np.float32(share)) for share in shares.values()]


def test_hashes_and_medians_are_numpys() -> None:
    sent = [(rank, signals(rank)) for rank in range(2)]
    facts = batch_facts(sent)
    assert facts["distinct_images"] == np.unique(np.concatenate([message.image_hashes for _, message in sent])).size
    for name, field in (("image_mean", "image_means"), ("image_deviation", "image_deviations")):
        assert facts[name] == float(np.median(np.concatenate([getattr(message, field) for _, message in sent])))
    largest = float(np.finfo(np.float32).max)
    assert batch_facts([(0, replace(sent[0][1], image_means=np.full(2, largest, np.float32)))])["image_mean"] == largest


@pytest.mark.parametrize("size", [16, 17, 31, 64])
def test_a_robust_z_is_that_of_sorted_distances(size: int) -> None:
    draw = random.Random(size)
    for _ in range(50):
        values = [draw.choice([draw.gauss(0, 1), round(draw.gauss(0, 1)), draw.expovariate(1.0)]) for _ in range(size)]
        window = Window(size)
        window.values = values
        middle = median(values)
        spread = MAD_TO_SD * median([abs(each - middle) for each in values])
        assert window.robust_z(3.0, floor=1e-6) == (3.0 - middle) / max(spread, 1e-6)


def test_ids_are_found_where_they_stand() -> None:
    rng = np.random.default_rng(1)
    known = np.unique(rng.integers(0, 60, 20))
    ids = rng.integers(0, 70, 50)
    assert is_among(ids, known).tolist() == np.isin(ids, known).tolist()
    assert not is_among(ids, known[:0]).any()
    usual = Shares(max_ids=16, rate=0.5)
    usual.learn(known, np.full(known.size, 1.0 / known.size))
    assert [usual.share(token) for token in range(70)] == usual.of(np.arange(70)).tolist()


def test_a_full_table_of_places_hands_the_counts_of_the_least_seen_to_the_others() -> None:
    rng = np.random.default_rng(2)
    table = Places(max_ids=24, num_places=3, rate=0.01)
    seen = 0.0
    for _ in range(40):
        ids, which = np.unique(rng.zipf(1.4, 50).clip(max=200), return_inverse=True)
        table.learn(table.find(ids), which, rng.integers(0, 3, 50))
        seen = seen * 0.99 + 50
    content, counts, others = table.state()
    kept = np.frombuffer(content, "<i4")
    assert kept.size == 24
    assert (np.diff(kept) > 0).all()
    total = np.frombuffer(counts, "<f4").sum() + np.frombuffer(others, "<f4").sum()
    assert total == pytest.approx(seen, rel=1e-5)
