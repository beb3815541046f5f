"""Mutated frames at the receiver's front with a real journal: only declared errors, bounded memory, others served."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.front import Front, seeds
from tests.fuzz.mutations import RAW, Mutator, fitted

from sidestep.protocol.frames import Envelope, encode, split
from sidestep.protocol.messages import Kind, Notice

SEEDS = seeds()
MAX_ALLOCATED_BYTES = 8 << 20


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.reopen()  # the next worker reads what was let in
    made.close()


def take_within_bounds(front: Front, frame: bytes) -> None:
    tracemalloc.start()
    try:
        front.take(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_ALLOCATED_BYTES + 8 * len(frame)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 32), st.sampled_from(SEEDS)), min_size=1, max_size=12))
def test_mutated_frames_are_taken_or_refused_and_others_are_served(
    front: Front, chosen: list[tuple[int, bytes]]
) -> None:
    for seed, frame in chosen:
        take_within_bounds(front, Mutator(seed, SEEDS).mutate(frame))
    front.serve_the_good_one()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([*Kind]), st.lists(st.sampled_from(RAW) | st.binary(max_size=40), max_size=20), st.binary())
def test_heads_that_declare_more_than_they_bring(front: Front, kind: Kind, pieces: list[bytes], body: bytes) -> None:
    take_within_bounds(front, fitted(kind, b"".join(pieces), body))
    front.serve_the_good_one()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.integers(1, 1 << 40),
    st.lists(st.tuples(st.integers(0, 9), st.integers(-2, 2)), min_size=1, max_size=30),
    st.integers(64, 900),
)
def test_chunks_in_any_order_twice_or_changed(
    front: Front, number: int, order: list[tuple[int, int]], chunk_bytes: int
) -> None:
    envelope = Envelope(run_id="good", incarnation="good-1", rank=0, sequence=(1 << 50) + number % 64)
    chunks = split(envelope, encode(envelope, Notice(text="n" * 600, code=str(number))), chunk_bytes)
    for at, change in order:
        chunk = bytearray(chunks[at % len(chunks)])
        chunk[-9] = (chunk[-9] + change) % 256
        take_within_bounds(front, bytes(chunk))
    front.serve_the_good_one()
