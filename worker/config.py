"""The worker's options: from the command line, else ``SIDESTEP_*``, else a TOML file, else the default."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from sidestep.worker.errors import ConfigError

ENVIRONMENT_PREFIX: Final = "SIDESTEP_"
CONFIG_VARIABLE: Final = "SIDESTEP_CONFIG"
WANDB_MODES: Final = ("", "online", "offline", "disabled")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _folder(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise TypeError("a folder")
    return Path(value).expanduser().absolute()


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in known:
        raise TypeError("yes or no")
    return known[value.lower()]


def _count(least: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        wanted = f"a whole number of at least {least}"
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise TypeError(wanted)
        try:
            number = int(value)
        except ValueError:
            raise TypeError(wanted) from None
        if number < least:
            raise TypeError(wanted)
        return number

    return convert


def _seconds(value: Any) -> float:
    wanted = "a number of seconds, 0 or more"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(wanted)
    try:
        number = float(value)
    except ValueError:
        raise TypeError(wanted) from None
    if not math.isfinite(number) or number < 0:
        raise TypeError(wanted)
    return number


def _mode(value: Any) -> str:
    if value not in WANDB_MODES:
        raise TypeError("online, offline or disabled")
    return str(value)


def _option(default: object, convert: Callable[[Any], Any], metavar: str, meaning: str) -> Any:
    return field(default=default, metadata={"convert": convert, "metavar": metavar, "help": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker's options; each field is ``--name``, ``SIDESTEP_NAME`` and a key of the TOML file alike."""

    endpoint: str = _option("", _text, "ADDRESS", "where to listen: ipc://PATH or tcp://HOST:PORT")
    """Empty: ``worker.sock`` in the private runtime folder. Off loopback it needs ``keys``."""
    keys: Path | None = _option(None, _folder, "DIR", "folder of key files, made by `sidestep keys` (for tcp)")  # noqa: RUF009
    """``server.secret`` and ``clients/*.public`` in it; off loopback nobody is listened to without."""
    journal: Path | None = _option(None, _folder, "DIR", "the journal's folder (default: OUT/journal)")  # noqa: RUF009
    """What arrives is kept here; the same folder continues the same journal."""
    out: Path | None = _option(None, _folder, "DIR", "where W&B's files go (default: a new folder)")  # noqa: RUF009
    """None: the journal's parent, or a new folder in ``SIDESTEP_HOME``."""
    project: str = _option("", _text, "NAME", "W&B project where the trainer names none")
    """Used where a trainer's Hello names none."""
    entity: str = _option("", _text, "NAME", "W&B entity where the trainer names none")
    """Used where a trainer's Hello names none."""
    wandb_mode: str = _option("", _mode, "MODE", "online, offline or disabled (default: WANDB_MODE, else by key)")
    """Empty: ``WANDB_MODE``, else online where a key is found, else offline."""
    assembly_deadline_seconds: float = _option(30.0, _seconds, "S", "how long a step waits for missing parts")
    """From the arrival of a step's first part until it closes without the rest."""
    commit_interval_seconds: float = _option(0.02, _seconds, "S", "longest time until what arrived is on disk")
    """Messages that arrive within it share one transaction."""
    commit_messages: int = _option(1_000, _count(1), "N", "messages of one transaction, at most")
    """A transaction is made sooner when this many wait."""
    segment_bytes: int = _option(1 << 30, _count(1 << 16), "BYTES", "size at which a journal's segment is followed")
    """By a new one."""
    journal_max_bytes: int = _option(20 << 30, _count(0), "BYTES", "what the journal may take before old messages go")
    """Whole segments go, the oldest first, once all their steps have closed; the outbox stays. 0: no bound."""
    journal_on_network_fs: bool = _option(
        default=False, convert=_flag, metavar="", meaning="take a journal's folder on a network file system"
    )
    """With slower commits, and no promise where a power loss or a second host is concerned."""
    feed_bytes: int = _option(64 << 20, _count(1 << 16), "BYTES", "arrived bytes kept in memory for assembly")
    """What is over it is read back from the journal."""
    sink_drain_seconds: float = _option(30.0, _seconds, "S", "how long the sinks may take when the worker ends")
    """What remains then stays in the outbox."""
    trainer_silence_seconds: float = _option(15.0, _seconds, "S", "silence after which a vanished trainer is given up")
    """Applies where its process is gone; elsewhere eight times as long."""
    idle_exit_seconds: float = _option(10.0, _seconds, "S", "how long to stay when nothing is left to do")
    """With ``owner_pid`` or ``until_idle``."""
    owner_pid: int = _option(0, _count(0), "PID", "end once this process is gone and all is delivered")
    """0: nobody's."""
    until_idle: bool = _option(
        default=False, convert=_flag, metavar="", meaning="end once every run has ended and all is delivered"
    )
    """At least one run must have come."""
    detector: str = _option("", _text, "MODULE:CLASS", "judge by detectors of your own too; several by commas")
    """``package.module:Class`` each, beside those that are installed as entry points ``sidestep.detectors``."""
    health_port: int = _option(0, _count(0), "PORT", "port of /healthz and /metrics (default: any)")
    """Recorded in ``worker.json``."""
    health_host: str = _option("127.0.0.1", _text, "HOST", "address of these two pages (default: 127.0.0.1)")
    """Anything but loopback opens the worker's figures to the network: there is no key."""


def environment_name(option: str) -> str:
    """Return the variable that sets ``option``."""
    return ENVIRONMENT_PREFIX + option.upper()


def flag_name(option: str) -> str:
    """Return the command line's name of ``option``."""
    return "--" + option.replace("_", "-")


def load_config(
    given: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> WorkerConfig:
    """Merge the sources; ``given`` (the command line) goes over the environment, over the file, over the defaults.

    Raises:
        ConfigError: a value is wrong or unknown; names the option and its source.
    """
    environment = os.environ if environment is None else environment
    sources = dict(_from_file(file, environment))
    for option in fields(WorkerConfig):
        variable = environment_name(option.name)
        if environment.get(variable):
            sources[option.name] = (environment[variable], f"the environment variable {variable}")
        if given is not None and given.get(option.name) is not None:
            sources[option.name] = (given[option.name], f"the command line's {flag_name(option.name)}")
    return WorkerConfig(**{name: _converted(name, value, source) for name, (value, source) in sources.items()})


def _converted(name: str, value: Any, source: str) -> Any:
    convert = next(option.metadata["convert"] for option in fields(WorkerConfig) if option.name == name)
    try:
        return convert(value)
    except TypeError as wanted:
        raise ConfigError(f"{name}: {value!r} (from {source}) is not {wanted}") from None


def _from_file(file: Path | None, environment: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    origin = "--config"
    if file is None:
        if not environment.get(CONFIG_VARIABLE):
            return {}
        file, origin = Path(environment[CONFIG_VARIABLE]), CONFIG_VARIABLE
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: {str(file)!r} (from {origin}) cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {str(file)!r} (from {origin}) is not TOML: {error}") from error
    known = {option.name for option in fields(WorkerConfig)}
    for name in table:
        if name not in known:
            raise ConfigError(f"{name}: no such option (from the file {file}); there are {', '.join(sorted(known))}")
    return {name: (value, f"the file {file}") for name, value in table.items()}
