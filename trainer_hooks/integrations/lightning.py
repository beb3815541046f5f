"""A callback for the ``Trainer`` of Lightning, ``lightning`` or ``pytorch_lightning`` (docs/lightning.md).

Lightning runs forward and backward within the optimizer's step, and shows a callback the batch only after that step. So
for the time of a training one method of one instance is wrapped, the strategy's ``training_step``, and the network in
the module has a forward hook: around them are batch, logits and the loss as it was returned, before it is divided by
the accumulation or multiplied by a gradient scaler. ``on_before_optimizer_step`` is Lightning's own place after the
last backward and the unscaling, before clipping. No class is changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sidestep.trainer_hooks.capture import Batch, ForwardReader
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.generation import GenerateFunction
from sidestep.trainer_hooks.guard import Guard, guarded
from sidestep.trainer_hooks.hooks import Hooks, attach
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.transport import OpenTransport

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

_LABELS = {"shift_labels": True, "targets": True, "target": True, "labels": None}
"""Names of labels in a batch, and whether they say that ``labels[t]`` is the target of position t."""
_NO_OPTIMIZER = "the module has no optimizer: there is nothing to watch in this training."
_MORE_OPTIMIZERS = "the module has several optimizers: rates and gradients are those of the first."
_NO_LOGITS = (
    "no forward with logits was seen within training_step: losses per token are not shown. Name the network that it "
    'calls, as LightningCallback(network="decoder"), or pass the batch\'s tensors by read_batch.'
)
_TWO_RUNS = (
    "a WandbLogger opens a W&B run, and the worker opens one too: there will be two. What the module logs is in the "
    "worker's: leave the logger out."
)

ReadBatch = Callable[[Any], Mapping[str, Any]]
"""A batch as the loader gives it, to arguments of ``Hooks.on_batch``."""


class LightningCallback(pytorch_lightning.Callback):  # type: ignore[misc]  # its types are not read
    """Attach Sidestep to a Lightning ``Trainer``: ``Trainer(..., callbacks=[sidestep.LightningCallback()])``.

    ``attach`` is called when the training begins, with the network, the first optimizer and the gradient scaler. Steps
    carry the trainer's own numbers, ``trainer.global_step``: the first one to end is 1. What the module logs goes into
    the run under its own names, as often as loggers get it. The run goes on from a checkpoint through ``state_dict``.

    What ``attach`` raises is raised at the training's beginning; after that nothing is (docs/trainer.md).

    Args:
        samples: what to generate from; none: no generation and no collapse rules.
        config: intervals, thresholds and bounds.
        tokenizer: as in ``attach``.
        network: dotted name of the module that ``training_step`` calls; left out, the only child with parameters, else
            the LightningModule itself.
        read_batch: from a batch to arguments of ``Hooks.on_batch``, where the forward does not show ids and labels.
        project: of the W&B run that the worker opens; so are entity, name and tags.
        entity: see project.
        name: see project.
        tags: see project.
        run_config: added to the module's hyperparameters, which are shown as the run's configuration.
        modules: prefixes of parameter names to the modules that gradients are shown under.
        generate_fn: as in ``attach``.
        endpoint: where the worker listens; left out, ``SIDESTEP_ENDPOINT``, else rank 0 starts one.
        run_id: the run to go on in, in place of a checkpoint's.
        transport: as in ``attach``.
    """

    def __init__(
        self,
        *,
        samples: Sequence[Sample] | None = None,
        config: HooksConfig | None = None,
        tokenizer: Any = None,
        network: str | None = None,
        read_batch: ReadBatch | None = None,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        run_config: Mapping[str, Any] | None = None,
        modules: Mapping[str, str] | None = None,
        generate_fn: GenerateFunction | None = None,
        endpoint: str | None = None,
        run_id: str | None = None,
        transport: OpenTransport | None = None,
    ) -> None:
        if run_config is not None and not isinstance(run_config, Mapping):
            raise TypeError(f"run_config must be a mapping, not {type(run_config).__name__}")
        if config is not None and not isinstance(config, HooksConfig):
            raise TypeError(f"config must be a HooksConfig, not {type(config).__name__}")
        self._config = HooksConfig() if config is None else config
        self._network = network
        self._read_batch = read_batch
        self._run_id = run_id
        self._run_config = dict(run_config or {})
        self._passed_on: dict[str, Any] = {
            "samples": samples,
            "tokenizer": tokenizer,
            "project": project,
            "entity": entity,
            "name": name,
            "tags": tags,
            "modules": modules,
            "generate_fn": generate_fn,
            "endpoint": endpoint,
            "transport": transport,
        }
        self._console = Console()
        self.guard = Guard(self._console)
        self.hooks: Hooks | None = None
        """The hooks of the newest training; None before the first."""
        self._watch: _Watch | None = None
        self._saved: dict[str, Any] = {}
        self._last_step = 0
        self._metrics_seen: dict[str, Any] = {}
        self._step_names: set[str] = set()

    def failures(self) -> dict[str, int]:
        """How often something failed inside the hooks or this callback, by where; empty is as it should be."""
        return {**(self.hooks.failures() if self.hooks is not None else {}), **self.guard.failures}

    def close(self) -> None:
        """End the run; without this call the next training or the end of the process does it."""
        self._let_go()
        if self.hooks is not None:
            self.hooks.close()

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
        network = _network(pl_module, self._network)
        outermost = trainer.strategy.model
        wrapped = isinstance(outermost, nn.Module) and outermost is not pl_module
        hooks = attach(
            outermost if wrapped else network,
            trainer.optimizers[0],
            config=self._config,
            run_config={**_hyperparameters(pl_module), **self._run_config},
            step=trainer.global_step + 1,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            run_id=self._run_id,
            **self._passed_on,
        )
        self.hooks = hooks
        if self._saved:
            hooks.load_state_dict(self._saved)
            self._saved = {}
        self._last_step = trainer.global_step
        self._metrics_seen, self._step_names = {}, set()
        if self._config.log_wandb:
            self._watch = _Watch(
                hooks,
                guard=self.guard,
                console=self._console,
                network=network,
                module=pl_module,
                strategy=trainer.strategy,
                read_batch=self._read_batch,
            )
            self._warn(trainer)

    @guarded
    def on_train_epoch_start(self, trainer: Any, _module: Any) -> None:
        """Count the epoch, which every batch carries, and log what belongs to the one before."""
        self._log(trainer, of_steps=False)
        if self._watch is not None:
            self._watch.epoch = trainer.current_epoch

    @guarded
    def on_before_backward(self, _trainer: Any, _module: Any, _loss: Any) -> None:
        """Show the micro-batch where ``training_step`` calls backward itself."""
        if self._watch is not None:
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
        self.hooks.after_step(step)
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

    def _let_go(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()
            if self.hooks is not None:
                self.hooks.release()

    def _warn(self, trainer: Any) -> None:
        if len(trainer.optimizers) > 1:
            self._console.once("more-optimizers", _MORE_OPTIMIZERS)
        if any(type(logger).__name__ == "WandbLogger" for logger in trainer.loggers):
            self._console.once("two-runs", _TWO_RUNS)


class _Watch:
    """What is wrapped of a training, and what is seen there."""

    def __init__(
        self,
        hooks: Hooks,
        *,
        guard: Guard,
        console: Console,
        network: nn.Module,
        module: Any,
        strategy: Any,
        read_batch: ReadBatch | None,
    ) -> None:
        self.guard = guard
        self.epoch = 0
        self._hooks: Hooks | None = hooks
        self._console = console
        self._reader = ForwardReader(network, 0)
        self._read_batch = read_batch
        self._given: Any = None
        self._computing = False
        self._seen: Batch | None = None
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._wrap(strategy, "training_step", self._around_step)
        if not module.automatic_optimization:
            self._wrap(module, "clip_gradients", self._around_clipping)
        self._removable = network.register_forward_hook(self._on_forward, with_kwargs=True)

    def end(self) -> None:
        """Undo it all; what somebody has wrapped around the wrapper does nothing more."""
        self._hooks = None
        self._removable.remove()
        for owner, name, wrapper in self._wrapped:
            if vars(owner).get(name) is wrapper:  # nobody has put something else there since
                delattr(owner, name)

    @guarded
    def tell_batch(self, loss: torch.Tensor | None) -> None:
        """Show the micro-batch, once; until then its logits are held as long as ``training_step`` itself may."""
        seen, self._seen = self._seen, None
        if self._hooks is None or not self._computing or (seen is None and loss is None):
            return
        told = self._told(seen if seen is not None else Batch())
        self._computing = False
        if told.get("input_ids") is None and told.get("labels") is None:
            return  # what the session's own hook saw stands, and it says so where it saw nothing
        if told.get("logits") is None and told.get("token_losses") is None:
            self._console.once("no-logits", _NO_LOGITS)
        told["loss"] = loss if loss is not None else told.get("loss")
        self._hooks.on_batch(**told, epoch=self.epoch)

    def _told(self, seen: Batch) -> dict[str, Any]:
        """Arguments of ``on_batch``: what the forward showed, completed by the batch, both overridden by the user's."""
        names = ("input_ids", "labels", "attention_mask", "logits", "loss", "shifted", "documents", "position_ids")
        told: dict[str, Any] = {name: getattr(seen, name) for name in (*names, "cu_seqlens")}
        batch = self._given
        if isinstance(batch, Mapping):
            _complete(told, batch)
        if self._read_batch is not None:
            told |= self._read_batch(batch)
        return told

    def _wrap(self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put a wrapper around a method of one instance, unless it has been replaced there already."""
        if name not in vars(owner):
            wrapper = around(getattr(owner, name))
            setattr(owner, name, wrapper)
            self._wrapped.append((owner, name, wrapper))

    def _around_clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip_gradients(*args: Any, **kwargs: Any) -> Any:
            if self._hooks is not None:
                self._hooks.before_clip()
            return original(*args, **kwargs)

        return clip_gradients

    def _around_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if self._hooks is None:
                return original(*args, **kwargs)
            self._given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(self._given, Mapping):
                self._given = dict(self._given)  # as it is now: a module may take the labels out
            self._computing, self._seen = True, None
            try:
                result = original(*args, **kwargs)
                loss = result.get("loss") if isinstance(result, Mapping) else result
                if isinstance(loss, torch.Tensor):  # None: the module skips this batch, or has called backward itself
                    self.tell_batch(loss)
            finally:
                self._computing, self._seen, self._given = False, None, None
            return result

        return training_step

    @guarded
    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hold what a training forward shows until the loss is there; a later one without logits changes nothing."""
        if not self._computing or not module.training or not self.guard.grad_enabled:
            return
        read = self._reader.read(args, kwargs, output)
        if read is not None and (self._seen is None or read.logits is not None):
            self._seen = read


def _network(pl_module: Any, name: str | None) -> nn.Module:
    """The module that ``training_step`` calls, by its name or as the only child that has parameters."""
    if name is not None:
        found: nn.Module = pl_module.get_submodule(name)
        return found
    children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    own = any(True for _ in pl_module.parameters(recurse=False))
    network: nn.Module = children[0] if len(children) == 1 and not own else pl_module
    return network


def _complete(told: dict[str, Any], batch: Mapping[Any, Any]) -> None:
    """Add what the forward was not given: ids, labels and mask of the batch, where their shapes fit."""
    ids = told["input_ids"]
    if ids is None:
        ids = told["input_ids"] = _integers(batch.get("input_ids"))
    if told["labels"] is None:
        name = next((name for name in _LABELS if _integers(batch.get(name)) is not None), "")
        labels = _integers(batch.get(name))
        if labels is not None and (ids is None or labels.shape == ids.shape):
            told["labels"], told["shifted"] = labels, _LABELS[name]
    mask = batch.get("attention_mask")
    if told["attention_mask"] is None and ids is not None and getattr(mask, "shape", None) == ids.shape:
        told["attention_mask"] = mask


def _integers(value: Any) -> torch.Tensor | None:
    """Ids or labels [b, t], or None."""
    fits = isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()
    return value if fits else None


def _is_same(optimizer: Any, first: Any) -> bool:
    """Whether an optimizer, perhaps in Lightning's wrapper, is the one that was attached to."""
    return optimizer is first or getattr(optimizer, "optimizer", None) is first


def _hyperparameters(pl_module: Any) -> dict[str, Any]:
    """What ``save_hyperparameters`` kept."""
    kept = getattr(pl_module, "hparams", None)
    return {str(name): value for name, value in kept.items()} if isinstance(kept, Mapping) else {}
