"""No path of a batch reads the device: fake CUDA tensors raise on item, nonzero, unique, tolist and the like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sidestep.trainer_hooks.capture import Batch
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.reducing import Reducer
from sidestep.trainer_hooks.vocabulary import read_vocabulary

B, T, V, D = 2, 7, 11, 5
EVERYTHING = frozenset({"tokens", "loss"})


class NoCopyToTheHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a fake tensor lets pass: a copy from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        came_from = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        tensors = out if isinstance(out, tuple | list) else (out,)
        went_to = {each.device.type for each in tensors if isinstance(each, torch.Tensor)}
        assert not ("cuda" in came_from and went_to == {"cpu"}), f"{func} copies to the host"
        return out


def batch_of(what: str, *, mask: bool) -> Batch:
    ids = torch.ones(B, T, dtype=torch.long, device="cuda")
    given: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "attention_mask": ids.clone() if mask else None}
    if what == "logits":
        given["logits"] = torch.zeros(B, T, V, device="cuda", dtype=torch.bfloat16)
    elif what == "token_losses":
        given["token_losses"] = torch.zeros(B, T, device="cuda")
    elif what == "hidden":
        given |= {"hidden": torch.zeros(B, T, D, device="cuda"), "head": torch.zeros(V, D, device="cuda")}
    return Batch(**given, loss=torch.zeros((), device="cuda"))


@pytest.mark.parametrize("what", ["logits", "token_losses", "hidden", "nothing"])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("due", [EVERYTHING, frozenset[str]()])
def test_no_path_of_a_device_batch_reads_it(what: str, shifted: bool, mask: bool, due: frozenset[str]) -> None:
    config = HooksConfig(eos_id=1, pad_id=2, vocabulary_size=V, shifted=shifted)
    reducer = Reducer(config, read_vocabulary(None, config), num_ids=V, shifted=None)
    with FakeTensorMode(), NoCopyToTheHost(), torch.no_grad():  # type: ignore[no-untyped-call]
        made = reducer.reduce(batch_of(what, mask=mask), due, 0, 0)
    assert made.answers is not None
    assert bool(made.tokens) == bool(due)
    assert ("losses" in made.losses) == (bool(due) and what != "nothing")
    assert all(tensor.device.type == "cuda" for tensor in (*made.tokens.values(), *made.losses.values()))
