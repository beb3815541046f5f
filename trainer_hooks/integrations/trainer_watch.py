"""What is seen of a Hugging Face ``Trainer`` while it trains, beside what its callbacks are told.

A callback is shown neither batches nor gradients before clipping, and label smoothing takes the labels out of the batch
before the model sees it. So for the time of a training two methods of two instances are wrapped: the trainer's
``compute_loss``, around which batch, labels, logits and loss are all at hand, and its accelerator's
``clip_grad_norm_``, which is called once a step, after the last backward. No class is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sidestep.trainer_hooks.capture import has_encoder
from sidestep.trainer_hooks.guard import Guard, guarded
from sidestep.trainer_hooks.hooks import Hooks
from sidestep.trainer_hooks.integrations.wrapped_method import WrappedMethod
from sidestep.trainer_hooks.parameters import unwrapped


class TrainerWatch:
    """What is wrapped of a trainer while it trains, and what is seen there."""

    def __init__(self, hooks: Hooks, guard: Guard, outermost: nn.Module, trainer: Any, accelerator: Any) -> None:
        self.guard = guard
        self.epoch = 0
        self._hooks: Hooks | None = hooks
        self._trainer = trainer
        self._has_encoder = has_encoder(unwrapped(outermost))
        self._accelerator = accelerator
        self._clip_was_seen = False
        self._norm: Any = None
        self._computing = False
        self._output: Any = None
        self._removable = outermost.register_forward_hook(self._on_forward)
        self._wrapped = []
        if accelerator is not None:
            self._wrapped.append(WrappedMethod(accelerator, "clip_grad_norm_", self._around_clipping))
        if trainer is not None:
            self._wrapped.append(WrappedMethod(trainer, "compute_loss", self._around_loss))

    def ended_step(self) -> bool:
        """Begin to wait for the next step's clipping; return whether the optimizer took the one that ends."""
        self._clip_was_seen = False
        return not getattr(self._accelerator, "optimizer_step_was_skipped", False)

    def end(self) -> None:
        """Undo it all; what somebody has wrapped around a wrapper of ours does nothing more."""
        self._hooks = None
        self._removable.remove()
        for wrapped in self._wrapped:
            wrapped.undo()

    def take_norm(self) -> torch.Tensor | float | None:
        """Return what the step's clipping said of the gradient's norm, None where nothing was clipped."""
        norm, self._norm = self._norm, None
        return norm if isinstance(norm, torch.Tensor | float) else None

    def _around_clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            self._before_clip()
            self._norm = original(*args, **kwargs)
            return self._norm

        return clip_grad_norm_

    def _around_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            inputs = kwargs.get("inputs", args[1] if len(args) > 1 else None)
            if self._hooks is None or not torch.is_grad_enabled() or not isinstance(inputs, Mapping):
                return original(*args, **kwargs)
            inputs = dict(inputs)  # as they are now: label smoothing takes the labels out
            self._computing = True
            try:
                result = original(*args, **kwargs)
                self._tell_batch(inputs, result, kwargs.get("num_items_in_batch", args[3] if len(args) > 3 else None))
            finally:
                self._computing, self._output = False, None
            return result

        return compute_loss

    @guarded
    def _before_clip(self) -> None:
        """Say it once a step: where nothing is clipped, the trainer asks for the norm by the same way."""
        if self._hooks is not None and not self._clip_was_seen:
            self._clip_was_seen = True
            self._hooks.before_clip()

    @guarded
    def _on_forward(self, module: nn.Module, _arguments: Any, output: Any) -> None:
        """Hold a training forward's output until ``compute_loss`` returns, which holds it as long itself."""
        if self._computing and module.training and self.guard.grad_enabled:
            self._output = output

    @guarded
    def _tell_batch(self, inputs: Mapping[str, Any], result: Any, num_items: Any) -> None:
        """Show the micro-batch, with the loss that ``compute_loss`` made of it."""
        ids, given = inputs.get("input_ids"), inputs.get("shift_labels", inputs.get("labels"))
        if self._hooks is None or self._output is None:
            return  # what the forward alone shows stands
        if self._has_encoder:
            self._tell_decoder(self._hooks, inputs, result, num_items)
            return
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return  # as above
        output = self._output
        log_probs = getattr(output, "log_probs", None)  # TRL's fused head: per token, and no logits
        self._hooks.on_batch(
            input_ids=ids,
            labels=_of_shape(given, ids.shape),
            attention_mask=_of_shape(inputs.get("attention_mask"), ids.shape),
            token_losses=-log_probs.detach() if isinstance(log_probs, torch.Tensor) else None,
            loss=self._as_reported(result[0] if isinstance(result, tuple) else result, num_items),
            shifted=True if inputs.get("shift_labels") is not None else None,
            position_ids=_tensor(inputs.get("position_ids")),
            cu_seqlens=_tensor(inputs.get("cu_seq_lens_q")),
            epoch=self.epoch,
        )

    def _tell_decoder(self, hooks: Hooks, inputs: Mapping[str, Any], result: Any, num_items: Any) -> None:
        """Show a decoder's part of a micro-batch; the logits are those of its labels, as beside each other."""
        labels = _tensor(inputs.get("labels"))
        if labels is None or labels.dim() != 2:
            return  # what the forward alone shows stands
        hooks.on_batch(
            input_ids=_of_shape(inputs.get("decoder_input_ids"), labels.shape),
            encoder_ids=_tensor(inputs.get("input_ids")),
            labels=labels,
            attention_mask=_of_shape(inputs.get("decoder_attention_mask"), labels.shape),
            loss=self._as_reported(result[0] if isinstance(result, tuple) else result, num_items),
            shifted=True,
            epoch=self.epoch,
        )

    def _as_reported(self, loss: Any, num_items: Any) -> torch.Tensor | None:
        """The loss such that its mean over a step's micro-batches is what the trainer reports for that step.

        A loss that is divided by the whole step's items is summed over micro-batches by the trainer, not averaged.
        """
        if not isinstance(loss, torch.Tensor):
            return None
        reported: torch.Tensor = loss.detach().mean()
        trainer = self._trainer
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            by_model = getattr(trainer, "model_accepts_loss_kwargs", False) and num_items is not None
            is_scaled = by_model or getattr(trainer, "compute_loss_func", None) is not None
        if not is_scaled:
            return reported
        planned: int = trainer.args.gradient_accumulation_steps
        return reported * int(getattr(trainer, "current_gradient_accumulation_steps", planned))


def _of_shape(value: Any, shape: torch.Size) -> torch.Tensor | None:
    return value if isinstance(value, torch.Tensor) and value.shape == shape else None


def _tensor(value: Any) -> torch.Tensor | None:
    return value if isinstance(value, torch.Tensor) else None
