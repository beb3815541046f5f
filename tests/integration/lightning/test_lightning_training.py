"""Lightning's own ``Trainer`` with the callback: messages as by explicit calls, weights as without it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning", reason="lightning is not installed")

import lightning.pytorch as pl
import torch
from tests.integration.lightning import tiny_training as tiny
from tests.support import reference

import sidestep
from sidestep.protocol.messages import Command, Gradients, Losses, Scalars, StepEnd, Tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning"),
]


class Module(pl.LightningModule):  # type: ignore[misc]  # its types are not read
    """As users write it: a network in it, its loss returned and logged."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = tiny.network(dropout)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, loss = self.network(**batch)
        self.log("train_loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.network(**batch)[1])

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = tiny.optimizer_of(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OwnLoss(Module):
    """The network gives logits; labels and loss are the module's, which takes the labels out of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = batch.pop("labels")
        logits, _ = self.network(**batch)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, tiny.V), labels[:, 1:].reshape(-1))
        self.losses.append(float(loss.detach()))
        return {"loss": loss}


class Whole(Module):
    """The module's own forward, which training_step calls."""

    def forward(self, **batch: Any) -> Any:
        return self.network(**batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(**batch)[1]
        self.losses.append(float(loss.detach()))
        return loss


class ByHand(Module):
    """Backward and step are the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.network(**batch)[1]
        self.losses.append(float(loss.detach()))
        self.manual_backward(loss / tiny.ACCUMULATION)
        if batch_idx % tiny.ACCUMULATION == tiny.ACCUMULATION - 1:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=tiny.MAX_NORM, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


@pytest.fixture(autouse=True)
def quiet_library() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def ways() -> tiny.Ways:
    return tiny.Ways()


def trainer(folder: Path, *callbacks: Any, library: Any = pl, **more: Any) -> Any:
    given: dict[str, Any] = {
        "max_steps": tiny.NUM_STEPS,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "accumulate_grad_batches": tiny.ACCUMULATION,
        "gradient_clip_val": tiny.MAX_NORM,
        "val_check_interval": 5,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return library.Trainer(callbacks=list(callbacks), **(given | more))


def fit(made: Any, module: Any, **more: Any) -> None:
    torch.manual_seed(0)
    made.fit(module, tiny.loader(), tiny.loader(8, seed=3), **more)


def callback_to(ways: tiny.Ways, **more: Any) -> sidestep.LightningCallback:
    return sidestep.LightningCallback(transport=ways, **(tiny.to_attach() | more))


@pytest.fixture(scope="module")
def explicit() -> tuple[tiny.Ways, tiny.Network, list[Any]]:
    ways = tiny.Ways()
    model, raw = tiny.plain_loop(ways)
    return ways, model, raw


def test_weights_and_losses_are_those_without_the_callback(tmp_path: Path, ways: tiny.Ways) -> None:
    alone, watched = Module(dropout=0.1), Module(dropout=0.1)
    fit(trainer(tmp_path), alone)
    callback = callback_to(ways)
    made = trainer(tmp_path, callback)
    fit(made, watched)
    callback.close()
    assert callback.failures() == {}
    assert watched.losses == alone.losses
    assert tiny.same_weights(watched, alone)
    assert "training_step" not in vars(made.strategy)
    assert len(ways.of(StepEnd)) == tiny.NUM_STEPS


def test_every_family_is_as_by_explicit_calls(
    tmp_path: Path, ways: tiny.Ways, explicit: tuple[tiny.Ways, tiny.Network, list[Any]]
) -> None:
    watched, callback = Module(), callback_to(ways)
    fit(trainer(tmp_path, callback), watched)
    callback.close()
    assert callback.failures() == {}
    other, model, raw = explicit
    assert tiny.same_weights(watched.network, model)
    ends = ways.of(StepEnd)
    assert [(end.step, end.epoch, end.applied) for end in ends] == [
        (step, (step - 1) // (tiny.NUM_STEPS // 2), True) for step in range(1, tiny.NUM_STEPS + 1)
    ]
    assert [end.sent for end in ends] == [end.sent for end in other.of(StepEnd)]
    assert tiny.differences(ways, other) == []
    assert [message.clipped for message in ways.of(Gradients)] == [False] * (tiny.NUM_STEPS // tiny.GRADIENT_INTERVAL)
    assert ways.opened[0].hello.run_config["dropout"] == 0.0
    assert ways.opened[0].hello.start_step == 1
    against_the_reference(ways, raw)


def against_the_reference(ways: tiny.Ways, raw: list[Any]) -> None:
    for message in ways.of(Losses):
        ids, labels, mask, logits, loss = raw[(message.step - 1) * tiny.ACCUMULATION + message.microstep]
        batch = reference.RawBatch(input_ids=ids, labels=labels, mask=mask, logits=logits, loss=loss, shifted=False)
        answers = reference.answers_of(batch, tiny.EOS)
        np.testing.assert_allclose(message.losses, [loss for a in answers for loss in a.losses], rtol=1e-5, atol=1e-6)
        assert message.trainer_loss[0] == np.float32(loss)


@pytest.mark.parametrize("kind", [OwnLoss, Whole, ByHand])
def test_other_ways_to_write_the_module_show_the_same(
    tmp_path: Path, ways: tiny.Ways, explicit: tuple[tiny.Ways, tiny.Network, list[Any]], kind: Any
) -> None:
    module, callback = kind(), callback_to(ways)
    by_hand: dict[str, Any] = {}
    if kind is ByHand:  # a validation between two micro-batches would clear its gradients: Lightning's own doing
        by_hand = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "val_check_interval": 6}
    fit(trainer(tmp_path, callback, **by_hand), module)
    callback.close()
    assert callback.failures() == {}
    assert "clip_gradients" not in vars(module)
    assert tiny.same_weights(module.network, explicit[1])
    assert tiny.differences(ways, explicit[0]) == []


def test_gradients_that_a_module_may_have_clipped_are_said_to_be(tmp_path: Path, ways: tiny.Ways) -> None:
    class Clipping(ByHand):
        def clip_gradients(self, *args: Any, gradient_clip_val: Any = None, **kwargs: Any) -> None:
            raise AssertionError("not called")

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.network(**batch)[1])
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1e-3)
            optimizer.step()

    callback = callback_to(ways)
    fit(trainer(tmp_path, callback, accumulate_grad_batches=1, gradient_clip_val=None), Clipping())
    callback.close()
    assert callback.failures() == {}
    messages = ways.of(Gradients)
    assert [message.clipped for message in messages] == [True] * (tiny.NUM_STEPS // tiny.GRADIENT_INTERVAL)
    scales = [4.0 ** message.exponents.astype(np.float64) for message in messages]
    squares = [scale * (m.m2 + m.counts * m.means**2) for scale, m in zip(scales, messages, strict=True)]
    np.testing.assert_allclose([float(square.sum()) ** 0.5 for square in squares], 1e-3, rtol=1e-2)


def test_what_the_module_logs_is_in_the_run(tmp_path: Path, ways: tiny.Ways) -> None:
    callback = callback_to(ways)
    module = Module()
    made = trainer(tmp_path, callback)
    fit(made, module)
    made.validate(module, tiny.loader(8, seed=3), verbose=False)
    callback.close()
    assert callback.failures() == {}
    logged = [dict(message.values) for message in ways.of(Scalars)]
    train = [(values["trainer/global_step"], values["train_loss"]) for values in logged if "train_loss" in values]
    steps = range(4, tiny.NUM_STEPS + 1, 4)
    assert [step for step, _ in train] == list(steps)
    np.testing.assert_allclose([loss for _, loss in train], [module.losses[2 * step - 1] for step in steps], rtol=1e-6)
    validated = [(v["trainer/global_step"], v["val_loss"], v["epoch"]) for v in logged if "val_loss" in v]
    assert [step for step, _, _ in validated] == [2, 5, 7, 10, 14, 17, 19, 22, 24]
    assert [epoch for _, _, epoch in validated] == [0] * 4 + [1] * 4 + [validated[-1][2]]
    torch.manual_seed(0)
    np.testing.assert_allclose(validated[-1][1], tiny.evaluate(module.network), rtol=1e-6)


def test_a_checkpoint_leads_back_to_its_run(tmp_path: Path, ways: tiny.Ways) -> None:
    callback = callback_to(ways)
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    fit(trainer(tmp_path, callback, saving, enable_checkpointing=True, max_steps=20), Module())
    callback.close()
    again = callback_to(ways)
    fit(trainer(tmp_path, again), Module(), ckpt_path=str(tmp_path / "step=10.ckpt"))
    again.close()
    assert again.failures() == {}
    assert len(ways.opened) == 2
    assert ways.opened[1].identity.run_id == ways.opened[0].identity.run_id
    assert ways.opened[1].hello.start_step == 11
    assert [end.step for end in ways.of(StepEnd)] == list(range(11, tiny.NUM_STEPS + 1))
    other = callback_to(ways, run_id="mine")
    fit(trainer(tmp_path, other, max_steps=12), Module(), ckpt_path=str(tmp_path / "step=10.ckpt"))
    other.close()
    assert ways.opened[-1].identity.run_id == "mine"


def test_an_exception_ends_the_run_under_its_name(tmp_path: Path, ways: tiny.Ways) -> None:
    class Breaking(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 6:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    callback = callback_to(ways)
    made = trainer(tmp_path, callback)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(made, Breaking())
    assert ways.opened[0].closed == "RuntimeError"
    assert [end.step for end in ways.of(StepEnd)] == [1, 2, 3]
    assert "training_step" not in vars(made.strategy)
    fit(trainer(tmp_path, callback, max_steps=2), Module())
    callback.close()
    assert ways.opened[1].identity.run_id == ways.opened[0].identity.run_id
    assert callback.failures() == {}


def test_a_skipped_batch_and_a_batch_without_names(tmp_path: Path, ways: tiny.Ways) -> None:
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    def read_batch(batch: Any) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    every = tiny.hooks_config(token_stats_interval=1, loss_breakdown_interval=1)
    callback = callback_to(ways, read_batch=read_batch, config=every)
    fit(trainer(tmp_path, callback, max_steps=3), Skipping())
    callback.close()
    assert callback.failures() == {}
    assert [(message.step, message.microstep) for message in ways.of(Tokens)][-2:] == [(3, 0), (3, 1)]


def test_bfloat16_is_seen_as_by_explicit_calls(tmp_path: Path, ways: tiny.Ways) -> None:
    other = tiny.Ways()
    model, _ = tiny.plain_loop(other, dtype=torch.bfloat16)
    module, callback = Module(), callback_to(ways)
    fit(trainer(tmp_path, callback, precision="bf16-mixed"), module)
    callback.close()
    assert callback.failures() == {}
    assert tiny.same_weights(module.network, model)
    assert tiny.differences(ways, other) == []


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_float16_with_a_scaler_is_seen_as_by_explicit_calls(tmp_path: Path, ways: tiny.Ways) -> None:
    """Lightning takes bfloat16 for float16 on a CPU, unless it is given the precision with its scaler."""
    other = tiny.Ways()
    model, _ = tiny.plain_loop(other, dtype=torch.float16, scaler=tiny.scaler())
    precision = importlib.import_module("lightning.pytorch.plugins").MixedPrecision
    module, callback = Module(), callback_to(ways)
    fit(trainer(tmp_path, callback, plugins=[precision("16-mixed", "cpu", scaler=tiny.scaler())]), module)
    callback.close()
    assert callback.failures() == {}
    assert tiny.same_weights(module.network, model)
    applied = [end.applied for end in ways.of(StepEnd)]
    assert {True, False} == set(applied), "some steps overflow, some do not"
    assert applied == [end.applied for end in other.of(StepEnd)]
    assert {message.scale for message in ways.of(Gradients)} == {1.0}
    assert tiny.differences(ways, other) == []


@pytest.mark.parametrize("obeys", [(), ("stop",)])
def test_what_the_worker_asks_for_is_done_only_where_the_user_said_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], obeys: tuple[str, ...]
) -> None:
    class Asking(tiny.Ways):
        def __call__(self, *arguments: Any) -> Any:
            opened = super().__call__(*arguments)
            opened.commands.append(Command(action="stop", reason="collapse", at_step=2))
            return opened

    callback = callback_to(Asking(), obeys=obeys)
    made = trainer(tmp_path, callback, max_steps=5)
    fit(made, Module())
    callback.close()
    assert callback.failures() == {}
    assert made.global_step == (2 if obeys else 5)
    said = capfd.readouterr().err
    assert ("done as the worker asks: stop (collapse)." in said) == bool(obeys)
    assert ('This callback does not do it; obeys=("stop",) would.' in said) == (not obeys)
    with pytest.raises(ValueError, match="LightningCallback can: stop"):
        callback_to(tiny.Ways(), obeys=("checkpoint",))


def test_a_logger_of_wandbs_is_told_so_once(
    tmp_path: Path, ways: tiny.Ways, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = importlib.import_module("lightning.pytorch.loggers").WandbLogger(save_dir=str(tmp_path))
    callback = callback_to(ways)
    try:
        fit(trainer(tmp_path, callback, max_steps=4, logger=logger), Module())
    finally:
        wandb.finish()
    callback.close()
    assert callback.failures() == {}
    said = capfd.readouterr().err
    assert said.count("a WandbLogger opens a W&B run, and the worker opens one too") == 1
    assert said.count("there will be two") == 1, said


@pytest.mark.skipif(
    tuple(map(int, pl.__version__.split(".")[:2])) < (2, 6), reason="older ones refuse callbacks of the other name"
)
def test_the_other_name_of_the_library_takes_the_callback_too(
    tmp_path: Path, ways: tiny.Ways, explicit: tuple[tiny.Ways, tiny.Network, list[Any]]
) -> None:
    library: Any = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Other(library.LightningModule):  # type: ignore[misc]  # its types are not read
        training_step = Module.training_step
        validation_step = Module.validation_step
        configure_optimizers = Module.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.network = tiny.network()
            self.losses: list[float] = []

    assert importlib.import_module("lightning.pytorch").Trainer is not library.Trainer
    callback = callback_to(ways)
    module = Other()
    fit(trainer(tmp_path, callback, library=library), module)
    callback.close()
    assert callback.failures() == {}
    assert tiny.differences(ways, explicit[0]) == []


def test_switched_off_it_leaves_everything_alone(tmp_path: Path, ways: tiny.Ways) -> None:
    callback = callback_to(ways, config=sidestep.HooksConfig(log_wandb=False))
    fit(trainer(tmp_path, callback, max_steps=2), Module())
    callback.close()
    assert ways.opened == []
    assert callback.failures() == {}


def test_what_is_wrong_is_said_before_the_first_step(tmp_path: Path, ways: tiny.Ways) -> None:
    with pytest.raises(TypeError, match="config must be a HooksConfig"):
        callback_to(ways, config={"lr_interval": 5})
    with pytest.raises(TypeError, match="run_config must be a mapping"):
        callback_to(ways, run_config=["lr"])
    with pytest.raises(AttributeError, match="decoder"):
        fit(trainer(tmp_path, callback_to(ways, network="decoder")), Module())
