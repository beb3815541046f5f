"""One rank of trainings under several wrappers, one after another: with hooks, and without them beside it.

    torchrun --nproc-per-node N sharded_training.py OUT ADDRESS ATTEMPT WRAPPER...

Leaves ``OUT/WRAPPER.RANK.npz`` with the raw tensors of the run with hooks (whole gradients by collectives of the test's
own, between the steps' counted parts), and ``OUT/WRAPPER.RANK.json`` with the collectives of each step of both runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.support.rank_processes import say_where_it_hangs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import Hooks, attach
from sidestep.trainer_hooks.topology import read_topology

VOCABULARY, EOS, PAD, IMAGE = 13, 2, 0, 12
NUM_STEPS, ACCUMULATION, GRADIENT_INTERVAL = 3, 2, 2


class Tokenizer:
    """What the hooks ask of one."""

    eos_token_id = EOS
    pad_token_id = PAD

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: list[int]) -> str:
        return f"t{ids[0]}"


class Block(nn.Module):
    """Matrices that tensor parallelism cuts; around them what it leaves whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.gain = nn.Parameter(torch.tensor([1.0, 1.1, 0.9]))  # fewer rows than four ranks: an empty share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        return made * self.gain.repeat(2)


class Model(nn.Module):
    """13 ids divide by neither two nor four ranks evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.block = Block()
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor) -> Any:
        logits = self.head(self.block(self.embedding(input_ids)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return logits, loss


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A model as its trainer calls it."""

    model: nn.Module
    data_rank: int
    """Whose batches this rank sees, by the wrapper's own arithmetic."""
    data_size: int
    quiet: Callable[[bool], Any]
    """From "is this the step's last micro-batch" to a context for its forward and backward."""


def _without(_is_last: bool) -> Any:
    return nullcontext()


def ddp(model: nn.Module) -> Wrapped:
    made = DistributedDataParallel(model)
    rank, size = dist.get_rank(), dist.get_world_size()
    return Wrapped(
        model=made,
        data_rank=rank,
        data_size=size,
        quiet=lambda is_last: nullcontext() if is_last else made.no_sync(),
    )


def _shard(model: Model, mesh: Any) -> Callable[[bool], Any]:
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def quiet(is_last: bool) -> Any:
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        return nullcontext()

    return quiet


def fsdp2(model: Model) -> Wrapped:
    size = dist.get_world_size()
    quiet = _shard(model, init_device_mesh("cpu", (size,)))
    return Wrapped(model=model, data_rank=dist.get_rank(), data_size=size, quiet=quiet)


def fsdp1(model: Model) -> Wrapped:
    made = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return Wrapped(model=made, data_rank=dist.get_rank(), data_size=dist.get_world_size(), quiet=_without)


def hsdp(model: Model) -> Wrapped:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    return Wrapped(model=model, data_rank=dist.get_rank(), data_size=size, quiet=_shard(model, mesh))


def _cut(model: Model, mesh: Any) -> None:
    parallelize_module(model.block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tp(model: Model) -> Wrapped:
    _cut(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    return Wrapped(model=model, data_rank=0, data_size=1, quiet=_without)


def fsdp2_tp(model: Model) -> Wrapped:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    _cut(model, mesh["tp"])
    quiet = _shard(model, mesh["dp"])
    return Wrapped(model=model, data_rank=dist.get_rank() // 2, data_size=size // 2, quiet=quiet)


def sequence(model: Model) -> Wrapped:
    """Sequence parallelism: the norm's gradients are partial sums, and those of ``gain`` are too, unmarked."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "block.norm": SequenceParallel(),
        "block.up": ColwiseParallel(input_layouts=Shard(1)),
        "block.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return Wrapped(model=model, data_rank=0, data_size=1, quiet=_without)


WRAPPERS: dict[str, Callable[[Any], Wrapped]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp": tp,
    "fsdp2_tp": fsdp2_tp,
    "sequence": sequence,
    "drifted": hsdp,
    "fsdp1": fsdp1,
}


def make_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two rows of eight ids, the first half a question, the end padding; answers of one to three tokens and EOS."""
    ids = torch.randint(3, IMAGE, (2, 8), generator=generator)
    ids[:, 0] = IMAGE
    targets = torch.full((2, 8), -100)
    mask = torch.ones(2, 8, dtype=torch.int64)
    for row in range(2):
        length = int(torch.randint(1, 4, (1,), generator=generator))
        ids[row, 4 + length] = EOS
        ids[row, 5 + length :] = PAD
        mask[row, 5 + length :] = 0
        targets[row, 3 : 4 + length] = ids[row, 4 : 5 + length]
    return {"input_ids": ids, "attention_mask": mask, "targets": targets}


def whole(gradient: Any) -> torch.Tensor:
    made: torch.Tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return made.detach()


class Run:
    """A training of a few steps."""

    def __init__(
        self, wrapped: Wrapped, hooks: Hooks | None, optimizer: torch.optim.Optimizer, *, drifts: bool
    ) -> None:
        self._wrapped = wrapped
        self._drifts = drifts
        self._are_known = not isinstance(wrapped.model, FullyShardedDataParallel)
        self._hooks = hooks
        self._optimizer = optimizer
        self.arrays: dict[str, Any] = {}
        self.collectives: list[dict[str, int]] = []

    def train(self, *, is_recorded: bool) -> None:
        rows = torch.Generator().manual_seed(100 + self._wrapped.data_rank)
        for step in range(NUM_STEPS):
            counted: dict[str, int] = {}
            for microstep in range(ACCUMULATION):
                with CommDebugMode() as seen:  # type: ignore[no-untyped-call]  # follows modules through one forward and backward, not more
                    self._forward_backward(step, microstep, make_batch(rows))
                    if self._hooks is not None and microstep == ACCUMULATION - 1:
                        self._hooks.before_clip()
                self._count(seen, counted)
            if is_recorded and self._are_known and step % GRADIENT_INTERVAL == 0:
                self._record_gradients(step)
            with CommDebugMode() as seen:  # type: ignore[no-untyped-call]
                self._optimizer.step()
                self._optimizer.zero_grad()
                if self._drifts and step == 0:
                    self._drift()
                if self._hooks is not None:
                    self._hooks.after_step(step)
            self._count(seen, counted)
            self.collectives.append(counted)

    def _drift(self) -> None:
        """The last rank's copy of the weights goes its own way."""
        if dist.get_rank() == dist.get_world_size() - 1:
            for parameter in self._wrapped.model.parameters():
                local: Any = parameter
                local.to_local().detach().add_(0.25)

    def _forward_backward(self, step: int, microstep: int, batch: dict[str, torch.Tensor]) -> None:
        with self._wrapped.quiet(microstep == ACCUMULATION - 1):
            logits, loss = self._wrapped.model(**batch)
            (loss / ACCUMULATION).backward()
        place = f"batch/{step}/{microstep}"
        self.arrays |= {f"{place}/{name}": tensor.numpy().copy() for name, tensor in batch.items()}
        self.arrays |= {f"{place}/logits": logits.detach().numpy().copy(), f"{place}/loss": loss.detach().numpy()}

    def _record_gradients(self, step: int) -> None:
        for name, parameter in self._wrapped.model.named_parameters():
            kept = whole(parameter.grad).numpy().copy()
            self.arrays[f"gradient/{step}/{name.removeprefix('module.')}"] = kept

    @staticmethod
    def _count(seen: Any, counted: dict[str, int]) -> None:
        for name, number in seen.get_comm_counts().items():
            counted[str(name)] = counted.get(str(name), 0) + number

    def weights(self) -> str:
        digest = hashlib.sha256()
        for parameter in self._wrapped.model.parameters():
            local: Any = parameter
            digest.update((local.to_local() if isinstance(local, DTensor) else local).detach().numpy().tobytes())
        return digest.hexdigest()


def run(name: str, *, address: str, run_id: str, is_hooked: bool) -> tuple[Run, dict[str, Any]]:
    torch.manual_seed(7)
    wrapped = WRAPPERS[name](Model())
    optimizer = torch.optim.AdamW([{"params": list(wrapped.model.parameters()), "name": "all"}], lr=0.01)
    hooks = None
    if is_hooked:
        config = HooksConfig(
            token_stats_interval=1,
            loss_breakdown_interval=1,
            answer_length_interval=1,
            lr_interval=1,
            gradient_log_interval=GRADIENT_INTERVAL,
            signal_gradient_interval=1,
            image_token_id=IMAGE,
            close_timeout_seconds=20.0,
        )
        hooks = attach(wrapped.model, optimizer, tokenizer=Tokenizer(), config=config, endpoint=address, run_id=run_id)
    made = Run(wrapped, hooks, optimizer, drifts=name == "drifted")
    made.train(is_recorded=is_hooked)
    told: dict[str, Any] = {
        "data": [wrapped.data_rank, wrapped.data_size],
        "topology": read_topology(wrapped.model).as_table(),
    }
    if hooks is not None:
        hooks.close()
        told["failures"] = hooks.failures()
    return made, told


def main(out: Path, address: str, attempt: str, names: list[str]) -> None:
    say_where_it_hangs(150)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in names:
        plain, _ = run(name, address="", run_id="", is_hooked=False)
        hooked, told = run(name, address=address, run_id=f"{name}-{attempt}", is_hooked=True)
        told |= {
            "collectives": [plain.collectives, hooked.collectives],
            "weights": [plain.weights(), hooked.weights()],
        }
        np.savez(out / f"{name}.{rank}.npz", **hooked.arrays)
        (out / f"{name}.{rank}.json").write_text(json.dumps(told), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
