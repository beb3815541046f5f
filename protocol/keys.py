"""Key files for endpoints that others can reach (docs/delivery.md, section 9): who may read them, and what they hold.

One folder on both sides, each with its own files in it: ``server.secret`` and ``clients/*.public`` for the worker,
``client.secret`` and ``server.public`` for the trainer. A file holds one key as ZeroMQ writes it (Z85, 40 characters);
lines that begin with ``# `` are for people.
"""

from __future__ import annotations

import os
import stat
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.errors import KeyFileError

KEYS_VARIABLE: Final = "SIDESTEP_KEYS"
"""The folder with the key files, on both sides."""
SERVER_KEY_VARIABLE: Final = "SIDESTEP_SERVER_KEY"
"""The server's public key itself, for a trainer whose folder lacks ``server.public``."""
SERVER_SECRET: Final = "server.secret"  # noqa: S105  (a file's name)
SERVER_PUBLIC: Final = "server.public"
CLIENT_SECRET: Final = "client.secret"  # noqa: S105  (a file's name)
CLIENTS: Final = "clients"
"""The folder of the public keys that a worker lets in."""
PUBLIC_SUFFIX: Final = ".public"
MAX_CLIENT_KEYS: Final = 16_384
"""Keys that one worker lets in; files beyond are left out."""

_MAX_FILE_BYTES: Final = 4_096
_KEY_CHARACTERS: Final = 40
_Z85: Final = string.digits + string.ascii_lowercase + string.ascii_uppercase + ".-:+=^!/*?&<>()[]{}@%$#"
_ROOT: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKeys:
    """What a worker needs to be reached from other hosts."""

    secret_key: str = field(repr=False)
    clients: Path
    """The folder of the public keys that are let in; read again when it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientKeys:
    """What a trainer needs to reach a worker on another host."""

    secret_key: str = field(repr=False)
    server_key: str
    """The worker's public key: whoever lacks its secret half cannot answer in its place."""


def checked_folder(endpoint: Endpoint, folder: Path | None) -> Path | None:
    """Return the folder whose keys are used at this endpoint: over ``tcp``, on loopback too where there is one.

    Raises:
        KeyFileError: the endpoint can be reached from other hosts, and there is no folder of keys.
    """
    if endpoint.transport != "tcp":
        return None
    if folder is None and not endpoint.is_private:
        raise KeyFileError(
            f"{endpoint.address} can be reached from other hosts, and there are no key files for it: make them once "
            f"with `sidestep keys DIR` and set {KEYS_VARIABLE}=DIR for the worker and for every rank, or use "
            "ipc://PATH or tcp://127.0.0.1:PORT"
        )
    return folder


def keys_folder(environment: Mapping[str, str]) -> Path | None:
    """Return the folder that ``SIDESTEP_KEYS`` names, None where it names none."""
    named = environment.get(KEYS_VARIABLE, "")
    return Path(named).expanduser().absolute() if named else None


def server_keys(endpoint: Endpoint, folder: Path | None) -> ServerKeys | None:
    """Return what a worker needs to listen at ``endpoint``; None where it needs no keys.

    Raises:
        KeyFileError: keys are needed and not given, a file is missing or is no key, or others may read it; the text
            says what to do.
    """
    folder = checked_folder(endpoint, folder)
    if folder is None:
        return None
    clients = folder / CLIENTS
    keys = ServerKeys(secret_key=read_secret(folder / SERVER_SECRET), clients=clients)
    if not client_keys_in(clients):
        raise KeyFileError(f"{clients} holds no public key (NAME{PUBLIC_SUFFIX}), so that no trainer could connect")
    return keys


def client_keys(endpoint: Endpoint, environment: Mapping[str, str], *, told: str = "") -> ClientKeys | None:
    """Return what a trainer needs to connect to ``endpoint``; None where it needs no keys.

    The worker's public key is that of the file, else that of ``SIDESTEP_SERVER_KEY``, else what it was ``told``: the
    store through which the ranks meet is open to others.

    Raises:
        KeyFileError: keys are needed and not given, a file is missing or is no key, or others may read it; the text
            says what to do.
    """
    folder = checked_folder(endpoint, keys_folder(environment))
    if folder is None:
        return None
    secret = read_secret(folder / CLIENT_SECRET)
    public = folder / SERVER_PUBLIC
    named = environment.get(SERVER_KEY_VARIABLE, "")
    if public.exists():
        return ClientKeys(secret_key=secret, server_key=read_public(public))
    if named or told:
        return ClientKeys(secret_key=secret, server_key=checked_key(named or told, SERVER_KEY_VARIABLE))
    raise KeyFileError(f"{public} is missing: copy the worker's there, or set {SERVER_KEY_VARIABLE} to its content")


def read_secret(path: Path) -> str:
    """Return the key in a file that its owner alone may read.

    A file of root's may be readable by its group: so are secrets mounted into a container.

    Raises:
        KeyFileError: it is missing, is no key, or others may read it.
    """
    text, found = _read(path)
    if found.st_uid not in {os.geteuid(), _ROOT}:
        raise KeyFileError(f"the key file {path} belongs to user {found.st_uid}, neither to this one nor to root")
    forbidden = 0o037 if found.st_uid == _ROOT else 0o077
    if stat.S_IMODE(found.st_mode) & forbidden:
        raise KeyFileError(
            f"others may read the key file {path} (mode {stat.S_IMODE(found.st_mode):04o}); `chmod 600 {path}`, and "
            "make new keys if it has been so for long"
        )
    return checked_key(text, str(path))


def read_public(path: Path) -> str:
    """Return the key in a file that anyone may read.

    Raises:
        KeyFileError: it is missing, or is no key.
    """
    return checked_key(_read(path)[0], str(path))


def client_keys_in(folder: Path) -> frozenset[str]:
    """Return the public keys that a worker lets in.

    Raises:
        KeyFileError: the folder or a file cannot be read or is no key, or others could add one.
    """
    try:
        found = folder.stat()
        names = sorted(each.name for each in folder.iterdir() if each.name.endswith(PUBLIC_SUFFIX))
        is_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError as error:
        raise KeyFileError(
            f"the folder of client keys {folder} cannot be read: {error.strerror}; `sidestep keys` makes one"
        ) from error
    if found.st_mode & 0o022 and not is_read_only:  # a secret's volume in Kubernetes is 1777, and read-only
        raise KeyFileError(f"others may add keys to {folder}; `chmod go-w {folder}`")
    return frozenset(read_public(folder / name) for name in names[:MAX_CLIENT_KEYS])


def checked_key(text: str, source: str) -> str:
    """Return the one key in ``text``.

    Raises:
        KeyFileError: it holds no key, or more than one.
    """
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("# ") and line != "#"]
    if len(keys) != 1 or not _is_key(keys[0]):
        raise KeyFileError(
            f"{source} does not hold one key of {_KEY_CHARACTERS} characters; `sidestep keys` makes them"
        )
    return keys[0]


def _is_key(text: str) -> bool:
    """Whether ZeroMQ can decode it: five characters of Z85 are 32 bits."""
    if len(text) != _KEY_CHARACTERS or any(character not in _Z85 for character in text):
        return False
    groups = [text[at : at + 5] for at in range(0, _KEY_CHARACTERS, 5)]
    return all(sum(_Z85.index(each) * 85 ** (4 - at) for at, each in enumerate(group)) < 1 << 32 for group in groups)


def _read(path: Path) -> tuple[str, os.stat_result]:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise KeyFileError(f"the key file {path} is not a file")
            return file.read(_MAX_FILE_BYTES).decode("ascii"), found
    except FileNotFoundError as error:
        raise KeyFileError(f"the key file {path} is missing; `sidestep keys` makes it") from error
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read by user {os.geteuid()}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeyFileError(f"the key file {path} does not hold a key") from error
