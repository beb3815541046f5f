"""A callback for Hugging Face's ``Trainer`` and those built on it, such as TRL's ``SFTTrainer`` (docs/transformers.md).

What callbacks are not shown is seen by ``trainer_watch``. This module alone imports ``transformers``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn

from sidestep.trainer_hooks.guard import guarded
from sidestep.trainer_hooks.hooks import Hooks
from sidestep.trainer_hooks.integrations.attached_callback import AttachArguments, AttachedCallback
from sidestep.trainer_hooks.integrations.trainer_watch import TrainerWatch

try:
    import transformers
except ImportError as error:
    raise ImportError("sidestep.TrainerCallback needs transformers: pip install 'sidestep[transformers]'") from error

STATE_KEY = "sidestep"
"""Where ``trainer_state.json`` keeps ``Hooks.state_dict()``, among its ``stateful_callbacks``."""

_ONCE_A_RUN = frozenset({
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos",
})  # fmt: skip
_NO_TRAINER = (
    "no transformers.Trainer called the callback's on_train_begin: labels that it takes out of a batch are not seen, "
    "and gradients are taken after clipping. Pass it as TrainerCallback(trainer=trainer)."
)
_TWO_RUNS = (
    "the Trainer reports to W&B itself, and the worker opens a run too: there will be two. What the Trainer logs is in "
    'the worker\'s: pass report_to="none" to TrainingArguments.'
)


class TrainerCallback(AttachedCallback, transformers.TrainerCallback):  # type: ignore[misc]  # its types are not read
    """Attach Sidestep to a ``Trainer``: ``Trainer(..., callbacks=[sidestep.TrainerCallback()])``.

    ``attach`` is called when the training begins, with the model as the loop calls it, its optimizer, tokenizer and
    gradient scaler, and with a checkpoint's run where the training is resumed from one. Steps carry the trainer's own
    numbers, ``state.global_step``: the first one to end is 1. What the trainer logs goes into the run under the names
    that its own W&B callback gives it (``train/loss``, ``eval/loss``).

    What ``attach`` raises is raised when the training begins; after that nothing is.

    Args:
        trainer: the trainer, where it is none that calls callbacks itself; left out, the one that does.
        **given: by name: ``samples``, ``config``, ``tokenizer`` (left out, that of the trainer's ``processing_class``),
            ``project``, ``entity``, ``name`` (left out, a search's trial name, else ``args.run_name``), ``tags``,
            ``run_config`` (added to the model's and the trainer's own), ``modules``, ``generate_fn``, ``endpoint``,
            ``run_id``, ``transport``, ``obeys`` (``"stop"``, ``"checkpoint"``): see ``AttachArguments``.
    """

    can_obey = frozenset({"stop", "checkpoint"})

    def __init__(self, *, trainer: Any = None, **given: Unpack[AttachArguments]) -> None:
        super().__init__(**given)
        self._trainer = trainer
        self._epoch = 0

    # ---------------------------------------------------------------------------------------- what the trainer calls

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,  # noqa: ARG002  (the order is the trainer's)
        *,
        model: Any = None,
        optimizer: Any = None,
        processing_class: Any = None,
        **_rest: Any,
    ) -> None:
        """Attach to the training that begins.

        Raises:
            TypeError: see ``attach``.
            ValueError: see ``attach``.
        """
        again = self.hooks.run_id if self.hooks is not None and self._watch is not None else None
        self.close()  # the one before; where it never ended (out of memory, say) this is another attempt of its run
        trainer = self._trainer if self._trainer is not None else _calling_trainer()
        if trainer is None:
            self._console.once("no-trainer", _NO_TRAINER)
        accelerator = getattr(trainer, "accelerator", None)
        outermost = getattr(trainer, "model_wrapped", None)
        outermost = outermost if isinstance(outermost, nn.Module) else model
        given = self._passed_on
        hooks = self._attach(
            outermost,
            optimizer,
            step=state.global_step + 1,
            scaler=getattr(accelerator, "scaler", None),
            run_config={**_settings(model), **_settings(args)},
            config=self._config,
            tokenizer=_tokenizer_of(processing_class) if given.get("tokenizer") is None else given["tokenizer"],
            name=given.get("name") or getattr(state, "trial_name", None) or getattr(args, "run_name", None),
            run_id=given.get("run_id") or again,
        )
        saved = _kept_by(state).get(STATE_KEY)
        if isinstance(saved, Mapping):
            hooks.load_state_dict(saved)
        self._epoch = int(state.epoch or 0) - 1
        self._keep_state(state)
        if self._config.log_wandb:
            self._watch = TrainerWatch(hooks, self.guard, outermost, trainer, accelerator)
            _warn_of_two_runs(hooks, trainer)

    @guarded
    def on_epoch_begin(self, args: Any, state: Any, control: Any, /, **_rest: Any) -> None:  # noqa: ARG002
        """Count the epoch, which every batch carries."""
        self._epoch += 1
        if self._watch is not None:
            self._watch.epoch = self._epoch

    @guarded
    def on_step_end(self, args: Any, state: Any, control: Any, /, **_rest: Any) -> None:
        """End the step under the trainer's number, before it logs, evaluates or saves."""
        if isinstance(self._watch, TrainerWatch) and self.hooks is not None:
            command = self.hooks.after_step(
                state.global_step, applied=self._watch.ended_step(), grad_norm=self._watch.take_norm()
            )
            self._keep_state(state)
            self._take(
                command,
                {
                    "stop": lambda: setattr(control, "should_training_stop", True),
                    "checkpoint": lambda: setattr(control, "should_save", True),
                },
                getattr(args, "world_size", 1),
            )

    @guarded
    def on_log(self, args: Any, state: Any, control: Any, /, *, logs: Any = None, **_rest: Any) -> None:  # noqa: ARG002
        """Put what the trainer logs into the run."""
        self._log(state, logs)

    @guarded
    def on_predict(self, args: Any, state: Any, control: Any, /, *, metrics: Any = None, **_rest: Any) -> None:  # noqa: ARG002
        """Put a prediction's metrics into the run; the trainer does not log them."""
        self._log(state, metrics)

    @guarded
    def on_train_end(self, args: Any, state: Any, control: Any, /, **_rest: Any) -> None:  # noqa: ARG002
        """Let go of the trainer; the run stays open for what is evaluated and logged afterwards."""
        self._let_go()

    # ---------------------------------------------------------------------------------------------------- inside

    def _log(self, state: Any, values: Any) -> None:
        if self.hooks is not None and values and state.is_world_process_zero:
            step = state.global_step
            self.hooks.log({**_as_in_wandb(values), "train/global_step": step}, step=step)

    def _keep_state(self, state: Any) -> None:
        """Leave the hooks' state where the trainer's next checkpoint will save it."""
        if self.hooks is not None and self._config.log_wandb:
            _kept_by(state)[STATE_KEY] = self.hooks.state_dict()


def _warn_of_two_runs(hooks: Hooks, trainer: Any) -> None:
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    if any(type(callback).__name__ == "WandbCallback" for callback in callbacks):
        hooks.warn_of_two_runs(_TWO_RUNS)


def _calling_trainer() -> Any:
    """The ``Trainer`` among the callers: callbacks are not told whose they are, and its accelerator is nowhere else."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers.Trainer):
            return owner
        frame = frame.f_back
    return None


def _tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, or what is one itself; None for an image processor."""
    inner = getattr(processing_class, "tokenizer", None)
    chosen = processing_class if inner is None else inner
    return chosen if callable(getattr(chosen, "decode", None)) else None


def _settings(holder: Any) -> dict[str, Any]:
    """The configuration of a model, or the trainer's arguments (whose ``to_dict`` hides tokens)."""
    holder = getattr(holder, "config", holder) if isinstance(holder, nn.Module) else holder
    write = getattr(holder, "to_dict", None)
    made = write() if callable(write) else holder
    return {str(name): value for name, value in made.items()} if isinstance(made, Mapping) else {}


def _kept_by(state: Any) -> dict[str, Any]:
    """The part of the trainer's state that is saved with checkpoints and that callbacks may write to."""
    kept = getattr(state, "stateful_callbacks", None)
    return kept if isinstance(kept, dict) else {}


def _as_in_wandb(values: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's values under the names that ``transformers`` gives them in W&B."""
    named = {}
    for name, value in values.items():
        kind, _, rest = name.partition("_")
        if name in _ONCE_A_RUN:
            named[name] = value
        elif kind in {"eval", "test"} and rest:
            named[f"{kind}/{rest}"] = value
        else:
            named[f"train/{name}"] = value
    return named
