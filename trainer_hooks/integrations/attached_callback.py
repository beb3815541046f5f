"""What the callbacks of Hugging Face's ``Trainer`` and of Lightning's have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypedDict, Unpack

from torch import nn

from sidestep.protocol.messages import Command
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.generation import GenerateFunction
from sidestep.trainer_hooks.guard import Guard
from sidestep.trainer_hooks.hooks import Hooks, attach
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.transport import OpenTransport


class AttachArguments(TypedDict, total=False):
    """Arguments of both callbacks, by name; what is left out is as ``attach`` has it."""

    samples: Sequence[Sample] | None
    """What to generate from; none: no generation and no collapse rules."""
    config: HooksConfig | None
    """Intervals, thresholds and bounds."""
    tokenizer: Any
    """As in ``attach``."""
    project: str | None
    """Of the W&B run that the worker opens; so are ``entity``, ``name`` and ``tags``."""
    entity: str | None
    """See ``project``."""
    name: str | None
    """See ``project``."""
    tags: Sequence[str]
    """See ``project``."""
    run_config: Mapping[str, Any] | None
    """Added to what the callback itself finds of the run's configuration, and winning over it."""
    modules: Mapping[str, str] | None
    """Prefixes of parameter names to the modules that gradients are shown under."""
    generate_fn: GenerateFunction | None
    """As in ``attach``."""
    endpoint: str | None
    """Where the worker listens; left out, ``SIDESTEP_ENDPOINT``, else rank 0 starts one."""
    run_id: str | None
    """The run to go on in, in place of a checkpoint's."""
    transport: OpenTransport | None
    """As in ``attach``."""
    obeys: Sequence[str]
    """What the worker may ask of the trainer at a step's end and is done: ``"stop"``, and where the callback can,
    ``"checkpoint"``. None by default: it is said once, and training goes on."""


class Watch(Protocol):
    """What is wrapped of a training while it goes on."""

    epoch: int
    """The epoch that batches are shown with."""

    def end(self) -> None:
        """Undo it all."""
        ...


class AttachedCallback:
    """Attaches to each training that begins, and keeps the account of its hooks.

    Raises:
        TypeError: an argument that there is none of, or one of a wrong type.
        ValueError: the callback cannot do what ``obeys`` names.
    """

    can_obey: ClassVar[frozenset[str]] = frozenset()
    """Actions of a ``Command`` that this callback knows how to take."""

    def __init__(self, **given: Unpack[AttachArguments]) -> None:
        unknown = sorted(given.keys() - AttachArguments.__annotations__.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__}() has no argument {', '.join(unknown)}")
        passed_on: dict[str, Any] = dict(given)
        config, run_config = passed_on.pop("config", None), passed_on.pop("run_config", None)
        if run_config is not None and not isinstance(run_config, Mapping):
            raise TypeError(f"run_config must be a mapping, not {type(run_config).__name__}")
        if config is not None and not isinstance(config, HooksConfig):
            raise TypeError(f"config must be a HooksConfig, not {type(config).__name__}")
        self._config = HooksConfig() if config is None else config
        self._run_config = dict(run_config or {})
        self._obeys = self._checked_obeys(passed_on.pop("obeys", ()))
        self._passed_on = passed_on
        self._console = Console()
        self.guard = Guard(self._console)
        self.hooks: Hooks | None = None
        """The hooks of the newest training; None before the first."""
        self._watch: Watch | None = None

    def _checked_obeys(self, obeys: Sequence[str]) -> frozenset[str]:
        wanted = frozenset({obeys} if isinstance(obeys, str) else obeys)
        if not wanted <= self.can_obey:
            raise ValueError(
                f"obeys is {sorted(wanted)}; {type(self).__name__} can: {', '.join(sorted(self.can_obey))}"
            )
        return wanted

    def failures(self) -> dict[str, int]:
        """How often something failed inside the hooks or this callback, by where; empty is as it should be."""
        return {**(self.hooks.failures() if self.hooks is not None else {}), **self.guard.failures}

    def close(self) -> None:
        """End the run; without this call the next training or the end of the process does it."""
        self._let_go()
        if self.hooks is not None:
            self.hooks.close()

    def _attach(
        self, model: nn.Module, optimizer: Any, *, step: int, scaler: Any, run_config: Mapping[str, Any], **more: Any
    ) -> Hooks:
        """Attach with what the user gave, completed and overridden by ``more``; raises what ``attach`` does."""
        arguments = {"config": self._config, **self._passed_on, **more}
        settings = {**run_config, **self._run_config}
        self.hooks = attach(model, optimizer, step=step, scaler=scaler, run_config=settings, **arguments)
        return self.hooks

    def _let_go(self) -> None:
        """Undo what is wrapped; what is logged still goes into the run."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()
        if self.hooks is not None:
            self.hooks.release()

    def _take(self, command: Command | None, actions: Mapping[str, Callable[[], None]], num_processes: int) -> None:
        """Do what the worker asks for where the user opted in; ranks that do not agree on a step would hang."""
        if command is None:
            return
        reason = f" ({command.reason})" if command.reason else ""
        if command.action not in self._obeys:
            hint = f'; obeys=("{command.action}",) would' if command.action in self.can_obey else ""
            text = f"the worker asks for: {command.action}{reason}. This callback does not do it{hint}."
        elif num_processes > 1:
            text = f"the worker asks for: {command.action}{reason}. It is done by trainings of one process only."
        else:
            actions[command.action]()
            text = f"done as the worker asks: {command.action}{reason}."
        self._console.once(f"command-{command.action}", text)
