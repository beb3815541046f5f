"""The trainer's interface: ``attach`` and the ``Hooks`` that it returns (docs/trainer.md)."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from sidestep.protocol.faults import Faults
from sidestep.protocol.messages import Command
from sidestep.trainer_hooks.attachment import (
    Training,
    look_at,
    make_generator,
    make_introduction,
    make_session,
)
from sidestep.trainer_hooks.capture import Batch
from sidestep.trainer_hooks.checks import check_arguments, check_generation, checked_optimizer
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.generation import GenerateFunction
from sidestep.trainer_hooks.loader import HashedBatch, WatchedLoader
from sidestep.trainer_hooks.opening import Introduction, RunNames
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.session import Session
from sidestep.trainer_hooks.transport import OpenTransport


class Hooks:
    """What a training loop calls. No call raises, waits, or changes a number of the training.

    Every call is optional: what is not told is seen by the hooks on the model and the optimizer. Made by ``attach``.
    """

    def __init__(self, session: Session | None, introduction: Introduction | None, *, keep_step: bool) -> None:
        self._session = session
        self._guard = session.guard if session is not None else None
        self._introduction = introduction
        self._keep_step = keep_step
        self._state: dict[str, Any] = {}
        if session is not None:
            atexit.register(self._close_at_exit)

    @property
    def run_id(self) -> str:
        """The run's id; empty where the hooks do nothing."""
        return self._introduction.run_id(self._state) if self._introduction is not None else ""

    def on_batch(
        self,
        *,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        loss: torch.Tensor | float | None = None,
        token_losses: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        head: nn.Module | torch.Tensor | None = None,
        shifted: bool | None = None,
        documents: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        encoder_ids: torch.Tensor | None = None,
        epoch: int | None = None,
    ) -> None:
        """Show a micro-batch, after its forward; it takes the place of what was seen of that forward.

        Args:
            input_ids: ids [b, t]; best those that are still on the CPU.
            labels: [b, t], ``ignore_index`` where there is no target.
            attention_mask: [b, t], 0 at padding.
            logits: [b, t, v]; left out, those of the forward are used while the trainer still holds them.
            loss: the trainer's own loss of this micro-batch, one element; left out, that of the forward.
            token_losses: the trainer's own unreduced losses [b, t], in place of logits.
            hidden: last hidden states [b, t, d], with ``head``, where the loss is fused and there are no logits.
            head: the module or weight [v, d] that turns them into logits.
            shifted: whether ``labels[t]`` is the target of position t; left out, ``HooksConfig.shifted`` and the name
                of the forward's argument decide.
            documents: number of the document at each position [b, t], where rows are packed.
            position_ids: [b, t], starting anew with each document.
            cu_seqlens: cumulated lengths of the documents [documents + 1].
            encoder_ids: of an encoder-decoder, what its encoder reads [b, s], by which samples are told apart; its
                ``input_ids`` are the decoder's.
            epoch: the epoch that the micro-batch belongs to; it stays until another is told.
        """
        if self._session is not None:
            self._session.on_batch(
                Batch(
                    input_ids=input_ids,
                    labels=labels,
                    attention_mask=attention_mask,
                    logits=logits,
                    loss=loss,
                    token_losses=token_losses,
                    hidden=hidden,
                    head=head,
                    shifted=shifted,
                    documents=documents,
                    position_ids=position_ids,
                    cu_seqlens=cu_seqlens,
                    encoder_ids=encoder_ids,
                    epoch=epoch,
                )
            )

    def before_clip(self) -> None:
        """Say that the step's last backward is done and nothing is clipped yet: once per optimizer step."""
        if self._session is not None:
            self._session.before_clip()

    def after_step(
        self, step: int | None = None, *, applied: bool = True, grad_norm: torch.Tensor | float | None = None
    ) -> Command | None:
        """Say that optimizer step ``step`` is done; generation runs within this call when it is due.

        Args:
            step: the trainer's own number of it, growing from call to call; left out, one more than the last.
            applied: False where the step was skipped (a GradScaler's overflow).
            grad_norm: what ``clip_grad_norm_`` returned, for the detectors; a tensor is copied, not read. Left out, the
                norm is taken every ``HooksConfig.signal_gradient_interval`` steps.

        Returns:
            What the worker asks of the trainer at this boundary, or None; the trainer is free to ignore it.
        """
        if self._session is None:
            return None
        command: Command | None = self._session.after_step(step, applied=applied, grad_norm=grad_norm)
        return command

    def mark_stage(self, name: str) -> None:
        """Say that from the step that goes on, other data or another objective are meant to be.

        What is measured against the run's own past starts anew, and nobody is warned of the change itself.
        """
        if self._session is not None:
            self._session.mark_stage(name)

    def watch_loader(self, loader: Any) -> Any:
        """Have samples and images hashed by the data loader's worker processes, in place of the training's device.

        Iterate over what this returns in place of the loader: ``for batch in hooks.watch_loader(loader)``. It yields
        the loader's batches, in their order, and passes everything else on to the loader. Batches are mappings with
        ``labels`` and ``input_ids`` [b, t] and images under the name that the forward takes them by; others stay as
        they are, and what the forward is given is hashed as without this. Wrap the loader of the training alone.

        Raises:
            TypeError: ``loader`` is no ``DataLoader``: it has no ``collate_fn`` to wrap.
        """
        return WatchedLoader(loader, self._handed)

    def _handed(self, hashed: HashedBatch) -> None:
        if self._session is not None:
            self._session.handed(hashed)

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        step_key: str | None = None,
        reduce: str | None = None,
    ) -> None:
        """Put the trainer's own values into the run, in place of ``wandb.run.log``.

        Args:
            values: names to numbers, bools, texts, or tensors of one element; a device's tensor is copied, not read.
            step: the optimizer step that they belong to; left out, the one that goes on.
            step_key: name of another step axis (an evaluation's counter, say), on which ``step`` is then the place.
            reduce: ``mean``, ``sum``, ``min`` or ``max`` over the ranks that log these names, worked out by the worker
                without a collective; left out, the lowest rank's values stand.
        """
        if self._session is not None:
            self._session.log(values, step, step_key, reduce)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed training goes on in the same run."""
        if self._session is None:
            return dict(self._state)
        return {"run_id": self.run_id, "step": self._session.last_step, "epoch": self._session.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in a checkpoint's run, after its last step unless ``attach`` was told one; before the first step."""
        self._state = dict(state)
        if self._session is not None:
            self._session.load(self._state, keep_step=self._keep_step)

    def failures(self) -> dict[str, int]:
        """How often something failed inside the hooks, by where; empty is as it should be.

        ``finish``: messages that could not be made of what was copied, on the thread that sends them.
        """
        found = dict(self._guard.failures) if self._guard is not None else {}
        staging = self._introduction.staging if self._introduction is not None else None
        num_unmade = staging.statistics().num_finish_errors if staging is not None else 0
        return {**found, "finish": num_unmade} if num_unmade else found

    def warn_of_two_runs(self, text: str) -> None:
        """Say once that the trainer has a W&B run of its own; ``text`` says how to leave it out.

        For integrations, which know the trainer's own way; without this a live ``wandb.run`` is noticed anyway.
        """
        if self._session is not None:
            self._session.warn_of_two_runs(text)

    def release(self) -> None:
        """Let go of model and optimizer after the training; what is logged still goes into the run, until ``close``."""
        if self._session is not None:
            self._session.release()

    def close(self) -> None:
        """Send what is left and say goodbye, within ``HooksConfig.close_timeout_seconds``; once is enough."""
        self._close(0, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(0 if kind is None else 1, "" if kind is None else kind.__name__)

    def _close_at_exit(self) -> None:
        """The interpreter ends, with an exception that nobody caught or without."""
        uncaught = getattr(sys, "last_value", None)
        self._close(0 if uncaught is None else 1, "" if uncaught is None else type(uncaught).__name__)

    def _close(self, exit_code: int, reason: str) -> None:
        session, self._session = self._session, None
        if session is not None:
            atexit.unregister(self._close_at_exit)
            self._state = {"run_id": self.run_id, "step": session.last_step, "epoch": session.epoch}
            session.close(exit_code, reason)


def attach(
    model: nn.Module,
    optimizer: Any,
    *,
    tokenizer: Any = None,
    samples: Sequence[Sample] | None = None,
    config: HooksConfig | None = None,
    project: str | None = None,
    entity: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    run_config: Any = None,
    step: int = 0,
    scaler: Any = None,
    modules: Mapping[str, str] | None = None,
    generate_fn: GenerateFunction | None = None,
    endpoint: str | None = None,
    run_id: str | None = None,
    transport: OpenTransport | None = None,
    on_incident: str | Callable[[Command], object] | None = None,
    faults: Faults | None = None,
) -> Hooks:
    """Look over a training's shoulder: ship its raw signals to a worker, which makes metrics and warnings of them.

    This call alone is enough. It takes at most two seconds and waits for nobody; where no endpoint is given or set in
    ``SIDESTEP_ENDPOINT``, rank 0 starts a worker.

    Args:
        model: as the training loop calls it: after ``torch.compile``, DDP, sharding.
        optimizer: the one that trains it.
        tokenizer: a ``tokenizers.Tokenizer``, a Hugging Face tokenizer, or anything with ``decode(ids)`` and ``len()``.
        samples: what to generate from; none: no generation and no collapse rules.
        config: intervals, thresholds and bounds.
        project: of the W&B run that the worker opens; so are entity, name and tags.
        entity: see project.
        name: see project.
        tags: see project.
        run_config: the trainer's own configuration, shown as the run's; secrets are masked.
        step: the number that the next finished optimizer step carries.
        scaler: the GradScaler, if there is one.
        modules: prefixes of parameter names to the modules that gradients are shown under.
        generate_fn: ``(model, samples, max_new_tokens)`` to the new ids of each sample, in place of the built-in ways.
        endpoint: where the worker listens, ``ipc://PATH`` or ``tcp://HOST:PORT``.
        run_id: the run to go on in; else ``SIDESTEP_RUN_ID``, else that of ``load_state_dict``, else a new one.
        transport: another way for the messages than the publisher (``InProcessTransport``).
        on_incident: ``HooksConfig.on_incident`` in another way; a callable is told of each command that is taken, on
            the training thread, on all ranks at the same step.
        faults: what is to go wrong on purpose, for tests of a training under failures; else ``SIDESTEP_FAULTS``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument's value is wrong, or misses another argument; the text says what to do.
    """
    config = HooksConfig() if config is None else config
    if on_incident is not None:
        config = replace(config, on_incident="call" if callable(on_incident) else on_incident)
    texts = {"project": project, "entity": entity, "name": name, "endpoint": endpoint, "run_id": run_id}
    check_arguments(model, config, step=step, scaler=scaler, modules=modules, texts=texts, tags=tags)
    check_generation(samples, tokenizer, generate_fn)
    optimizer = checked_optimizer(optimizer, model)
    names = RunNames(
        project=project or "", entity=entity or "", name=name or "", tags=tuple(tags), run_config=run_config
    )
    if not config.log_wandb:
        return Hooks(None, None, keep_step=False)
    training = Training(model=model, optimizer=optimizer, config=config, scaler=scaler, modules=modules)
    seen = look_at(training, tokenizer, samples)
    generator = make_generator(training, seen, generate_fn)
    introduction = make_introduction(
        training,
        seen,
        names,
        step=step,
        run_id=run_id,
        endpoint=endpoint,
        transport=transport,
        faults=Faults.from_environment() if faults is None else faults,
    )
    if introduction is None:
        return Hooks(None, None, keep_step=False)
    told = on_incident if callable(on_incident) else None
    session = make_session(training, seen, generator, introduction, step, on_incident=told)
    return Hooks(session, introduction, keep_step=step > 0)
