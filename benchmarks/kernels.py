"""What the two large reductions cost: kernels and torch's operations beside one read of the memory that they look at.

    python benchmarks/kernels.py [--quick] [--json FILE] [--sweep]

On a CUDA device, by its own clock: the statistics of all gradients of nanoVLM-460M (440 tensors), and the labelled
fifth of the logits of 32 x 1024 positions, by kernel, by torch's operations, by foreach and by torch.compile. The floor
is the bytes of one read at the rate of a large copy. Without a device: the gradients' statistics by the host's kernel,
by numpy's passes, by foreach and by torch.compile, beside one sum over each gradient, by the calling thread's CPU time
on one thread and by the wall clock on as many as torch has. Medians of one run, the ways taking turns. ``--sweep``
tries other sizes of the programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where this is run from does not matter

from sidestep.trainer_hooks.kernels import gradient_launch, host_build, row_launch
from sidestep.trainer_hooks.kernels.choice import host_obstacle, kernels, stated
from sidestep.trainer_hooks.kernels.host_launch import host_kernel
from sidestep.trainer_hooks.reductions.cross_entropy import logits_source
from sidestep.trainer_hooks.reductions.gradient_blocks import BLOCK_ELEMENTS, reduce_on_host
from sidestep.trainer_hooks.reductions.gradient_pieces import Piece
from sidestep.trainer_hooks.reductions.gradient_rows import reduce_by_rows
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, reduce_gradients
from sidestep.trainer_hooks.signals.rows import row_signals

Call = Callable[[], object]

ROUNDS, HOST_ROUNDS, QUICK_ROUNDS = 30, 15, 3
COPY_BYTES = 2 << 30
ONE_READ = "one read"
LABELLED_SHARE = 0.2
SIGNAL_ROWS = 896
"""Labelled rows of a step that the detectors look at, by default."""


def nanovlm_shapes(width: int = 960) -> list[tuple[int, ...]]:
    """Return the 440 shapes of nanoVLM-460M's parameters; a smaller ``width`` makes all of them smaller."""
    hidden, inner, keys, vision = width, width * 8 // 3, width // 3, width * 4 // 5
    layer: list[tuple[int, ...]] = [
        (hidden, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, hidden),
        (inner, hidden),
        (inner, hidden),
    ]
    layer += [(hidden, inner), (hidden,), (hidden,)]
    encoder: list[tuple[int, ...]] = [
        (vision,),
        (vision,),
        (3 * vision, vision),
        (3 * vision,),
        (vision, vision),
        (vision,),
        (vision,),
    ]
    encoder += [(vision,), (4 * vision, vision), (4 * vision,), (vision, 4 * vision), (vision,)]
    ends: list[tuple[int, ...]] = [
        (49_280 * width // 960, hidden),
        (hidden,),
        (vision, 3, 16, 16),
        (vision,),
        (1024, vision),
    ]
    ends += [(vision,), (vision,), (hidden, 16 * vision)]
    return [shape for _ in range(32) for shape in layer] + [shape for _ in range(12) for shape in encoder] + ends


def drawn(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[LocalGradient]:
    """Draw gradients of such shapes, in three modules."""
    generator = torch.Generator(device=device).manual_seed(0)
    made = []
    for index, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator, device=device).mul_(10.0 ** -(3 + index % 4)).to(dtype)
        made.append(LocalGradient(index, index * 3 // len(shapes), values))
    return made


def timed(
    ways: Mapping[str, Call], rounds: int, device: torch.device, clock: Callable[[], float] = time.thread_time
) -> dict[str, list[float]]:
    """Return milliseconds of every call of each way; they take turns, after two calls that are not counted.

    On the host they are those of ``clock``, which says seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, call in ways.items():
            taken_ms = _device_ms(call) if device.type == "cuda" else _host_ms(call, clock)
            if number >= 2:
                taken[name].append(taken_ms)
    return taken


def _device_ms(call: Call) -> float:
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    first.record()
    call()
    second.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(second))


def _host_ms(call: Call, clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return (clock() - began) * 1e3


@contextmanager
def choice_of(value: str) -> Iterator[None]:
    """Force a choice while this lasts."""
    before = os.environ.get("SIDESTEP_KERNELS")
    os.environ["SIDESTEP_KERNELS"] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("SIDESTEP_KERNELS")
        else:
            os.environ["SIDESTEP_KERNELS"] = before


def by_torch(call: Call) -> Call:
    """Return the call with kernels off."""

    def off() -> object:
        with choice_of("torch"):
            return call()

    return off


def foreach(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms, largest magnitudes and their finiteness by what torch has for lists: less than the statistics hold."""
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)  # noqa: SLF001
    highest = torch._foreach_norm(list(tensors), float("inf"), dtype=torch.float32)  # noqa: SLF001
    return [torch.stack([*norms, *highest]).isfinite()]


def flat_statistics(flat: Tensor) -> Tensor:
    """Mean, M2, largest magnitude, zeros and non-finite values of one tensor, for a compiler to make one pass of."""
    wide = flat.float()
    mean = wide.mean()
    return torch.stack(
        (mean, (wide - mean).square().sum(), wide.abs().amax(), (wide == 0).sum(), (~wide.isfinite()).sum())
    )


def copy_bytes_per_ms(device: torch.device, rounds: int) -> float:
    """Return what a large copy on the device moves, reads and writes together."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = timed({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]
    return 2 * COPY_BYTES / statistics.median(taken)


def gradient_rows(dtype: torch.dtype, device: torch.device, rounds: int, rate: float, *, width: int) -> dict[str, Any]:
    """Measure the gradients' statistics on a device."""
    held = drawn(nanovlm_shapes(width), device, dtype)
    tensors = [each.gradient for each in held]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    compiled: Any = torch.compile(flat_statistics)
    ways: dict[str, Call] = {
        "kernel": lambda: reduce_gradients(held),
        "torch's operations": by_torch(lambda: reduce_gradients(held)),
        "foreach, norms and largest only": lambda: foreach(tensors),
        "torch.compile, one flat tensor, no histogram": lambda: compiled(flat),
    }
    return rows_of(timed(ways, rounds, device), flat.nbytes / rate)


def logit_rows(device: torch.device, rounds: int, rate: float, *, batch: int, width: int) -> dict[str, Any]:
    """Measure the labelled rows of the logits on a device."""
    positions = 1024
    logits = torch.randn((batch, positions, width), device=device, dtype=torch.bfloat16)
    generator = torch.Generator(device=device).manual_seed(0)
    labelled = torch.rand(batch * positions, device=device, generator=generator) < LABELLED_SHARE
    targets = torch.randint(0, width, (batch * positions,), device=device, generator=generator)
    index = labelled.nonzero().flatten()
    few = index[:SIGNAL_ROWS]
    source = logits_source(logits, batch, positions)
    floor = index.numel() * width * 2 / rate
    flat = logits.view(-1, width)

    def stock() -> Tensor:
        return F.cross_entropy(flat[index].float(), targets[index], reduction="none")

    compiled: Any = torch.compile(stock)

    def signals() -> object:
        return row_signals(source, few // positions, few % positions, targets[few], eos_id=2, weights=None)

    losses = {
        "kernel, every labelled row": lambda: row_launch.read_logits(
            logits, targets, positions=positions, weights=labelled, eos_id=2, with_mean=False
        ),
        "torch, cross-entropy of those rows": stock,
        "torch.compile of that": compiled,
    }
    of_step: dict[str, Call] = {"kernel, with the mean": signals, "torch's operations": by_torch(signals)}
    return {
        "labelled rows": rows_of(timed(losses, rounds, device), floor),
        "rows of a step": rows_of(timed(of_step, rounds, device), few.numel() * width * 2 / rate),
    }


def host_rows(
    rounds: int, dtype: torch.dtype, *, width: int, quick: bool, clock: Callable[[], float] = time.thread_time
) -> dict[str, Any]:
    """Measure the gradients' statistics on the host."""
    device = torch.device("cpu")
    held = drawn(nanovlm_shapes(width), device, dtype)
    tensors = [each.gradient for each in held]
    pieces = [Piece(slot=slot, module=each.module, values=each.gradient.view(-1)) for slot, each in enumerate(held)]
    slots, modules = len(pieces), 1 + max(each.module for each in held)
    floor = f"{ONE_READ}, by torch.sum"
    ways: dict[str, Call] = {
        floor: lambda: [tensor.sum() for tensor in tensors],
        f"{ONE_READ}, by torch.dot with itself": lambda: [torch.dot(each.values, each.values) for each in pieces],
    }
    if not host_obstacle() and host_kernel.wait(host_build.COMPILE_SECONDS):
        ways["kernel"] = lambda: host_kernel.reduce(pieces, slots=slots, modules=modules)
        ways["kernel, the whole call"] = lambda: reduce_gradients(held)
    ways |= {
        "numpy's passes, without the histogram": lambda: reduce_on_host(
            pieces, slots, modules, counts_magnitudes=False
        ),
        "numpy's passes": lambda: reduce_on_host(pieces, slots, modules),
        "torch's operations": lambda: reduce_by_rows(device, pieces, slots, modules),
        "foreach, norms and largest only": lambda: foreach(tensors),
    }
    if not quick and host_build.compiler():
        compiled: Any = torch.compile(flat_statistics)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        ways["torch.compile, one flat tensor, no histogram"] = lambda: compiled(flat)
    taken = timed(ways, rounds, device, clock)
    return rows_of(taken, statistics.median(taken[floor]))


def host_results(*, quick: bool) -> dict[str, Any]:
    """Measure the host: one thread by its CPU time, and all of torch's by the wall clock."""
    rounds, width = (QUICK_ROUNDS, 96) if quick else (HOST_ROUNDS, 480)
    threads = torch.get_num_threads()
    results: dict[str, Any] = {"block_elements": BLOCK_ELEMENTS, "load": os.getloadavg()[0]}
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        results[f"gradients, {dtype}, 1 thread, CPU time"] = host_rows(rounds, dtype, width=width, quick=quick)
    torch.set_num_threads(threads)
    if threads > 1:
        name = f"gradients, {torch.float32}, {threads} threads, wall clock"
        results[name] = host_rows(rounds, torch.float32, width=width, quick=quick, clock=time.perf_counter)
    return results | {"load_at_the_end": os.getloadavg()[0]}


def rows_of(taken: Mapping[str, list[float]], floor_ms: float) -> dict[str, Any]:
    """Return median, quartiles and the ratio to the floor of each way."""
    made: dict[str, Any] = {"floor_ms": floor_ms}
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4)
        made[name] = {"median_ms": middle, "quartiles_ms": [low, high], "times_floor": middle / floor_ms}
    return made


def sweep(device: torch.device, rounds: int, rate: float) -> dict[str, Any]:
    """Try other sizes of the programs; the results that they give are the same."""
    held = drawn(nanovlm_shapes(), device, torch.float32)
    size_bytes = sum(each.gradient.nbytes for each in held)
    made = {}
    before = gradient_launch.LANES, gradient_launch.CHUNK_PARTS, gradient_launch.MAX_REGISTERS
    for lanes in (32, 64, 128):
        for parts in (1, 2, 4):
            for registers in (64, 96, 128, 168):
                gradient_launch.LANES, gradient_launch.CHUNK_PARTS = lanes, parts
                gradient_launch.MAX_REGISTERS = registers
                taken = timed({"kernel": lambda: reduce_gradients(held)}, rounds, device)
                row = rows_of(taken, size_bytes / rate)["kernel"]
                made[f"{lanes} lanes, {parts} parts, {registers} registers"] = row
    gradient_launch.LANES, gradient_launch.CHUNK_PARTS, gradient_launch.MAX_REGISTERS = before
    return made


def report(results: Mapping[str, Any]) -> None:
    """Print one table of everything."""
    print("| of | way | median ms | times the floor |\n| --- | --- | --- | --- |")
    for name, rows in results.items():
        if not isinstance(rows, Mapping):
            continue
        for way, row in rows.items():
            if isinstance(row, Mapping):
                print(f"| {name} | {way} | {row['median_ms']:.3f} | {row['times_floor']:.2f} |")
            else:
                print(f"| {name} | floor | {row:.3f} | 1 |")


def main() -> None:
    """Measure and print; write the figures too where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little of everything: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--sweep", action="store_true", help="on a device: also other sizes of the programs")
    told = parser.parse_args()
    on_device = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")
    rounds = QUICK_ROUNDS if told.quick else ROUNDS if on_device else HOST_ROUNDS
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name(device) if on_device else platform.machine(),
        "torch": str(torch.__version__),
        "kernels": stated(device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    if on_device:
        rate = copy_bytes_per_ms(device, rounds)
        results["copy_terabytes_per_second"] = rate / 1e9
        width = 192 if told.quick else 960
        for dtype in (torch.float32, torch.bfloat16):
            results[f"gradients, {dtype}"] = gradient_rows(dtype, device, rounds, rate, width=width)
        results |= logit_rows(device, rounds, rate, batch=2 if told.quick else 32, width=49_280)
        if told.sweep:
            results["sweep of the gradients"] = sweep(device, rounds, rate)
        results["kernels that failed"] = dict(kernels.failures) or None
    else:
        results |= host_results(quick=told.quick)
    print({name: value for name, value in results.items() if not isinstance(value, Mapping)})
    report(results)
    if told.json is not None:
        told.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
