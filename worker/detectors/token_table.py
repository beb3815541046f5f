"""Tables with a row a token id, of a bounded size: what each target usually costs, and where it usually stands.

The most sighted ids have rows of their own; the others share one by the size of their id, since a tokenizer numbers
its ids by how often it meets them. Values are kept in single precision, as they are saved.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json

NUM_SHARED: Final = 64
"""Rows that ids without one of their own share."""
FORGETTING: Final = 0.998
"""Share of its sightings that an id keeps at each step: an id that is gone makes room."""


class Found(NamedTuple):
    """Where distinct ids stand in a table as it is now: looked up once, for asking and for learning."""

    ids: NDArray[np.int64]
    """Distinct and ascending [k]."""
    columns: NDArray[np.int64]
    """The column of each; of no meaning for ids without one of their own [k]."""
    is_own: NDArray[np.bool_]
    """Whether it has a column of its own [k]."""


class Costs:
    """The running mean loss of each target id.

    Args:
        max_ids: ids with a row of their own.
        rate: weight of one more sighting, once there are ``1 / rate``.
        min_sightings: sightings from which a row is used.
    """

    def __init__(self, *, max_ids: int, rate: float, min_sightings: int) -> None:
        self._max_ids, self._rate, self._min_sightings = max_ids, rate, min_sightings
        self._ids = np.zeros(0, np.int32)
        self._means = np.zeros(0, np.float32)
        self._sightings = np.zeros(0, np.float32)
        self._shared_means = np.zeros(NUM_SHARED, np.float32)
        self._shared_sightings = np.zeros(NUM_SHARED, np.float32)

    def find(self, ids: NDArray[np.int64]) -> Found:
        """Look these distinct, ascending ids up, until something new is learned."""
        return find_ids(self._ids, ids)

    def expected(self, found: Found, otherwise: float) -> NDArray[np.float64]:
        """Return what each id usually costs [k]; ``otherwise`` where nothing is known."""
        shared = _shared(found.ids)
        costs = np.where(
            self._shared_sightings[shared] >= self._min_sightings, self._shared_means[shared], np.float32(otherwise)
        )
        if self._ids.size:
            is_known = found.is_own & (self._sightings[found.columns] >= self._min_sightings)
            costs = np.where(is_known, self._means[found.columns], costs)
        return costs.astype(np.float64)

    def learn(self, found: Found, means: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Take in the mean loss of each id [k], and how often it was seen [k]."""
        self._learn_shared(found.ids, means, counts)
        self._sightings *= np.float32(FORGETTING)
        own, new = np.flatnonzero(found.is_own), np.flatnonzero(~found.is_own)
        if own.size:
            columns = found.columns[own]
            self._means[columns], self._sightings[columns] = self._moved(
                self._means[columns], self._sightings[columns], means[own], counts[own]
            )
        if new.size:
            self._add(found.ids[new], means[new], counts[new])

    def _moved(
        self, old: NDArray[Any], sightings: NDArray[Any], means: NDArray[Any], counts: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Each of ``counts`` sightings moves the mean by the rate; the first ones count evenly."""
        together = sightings.astype(np.float64) + counts
        weight = np.maximum(1.0 - (1.0 - self._rate) ** counts, counts / together)
        wide = old.astype(np.float64)
        return (wide + weight * (means - wide)).astype(np.float32), together.astype(np.float32)

    def _learn_shared(self, ids: NDArray[np.int64], means: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        shared = _shared(ids)
        num = np.bincount(shared, weights=counts, minlength=NUM_SHARED)
        sums = np.bincount(shared, weights=means * counts, minlength=NUM_SHARED)
        seen = num > 0
        self._shared_means[seen], self._shared_sightings[seen] = self._moved(
            self._shared_means[seen], self._shared_sightings[seen], sums[seen] / num[seen], num[seen]
        )
        self._shared_sightings = np.minimum(self._shared_sightings, np.float32(1e6))

    def _add(self, ids: NDArray[np.int64], means: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Give new ids rows; where there are too many, the least sighted go."""
        all_ids = np.concatenate([self._ids, ids.astype(np.int32)])
        all_means = np.concatenate([self._means, means.astype(np.float32)])
        all_sightings = np.concatenate([self._sightings, counts.astype(np.float32)])
        kept = _largest(all_sightings, all_ids, self._max_ids)
        kept = kept[np.argsort(all_ids[kept], kind="stable")]
        self._ids, self._means, self._sightings = all_ids[kept], all_means[kept], all_sightings[kept]

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        arrays = (self._ids, self._means, self._sightings, self._shared_means, self._shared_sightings)
        return [array.tobytes() for array in arrays]

    def restore(self, state: Any) -> None:
        """Take over a state."""
        ids, *rest = state
        self._ids = np.frombuffer(ids, "<i4").copy()
        self._means, self._sightings, self._shared_means, self._shared_sightings = (
            np.frombuffer(content, "<f4").copy() for content in rest
        )
        if not self._ids.size == self._means.size == self._sightings.size:
            raise ValueError("a table of token costs with columns of different lengths")


class Places:
    """How often each id stands at each of a few places of an answer, exponentially forgotten.

    Args:
        max_ids: ids with a column of their own; the others are one, spread evenly over the rest of the vocabulary.
        num_places: rows; the last one is for all later places.
        rate: weight of the newest step.
    """

    def __init__(self, *, max_ids: int, num_places: int, rate: float) -> None:
        self._max_ids, self._num_places, self._rate = max_ids, num_places, rate
        self._ids = np.zeros(0, np.int32)
        self._counts = np.zeros((num_places, 0), np.float32)
        self._others = np.zeros(num_places, np.float32)

    def find(self, ids: NDArray[np.int64]) -> Found:
        """Look these distinct, ascending ids up, until something new is learned."""
        return find_ids(self._ids, ids)

    def costs(
        self,
        found: Found,
        which: NDArray[np.int64],
        places: NDArray[np.int64],
        *,
        vocabulary: int,
        smoothing: float,
    ) -> NDArray[np.float64]:
        """Return -log of the probability of the id of each row at its place [n], in nats.

        A place's own counts are mixed with those of all places, which weigh ``smoothing`` counts; ids without a column
        share what is left of the vocabulary evenly.

        Args:
            found: the distinct ids.
            which: which of them each row has [n].
            places: the place of each row, below ``num_places`` [n].
            vocabulary: number of ids that there are.
            smoothing: counts that the frequency at all places weighs.
        """
        totals = self._counts.sum(axis=1) + self._others
        spread = 1.0 / max(vocabulary - self._ids.size, 1)
        own = np.repeat((self._others * spread)[:, None], found.ids.size, axis=1)
        if self._ids.size:
            own = np.where(found.is_own, self._counts.take(found.columns, axis=1), own)
        background = (own.sum(axis=0) + 1.0 / max(vocabulary, 1)) / (float(totals.sum()) + 1.0)
        probability = (own + smoothing * background) / (totals[:, None] + smoothing)
        costs: NDArray[np.float64] = -np.log(np.maximum(probability, 1e-30)).astype(np.float64)
        return costs[places, which]

    def learn(self, found: Found, which: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Take in the targets of a step, given as ``costs`` has them."""
        keep = np.float32(1.0 - self._rate)
        self._counts *= keep
        self._others *= keep
        num_ids = found.ids.size
        num = np.bincount(places * num_ids + which, minlength=self._num_places * num_ids)
        num = num.reshape(self._num_places, num_ids)
        own, new = np.flatnonzero(found.is_own), np.flatnonzero(~found.is_own)
        if own.size:
            columns = found.columns[own]
            self._counts[:, columns] = self._counts.take(columns, axis=1) + num.take(own, axis=1).astype(np.float32)
        if new.size:
            self._add(found.ids[new], num.take(new, axis=1))

    def _add(self, ids: NDArray[np.int64], num: NDArray[np.int64]) -> None:
        """Give new ids columns; where there are too many, the least seen go, and their counts with the others'."""
        all_ids = np.concatenate([self._ids, ids.astype(np.int32)])
        counts = np.concatenate([self._counts, num.astype(np.float32)], axis=1)
        kept = _largest(counts.sum(axis=0), all_ids, self._max_ids)
        if kept.size < all_ids.size:
            # Added up one after the other: in another order the last bits, and with them a replay, would be others.
            remaining = counts.take(kept, axis=1).cumsum(axis=1)[:, -1]
            self._others = np.maximum(self._others + counts.sum(axis=1) - remaining, 0.0)
        kept = kept[np.argsort(all_ids[kept], kind="stable")]
        self._ids, self._counts = all_ids[kept], counts.take(kept, axis=1)

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return [self._ids.tobytes(), self._counts.tobytes(), self._others.tobytes()]

    def restore(self, state: Any) -> None:
        """Take over a state."""
        ids, counts, others = state
        self._ids = np.frombuffer(ids, "<i4").copy()
        self._counts = np.frombuffer(counts, "<f4").reshape(self._num_places, self._ids.size).copy()
        self._others = np.frombuffer(others, "<f4").copy()


class Shares:
    """Exponentially weighted shares of ids within a bounded table: what the targets usually are."""

    def __init__(self, *, max_ids: int, rate: float) -> None:
        self._max_ids, self._rate = max_ids, rate
        self.ids = np.zeros(0, np.int64)
        """Ascending [k <= max_ids]."""
        self.shares = np.zeros(0, np.float64)
        """Usual share of each; what rare ids have is not in it [k]."""

    def share(self, token: int) -> float:
        """Return the usual share of an id."""
        place = int(self.ids.searchsorted(token))
        return float(self.shares[place]) if place < self.ids.size and self.ids[place] == token else 0.0

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the usual share of each id."""
        if not self.ids.size:
            return np.zeros(ids.size)
        _, places, is_known = find_ids(self.ids, ids)
        return np.where(is_known, self.shares[places], 0.0)

    def learn(self, ids: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
        """Take in the shares of a step's distinct ids (of the first step, whole)."""
        rate = self._rate if self.ids.size else 1.0
        both = np.concatenate([self.ids, ids])
        weighted = np.concatenate([(1.0 - rate) * self.shares, rate * shares])
        self.ids, self.shares = pooled(both, weighted)
        if self.ids.size > self._max_ids:
            kept = np.sort(np.lexsort((self.ids, -self.shares))[: self._max_ids])
            self.ids, self.shares = self.ids[kept], self.shares[kept]

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return [self.ids.tobytes(), self.shares.tobytes()]

    def restore(self, state: Any) -> None:
        """Take over a state."""
        ids, shares = state
        self.ids, self.shares = np.frombuffer(ids, "<i8"), np.frombuffer(shares, "<f8")


def is_among(ids: NDArray[Any], known: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which of ``ids`` are among the ascending ``known`` [k]."""
    return find_ids(known, ids).is_own


def pooled(ids: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return distinct ids, ascending, and the sum of the values of each."""
    distinct, places = np.unique(ids, return_inverse=True)
    sums = np.bincount(places.reshape(-1), weights=values, minlength=distinct.size)
    return distinct, sums.astype(np.float64, copy=False)


def find_ids(known: NDArray[Any], ids: NDArray[np.int64]) -> Found:
    """Return where ``ids`` stand in the ascending ``known``."""
    if not known.size:
        return Found(ids, np.zeros(ids.size, np.int64), np.zeros(ids.size, np.bool_))
    columns = np.minimum(known.searchsorted(ids), known.size - 1)
    return Found(ids, columns, known[columns] == ids)


def _largest(values: NDArray[np.float32], ids: NDArray[np.int32], number: int) -> NDArray[np.int64]:
    """Return the places of the largest values, of equal ones those of the smallest ids: the same on every machine."""
    if values.size <= number:
        return np.arange(values.size)
    least = np.partition(values, values.size - number)[values.size - number]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)
    chosen = equal[np.argsort(ids[equal], kind="stable")[: number - above.size]]
    return np.concatenate([above, chosen])


def _shared(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.minimum((4 * np.log2(ids.astype(np.float64) + 1)).astype(np.int64), NUM_SHARED - 1)
