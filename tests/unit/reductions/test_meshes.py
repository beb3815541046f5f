"""Distributed tensors are never computed with: what a rank has a part of is left out, and said."""

from __future__ import annotations

import subprocess
import sys

import pytest

SPREAD = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
from sidestep.trainer_hooks.capture import SPREAD_LOGITS, Batch, ForwardReader, whole_batch
from sidestep.trainer_hooks.logged import logged_values
from sidestep.trainer_hooks.meshes import tensor_parallel_place, whole_or_none

mesh = init_device_mesh("cpu", (4,))
local = torch.arange(24.0).view(2, 3, 4)
copied, spread, partial = (DTensor.from_local(local, mesh, [p]) for p in (Replicate(), Shard(2), Partial()))
norm = DTensor.from_local(torch.tensor(2.0), mesh, [Partial()])
with CommDebugMode() as seen:
    assert whole_or_none(local) is local
    assert type(whole_or_none(copied)) is torch.Tensor and torch.equal(whole_or_none(copied), local)
    assert whole_or_none(spread) is None and whole_or_none(partial) is None

    made, left_out = logged_values({"norm": norm, "loss": torch.tensor(1.5)}, None, None)
    assert (made.values, left_out) == ({"loss": 1.5}, ["norm"])

    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch = whole_batch(Batch(input_ids=ids, labels=ids, logits=spread, loss=torch.tensor(1.0)))
    assert batch.logits is None and batch.reason == SPREAD_LOGITS and float(batch.loss) == 1.0
    plain = Batch(input_ids=ids, logits=local)
    assert whole_batch(plain) is plain

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(2, 16)
        def forward(self, input_ids, labels):
            return spread, None

    read = ForwardReader(Model(), 16).read((ids,), {"labels": ids}, (spread, torch.tensor(2.0)))
    assert read.logits is None and read.reason == SPREAD_LOGITS and float(read.loss) == 2.0
assert seen.get_total_counts() == 0

both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
staged = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
for place in (tensor_parallel_place(each, 4) for each in (both["tp"], staged["tp"], mesh)):
    print(place.rank, place.size, place.copy, place.num_copies)
dist.destroy_process_group()
"""


@pytest.mark.timeout(130)  # torch.distributed is slow to import on a busy machine
def test_no_operation_and_no_guess_on_a_distributed_tensor() -> None:
    """As rank 1 of four, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", SPREAD]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 2 0 2", "0 1 0 1", "0 1 0 1"]
