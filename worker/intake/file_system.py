"""What kind of file system a journal would lie on (docs/delivery.md, section 7).

A write-ahead log needs memory that every reader shares, and a commit needs an fsync that means it: network file systems
promise neither. The kernel is asked twice: by ``statfs`` for the type's number, and by the list of mounts for its name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNTS_FILE: Final = Path("/proc/self/mountinfo")
_STATFS_BYTES: Final = 512

NETWORK_TYPES: Final = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x01021997: "9p",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x00C36400: "ceph",
    0x5346414F: "afs",
    0x6B414653: "kafs",
    0x73757245: "coda",
    0x65735546: "fuse",
    0x20030528: "orangefs",
    0xAAD7AAEA: "panfs",
    0x786F4256: "vboxsf",
    0x564C: "ncp",
}
"""``f_type`` of statfs(2) to a name; the numbers of linux/magic.h and of the file systems' own sources."""

NETWORK_NAMES: Final = frozenset({
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "fhgfs", "glusterfs", "gpfs", "lustre", "mmfs", "ncpfs",
    "nfs", "nfs4", "orangefs", "panfs", "prl_fs", "pvfs2", "smb3", "smbfs", "vboxsf", "wekafs",
})  # fmt: skip
LOCAL_FUSE_NAMES: Final = frozenset({"fuseblk", "fuse.fuse-overlayfs"})
"""FUSE over a local disk, and the root of a container without privileges: one kernel has all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of ``/proc/self/mountinfo``."""

    point: str
    type_name: str


def mounts_of(lines: Iterable[str]) -> list[Mount]:
    """Return the mounts that proc(5) lists, in its order; lines that are none are left out."""
    found = []
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if separator and len(fields) > 4 and kind[0]:
            found.append(Mount(point=_unescaped(fields[4]), type_name=kind[0]))
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """Return the mount that an absolute, resolved path lies on: the longest point above it, the last one of equals."""
    best: Mount | None = None
    for mount in mounts:
        root = mount.point.rstrip("/") + "/"
        if (path.rstrip("/") + "/").startswith(root) and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def statfs_type(path: Path) -> int:
    """Return ``f_type`` of the file system that ``path`` lies on.

    Raises:
        OSError: there is no such call here, or it fails.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).statfs
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    room = ctypes.create_string_buffer(_STATFS_BYTES)
    if call(os.fsencode(path), room) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int.from_bytes(room.raw[:4], "little" if _is_little() else "big")  # 32 bits suffice for every magic number


def _is_little() -> bool:
    return int.from_bytes(bytes(ctypes.c_uint16(1)), "little") == 1


def network_name(type_number: int, type_name: str) -> str:
    """Return the network file system's name that a type's number and name stand for, empty for a local one."""
    if type_name in LOCAL_FUSE_NAMES:
        return ""
    if type_name in NETWORK_NAMES or type_name == "fuse" or type_name.startswith("fuse."):
        return type_name
    return NETWORK_TYPES.get(type_number, "")


def network_file_system(folder: Path) -> str:
    """Return the name of the network file system that ``folder`` (or what is there of it) lies on, empty for none.

    Where the kernel cannot be asked, the answer is that of the other question, or none.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    there = there.resolve()
    try:
        type_number = statfs_type(there)
    except OSError:
        type_number = 0  # the list of mounts is asked as well
    try:
        lines = MOUNTS_FILE.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []  # no Linux, or no /proc: the number above is all there is
    mount = mount_of(str(there), mounts_of(lines))
    return network_name(type_number, mount.type_name if mount is not None else "")
