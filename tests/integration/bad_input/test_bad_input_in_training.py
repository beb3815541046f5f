"""Rows of docs/bad_input.md that show while it trains, beside a real worker: warned once, and the training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from tests.support.worker_process import wait_until
from torch import nn

from sidestep.trainer_hooks.samples import Sample

MakeTraining = Callable[..., Any]
IGNORED = -100


def ignored(ids: torch.Tensor) -> torch.Tensor:
    return torch.full_like(ids, IGNORED)


def without(ids: torch.Tensor) -> None:
    return None


def longer(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat((ids, ids), dim=1)


def test_no_labels(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training()
    training.attach(endpoint=served.address)
    training.run(5, without)
    told.once("no labels")
    wait_until(lambda: len(served.rows(training.hooks)) == 5, "the rows")
    assert all("loss/total" not in row and "tokens/total_tokens" in row for row in served.rows(training.hooks))


def test_all_labels_ignored(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training()
    training.attach(endpoint=served.address)
    training.run(4, ignored)
    told.once("all labels ignored")
    training.run(1)
    wait_until(lambda: len(served.rows(training.hooks)) == 5, "the rows")
    rows = served.rows(training.hooks)
    assert all("loss/total" not in row and "loss/trainer" in row for row in rows[:4])
    assert rows[4]["loss/total"] > 0
    assert training.hooks.failures() == {}


def test_labels_of_another_shape_in_on_batch(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training()
    training.attach(endpoint=served.address)
    training.run(3, longer)
    told.once("labels of another shape, passed")
    told.once("no labels")
    assert "no training batch was seen" not in told.text()
    assert training.hooks.failures() == {"on_batch": 3}


def test_labels_of_another_shape_in_the_forward(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training(forgotten={"on_batch"})
    training.attach(endpoint=served.address)
    training.run(3, longer)
    told.once("labels of another shape, seen")
    assert training.hooks.failures() == {}


def test_nan_everywhere(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training()
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(float("nan"))
    training.attach(endpoint=served.address)
    training.run(3)
    told.once("NaN everywhere")
    wait_until(lambda: len(served.rows(training.hooks)) == 3, "the rows")
    row = served.rows(training.hooks)[0]
    assert row["loss/nonfinite_tokens"] == 14
    assert row["loss/trainer_nonfinite"] == 1
    assert row["gradients/global/nonfinite"] > 0
    assert not {"loss/total", "loss/trainer"} & row.keys()
    assert row["lr/0"] == 0.1, "one group of several modules goes by its number"


def test_empty_generations(make_training: MakeTraining, served: Any, told: Any, tokenizer: Any) -> None:
    training = make_training()
    samples = [Sample(question="q", target="t", prompt_ids=[5]) for _ in range(3)]
    training.attach(
        endpoint=served.address,
        samples=samples,
        tokenizer=tokenizer,
        settings={"collapse_deadline": 1},
        generate_fn=lambda _model, asked, _limit: [[] for _ in asked],
    )
    training.run(3)
    told.once("empty generations")
    wait_until(lambda: len(served.rows(training.hooks)) == 3, "the rows")
    row = served.rows(training.hooks)[1]
    assert row["generation/empty_ratio"] == 1
    assert row["generation/avg_length"] == 0
    assert row["collapse/is_collapsed"] == 1


def test_unnamed_and_added_groups(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training()
    model = training.model
    model.extra = nn.Linear(2, 2)
    training.optimizer = torch.optim.SGD([{"params": list(model.body.parameters())}], lr=0.1)
    training.attach(endpoint=served.address)
    before = told.text()
    training.run(1)
    training.optimizer.add_param_group({"params": list(model.lm_head.parameters()), "lr": 0.2})
    training.run(2)
    wait_until(lambda: len(served.rows(training.hooks)) == 3, "the rows")
    rates = [{key: row[key] for key in row if key.startswith("lr/")} for row in served.rows(training.hooks)]
    assert rates == [{"lr/body": 0.1}, *[{"lr/body": 0.1, "lr/1": 0.2}] * 2]
    assert told.text() == before, "nothing is said"


def test_a_model_without_gradients(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training()
    training.model.requires_grad_(requires_grad=False)
    training.attach(endpoint=served.address)
    training.run(4)
    told.once("no gradients")
    wait_until(lambda: len(served.rows(training.hooks)) == 4, "the rows")
    assert not any(key.startswith("gradients/") for row in served.rows(training.hooks) for key in row)


def test_frozen_then_unfrozen(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training()
    training.model.body.requires_grad_(requires_grad=False)
    training.attach(endpoint=served.address)
    before = told.text()
    training.run(2)
    training.model.body.requires_grad_(requires_grad=True)
    training.run(2)
    training.model.lm_head.requires_grad_(requires_grad=False)
    training.run(1)
    wait_until(lambda: len(served.rows(training.hooks)) == 5, "the rows")
    seen = [
        {name for name in ("body", "lm_head") if f"gradients/{name}/norm" in row} for row in served.rows(training.hooks)
    ]
    assert seen == [{"lm_head"}, {"lm_head"}, {"body", "lm_head"}, {"body", "lm_head"}, {"body"}]
    assert told.text() == before, "nothing is said"


@pytest.mark.parametrize(
    ("forgotten", "row"), [("before_clip", "before_clip never comes"), ("after_step", "after_step never comes")]
)
def test_a_call_that_never_comes(make_training: MakeTraining, served: Any, told: Any, forgotten: str, row: str) -> None:
    training = make_training(forgotten={forgotten})
    training.attach(endpoint=served.address)
    training.run(5)
    training.hooks.close()
    told.once(row)
    wait_until(lambda: len(served.rows(training.hooks)) == 5, "the rows")


def test_no_batch_is_seen(make_training: MakeTraining, served: Any, told: Any) -> None:
    training = make_training(forgotten={"on_batch"})
    training.attach(endpoint=served.address)
    training.model = training.model.forward  # past the hooks of the module
    training.run(4)
    told.once("no batch is seen")


def test_a_live_wandb_run(make_training: MakeTraining, served: Any, told: Any, tmp_path: Path) -> None:
    training = make_training()
    training.attach(endpoint=served.address)
    run = wandb.init(mode="offline", dir=tmp_path, project="mine")
    try:
        training.run(3)
        told.once("a live wandb.run")
    finally:
        run.finish()
        wandb.teardown()  # its core and the variable that names it do not outlive this test
    wait_until(lambda: [kind for kind, _ in served.entries(training.hooks)].count("notice") == 1, "it, in the run")
