"""What is seen of a Lightning ``Trainer`` while it trains, beside what its callbacks are told.

Forward and backward run within the optimizer's step. Around the strategy's ``training_step``, on that instance alone,
are the batch and the loss as it was returned; a forward hook on the network shows what that was given and returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sidestep.trainer_hooks.capture import Batch, ForwardReader
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.guard import Guard, guarded
from sidestep.trainer_hooks.hooks import Hooks
from sidestep.trainer_hooks.integrations.lightning_batch import complete
from sidestep.trainer_hooks.integrations.wrapped_method import WrappedMethod

_NO_LOGITS = (
    "no forward with logits was seen within training_step: losses per token are not shown. Name the network that it "
    'calls, as LightningCallback(network="decoder"), or pass the batch\'s tensors by read_batch.'
)

ReadBatch = Callable[[Any], Mapping[str, Any]]
"""A batch as the loader gives it, to arguments of ``Hooks.on_batch``."""


class LightningWatch:
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
        self._wrapped = [WrappedMethod(strategy, "training_step", self._around_step)]
        if not module.automatic_optimization:
            self._wrapped.append(WrappedMethod(module, "clip_gradients", self._around_clipping))
        self._removable = network.register_forward_hook(self._on_forward, with_kwargs=True)

    def end(self) -> None:
        """Undo it all; what somebody has wrapped around the wrapper does nothing more."""
        self._hooks = None
        self._removable.remove()
        for wrapped in self._wrapped:
            wrapped.undo()

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
        told: dict[str, Any] = {name: getattr(seen, name) for name in (*names, "cu_seqlens", "encoder_ids")}
        batch = self._given
        if isinstance(batch, Mapping):
            complete(told, batch)
        if self._read_batch is not None:
            told |= self._read_batch(batch)
        return told

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


def network_of(pl_module: Any, name: str | None) -> nn.Module:
    """The module that ``training_step`` calls, by its name or as the only child that has parameters."""
    if name is not None:
        found: nn.Module = pl_module.get_submodule(name)
        return found
    children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    own = any(True for _ in pl_module.parameters(recurse=False))
    network: nn.Module = children[0] if len(children) == 1 and not own else pl_module
    return network
