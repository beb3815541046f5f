"""A callback for the ``Trainer`` of Lightning, ``lightning`` or ``pytorch_lightning`` (docs/lightning.md).

Lightning runs forward and backward within the optimizer's step, and shows a callback the batch only after that step. So
for the time of a training one method of one instance is wrapped, the strategy's ``training_step``, and the network in
the module has a forward hook: around them are batch, logits and the loss as it was returned, before it is divided by
the accumulation or multiplied by a gradient scaler. ``on_before_optimizer_step`` is Lightning's own place after the
last backward and the unscaling, before clipping. No class is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn

from sidestep.trainer_hooks.guard import guarded
from sidestep.trainer_hooks.hooks import Hooks
from sidestep.trainer_hooks.integrations.attached_callback import AttachArguments, AttachedCallback
from sidestep.trainer_hooks.integrations.lightning_watch import LightningWatch, ReadBatch, network_of

try:  # both are the same code under two names; the one that the user has loaded comes first
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        import pytorch_lightning
    else:
        import lightning.pytorch as pytorch_lightning
except ImportError:
    try:
        import pytorch_lightning
    except ImportError as error:
        raise ImportError("sidestep.LightningCallback needs lightning: pip install 'sidestep[lightning]'") from error

_NO_OPTIMIZER = "the module has no optimizer: there is nothing to watch in this training."
_MORE_OPTIMIZERS = "the module has several optimizers: rates and gradients are those of the first."
_TWO_RUNS = (
    "a WandbLogger opens a W&B run, and the worker opens one too: there will be two. What the module logs is in the "
    "worker's: leave the logger out."
)


class LightningCallback(AttachedCallback, pytorch_lightning.Callback):  # type: ignore[misc]  # its types are not read
    """Attach Sidestep to a Lightning ``Trainer``: ``Trainer(..., callbacks=[sidestep.LightningCallback()])``.

    ``attach`` is called when the training begins, with the network, the first optimizer and the gradient scaler. Steps
    carry the trainer's own numbers, ``trainer.global_step``: the first one to end is 1. What the module logs goes into
    the run under its own names, as often as loggers get it. The run goes on from a checkpoint through ``state_dict``.

    What ``attach`` raises is raised at the training's beginning; after that nothing is (docs/trainer.md).

    Args:
        network: dotted name of the module that ``training_step`` calls; left out, the only child with parameters, else
            the LightningModule itself.
        read_batch: from a batch to arguments of ``Hooks.on_batch``, where the forward does not show ids and labels.
        **given: by name: ``samples``, ``config``, ``tokenizer``, ``project``, ``entity``, ``name``, ``tags``,
            ``run_config`` (added to the module's hyperparameters), ``modules``, ``generate_fn``, ``endpoint``,
            ``run_id``, ``transport``, ``obeys`` (``"stop"``): see ``AttachArguments``.
    """

    can_obey = frozenset({"stop"})

    def __init__(
        self, *, network: str | None = None, read_batch: ReadBatch | None = None, **given: Unpack[AttachArguments]
    ) -> None:
        super().__init__(**given)
        self._network = network
        self._read_batch = read_batch
        self._saved: dict[str, Any] = {}
        self._last_step = 0
        self._metrics_seen: dict[str, Any] = {}
        self._step_names: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps of the run."""
        return self.hooks.state_dict() if self.hooks is not None else dict(self._saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the checkpoint's run, in the training that begins next."""
        self._saved = dict(state_dict)

    # ---------------------------------------------------------------------------------------- what the trainer calls

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the training that begins.

        Raises:
            AttributeError: the module has no network of the name given.
            TypeError: see ``attach``.
            ValueError: see ``attach``.
        """
        self.close()  # the one before
        if not trainer.optimizers:
            self._console.once("no-optimizer", _NO_OPTIMIZER)
            return
        network = network_of(pl_module, self._network)
        outermost = trainer.strategy.model
        wrapped = isinstance(outermost, nn.Module) and outermost is not pl_module
        hooks = self._attach(
            outermost if wrapped else network,
            trainer.optimizers[0],
            step=trainer.global_step + 1,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            run_config=_hyperparameters(pl_module),
        )
        if self._saved:
            hooks.load_state_dict(self._saved)
            self._saved = {}
        self._last_step = trainer.global_step
        self._metrics_seen, self._step_names = {}, set()
        if self._config.log_wandb:
            self._watch = LightningWatch(
                hooks,
                guard=self.guard,
                console=self._console,
                network=network,
                module=pl_module,
                strategy=trainer.strategy,
                read_batch=self._read_batch,
            )
            self._warn(hooks, trainer)

    @guarded
    def on_train_epoch_start(self, trainer: Any, _module: Any) -> None:
        """Count the epoch, which every batch carries, and log what belongs to the one before."""
        self._log(trainer, of_steps=False)
        if self._watch is not None:
            self._watch.epoch = trainer.current_epoch

    @guarded
    def on_before_backward(self, _trainer: Any, _module: Any, _loss: Any) -> None:
        """Show the micro-batch where ``training_step`` calls backward itself."""
        if isinstance(self._watch, LightningWatch):
            self._watch.tell_batch(None)

    @guarded
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Take the gradients: after the last backward, unscaled, before clipping.

        Where the module steps by itself it may have clipped by now: then ``clip_gradients`` is the place.
        """
        ours = self._watch is not None and _is_same(optimizer, trainer.optimizers[0])
        if ours and self.hooks is not None and module.automatic_optimization:
            self.hooks.before_clip()

    @guarded
    def on_train_batch_end(self, trainer: Any, _module: Any, _outputs: Any, _batch: Any, _batch_idx: int) -> None:
        """End the step under the trainer's number, where this micro-batch ended one."""
        step = trainer.global_step
        if self._watch is None or self.hooks is None or step <= self._last_step:
            return
        self._last_step = step
        self._take(
            self.hooks.after_step(step), {"stop": lambda: setattr(trainer, "should_stop", True)}, trainer.world_size
        )
        every = trainer.log_every_n_steps
        if every and step % every == 0:
            self._log(trainer, of_steps=True)

    @guarded
    def on_validation_start(self, trainer: Any, _module: Any) -> None:
        """Remember what was logged before, so that what is new afterwards is the validation's."""
        self._metrics_seen = dict(trainer.logged_metrics)

    @guarded
    def on_validation_end(self, trainer: Any, _module: Any) -> None:
        """Put what the validation logged into the run."""
        if not trainer.sanity_checking:
            self._log(trainer, of_steps=False)

    @guarded
    def on_test_start(self, trainer: Any, _module: Any) -> None:
        """As for a validation."""
        self._metrics_seen = dict(trainer.logged_metrics)

    @guarded
    def on_test_end(self, trainer: Any, _module: Any) -> None:
        """Put what the test logged into the run."""
        self._log(trainer, of_steps=False)

    @guarded
    def on_train_end(self, trainer: Any, _module: Any) -> None:
        """Let go of the trainer; the run stays open for what is evaluated and logged afterwards."""
        self._log(trainer, of_steps=False)
        self._let_go()

    @guarded
    def on_exception(self, _trainer: Any, _module: Any, exception: BaseException) -> None:
        """End the run as one that was broken off."""
        self._let_go()
        if self.hooks is not None:
            self._saved = self.hooks.state_dict()  # another attempt goes on in the same run
            self.hooks.__exit__(type(exception), exception, exception.__traceback__)

    @guarded
    def teardown(self, _trainer: Any, _module: Any, stage: str) -> None:
        """Let go of a training that did not come to its end."""
        if stage == "fit":
            self._let_go()

    # ---------------------------------------------------------------------------------------------------- inside

    def _log(self, trainer: Any, *, of_steps: bool) -> None:
        """Log what is new among the trainer's logged metrics: each is a new object whenever it has been logged."""
        now = dict(trainer.logged_metrics)
        before, self._metrics_seen = self._metrics_seen, now
        new = {name: value for name, value in now.items() if before.get(name) is not value}
        if of_steps:
            self._step_names |= new.keys()
        else:
            new = {name: value for name, value in new.items() if name not in self._step_names}
        if new and self.hooks is not None and trainer.is_global_zero:
            step = self._last_step
            self.hooks.log({"epoch": trainer.current_epoch, **new, "trainer/global_step": step}, step=step)

    def _warn(self, hooks: Hooks, trainer: Any) -> None:
        if len(trainer.optimizers) > 1:
            self._console.once("more-optimizers", _MORE_OPTIMIZERS)
        if any(type(logger).__name__ == "WandbLogger" for logger in trainer.loggers):
            hooks.warn_of_two_runs(_TWO_RUNS)


def _is_same(optimizer: Any, first: Any) -> bool:
    """Whether an optimizer, perhaps in Lightning's wrapper, is the one that was attached to."""
    return optimizer is first or getattr(optimizer, "optimizer", None) is first


def _hyperparameters(pl_module: Any) -> dict[str, Any]:
    """What ``save_hyperparameters`` kept."""
    kept = getattr(pl_module, "hparams", None)
    return {str(name): value for name, value in kept.items()} if isinstance(kept, Mapping) else {}
