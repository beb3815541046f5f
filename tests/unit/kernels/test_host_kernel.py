"""The host's kernel: what it is compiled for, what it says at every size, and what happens where it cannot be made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS
from sidestep.trainer_hooks.errors import KernelError
from sidestep.trainer_hooks.kernels import host_build, host_launch
from sidestep.trainer_hooks.kernels.choice import host_obstacle, kernels, stated
from sidestep.trainer_hooks.kernels.host_build import COMPILE_SECONDS, KNOWN_INSTRUCTIONS, Instructions
from sidestep.trainer_hooks.reductions.gradient_pieces import Piece

torch.set_num_threads(1)
CPU = torch.device("cpu")
OBSTACLE = host_build.obstacle()
HERE = [each for each in KNOWN_INSTRUCTIONS if not OBSTACLE and set(each.features) <= host_build.features()]
"""All that this processor has: each is a program of its own."""
needs_compiler = pytest.mark.skipif(bool(OBSTACLE), reason=f"no kernel can be made on this host: {OBSTACLE}")
pytestmark = pytest.mark.timeout(180)

EDGES = 10.0 ** (np.arange(1, 64) / 4 - 12)


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIDESTEP_KERNELS", raising=False)


@pytest.fixture(params=HERE, ids=lambda each: each.name)
def kernel(request: pytest.FixtureRequest) -> host_launch.HostKernel:
    """A kernel for each of this processor's instructions, checked when it was loaded."""
    made = host_launch.HostKernel()
    made._load(request.param)
    return made


def reduced(kernel: host_launch.HostKernel, *tensors: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    pieces = [Piece(slot=slot, module=slot % 2, values=tensor) for slot, tensor in enumerate(tensors)]
    sums, histograms = kernel.reduce(pieces, slots=len(tensors), modules=2)
    return sums.numpy(), histograms.numpy()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_size_around_a_chunk_equals_float64(kernel: host_launch.HostKernel, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 12_289]
    tensors = [torch.randn(size, generator=generator).mul(10.0 ** -(size % 5)).to(dtype) for size in sizes]
    sums, histograms = reduced(kernel, *tensors)
    for row, tensor in zip(sums, tensors, strict=True):
        wide = tensor.to(torch.float32).to(torch.float64).numpy()
        not_zero = np.count_nonzero(wide)
        assert row[0] == not_zero + -wide.size % 1024
        assert row[1] == not_zero
        assert row[2] == pytest.approx(wide.sum(), abs=1e-6 * np.abs(wide).sum())
        assert row[3] + row[4] == pytest.approx(np.square(wide).sum(), rel=2e-6)
        assert row[5] == np.abs(wide).max()
    for module, counts in enumerate(histograms):
        wide = np.concatenate([tensor.float().double().numpy() for tensor in tensors[module::2]])
        expected = host_launch._histogram(np.abs(wide[wide != 0]))
        assert np.abs(np.cumsum(counts - expected)).max() <= 1


@needs_compiler
@pytest.mark.parametrize("factor", [1 - 6e-6, 1.0])
def test_every_edge_of_the_histogram(kernel: host_launch.HostKernel, factor: float) -> None:
    """A magnitude a hundred thousandth of a bin under an edge lies below it, the edge itself above."""
    values = np.asarray(EDGES * factor, np.float32)
    expected = np.zeros(GRADIENT_HISTOGRAM_BINS, np.int64)
    expected[int(factor == 1) :][: EDGES.size] = 3
    for shape in ((3,), (1,)):
        tensors = [torch.from_numpy(value.repeat(shape)) for value in values for _ in range(3 // shape[0])]
        sums = kernel.reduce([Piece(slot=0, module=0, values=tensor) for tensor in tensors], slots=1, modules=1)
        assert sums[1][0].tolist() == expected.tolist()
    together = torch.from_numpy(np.random.default_rng(1).permutation(values.repeat(3)))
    assert (
        kernel.reduce([Piece(slot=0, module=0, values=together)], slots=1, modules=1)[1][0].tolist()
        == expected.tolist()
    )


@needs_compiler
def test_every_bin_can_be_full_at_once(kernel: host_launch.HostKernel) -> None:
    """All 64 bins within one chunk, and one of them alone: counters of four bits overflow nowhere."""
    middle = np.asarray(10.0 ** (np.arange(64) / 4 - 11.875), np.float32)
    spread = torch.from_numpy(np.tile(middle, 192))
    assert reduced(kernel, spread)[1][0].tolist() == [192] * 64
    for place in range(64):
        row = reduced(kernel, torch.full((12_288,), float(middle[place])))[1][0]
        assert row[place] == row.sum() == 12_288


@needs_compiler
def test_views_are_read_as_they_are(kernel: host_launch.HostKernel) -> None:
    base = torch.arange(1.0, 9001.0)
    odd, negative = base[1:8998:3], torch.view_as_complex(base.view(-1, 2)).conj().imag
    assert odd.stride(0) == 3
    assert negative.is_neg()
    sums, _ = reduced(kernel, odd, negative, base[1:5])
    assert sums[:, 2] == pytest.approx([odd.double().sum().item(), negative.double().sum().item(), 14.0])


@needs_compiler
def test_it_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = host_build.instructions()
    assert chosen is not None
    path = host_build.library(chosen)
    made_at = path.stat().st_mtime_ns
    assert path.is_relative_to(tmp_path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert host_build.library(chosen).stat().st_mtime_ns == made_at
    assert not host_build.obstacle(), "a library in the cache needs no compiler"


@needs_compiler
def test_a_cache_that_others_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = tmp_path / "sidestep" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    path = host_build.library(HERE[0])
    assert path.parent != folder
    assert path.parent.stat().st_mode & 0o077 == 0


def test_without_a_compiler_it_is_said_and_numpy_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(host_build, "instructions", lambda: KNOWN_INSTRUCTIONS[0])
    assert host_obstacle() == "no C compiler"
    assert stated(CPU) == "torch (no C compiler)"
    monkeypatch.setattr(host_build, "instructions", lambda: None)
    assert stated(CPU) == "torch (a processor without AVX2)"


@needs_compiler
@pytest.mark.parametrize("value", ["torch", "triton"])
def test_it_can_be_turned_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert stated(CPU) == f"compiled for {HERE[0].name}"
    assert kernels.can_run_on_host([torch.ones(3)]) in {True, False}
    monkeypatch.setenv("SIDESTEP_KERNELS", value)
    assert stated(CPU) == f"torch (SIDESTEP_KERNELS is {value})"
    assert not kernels.can_run_on_host([torch.ones(3)])


@needs_compiler
def test_a_library_that_says_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.c"
    wrong.write_text(host_build.SOURCE.read_text().replace("found.squares - between", "found.squares"))
    monkeypatch.setattr(host_build, "SOURCE", wrong)
    with pytest.raises(KernelError, match="does not say what float64 says"):
        host_launch.HostKernel()._load(HERE[0])


_FALL_BACK = """
import json
import torch
from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.kernels.host_launch import host_kernel
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, reduce_gradients
held = [LocalGradient(0, 0, torch.arange(5.0))]
first = reduce_gradients(held)["sums"].tolist()
is_there = host_kernel.wait(100)
sums = [first] + [reduce_gradients(held)["sums"].tolist() for _ in range(2)]
print(json.dumps({"is_there": is_there, "sums": sums, "failures": kernels.failures}))
"""


def fall_back(folder: Path, compiler: str) -> tuple[dict[str, object], list[str]]:
    """Reduce in a process whose compiler is a script; return what it says, and its notices."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{compiler}\n")
    script.chmod(0o755)
    environment = os.environ | {"CC": str(script), "XDG_CACHE_HOME": str(folder)}
    environment.pop("SIDESTEP_KERNELS", None)
    done = subprocess.run(
        [sys.executable, "-c", _FALL_BACK], capture_output=True, text=True, timeout=170, check=True, env=environment
    )
    made: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return made, [line for line in done.stderr.splitlines() if "kernel cannot run here" in line]


@needs_compiler
def test_a_compiler_that_fails_is_said_once_and_numpy_does_it(tmp_path: Path) -> None:
    said, notices = fall_back(tmp_path, "echo 'no room on this disk' >&2; exit 3")
    assert said["failures"] == {"host gradient": 1}
    assert not said["is_there"]
    assert said["sums"] == [said["sums"][0]] * 3  # type: ignore[index]
    (notice,) = notices
    assert "no room on this disk" in notice
    assert "other operations do the same" in notice


@needs_compiler
def test_while_it_is_compiled_numpy_does_it(tmp_path: Path) -> None:
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    said, notices = fall_back(tmp_path, f'sleep 1; exec {real} "$@"')
    assert said["is_there"]
    assert not notices
    assert not said["failures"]
    assert [row[0][:4] for row in said["sums"]] == [[5.0 + 1018, 4.0, 10.0, 10.0]] * 3  # type: ignore[attr-defined]


def test_options_are_the_processors_own_words() -> None:
    """A wider choice has all that a narrower one has, and the narrowest has what the source asks for."""
    wide, narrow = KNOWN_INSTRUCTIONS
    assert set(narrow.features) < set(wide.features)
    assert isinstance(narrow, Instructions)
    assert {"-mavx2", "-mfma", "-mf16c"} <= set(host_build._options(narrow))
    assert COMPILE_SECONDS > 0
