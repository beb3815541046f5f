from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sidestep.protocol.faults import Faults
from sidestep.protocol.messages import Losses
from sidestep.protocol.tables import decode_table
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.faults import FINISH
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.logged import logged_values
from sidestep.trainer_hooks.plain import plain, plain_map
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.topology import Topology
from sidestep.trainer_hooks.transport import InProcessTransport
from sidestep.trainer_hooks.vocabulary import read_vocabulary


class Tokenizer:
    eos_token_id = 2
    pad_token_id = 3

    def __len__(self) -> int:
        return 9

    def decode(self, ids: list[int]) -> str:
        if ids == [8]:
            raise IndexError(8)
        return f"t{ids[0]}"


SAMPLE = Sample(question="q", target="t", prompt_ids=[1])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 9, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: Any = None) -> Any:
        logits = self.lm_head(torch.ones(*input_ids.shape, 4))
        loss = (
            None
            if labels is None
            else nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": 3}, TypeError, "torch.nn.Module"),
        ({"optimizer": object()}, TypeError, "torch.optim.Optimizer"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, ValueError, "none of the model's parameters"),
        ({"config": {"lr_interval": 3}}, TypeError, "from_train_config"),
        ({"step": -1}, ValueError, "at least 0"),
        ({"step": 1.5}, TypeError, "optimizer step"),
        ({"project": 3}, TypeError, "project must be text"),
        ({"tags": "abc"}, TypeError, "tags"),
        ({"samples": [SAMPLE]}, ValueError, "tokenizer"),
        ({"samples": [], "tokenizer": Tokenizer()}, ValueError, "samples is empty"),
        ({"samples": ["q"], "tokenizer": Tokenizer()}, TypeError, "samples_from_dataset"),
        ({"generate_fn": print}, ValueError, "samples"),
        ({"generate_fn": 3, "samples": [SAMPLE], "tokenizer": Tokenizer()}, TypeError, "callable"),
        ({"scaler": 3}, TypeError, "GradScaler"),
        ({"modules": {"a": 3}}, TypeError, "modules"),
        ({"run_config": 3}, ValueError, "run_config"),
        ({"tokenizer": object()}, ValueError, "tokenizer"),
        ({"endpoint": "nonsense", "transport": None}, ValueError, "ipc://"),
    ],
)
def test_mistakes_raise_at_attach_and_leave_no_hook(change: dict[str, Any], error: type[Exception], match: str) -> None:
    model = Model()
    arguments = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters()),
        "transport": InProcessTransport,
        **change,
    }
    with pytest.raises(error, match=match):
        attach(arguments.pop("model"), arguments.pop("optimizer"), **arguments)
    assert not model._forward_hooks


def test_a_bare_model_among_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = Model()
    with pytest.raises(ValueError, match="wrap it first"):
        attach(model, torch.optim.SGD(model.parameters()), transport=InProcessTransport)


def test_an_empty_optimizer_is_refused() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match="has no parameters"):
        attach(model, optimizer, transport=InProcessTransport)


def test_a_wrapped_optimizer_is_unwrapped_and_attach_is_quick() -> None:
    model = Model()
    inner = torch.optim.SGD(model.parameters())
    began = time.monotonic()
    hooks = attach(model, SimpleNamespace(optimizer=inner), tokenizer=Tokenizer(), transport=InProcessTransport)
    assert time.monotonic() - began < 2.0  # the promise of docs/delivery.md, section 10
    assert inner._optimizer_step_pre_hooks
    hooks.close()
    assert not inner._optimizer_step_pre_hooks


def test_model_outputs_with_unshifted_labels_are_seen_by_attach_alone() -> None:
    model = Model().train()
    opened: list[InProcessTransport] = []

    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    config = HooksConfig(loss_breakdown_interval=1, token_stats_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([[1, 4, 5, 2]])
    labels = torch.tensor([[-100, -100, 5, 2]])
    with attach(model, optimizer, tokenizer=Tokenizer(), config=config, transport=way) as hooks:
        out = model(input_ids=ids, labels=labels)
        out.loss.backward()
        optimizer.step()
        model(input_ids=ids, labels=labels)
    assert hooks.failures() == {}
    [losses] = [m for m in opened[0].messages if isinstance(m, Losses)]
    assert losses.target_ids.tolist() == [5, 2]
    assert losses.losses.mean() == pytest.approx(out.loss.item(), rel=1e-5)
    assert losses.trainer_loss.tolist() == [pytest.approx(out.loss.item())]
    assert opened[0].hello.capabilities["labels"].startswith("not shifted, by the forward's argument 'labels'")
    assert opened[0].hello.capabilities["generation"].startswith("absent")


def test_a_message_that_fails_away_from_the_training_thread_is_among_the_failures() -> None:
    model, ids = Model().train(), torch.tensor([[1, 4, 5, 2]])
    opened: list[InProcessTransport] = []

    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    faults = Faults().fail_at(FINISH, step=1)
    with attach(model, optimizer, tokenizer=Tokenizer(), transport=way, faults=faults) as hooks:
        for step, expected in ((0, {}), (1, {"finish": 1})):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            hooks.after_step(step)
            assert opened[0].messages
            assert hooks.failures() == expected
    assert hooks.failures() == {"finish": 1}


def test_the_run_id_is_the_callers_then_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDESTEP_RUN_ID", "from-environment")
    for told, expected in ((None, "from-environment"), ("told", "told")):
        model = Model()
        hooks = attach(model, torch.optim.SGD(model.parameters()), run_id=told, transport=InProcessTransport)
        hooks.load_state_dict({"run_id": "from-state", "step": 4, "epoch": 1})
        assert hooks.state_dict() == {"run_id": expected, "step": 4, "epoch": 1}
        hooks.close()


@pytest.mark.parametrize(
    ("told", "chosen", "expected"),
    [
        ({"image_token_id": 6}, None, 6),
        ({"image_token_index": 7}, None, 7),
        ({"image_token_id": 6}, 5, 5),
        ({"image_token_id": None}, None, None),
        ({"image_token_id": -1}, None, None),
        ({"image_token_id": True}, None, None),
        ({}, None, None),
    ],
)
def test_the_models_configuration_tells_where_images_are_put(
    told: dict[str, Any], chosen: int | None, expected: int | None
) -> None:
    model = Model()
    model.config = SimpleNamespace(**told)  # type: ignore[assignment]
    opened: list[InProcessTransport] = []

    def way(*arguments: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*arguments))
        return opened[-1]

    attach(model, torch.optim.SGD(model.parameters()), config=HooksConfig(image_token_id=chosen), transport=way).close()
    [transport] = opened
    table = decode_table(transport.blobs[transport.hello.tables["tokenizer"]])
    assert isinstance(table, dict)
    assert table["image_token_id"] == expected


def test_a_tokenizer_that_only_decodes_travels_as_texts() -> None:
    vocabulary = read_vocabulary(Tokenizer(), HooksConfig(image_token_id=5))
    table = vocabulary.as_table()
    assert table["kind"] == "texts"
    assert table["texts"][7] == "t7"
    assert table["texts"][8] == "<8>"
    assert (table["eos_id"], table["pad_id"], table["image_token_id"], table["vocabulary_size"]) == (2, 3, 5, 9)


def test_a_tokenizers_tokenizer_travels_as_its_json() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))  # noqa: S106
    made.add_special_tokens(["<|im_end|>", "<image>"])
    vocabulary = read_vocabulary(made, HooksConfig())
    assert (vocabulary.eos_id, vocabulary.image_token_id, vocabulary.size, vocabulary.special_ids) == (2, 3, 4, (2, 3))
    assert vocabulary.content == made.to_str().encode()
    assert read_vocabulary(SimpleNamespace(backend_tokenizer=made), HooksConfig(eos_id=0)).eos_id == 0


class Colour(Enum):
    RED = "red"


@dataclass
class Settings:
    path: Path
    colour: Colour
    hf_token: str
    nested: dict[str, Any]


def test_a_configuration_becomes_plain_and_secrets_are_masked() -> None:
    settings = Settings(Path("a/b"), Colour.RED, "hf_x", {"dtype": torch.float16, "sizes": (1, 2), "api_key": ""})
    assert plain_map(settings) == {
        "path": "a/b",
        "colour": "red",
        "hf_token": "***",
        "nested": {"dtype": "torch.float16", "sizes": [1, 2], "api_key": ""},
    }
    assert plain_map(argparse.Namespace(lr=0.1, n=np.int64(3)))["lr"] == 0.1
    assert plain(1 << 70) == str(1 << 70)
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(40):
        inner["x"] = {}
        inner = inner["x"]
    assert isinstance(plain(deep), dict)


def test_what_is_logged_is_sorted_into_plain_values_and_the_rest_is_named() -> None:
    made, left_out = logged_values(
        {"a": 1, "b": True, "c": "x", "d": torch.tensor(2.5), "e": np.float32(0.5), "f": {"g": [1]}, "h": float("nan")},
        7,
        "k",
    )
    assert {name: value for name, value in made.values.items() if name != "h"} == {
        "a": 1, "b": True, "c": "x", "d": 2.5, "e": 0.5,
    }  # fmt: skip
    assert np.isnan(made.values["h"])
    assert (made.step_key, made.key_step, left_out) == ("k", 7, ["f.g"])


def test_the_topology_travels_as_plain_values() -> None:
    table = Topology(rank=1, world_size=2, local_rank=1, wrapper="ddp", compiled=False, sharded=False).as_table()
    assert (table["data_parallel_rank"], table["data_parallel_size"], table["wrapper"]) == (1, 2, "ddp")
