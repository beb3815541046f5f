"""What is chosen where, what Hello says of it, and what happens when a kernel cannot run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidestep.trainer_hooks.environment import snapshot
from sidestep.trainer_hooks.kernels.choice import obstacle, stated

HAS_TRITON = importlib.util.find_spec("triton") is not None
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install 'sidestep[kernels]'")


@pytest.mark.parametrize("value", ["", "auto", "triton"])
def test_without_a_device_triton_does_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("SIDESTEP_KERNELS", value)
    assert obstacle(CPU) == "no CUDA device"
    assert snapshot(CPU)["kernels"] == stated(CPU)
    assert "triton 3" not in stated(CPU)


@pytest.mark.skipif(torch.version.hip is not None, reason="another maker's devices have no kernels")
def test_on_a_device_triton_does_it_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = torch.device("cuda", 0)
    said = stated(device)
    assert said.startswith("triton ") if HAS_TRITON else said == "torch (Triton is not installed)"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert stated(device) == "torch (Triton is in its interpreter)"
    monkeypatch.setenv("SIDESTEP_KERNELS", "torch")
    assert stated(device) == "torch (SIDESTEP_KERNELS is torch)"


def test_a_choice_that_there_is_not_is_refused_at_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDESTEP_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"SIDESTEP_KERNELS must be one of auto, triton, torch, not 'fast'"):
        snapshot(CPU)


_FALL_BACK = """
import json, os, sys
import torch
from sidestep.trainer_hooks.kernels import gradient_kernel, row_kernel  # compiled ones: there is no driver for them
from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.reductions.cross_entropy import cross_entropy, logits_source
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, reduce_gradients
os.environ |= {"TRITON_INTERPRET": "1", "SIDESTEP_KERNELS": "triton"}
held = [LocalGradient(0, 0, torch.arange(5.0))]
sums = [reduce_gradients(held)["sums"].tolist() for _ in range(3)]
where = torch.tensor([0, 0]), torch.tensor([0, 1])
losses = cross_entropy(logits_source(torch.zeros(1, 2, 4), 1, 2), *where, torch.tensor([1, 2])).tolist()
print(json.dumps({"sums": sums, "losses": losses, "failures": kernels.failures}))
"""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the kernels run")
@pytest.mark.timeout(180)
def test_what_cannot_run_is_said_once_and_torch_does_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _FALL_BACK], capture_output=True, text=True, timeout=170, check=True, env=environment
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["failures"] == {"gradient": 1, "row": 1}
    assert said["sums"][0] == said["sums"][1] == said["sums"][2]
    assert said["sums"][0][0][2] == 10.0
    assert said["losses"] == pytest.approx([1.3862944, 1.3862944])
    notices = [line for line in done.stderr.splitlines() if "kernel cannot run here" in line]
    assert [line.split()[2] for line in notices] == ["gradient", "row"]


_COMPILE = """
import inspect, json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sidestep.trainer_hooks.kernels import gradient_kernel, row_kernel

GRADIENT = {"is_aligned": True, "lanes": 64, "parts": 2, "filled_to": 1024, "slope": 1.2, "offset": 47.5,
            "smallest": 1e-12, "native": True}
ROW = {"is_weighted": True, "lanes": 1024, "native": True}
KERNELS = [
    (gradient_kernel.reduce_chunks, GRADIENT | {"element": tl.float32}, {}, 1),
    (gradient_kernel.join_chunks, {"group": 128, "rounds": 16}, {}, 4),
    (row_kernel.read_rows, ROW | {"is_listed": False, "has_eos": True, "depth": 4, "rounds": 13},
     {"logits": "*bf16", "weights": "*i1"}, 4),
    (row_kernel.add_probabilities, ROW | {"is_listed": True, "group": 32}, {"logits": "*bf16", "weights": "*fp32"}, 4),
]
TYPES = {"chunks": "*i64", "spans": "*i64", "partials": "*fp64", "histograms": "*i64", "sums": "*fp64", "rows": "*i64",
         "places": "*i64", "targets": "*i64", "numbers": "*fp32", "predictions": "*i32", "normalizers": "*fp32"}
EVEN = ("chunks", "partials", "histograms", "logits", "row_stride", "position_stride", "width")
wide = {}
for kernel, constants, types, warps in KERNELS:
    names = list(inspect.signature(kernel.fn).parameters)
    types = TYPES | types | ({"partials": "*fp32"} if "logits" in names else {})
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in EVEN if name in names}
    source = ASTSource(fn=kernel, signature=signature, attrs=attributes,
                       constexprs={(names.index(name),): value for name, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    wide[kernel.fn.__name__] = made.asm["ptx"].count("ld.global.v")
    assert made.asm["cubin"]
print(json.dumps(wide))
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_kernels_compile_for_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = tmp_path / "compile_kernels.py"
    script.write_text(_COMPILE, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    wide = json.loads(done.stdout.splitlines()[-1])
    # Two to four values to an instruction: what a hint of alignment that is lost would undo.
    assert wide["reduce_chunks"] >= 32
    assert wide["read_rows"] >= 4
