"""``host_gradients.c`` made into a library on the machine that it runs on: compiled once, kept in a cache.

What the processor can do is read from ``/proc/cpuinfo``; the compiler is ``CC``, else ``cc``, ``gcc`` or ``clang``. The
cache lies in ``XDG_CACHE_HOME``, else in ``~/.cache``. It is used only where nobody else may write to it, since what
lies in it is run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sidestep.trainer_hooks.errors import KernelError

SOURCE = Path(__file__).with_name("host_gradients.c")
COMPILE_SECONDS = 120.0
_CPU_INFO = Path("/proc/cpuinfo")
_ALWAYS = ("-std=gnu11", "-O3", "-shared", "-fPIC")
_AVX2 = ("avx2", "fma", "f16c")


class Instructions(NamedTuple):
    """Vector instructions that the source can be compiled for."""

    name: str
    features: tuple[str, ...]
    """What ``/proc/cpuinfo`` must list; the compiler's options are the same words behind ``-m``."""


KNOWN_INSTRUCTIONS = (
    Instructions("AVX-512", (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")),
    Instructions("AVX2", _AVX2),
)
"""The widest first."""


@cache
def features() -> frozenset[str]:
    """Return what this processor can do, in the words of ``/proc/cpuinfo``; empty where nothing says it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system: numpy's passes have no such need
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())


def instructions() -> Instructions | None:
    """Return the widest instructions of this processor that the source is written for; None where there are none."""
    return next((each for each in KNOWN_INSTRUCTIONS if features().issuperset(each.features)), None)


def compiler() -> str | None:
    """Return the path of a C compiler; None where there is none."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cached_library(chosen: Instructions) -> Path | None:
    """Return where the library for such instructions is kept; None where no folder of this user's alone can be had."""
    folder = _cache_folder()
    if folder is None:
        return None
    told = "\0".join((SOURCE.read_text(encoding="utf-8"), *_options(chosen)))
    return folder / f"host_gradients-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"


def obstacle() -> str:
    """Return why there can be no library here; empty where there can."""
    chosen = instructions()
    if chosen is None:
        return "a processor without AVX2"
    if compiler() is not None:
        return ""
    kept = cached_library(chosen)
    return "" if kept is not None and kept.is_file() else "no C compiler"


def library(chosen: Instructions) -> Path:
    """Return the path of a library for such instructions, compiled now where the cache has none.

    Raises:
        KernelError: there is no compiler, it fails, or it takes more than ``COMPILE_SECONDS``.
        OSError: nothing can be written anywhere.
    """
    kept = cached_library(chosen)
    if kept is None:
        kept = Path(tempfile.mkdtemp(prefix="sidestep-kernels-")) / "host_gradients.so"
    if not kept.is_file():
        _compile(kept, chosen)
    return kept


def _options(chosen: Instructions) -> list[str]:
    return [*_ALWAYS, *(f"-m{feature}" for feature in chosen.features)]


def _cache_folder() -> Path | None:
    """Return the cache, made where it is not there; None where it cannot be, or others may write to it."""
    told = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(told) if told else Path.home() / ".cache") / "sidestep" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):  # a home that cannot be written to, or none at all: a folder of the moment will do
        return None
    is_own = state.st_uid == os.geteuid() and not state.st_mode & 0o022
    return folder if is_own and os.access(folder, os.W_OK | os.X_OK) else None


def _compile(target: Path, chosen: Instructions) -> None:
    """Compile beside the target and put the result in its place at once: other processes may do the same."""
    found = compiler()
    if found is None:
        raise KernelError("there is no C compiler")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [found, *_options(chosen), "-o", str(made), str(SOURCE)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise KernelError(f"{found} did not end within {COMPILE_SECONDS:.0f} s") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise KernelError(f"{found} failed: {said[0] if said else f'exit status {done.returncode}'}")
        made.replace(target)
