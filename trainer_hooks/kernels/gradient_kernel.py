"""Triton source of the gradients' statistics: one program per chunk, then one per tensor (docs/metrics.md, gradients/).

The float sums have one order, always the same; only whole numbers are added atomically. A chunk's full blocks go a
short way, some twenty instructions an element, since the memory would wait for more: a lane takes ``DEPTH`` elements,
sums their distances from the first of them, and counts their bins by bits, 32 elements at once. What that way cannot do
(the rest of a tensor, values that are not finite, very large or very small) goes the way of
``reductions/gradients.py``, by each block's own scale and centre. Either way float32 within a row, float64 beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

jit: Callable[[Callable[..., Any]], Any] = triton.jit

DEPTH = tl.constexpr(32)
"""Elements of a lane in a block: one for each bit of a word."""
COUNTED_BLOCKS = tl.constexpr(7)
"""Blocks whose elements, all in one bin, still fit into the 8 bits of a counter."""
SCALE = tl.constexpr(2.0**32)
"""Brings gradients to where their squares neither overflow nor vanish."""
LEAST, MOST = tl.constexpr(2.0**-60), tl.constexpr(9999.0)
"""The largest magnitudes of a chunk for which that is so, and no bin lies beyond the last one."""
MAGIC = tl.constexpr(1.5 * 2.0**23)
"""A float to which whole numbers add as the low bits of its representation."""
MAGIC_BITS = tl.constexpr(0x4B400000)
FOUR_MAGIC_BITS = tl.constexpr((0x4B400000 * 0x01010101) & 0xFFFFFFFF)
"""What four of them leave in a word, 8 bits apart."""
ALL = tl.constexpr(0xFFFFFFFF)
BINS = tl.constexpr(64)
SLOW_BLOCK = tl.constexpr(512)
INFINITY_BITS = tl.constexpr(0x7F800000)


@jit
def _log2(values: tl.tensor, native: tl.constexpr) -> tl.tensor:
    if native:
        made = libdevice.fast_log2f(values)
    else:
        made = tl.log2(values)
    return made


@jit
def _ones(word: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """Count the bits that are set; uint32."""
    if native:
        number = libdevice.popc(word.to(tl.int32, bitcast=True)).to(tl.uint32)
    else:
        number = word - ((word >> 1) & 0x55555555)
        number = (number & 0x33333333) + ((number >> 2) & 0x33333333)
        number = (number + (number >> 4)) & 0x0F0F0F0F
        number = number + (number >> 8)
        number = (number + (number >> 16)) & 0x3F
    return number


@jit
def _plane(word: tl.tensor, bit: tl.constexpr, place: tl.constexpr) -> tl.tensor:
    """Take one bit of each of a word's four codes, to bit ``place`` of their bytes."""
    if place >= bit:
        moved = word << (place - bit)
    else:
        moved = word >> (bit - place)
    return moved & (0x01010101 << place)


@jit
def _four(of: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """Count four bins, whose elements are those of ``of`` and one of the others; 8 bits each."""
    low = _ones(of & a, native) + _ones(of & b, native) * 0x100
    return low + _ones(of & c, native) * 0x10000 + _ones(of & d, native) * 0x1000000


@jit
def _placed(counts: tl.tensor, packed: tl.tensor, first: tl.constexpr) -> tl.tensor:
    """Add what all lanes have counted of four bins to ``counts`` [bins]; two sums hold 16 bits of each."""
    bins = tl.arange(0, BINS)
    even = tl.sum((packed & 0x00FF00FF).to(tl.int32, bitcast=True), axis=0)
    odd = tl.sum(((packed >> 8) & 0x00FF00FF).to(tl.int32, bitcast=True), axis=0)
    counts += tl.where(bins == first, even & 0xFFFF, 0) + tl.where(bins == first + 2, (even >> 16) & 0xFFFF, 0)
    return counts + tl.where(bins == first + 1, odd & 0xFFFF, 0) + tl.where(bins == first + 3, (odd >> 16) & 0xFFFF, 0)


@jit
def _fast_blocks(
    address: tl.tensor,
    size: tl.tensor,
    first_block: tl.tensor,
    lanes: tl.constexpr,
    slope: tl.constexpr,
    offset: tl.constexpr,
    smallest: tl.constexpr,
    native: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Reduce up to ``COUNTED_BLOCKS`` full blocks, all that there are from ``first_block`` on."""
    lane = tl.arange(0, lanes)
    largest = tl.zeros((lanes,), tl.float32)
    zeros = tl.zeros((lanes,), tl.int32)
    total = tl.zeros((lanes,), tl.float64)
    within = tl.zeros((lanes,), tl.float64)
    between = tl.zeros((lanes,), tl.float64)
    none = tl.zeros((lanes,), tl.uint32)
    c0, c1, c2, c3, c4, c5, c6, c7 = none, none, none, none, none, none, none, none
    c8, c9, c10, c11, c12, c13, c14, c15 = none, none, none, none, none, none, none, none
    for number in range(COUNTED_BLOCKS):
        begin = (first_block + number) * (DEPTH * lanes)
        if begin + DEPTH * lanes <= size:
            here = address + begin + lane
            pivot = tl.load(here).to(tl.float32) * SCALE
            left = tl.zeros((lanes,), tl.float32)
            squares = tl.zeros((lanes,), tl.float32)
            p0, p1, p2, p3, p4, p5 = none, none, none, none, none, none
            for place in tl.static_range(8):
                word = none
                for of_word in tl.static_range(4):
                    value = tl.load(here + (place * 4 + of_word) * lanes).to(tl.float32)
                    magnitude = tl.abs(value)
                    largest = tl.maximum(largest, magnitude)
                    zeros += (value == 0.0).to(tl.int32)
                    distance = value * SCALE - pivot
                    left += distance
                    squares += distance * distance
                    bin_of = (_log2(tl.maximum(magnitude, smallest), native) * slope + offset) + MAGIC
                    word = (word << 8) + bin_of.to(tl.uint32, bitcast=True)
                word = word - FOUR_MAGIC_BITS
                p0 |= _plane(word, 0, place)
                p1 |= _plane(word, 1, place)
                p2 |= _plane(word, 2, place)
                p3 |= _plane(word, 3, place)
                p4 |= _plane(word, 4, place)
                p5 |= _plane(word, 5, place)
            n0, n1, n2, n3, n4, n5 = p0 ^ ALL, p1 ^ ALL, p2 ^ ALL, p3 ^ ALL, p4 ^ ALL, p5 ^ ALL
            l0, l1, l2, l3 = n2 & n1 & n0, n2 & n1 & p0, n2 & p1 & n0, n2 & p1 & p0
            l4, l5, l6, l7 = p2 & n1 & n0, p2 & n1 & p0, p2 & p1 & n0, p2 & p1 & p0
            h0, h1, h2, h3 = n5 & n4 & n3, n5 & n4 & p3, n5 & p4 & n3, n5 & p4 & p3
            h4, h5, h6, h7 = p5 & n4 & n3, p5 & n4 & p3, p5 & p4 & n3, p5 & p4 & p3
            c0, c1 = c0 + _four(h0, l0, l1, l2, l3, native), c1 + _four(h0, l4, l5, l6, l7, native)
            c2, c3 = c2 + _four(h1, l0, l1, l2, l3, native), c3 + _four(h1, l4, l5, l6, l7, native)
            c4, c5 = c4 + _four(h2, l0, l1, l2, l3, native), c5 + _four(h2, l4, l5, l6, l7, native)
            c6, c7 = c6 + _four(h3, l0, l1, l2, l3, native), c7 + _four(h3, l4, l5, l6, l7, native)
            c8, c9 = c8 + _four(h4, l0, l1, l2, l3, native), c9 + _four(h4, l4, l5, l6, l7, native)
            c10, c11 = c10 + _four(h5, l0, l1, l2, l3, native), c11 + _four(h5, l4, l5, l6, l7, native)
            c12, c13 = c12 + _four(h6, l0, l1, l2, l3, native), c13 + _four(h6, l4, l5, l6, l7, native)
            c14, c15 = c14 + _four(h7, l0, l1, l2, l3, native), c15 + _four(h7, l4, l5, l6, l7, native)
            # The pivot is one of the lane's own elements: its distance from them is at most as large as their spread.
            within += tl.maximum(squares - left * left * (1.0 / DEPTH), 0.0).to(tl.float64)
            lane_total = pivot.to(tl.float64) * DEPTH + left.to(tl.float64)
            total += lane_total
            between += lane_total * lane_total
    counts = tl.zeros((BINS,), tl.int32)
    counts = _placed(_placed(_placed(_placed(counts, c0, 0), c1, 4), c2, 8), c3, 12)
    counts = _placed(_placed(_placed(_placed(counts, c4, 16), c5, 20), c6, 24), c7, 28)
    counts = _placed(_placed(_placed(_placed(counts, c8, 32), c9, 36), c10, 40), c11, 44)
    counts = _placed(_placed(_placed(_placed(counts, c12, 48), c13, 52), c14, 56), c15, 60)
    return (
        tl.sum(total, axis=0) * (1.0 / SCALE),
        tl.sum(within, axis=0) * (1.0 / SCALE) * (1.0 / SCALE),
        tl.sum(between, axis=0) * (1.0 / DEPTH) * (1.0 / SCALE) * (1.0 / SCALE),
        tl.max(largest, axis=0),
        tl.sum(zeros, axis=0),
        counts,
    )


@jit
def _slow_block(
    address: tl.tensor,
    here: tl.tensor,
    slope: tl.constexpr,
    offset: tl.constexpr,
    smallest: tl.constexpr,
    native: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Reduce at most ``SLOW_BLOCK`` elements, whatever they are; ``here`` of them are there."""
    places = tl.arange(0, SLOW_BLOCK)
    values = tl.load(address + places, mask=places < here, other=0.0).to(tl.float32)
    # Of whole numbers there are no comparisons that a flushed denormal or a NaN could spoil.
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    is_finite = bits < INFINITY_BITS
    finite_bits = tl.where(is_finite, bits, 0)
    largest = tl.max(finite_bits, axis=0)
    not_zero = tl.sum((bits != 0).to(tl.int32), axis=0)
    finite_not_zero = tl.sum((finite_bits != 0).to(tl.int32), axis=0)
    count = tl.minimum(here, SLOW_BLOCK) - (not_zero - finite_not_zero)
    exponent = tl.minimum(tl.maximum((largest >> 23) - 127, -120), 120)
    factor = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = ((127 + exponent) << 23).to(tl.float32, bitcast=True).to(tl.float64)
    divisor = tl.maximum(count, 1).to(tl.float32)
    scaled = tl.where(is_finite, values, 0.0) * factor
    centre = tl.sum(scaled, axis=0) / divisor
    rest = tl.where(is_finite & (places < here), scaled - centre, 0.0)
    left = tl.sum(rest, axis=0) / divisor
    spread = tl.maximum(tl.sum(rest * rest, axis=0) - divisor * left * left, 0.0)
    mean = (centre.to(tl.float64) + left.to(tl.float64)) * unit
    total = mean * count.to(tl.float64)
    magnitudes = tl.maximum(finite_bits.to(tl.float32, bitcast=True), smallest)
    bin_of = (_log2(magnitudes, native) * slope + offset + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    counts = tl.histogram(tl.minimum(bin_of, BINS - 1), BINS)
    others = SLOW_BLOCK - finite_not_zero  # zeros, what is not finite and what is not there: to the first bin
    counts -= tl.where(tl.arange(0, BINS) == 0, others, 0)
    return total, spread.to(tl.float64) * unit * unit, total * mean, largest, not_zero, finite_not_zero, counts


@jit
def reduce_chunks(
    chunks: tl.tensor,
    first_chunk: tl.tensor,
    partials: tl.tensor,
    histograms: tl.tensor,
    element: tl.constexpr,
    is_aligned: tl.constexpr,
    lanes: tl.constexpr,
    parts: tl.constexpr,
    filled_to: tl.constexpr,
    slope: tl.constexpr,
    offset: tl.constexpr,
    smallest: tl.constexpr,
    native: tl.constexpr,
) -> None:
    """Reduce one chunk: six float64 to ``partials``, and its magnitudes to its module's histogram.

    Args:
        chunks: int64 [chunks, 3]: address, elements (at most ``parts * 7 * 32 * lanes``), module.
        first_chunk: the chunk of program 0.
        partials: float64 [chunks, 6]: not zero, finite and not zero, sum, within, between, largest magnitude.
        histograms: int64 [modules, 64], added to.
        element: the dtype at the addresses.
        is_aligned: whether all addresses are multiples of 16 bytes.
        lanes: elements that are read at once.
        parts: runs of ``COUNTED_BLOCKS`` blocks in a chunk.
        filled_to: a tensor counts as filled up with NaN to a multiple of this.
        slope: bins that a doubling of the magnitude passes through.
        offset: the bin of magnitude 1, less one half.
        smallest: a magnitude within the first bin; what is smaller counts as this.
        native: whether to use the device's own instructions for what Triton has no word for.
    """
    chunk = first_chunk + tl.program_id(0)
    address = tl.load(chunks + chunk * 3).to(tl.pointer_type(element))
    if is_aligned:
        address = tl.multiple_of(address, 16)
    size = tl.load(chunks + chunk * 3 + 1).to(tl.int32)
    module = tl.load(chunks + chunk * 3 + 2)
    total = tl.full((), 0.0, tl.float64)
    within = tl.full((), 0.0, tl.float64)
    between = tl.full((), 0.0, tl.float64)
    most = tl.full((), 0.0, tl.float32)
    zeros = tl.full((), 0, tl.int32)
    counts = tl.zeros((BINS,), tl.int32)
    for part in range(parts):
        made = _fast_blocks(address, size, part * COUNTED_BLOCKS, lanes, slope, offset, smallest, native)
        total, within, between = total + made[0], within + made[1], between + made[2]
        most, zeros, counts = tl.maximum(most, made[3]), zeros + made[4], counts + made[5]
    covered = size // (DEPTH * lanes) * (DEPTH * lanes)
    largest = most.to(tl.int32, bitcast=True)
    not_zero = covered - zeros
    is_sound = ((most == 0.0) | ((most > LEAST) & (most < MOST))) & (total - total == 0.0)
    if not is_sound:
        covered, largest, not_zero = covered * 0, largest * 0, not_zero * 0
        total = tl.full((), 0.0, tl.float64)
        within = tl.full((), 0.0, tl.float64)
        between = tl.full((), 0.0, tl.float64)
        counts = tl.zeros((BINS,), tl.int32)
    finite_not_zero = not_zero
    for number in range(parts * COUNTED_BLOCKS * DEPTH * lanes // SLOW_BLOCK):
        begin = number * SLOW_BLOCK
        if (begin >= covered) & (begin < size):
            block = _slow_block(address + begin, size - begin, slope, offset, smallest, native)
            total, within, between = total + block[0], within + block[1], between + block[2]
            largest = tl.maximum(largest, block[3])
            not_zero, finite_not_zero, counts = not_zero + block[4], finite_not_zero + block[5], counts + block[6]
    bins = tl.arange(0, BINS)
    counts -= tl.where(bins == 0, zeros * is_sound.to(tl.int32), 0)  # counted there too on the short way
    tl.atomic_add(histograms + module * BINS + bins, counts.to(tl.int64), mask=counts != 0, sem="relaxed")
    filling = (filled_to - size % filled_to) % filled_to
    row = partials + chunk * 6
    tl.store(row, (not_zero + filling).to(tl.float64))
    tl.store(row + 1, finite_not_zero.to(tl.float64))
    tl.store(row + 2, total)
    tl.store(row + 3, within)
    tl.store(row + 4, between)
    tl.store(row + 5, largest.to(tl.float32, bitcast=True).to(tl.float64))


@jit
def join_chunks(
    partials: tl.tensor, spans: tl.tensor, sums: tl.tensor, group: tl.constexpr, rounds: tl.constexpr
) -> None:
    """Add up one tensor's chunks.

    Args:
        partials: float64 [chunks, 6], as ``reduce_chunks`` leaves it.
        spans: int64 [tensors, 3]: first chunk, number of chunks, row of ``sums``.
        sums: float64 [slots, 6].
        group: chunks that are added together.
        rounds: groups of the tensor of most chunks, or more.
    """
    span = spans + tl.program_id(0) * 3
    first = tl.load(span)
    count = tl.load(span + 1)
    slot = tl.load(span + 2)
    columns = tl.arange(0, 8)
    members = tl.arange(0, group)
    total = tl.zeros((8,), tl.float64)
    largest = tl.zeros((8,), tl.float64)
    for number in range(rounds):
        places = number * group + members
        mask = (places < count)[:, None] & (columns < 6)[None, :]
        tile = tl.load(partials + (first + places)[:, None] * 6 + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(tile, axis=0)
        largest = tl.maximum(largest, tl.max(tile, axis=0))
    tl.store(sums + slot * 6 + columns, tl.where(columns == 5, largest, total), mask=columns < 6)
