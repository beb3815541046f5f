"""No reduction reads device data on the host: proven without a device (docs/trainer.md, section 3).

Tensors on the device are fake: they have a shape and a device and no values, so that whatever depends on a value raises
(``item``, ``if``, boolean indexing, ``nonzero``, ``unique``, ``bincount``, ``masked_select``, ``tolist``, ``float()``).
What a fake tensor lets pass, a copy to the host, is refused by a dispatch mode. Tensors on the host are real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sidestep.trainer_hooks.capture import Batch, ForwardReader
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.image_probe import rolled, rolled_rows
from sidestep.trainer_hooks.reducing import Reducer
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch, align
from sidestep.trainer_hooks.reductions.answers import reduce_answers
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, reduce_gradients
from sidestep.trainer_hooks.reductions.learning_rate import reduce_learning_rates
from sidestep.trainer_hooks.reductions.loss import reduce_loss
from sidestep.trainer_hooks.reductions.tokens import reduce_tokens
from sidestep.trainer_hooks.signals.group_settings import group_settings
from sidestep.trainer_hooks.signals.heartbeat import Heartbeat
from sidestep.trainer_hooks.signals.lost_gradients import LostGradients
from sidestep.trainer_hooks.signals.microbatch import MicroSignalReader
from sidestep.trainer_hooks.signals.module_norms import module_norms, whole_norm
from sidestep.trainer_hooks.signals.optimizer_steps import OptimizerSteps
from sidestep.trainer_hooks.signals.packed_images import images_of
from sidestep.trainer_hooks.signals.projector import projector_numbers
from sidestep.trainer_hooks.signals.step import StepSignals
from sidestep.trainer_hooks.vocabulary import read_vocabulary
from sidestep.trainer_hooks.wiring_changes import find_answers
from sidestep.trainer_hooks.wiring_probe import WiringProbe

ROWS, POSITIONS, VOCABULARY, FEATURES = 3, 40, 50, 8
CUDA = torch.device("cuda", 0)


class HostReadError(AssertionError):
    """A value went from the device to the host."""


class DeviceWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on the host for real, lets those on the device be faked, and refuses the way back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        if not any(_on_device(leaf) for leaf in leaves):
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        self.device_operations += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            raise HostReadError(f"{func} on a device")
        result = func(*args, **(kwargs or {}))
        came_from_device = any(isinstance(leaf, Tensor) and _on_device(leaf) for leaf in leaves)
        if came_from_device and any(isinstance(out, Tensor) and not _on_device(out) for out in tree_leaves(result)):
            raise HostReadError(f"{func} brings a device's values to the host")
        return result


def _on_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, Tensor) and value.device.type == "cuda"


@contextmanager
def watched() -> Iterator[DeviceWatch]:
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(DeviceWatch())


def ids(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.ones((ROWS, POSITIONS), dtype=torch.int64, device=device)
    return torch.from_numpy(np.arange(ROWS * POSITIONS).reshape(ROWS, POSITIONS) % VOCABULARY)


DOCUMENTS: dict[str, Callable[[torch.device], dict[str, Tensor]]] = {
    "no documents": lambda _: {},
    "documents": lambda device: {"documents": ids(device)},
    "cu_seqlens": lambda device: {"cu_seqlens": torch.ones(5, dtype=torch.int32, device=device)},
    "position_ids": lambda device: {"position_ids": torch.ones((3, ROWS, POSITIONS), dtype=torch.int64, device=device)},
}


def batch_on(device: torch.device, **arguments: Any) -> AlignedBatch:
    arguments = {"attention_mask": ids(device), "pad_id": 0, "eos_id": 2, **arguments}
    return align(input_ids=ids(device), labels=ids(device), **arguments)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_alignment_tokens_and_answers(documents: str, shifted: bool, masked: bool) -> None:
    with watched() as watch:
        arguments = DOCUMENTS[documents](CUDA) | ({} if masked else {"attention_mask": None})
        batch = batch_on(CUDA, shifted=shifted, **arguments)
        assert not batch.on_host
        tokens = reduce_tokens(batch, VOCABULARY)
        answers = reduce_answers(batch)
    assert shapes(tokens) == {"token_counts": (3, VOCABULARY + 1), "token_totals": (3,)}
    assert tuple(answers.shape) == (3 + POSITIONS + 1,)
    assert all(_on_device(part) for part in (*tokens.values(), answers))
    assert watch.device_operations > 20


def shapes(parts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(part.shape) for name, part in parts.items()}


def logits(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros((ROWS, POSITIONS, VOCABULARY), dtype=dtype, device=CUDA)


def sources(name: str) -> dict[str, Any]:
    """Return what the losses are to come from; all of it on the device."""
    hidden = torch.zeros((ROWS, POSITIONS, FEATURES), dtype=torch.bfloat16, device=CUDA)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "logits": lambda: {"logits": logits()},
        "short logits": lambda: {"logits": logits(torch.float16).narrow(1, 0, POSITIONS - 1)},
        "flat logits": lambda: {"logits": logits(torch.float32).view(-1, VOCABULARY)},
        "token_losses": lambda: {"token_losses": torch.zeros((ROWS, POSITIONS), device=CUDA)},
        "short token_losses": lambda: {"token_losses": torch.zeros(ROWS * (POSITIONS - 1), device=CUDA)},
        "hidden and weight": lambda: {"hidden": hidden, "head": torch.zeros((VOCABULARY, FEATURES), device=CUDA)},
        "hidden and module": lambda: {"hidden": hidden, "head": head_module()},
        "nothing": dict,
    }
    return makers[name]()


def head_module() -> nn.Linear:
    head = nn.Linear(FEATURES, VOCABULARY, bias=False, device="meta")  # a fake device cannot draw initial weights
    head.weight = nn.Parameter(torch.zeros((VOCABULARY, FEATURES), device=CUDA))
    return head


SOURCES = (
    "logits", "short logits", "flat logits", "token_losses", "short token_losses", "hidden and weight",
    "hidden and module", "nothing",
)  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("labels_at", ["host", "device"])
@pytest.mark.parametrize("documents", ["no documents", "documents"])
def test_losses(source: str, labels_at: str, documents: str) -> None:
    device = CUDA if labels_at == "device" else torch.device("cpu")
    with watched() as watch:
        given = sources(source)
        batch = batch_on(device, **DOCUMENTS[documents](device))
        assert batch.on_host == (labels_at == "host")
        loss = torch.zeros((), device=CUDA)
        parts = reduce_loss(batch, **given, trainer_loss=loss, max_rows=16, seed=5)
    assert _on_device(parts["trainer_loss"])
    assert ("losses" in parts) == (source != "nothing")
    assert watch.device_operations > 0
    if source == "nothing":
        return
    labelled = ROWS * (POSITIONS - 1)
    rows = labelled if labels_at == "host" else 16
    if "hidden" in source:
        rows = 16
    elif "token_losses" in source and labels_at == "device":
        rows = ROWS * POSITIONS
    assert _on_device(parts["losses"])
    assert shapes(parts)["losses"] == shapes(parts)["roles"] == shapes(parts)["targets"] == (rows,)
    assert ("document_starts" in parts) == (documents == "documents")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("labels_at", ["host", "device"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("due", ["tokens loss", "tokens", "loss", ""])
def test_every_path_of_on_batch(source: str, labels_at: str, documents: str, due: str) -> None:
    """From the trainer's tensors to what is kept of them: the whole of what ``on_batch`` does with a micro-batch."""
    device = CUDA if labels_at == "device" else torch.device("cpu")
    config = HooksConfig(eos_id=2, pad_id=0, vocabulary_size=VOCABULARY)
    reducer = Reducer(config, read_vocabulary(None, config), num_ids=VOCABULARY, shifted=True)
    with watched():
        given: dict[str, Any] = {name: ids(device) for name in ("input_ids", "labels", "attention_mask")}
        given |= {**DOCUMENTS[documents](device), **sources(source), "loss": torch.zeros((), device=CUDA)}
        made = reducer.reduce(Batch(**given), frozenset(due.split()), 0, 0)
    assert (made.answers is not None) or (made.labels is not None)
    assert bool(made.tokens) == ("tokens" in due)
    assert ("losses" in made.losses) == ("loss" in due and source != "nothing")
    assert all(_on_device(made.losses[name]) for name in made.losses if name in ("losses", "trainer_loss"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients(dtype: torch.dtype, scaled: bool) -> None:
    with watched() as watch:
        tensors = [torch.zeros(size, dtype=dtype, device=CUDA) for size in ((), (0,), (5, 7), (3000,))]
        tensors += [
            torch.zeros((40, 30), device=CUDA).t(),
            torch.zeros((40, 30), dtype=torch.bfloat16, device=CUDA).narrow(1, 3, 27),
        ]
        gradients = [LocalGradient(index, index % 2, tensor) for index, tensor in enumerate(tensors)]
        parts = reduce_gradients(gradients, torch.ones((), device=CUDA) if scaled else None)
    assert shapes(parts)["sums"] == (6, 6)
    assert shapes(parts)["histograms"] == (2, 64)
    assert all(_on_device(parts[name]) for name in ("sums", "histograms", "scale"))
    assert parts["counts"].tolist() == [1, 0, 35, 3000, 1200, 1080]
    assert watch.device_operations > 20


def test_gradients_on_host_and_device_together() -> None:
    with watched():
        tensors = [torch.from_numpy(np.ones(5, np.float32)), torch.zeros(7, device=CUDA)]
        parts = reduce_gradients([LocalGradient(index, 0, tensor) for index, tensor in enumerate(tensors)])
    assert _on_device(parts["sums"])


def test_learning_rates() -> None:
    with watched():
        on_device = torch.ones((), device=CUDA)
        on_host = torch.from_numpy(np.array(0.5))
        parts = reduce_learning_rates([{"lr": 0.1}, {"lr": on_device}, {"lr": on_host}])
    assert _on_device(parts["rates"])
    assert shapes(parts) == {"rates": (3,)}


def test_settings_of_the_optimizers_groups() -> None:
    with watched():
        there, here = torch.ones((), device=CUDA), torch.from_numpy(np.array(0.5))
        optimizer = torch.optim.AdamW([torch.zeros(3, device=CUDA, requires_grad=True)])
        optimizer.param_groups[0].update(betas=(there, here), eps=there, weight_decay=here)
        found = group_settings(optimizer)
    assert [None if math.isnan(value) else value for value in found] == [None, 0.5, None, 0.5]


def test_whether_gradients_are_gone() -> None:
    with watched():
        model = head_module()
        lost = LostGradients(model, is_sharded=False)
        for _ in range(3):
            lost.micro_batch(0)
            lost.micro_batch(1)
            model.weight.grad = torch.zeros((VOCABULARY, FEATURES), device=CUDA)
            lost.before_update()
            assert lost.take() == 0
            model.weight.grad = None


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("labels_at", ["host", "device"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_steps_signals(source: str, labels_at: str, shifted: bool, masked: bool) -> None:
    """From a micro-batch to what a step stages, gradient norms, heartbeat, projector and images included."""
    device = CUDA if labels_at == "device" else torch.device("cpu")
    with watched() as watch:
        given: dict[str, Any] = {name: ids(device) for name in ("input_ids", "labels")}
        given |= {"attention_mask": ids(device)} if masked else {}
        given |= {**sources(source), "loss": torch.zeros((), device=CUDA)}
        batch = Batch(**given)
        aligned = batch_on(device, shifted=shifted) if labels_at == "device" else None
        reader = MicroSignalReader(eos_id=2, pad_id=0, ignore_index=-100)
        images = [[torch.zeros((3, 8, 8), device=CUDA)], [torch.zeros((2, 3, 8, 8), dtype=torch.bfloat16, device=CUDA)]]
        made = [reader.read(batch, aligned, shifted=shifted, max_rows=16, seed=seed, images=images) for seed in (1, 2)]
        norms = module_norms([(1, torch.zeros(9, device=CUDA))] * 2, 3, torch.ones((), device=CUDA))
        assert norms is not None
        optimizer = torch.optim.AdamW([torch.zeros(3, device=CUDA, requires_grad=True)])
        optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] = torch.zeros((), device=CUDA)
        steps = OptimizerSteps(optimizer).take()
        assert isinstance(steps, torch.Tensor)
        step = StepSignals(
            microbatches=made,
            projector=[projector_numbers(torch.zeros((4, 5, 6), dtype=torch.bfloat16, device=CUDA))],
            gradient_norm=whole_norm(norms),
            module_norms=norms,
            weight_norms=module_norms([(0, torch.zeros(9, device=CUDA))], 3),
            optimizer_steps=steps,
            heartbeat=Heartbeat(head_module()).take(),
        )
        tensors = step.tensors()
    assert _on_device(tensors["0/images"])
    assert shapes(tensors)["0/images"] == (3, 4)
    insides = ("projector/0", "gradient_norm", "module_norms", "weight_norms", "optimizer_steps", "heartbeat")
    assert all(_on_device(tensors[name]) for name in insides)
    assert ("mean_ids" in tensors) == ("logits" in source or "hidden" in source)
    if "mean_ids" in tensors:
        assert _on_device(tensors["0/numbers"])
        assert shapes(tensors)["0/numbers"] == (4, 16 if labels_at == "device" else shapes(tensors)["0/numbers"][1])
    assert watch.device_operations > 20


class Predicting(nn.Module):
    """Logits of the shape of the ids, on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.head = head_module()

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, pixel_values: Tensor | list[Any]
    ) -> Tensor:
        assert labels.shape == input_ids.shape == attention_mask.shape
        assert len(pixel_values) == ROWS
        made: Tensor = self.head(torch.zeros((ROWS, POSITIONS, FEATURES), device=CUDA))
        return made


@pytest.mark.parametrize("labels_at", ["host", "device"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("images", ["together", "alone", "tiled", "by rows"])
def test_the_probe_of_the_wiring(labels_at: str, shifted: bool, images: str) -> None:
    with watched() as watch:
        labels = ids(CUDA if labels_at == "device" else torch.device("cpu"))
        tiles = [torch.zeros((1 + (place if images == "tiled" else 0), 3, 4, 4), device=CUDA) for place in range(ROWS)]
        given = {
            "input_ids": ids(CUDA),
            "labels": labels,
            "attention_mask": ids(CUDA),
            "pixel_values": {"together": torch.cat(tiles), "by rows": [[tile, tile] for tile in tiles]}.get(
                images, tiles
            ),
        }
        model = Predicting()
        probe = WiringProbe(model, ForwardReader(model, VOCABULARY), 1, image_token_id=3)
        for step, thorough in ((10, {}), (11, {"noise": ()})):
            probe.see(given)
            probe.keep(Batch(labels=labels), lambda batch: align(input_ids=None, labels=batch.labels, shifted=shifted))
            made = probe.run(step)
            assert made is not None
            tensors, finish = made
            assert shapes(tensors) == {"changes": (6,), "rows": (6,), **thorough}
            assert all(_on_device(tensor) for tensor in tensors.values())
            finish({name: np.ones(shape) for name, shape in shapes(tensors).items()})
    assert watch.device_operations > 200


@pytest.mark.parametrize("grids_at", ["host", "device"])
def test_images_of_patches_that_follow_each_other(grids_at: str) -> None:
    with watched() as watch:
        grids = torch.full((ROWS, 3), 2, dtype=torch.int64, device=CUDA if grids_at == "device" else "cpu")
        given = {
            "input_ids": ids(CUDA),
            "pixel_values": torch.zeros((8 * ROWS, FEATURES), dtype=torch.bfloat16, device=CUDA),
            "image_grid_thw": grids,
        }
        images = images_of(given)
        made = MicroSignalReader(eos_id=2, pad_id=0, ignore_index=-100).read(
            Batch(labels=ids(CUDA)), batch_on(CUDA, shifted=False), shifted=False, max_rows=9, seed=1, images=images
        )
        both = rolled(given), rolled_rows(given, ROWS)
    assert shapes(made.tensors)["images"] == (ROWS, 4)
    for moved in both:
        assert moved is not None
        assert moved[0]["pixel_values"].shape == given["pixel_values"].shape
        assert _on_device(moved[1])
    assert watch.device_operations > 50


@pytest.mark.parametrize("kind", ["image_sizes", "aspect_ratio_ids", ""])
def test_images_in_the_place_of_others(kind: str) -> None:
    with watched() as watch:
        images = torch.zeros((ROWS, 2, 3, 4, 4), device=CUDA)
        told = {kind: torch.ones((ROWS, 2), dtype=torch.int64, device=CUDA)} if kind else {}
        mask = torch.ones((ROWS, 2, 4, 4), device=CUDA)
        given = {"input_ids": ids(CUDA), "pixel_values": images, "pixel_attention_mask": mask, **told}
        both = rolled(given), rolled_rows(given, ROWS)
    for moved in both:
        assert moved is not None
        assert _on_device(moved[1])
        assert moved[0]["pixel_values"].shape == images.shape
        assert ("pixel_attention_mask" in moved[0]) == (not kind)
    assert watch.device_operations > 20


def test_ids_on_the_host_are_not_compared_with_labels_on_a_device() -> None:
    with watched():
        assert find_answers(ids(torch.device("cpu")), align(input_ids=None, labels=ids(CUDA))) is None


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "boolean index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "unique": torch.unique,
    "bincount": lambda x: x.flatten().bincount(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "copy_": lambda x: torch.zeros(x.shape, dtype=x.dtype).copy_(x),
    "numpy": lambda x: x.numpy(force=True),
}


@pytest.mark.parametrize("read", READS)
def test_the_proof_sees_every_way_to_read(read: str) -> None:
    with watched():
        values = ids(CUDA)
        assert isinstance(values, FakeTensor)
        # Fake tensors refuse with errors of their own, and a build without CUDA some calls even earlier.
        with pytest.raises((HostReadError, RuntimeError)) as caught:
            READS[read](values)
    if read in {"cpu", "to"}:
        assert caught.type is HostReadError
