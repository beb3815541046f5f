"""What parameters are called, and which share of each a rank holds (docs/metrics.md, ``gradients/``)."""

from __future__ import annotations

import gc
import importlib
import inspect
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sidestep.trainer_hooks.parameters import _WRAPPERS, ParameterTable, named_parameters, unwrapped


class Model(nn.Module):
    """A module called ``module``, a tied weight, a parameter of the root, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.decoder = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
        self.decoder["head"].weight = self.decoder["embedding"].weight
        self.module[0].bias.requires_grad_(False)


NAMES = ["scale", "module.0.weight", "module.0.bias", "module.1.weight", "module.1.bias", "decoder.embedding.weight"]


def checkpointed(model: Model) -> nn.Module:
    model.module[0] = checkpoint_wrapper(model.module[0])
    model.decoder["embedding"] = checkpoint_wrapper(model.decoder["embedding"])
    return model


def compiled(model: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(model, backend="eager"))


WRAPPINGS: dict[str, Callable[[Model], nn.Module]] = {
    "bare": lambda model: model,
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "compiled within": lambda model: nn.DataParallel(compiled(model)),
    "checkpointed inside": checkpointed,
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_leave_no_trace_and_a_module_called_module_does(wrapping: str) -> None:
    model = Model()
    wrapped = WRAPPINGS[wrapping](model)
    assert [name for name, _ in named_parameters(wrapped)] == NAMES
    table = ParameterTable(wrapped)
    assert table.modules == ("root", "module", "decoder")
    assert [row.param for row in table.rows][:3] == ["scale", "0_weight", "0_bias"]
    assert unwrapped(wrapped) is model
    assert table.fits(wrapped)
    assert table.fits(model)


def build(sizes: dict[str, int]) -> nn.Module:
    """Make a model whose parameters have these names and sizes."""
    root = nn.Module()
    for name, size in sizes.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, nn.Parameter(torch.zeros(size)))
    return root


def spelled(sizes: dict[str, int], modules: dict[str, str] | None = None) -> list[str]:
    table = ParameterTable(build(sizes), modules=modules)
    return [f"{table.modules[row.module]}/{row.param}" for row in table.rows]


def test_a_child_that_holds_nearly_all_is_looked_into() -> None:
    sizes = {
        "logit_scale": 1,
        "lm_head.weight": 5,
        "model.scale": 1,
        "model.visual.blocks.0.weight": 40,
        "model.visual.norm.weight": 2,
        "model.text.layers.0.weight": 80,
        "model.text.norm.weight": 2,
    }
    assert spelled(sizes) == [
        "root/logit_scale", "lm_head/weight", "model/scale", "visual/blocks_0_weight", "visual/norm_weight",
        "text/layers_0_weight", "text/norm_weight",
    ]  # fmt: skip


def test_numbered_layers_keep_the_name_above_them() -> None:
    sizes = {"norm.weight": 1, "layers.0.a.weight": 50, "layers.0.b.weight": 1, "layers.1.a.weight": 50}
    assert spelled(sizes) == ["norm/weight", "layers_0/a_weight", "layers_0/b_weight", "layers_1/a_weight"]


def test_the_parameters_of_a_single_layer_are_no_modules() -> None:
    assert spelled({"fc.weight": 100, "fc.bias": 1}) == ["fc/weight", "fc/bias"]
    assert spelled({"weight": 3}) == ["root/weight"]
    assert spelled({}) == []


def test_a_share_of_exactly_nine_tenths_is_not_nearly_all() -> None:
    assert spelled({"model.a.weight": 45, "model.b.weight": 45, "head.weight": 10}) == [
        "model/a_weight", "model/b_weight", "head/weight",
    ]  # fmt: skip


def test_the_adapters_map_wins_by_its_longest_prefix() -> None:
    sizes = {"model.vision.a.weight": 1, "model.vision.merger.weight": 1, "model.visionary.weight": 1}
    modules = {"model.vision": "vision_encoder", "model.vision.merger": "modality_projector"}
    assert spelled(sizes, modules) == ["vision_encoder/a_weight", "modality_projector/weight", "visionary/weight"]


def test_a_collision_of_spellings_keeps_two_underscores() -> None:
    sizes = {"m.a.b_c": 1, "m.a_b.c": 1, "m.d.e": 1, "n.x.w": 1}
    assert spelled(sizes) == ["m/a__b_c", "m/a_b__c", "m/d_e", "n/x_w"]
    hostile = {"m.a.b": 1, "m.a_b": 1, "m.a__b": 1, "n.w": 1}
    assert len(set(spelled(hostile))) == len(hostile)


def test_rows_say_shape_group_and_whether_it_trains() -> None:
    model = Model()
    groups: list[dict[str, Any]] = [{"params": [model.scale]}, {"params": model.decoder.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    table = ParameterTable(model, optimizer)
    rows = {row["name"]: row for row in table.as_json()["parameters"]}
    assert rows["decoder.embedding.weight"] == {
        "name": "decoder.embedding.weight", "module": 2, "param": "embedding_weight", "shape": [6, 4], "numel": 24,
        "offset": [0, 0], "local_shape": [6, 4], "trainable": True, "group": 1,
    }  # fmt: skip
    assert rows["scale"]["shape"] == []
    assert (rows["scale"]["numel"], rows["scale"]["group"]) == (1, 0)
    assert not rows["module.0.bias"]["trainable"]
    assert rows["module.0.weight"]["group"] == -1
    assert table.module_of(model.scale) == "root"
    assert table.module_of(torch.zeros(1)) is None


def test_gradients_of_a_step_and_those_that_are_missing() -> None:
    model = Model()
    table = ParameterTable(model)
    cast("Tensor", model.decoder["embedding"].weight).sum().backward()  # type: ignore[no-untyped-call]
    held, without, partial = table.gradients()
    assert not partial
    assert [(each.parameter, each.module) for each in held] == [(5, 2)]
    assert without == [0, 1, 3, 4]  # the frozen bias is not missed


def test_a_change_of_what_trains_or_of_the_parameters_is_seen() -> None:
    model = Model()
    table = ParameterTable(model)
    model.module[0].bias.requires_grad_(True)
    assert not table.fits(model)
    assert ParameterTable(model).fits(model)
    model.module[0].bias = nn.Parameter(torch.zeros(4))
    assert not table.fits(model)


def test_the_table_keeps_no_parameter_alive() -> None:
    model = Model()
    reference = weakref.ref(model.scale)
    table = ParameterTable(model)
    del model
    gc.collect()
    assert reference() is None
    assert table.gradients() == ([], [], [])


@pytest.mark.parametrize(("home", "name", "attribute"), _WRAPPERS[:5])
def test_the_wrappers_are_where_they_are_looked_for(home: str, name: str, attribute: str) -> None:
    wrapper = getattr(importlib.import_module(home), name)
    assert issubclass(wrapper, nn.Module)
    assert attribute in inspect.getsource(importlib.import_module(home))


SHARDED = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
from sidestep.trainer_hooks.parameters import ParameterTable, named_parameters
from sidestep.trainer_hooks.reductions.gradients import gradients_message, reduce_gradients

model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6))
wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(1, 1)))
print([name for name, _ in named_parameters(wrapped)])
fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
table = ParameterTable(model)
for row in table.rows:
    print(row.name, row.shape, row.offset, row.local_shape)
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
held, without, _ = table.gradients()
parts = {name: part.numpy() for name, part in reduce_gradients(held).items()}
print(gradients_message(step=0, arrays=parts).counts.tolist(), without)
dist.destroy_process_group()
"""


@pytest.mark.timeout(130)  # torch.distributed is slow to import on a busy machine
def test_a_shard_knows_its_place_and_is_reduced_alone() -> None:
    """Let FSDP2 shard over four ranks of which this process is one; in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", SHARDED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['0.weight', '0.bias']",
        "0.weight (8, 4) (2, 0) (2, 4)",
        "0.bias (8,) (2,) (2,)",
        "1.weight (6, 8) (2, 0) (2, 8)",
        "1.bias (6,) (2,) (2,)",
        "[8, 2, 16, 2] []",
    ]  # fmt: skip
