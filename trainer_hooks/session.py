"""The hooks at work: what is seen of forwards and optimizer steps, put together step by step.

One ``Session`` lives on the training thread; what it hands over goes on in staging and on the publisher's thread. All
its entrances are guarded: nothing is raised into the training (docs/trainer.md, section 1).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sidestep.protocol.messages import Command, Kind, Notice, StepEnd
from sidestep.trainer_hooks.capture import Batch, ForwardReader, Outputs, complete_batch, remember_outputs, whole_batch
from sidestep.trainer_hooks.collective_generation import EveryRank
from sidestep.trainer_hooks.commands import Commands
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.generation import Generator
from sidestep.trainer_hooks.gradient_scale import carried_scale, is_known_overflow, overflow_flag
from sidestep.trainer_hooks.guard import Guard, guarded
from sidestep.trainer_hooks.loader import HashedBatch
from sidestep.trainer_hooks.logged import logged_values
from sidestep.trainer_hooks.missing_calls import MissingCalls
from sidestep.trainer_hooks.open_step import LoggedValues, OpenStep, StepFacts, StepGradients, stage_step
from sidestep.trainer_hooks.opening import Introduction
from sidestep.trainer_hooks.parameters import ParameterTable
from sidestep.trainer_hooks.reducing import Reducer
from sidestep.trainer_hooks.reductions.gradients import reduce_gradients
from sidestep.trainer_hooks.reductions.learning_rate import reduce_learning_rates
from sidestep.trainer_hooks.schedule import Schedule
from sidestep.trainer_hooks.signals.watch import SignalWatch
from sidestep.trainer_hooks.step_counts import StepCounts
from sidestep.trainer_hooks.topology import Topology
from sidestep.trainer_hooks.transport import Transport

WANDB_NOTICE = (
    "this process has a live wandb.run of its own, and the worker opens one: there will be two runs. Leave out "
    "wandb.init(), pass what you log to hooks.log({...}, step=...), and project, entity, name, tags and run_config "
    "to attach()."
)

_NOT_READ = Outputs(None, None)
"""A forward was seen at a step with nothing due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a session is made of; put together by ``attach``."""

    model: nn.Module
    """As the trainer calls it."""
    optimizer: Any
    config: HooksConfig
    make_table: Callable[[], ParameterTable]
    table: ParameterTable
    reader: ForwardReader
    reducer: Reducer
    generator: Generator | None
    scaler: Any
    topology: Topology
    takes_gradients: bool
    """Whether this rank ships gradients: of copies of the model, the first alone does."""
    takes_norms: bool
    """Whether it takes their norms for the detectors: every copy does, so that those that differ are seen."""
    signals: SignalWatch | None
    """What looks at every step for the detectors, where that is wanted."""
    on_incident: Callable[[Command], object] | None = None
    """Told of every command that is taken, at the boundary."""
    introduction: Introduction


class Session:
    """What ``Hooks`` does; see there."""

    def __init__(self, parts: Parts, step: int) -> None:
        self._parts = parts
        self.guard = Guard(parts.introduction.console)
        self._schedule = Schedule(parts.config)
        self._missing = MissingCalls(self._schedule, takes_gradients=parts.takes_gradients)
        self._transport: Transport | None = None
        self._commands: Commands | None = None
        self._state: Mapping[str, Any] = {}
        self._table = parts.table
        self.last_step = step - 1
        self.epoch = 0
        self._opened: OpenStep | None = None
        self._outputs: Outputs | None = None
        self._overriding = False
        self._explicit_steps = False
        self._wandb_looked_for = True
        self._stage = ""
        if parts.signals is not None:
            parts.signals.failed = self.guard.failed
        model, optimizer = parts.model, parts.optimizer
        is_collective = parts.generator is not None and parts.generator.is_collective
        incarnation, world_size = parts.introduction.agreed.incarnation, parts.topology.world_size
        self._every_rank = EveryRank(incarnation, world_size) if is_collective else None
        self._removable = [
            model.register_forward_hook(self.on_forward, with_kwargs=True),
            optimizer.register_step_pre_hook(self.before_optimizer),
            optimizer.register_step_post_hook(self.after_optimizer),
        ]

    # ------------------------------------------------------------------------------------------ what is seen

    @guarded
    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """See a forward of the outermost module; those of an evaluation and of generation are none of ours."""
        if not module.training or not self.guard.grad_enabled:
            return
        self._step_that_nobody_ended()
        opened = self._now()
        watch = self._parts.signals
        if watch is not None:
            watch.forward(self._parts.reader.arguments(args, kwargs), opened.expected)
        if self._overriding:
            if self._outputs is not None:  # the one before was not passed to on_batch: from now on all are looked at
                self._overriding = False
            if self._overriding:
                is_read = opened.due or watch is not None
                self._outputs = remember_outputs(*self._parts.reader.outputs(output, None)) if is_read else _NOT_READ
                return
        batch = self._parts.reader.read(args, kwargs, output)
        if batch is None:
            return
        self._add(opened, batch)
        self._outputs = remember_outputs(batch.logits, batch.loss)

    @guarded
    def on_batch(self, batch: Batch) -> None:
        """Take a micro-batch from the trainer, in place of the captured one of the same forward."""
        self._missing.called("on_batch")
        self._step_that_nobody_ended()
        opened = self._now()
        outputs, self._outputs = self._outputs, None
        if outputs is not None:
            if opened.microbatches and opened.microbatches[-1].captured:
                opened.microbatches.pop()
            is_read = opened.due or self._parts.signals is not None
            if is_read and (batch.logits is None or batch.loss is None):
                batch = complete_batch(batch, outputs)
        batch = whole_batch(batch)
        if batch.epoch is not None:
            self.epoch = int(batch.epoch)
        if batch.input_ids is None and batch.labels is None:
            raise ValueError("on_batch needs input_ids or labels")
        self._add(opened, batch)

    @guarded
    def before_clip(self) -> None:
        """Take the step's gradients, where they are due."""
        self._missing.called("before_clip")
        opened = self._now()
        if "gradients" in opened.due:
            self._take_gradients(opened, clipped=False)
        self._take_norms(opened, clipped=False)

    @guarded
    def before_optimizer(
        self, _optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See that the optimizer is about to step: rates, and the gradients if nobody said "before clipping".

        With a closure, forward and backward are still to come: the arguments are then those with the closure watched.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if callable(closure):
            self._step_that_nobody_ended()
        opened = self._now()
        opened.overflow = overflow_flag(self._parts.optimizer)
        if "lr" in opened.due and self._parts.topology.rank == 0:
            opened.rates = reduce_learning_rates(self._parts.optimizer.param_groups)
        if self._parts.signals is not None:
            self._parts.signals.before_update()
        if not callable(closure):
            self._take_norms(opened, clipped=True)
        if "gradients" not in opened.due or opened.gradients is not None:
            return None
        if not callable(closure):
            self._take_gradients(opened, clipped=True)
            return None
        watched = _followed_by(closure, self.after_closure)
        return (
            (args, {**kwargs, "closure": watched}) if "closure" in kwargs else ((args[0], watched, *args[2:]), kwargs)
        )

    @guarded
    def after_closure(self) -> None:
        """Take the gradients that the step's closure has made, if nobody said "before clipping" within it."""
        opened = self._now()
        if "gradients" in opened.due and opened.gradients is None:
            self._take_gradients(opened, clipped=True)
        self._take_norms(opened, clipped=True)

    @guarded
    def after_optimizer(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """See that the optimizer has stepped; the step ends with ``after_step``, else with the next forward."""
        opened = self._now()
        opened.stepped = True
        watch = self._parts.signals
        if watch is not None:
            watch.after_update()
            if self._parts.takes_norms and watch.wants_weights(opened.expected):
                watch.weights(self._table.weights(), len(self._table.modules))

    # --------------------------------------------------------------------------------------- what is told

    @guarded
    def after_step(
        self, step: int | None, *, applied: bool, grad_norm: torch.Tensor | float | None = None
    ) -> Command | None:
        """End the step under the trainer's own number."""
        if grad_norm is not None and self._parts.signals is not None:
            self._parts.signals.told_norm(grad_norm)
        self._explicit_steps = True
        self._missing.called("after_step")
        step = self.last_step + 1 if step is None else int(step)
        if step <= self.last_step:
            self.notice(
                "step-again",
                f"after_step({step}) came after step {self.last_step}: a number that grows is needed; what was seen "
                "since joins the next step.",
            )
            return None
        self._end(step, applied=applied)
        return self._command_at(step)

    def _command_at(self, step: int) -> Command | None:
        try:
            return None if self._commands is None else self._commands.at_boundary(step, self._parts.on_incident)
        except Exception as error:  # noqa: BLE001  (a callable's failure is counted and said; the training goes on)
            self.guard.failed("on_incident", error)
            return None

    @guarded
    def handed(self, hashed: HashedBatch) -> None:
        """Take the hashes that the data loader's workers made of a batch which the loop has taken."""
        if self._parts.signals is not None:
            self._parts.signals.handed(hashed)

    @guarded
    def mark_stage(self, name: str) -> None:
        """From the step that goes on, other data or another objective are meant to be."""
        self._stage = str(name)

    @guarded
    def log(self, values: Mapping[str, Any], step: int | None, step_key: str | None, reduce: str | None = None) -> None:
        """Keep what the trainer logs for the end of the step."""
        self._look_for_wandb()
        made, left_out = logged_values(values, step, step_key, reduce)
        if step is not None and not step_key and step <= self.last_step:
            self._send_late(step, [made])  # that step has ended: the worker shows it in a row of its own
        else:
            self._now().logged.append(made)
        if left_out:
            self.notice(
                "not-logged",
                "log() takes numbers, bools, texts and tensors of one element (of a DTensor what full_tensor() gives, "
                f"called on all ranks); left out: {left_out[0]}",
            )

    @guarded
    def release(self) -> None:
        """End the last step and let go of model and optimizer; what is logged still goes into the run."""
        self._step_that_nobody_ended(closing=True)
        for handle in self._removable:
            handle.remove()
        if self._parts.signals is not None:
            self._parts.signals.remove()

    @guarded
    def close(self, exit_code: int, reason: str) -> None:
        """End the last step, let go of model and optimizer, and say goodbye."""
        self.release()
        opened = self._opened
        if opened is not None and opened.logged:  # what was logged after the last step belongs to no step that will end
            self._send_late(opened.expected, opened.logged)
        self._parts.introduction.staging.advance()
        self._way().close(self._parts.config.close_timeout_seconds, exit_code=exit_code, reason=reason)

    @guarded
    def load(self, state: Mapping[str, Any], *, keep_step: bool) -> None:
        """Go on where a checkpoint was made; the run's id counts until the first hook has been called."""
        if self._transport is not None:
            self.notice("late-state", "load_state_dict() came after the first step: the run's id stays what it is.")
        self._state = dict(state)
        self.epoch = int(state.get("epoch", 0))
        if not keep_step:
            self.last_step = int(state["step"])
            self._opened = None

    # --------------------------------------------------------------------------------------- inside

    def notice(self, code: str, text: str, level: str = "warning") -> None:
        """Say something once, here and in the run."""
        if self._parts.introduction.console.once(code, text):
            self._way().submit(Notice(text=f"sidestep: {text}", code=code, level=level, step=self.last_step + 1))

    def _way(self) -> Transport:
        """The transport, opened at the first use: what ``load_state_dict`` says comes before."""
        if self._transport is None:
            self._transport = self._parts.introduction.open(self._state, self.last_step + 1)
            incarnation = self._parts.introduction.agreed.incarnation
            self._commands = Commands(self._transport, self._parts.topology, incarnation)
        return self._transport

    def _now(self) -> OpenStep:
        if self._opened is None:
            self._way()
            expected = self.last_step + 1
            self._opened = OpenStep(expected=expected, due=frozenset(self._schedule.due_families(expected)))
        return self._opened

    def _add(self, opened: OpenStep, batch: Batch) -> None:
        seen, reducer, watch = opened.microbatches, self._parts.reducer, self._parts.signals
        made = reducer.reduce(batch, opened.due, opened.expected, len(seen), self.epoch)
        if watch is not None:
            shifted, step = reducer.is_shifted(batch), opened.expected
            copied = None if made.labels is None else made.labels[1]
            made.signals = watch.microbatch(
                batch, reducer.aligned, shifted=shifted, step=step, microstep=len(seen), copied=copied
            )
        seen.append(made)

    def _step_that_nobody_ended(self, *, closing: bool = False) -> None:
        if self._opened is not None and self._opened.stepped and (closing or not self._explicit_steps):
            self._end(self.last_step + 1, applied=True)

    def _take_gradients(self, opened: OpenStep, *, clipped: bool) -> None:
        if not self._parts.takes_gradients:
            return
        if not self._table.fits(self._parts.model):
            self._table = self._renewed_table()
        held, without, partial = self._table.gradients()
        if held or partial:
            scale = carried_scale(self._parts.optimizer, self._parts.scaler)
            opened.gradients = StepGradients(reduce_gradients(held, scale), tuple(without), clipped, tuple(partial))

    def _take_norms(self, opened: OpenStep, *, clipped: bool) -> None:
        watch = self._parts.signals
        if watch is None or not self._parts.takes_norms or not watch.wants_gradients(opened.expected):
            return
        scale = carried_scale(self._parts.optimizer, self._parts.scaler)
        held = [each for each in self._table.gradients().held if each.is_first]
        watch.gradients(held, len(self._table.modules), scale, clipped=clipped)

    def _renewed_table(self) -> ParameterTable:
        """The table with the parameters of now; rows keep their numbers, which the worker knows."""
        renewed = self._parts.make_table()
        if renewed.places() == self._table.places():
            return renewed
        if self._table.holds_shares():  # gathered for a while by FSDP, which keeps the shares and their gradients
            return self._table
        self.notice("parameters", "parameters were replaced since attach(): gradients of those known then are shown.")
        return self._table

    def _end(self, step: int, *, applied: bool) -> None:
        """End the open step as ``step``: launch its copies, generate, and say what was sent."""
        opened = self._now()
        self._opened, self._outputs = None, self._outputs if self._overriding else None
        self.last_step = step
        if (self._parts.scaler is not None and not opened.stepped) or is_known_overflow(opened.overflow):
            applied = False  # the scaler did not call the optimizer, or told it to leave all as it is
        due = self._schedule.due_families(step)
        families = opened.due if step == opened.expected else frozenset(due)
        counts = StepCounts()
        try:
            counts = stage_step(opened, self._facts(step, families, applied=applied), self._parts.introduction.staging)
        except Exception as error:  # noqa: BLE001  (counted and said; the step still has its end)
            self.guard.failed("staging", error)
        watch = self._parts.signals
        if watch is not None:
            read = [batch.signals for batch in opened.microbatches if batch.signals is not None]
            watch.end(step, read, self._parts.introduction.staging, counts)
            self.guard.exclude(watch.take_waited())
        self._generate(step, due, counts)
        self._parts.introduction.staging.advance()
        self._way().submit(
            StepEnd(
                step=step,
                unix_time=time.time(),
                applied=applied,
                epoch=self.epoch,
                sent=counts.sent,
                dropped=counts.dropped,
                due=due,
                hook_seconds=self.guard.take_seconds(),
                stage=self._stage,
            )
        )
        self._stage = ""
        self._look_back(opened)

    def _send_late(self, step: int, logged: list[LoggedValues]) -> None:
        self._way()
        late = OpenStep(expected=step, due=frozenset(), logged=logged)
        stage_step(late, self._facts(step, frozenset(), applied=False), self._parts.introduction.staging)

    def _facts(self, step: int, due: frozenset[str], *, applied: bool) -> StepFacts:
        return StepFacts(
            step=step,
            applied=applied,
            due=due,
            world_size=self._parts.topology.world_size,
            staging_bytes=self._parts.config.staging_bytes,
        )

    def _generate(self, step: int, due: tuple[str, ...], counts: StepCounts) -> None:
        generator = self._parts.generator
        if generator is None:
            return
        is_due = "generation" in due or "collapse" in due
        if not is_due and not self._is_wished(generator, step):
            return
        if self._every_rank is not None and not self._every_rank.take_part():
            self.notice(
                "generation", "not all ranks have hooks: nothing is generated, as the others would be waited for."
            )
            return
        began = time.perf_counter()
        try:
            made = generator.run(step, alone=not is_due)
            if not generator.is_collective or self._parts.topology.rank == 0:
                self._way().submit(made)
                counts.add((Kind.GENERATION,), staged=True)
        except Exception as error:  # noqa: BLE001  (its samples' failures are its own; this is another: counted, said)
            self.guard.failed("generation", error)
        finally:
            waited = time.perf_counter() - began
            self.guard.exclude(waited)
            if self._parts.signals is not None:
                self._parts.signals.waited(waited)

    def _is_wished(self, generator: Generator, step: int) -> bool:
        """Whether the worker wishes for samples now: of ranks that generate together, not all would hear of it."""
        may_be = self._commands is not None and generator.is_first and not generator.is_collective
        return may_be and self._commands is not None and self._commands.take_sample(step)

    def _look_back(self, opened: OpenStep) -> None:
        """Learn from the step how the trainer uses the hooks, and say once what it seems to have forgotten."""
        seen = opened.microbatches
        if seen and not self._overriding and not any(batch.captured for batch in seen):
            self._overriding = True
        for code, text in self._missing.after_step(opened):
            self.notice(code, text)
        self._look_for_wandb()

    @guarded
    def warn_of_two_runs(self, text: str) -> None:
        """Say what the trainer's own way to leave a second run out is, in place of the notice of a live one."""
        self._wandb_looked_for = False
        self.notice("wandb", text)

    def _look_for_wandb(self) -> None:
        if self._wandb_looked_for and getattr(sys.modules.get("wandb"), "run", None) is not None:
            self._wandb_looked_for = False
            self.notice("wandb", WANDB_NOTICE)


def _followed_by(closure: Callable[[], Any], then: Callable[[], object]) -> Callable[[], Any]:
    def watched() -> Any:
        result = closure()
        then()
        return result

    return watched
