"""A FUSE file system of one empty folder, mounted by hand: ``python -m tests.support.tiny_fuse FOLDER`` (root only).

It says that it is there, and nothing else; "ready" on standard output says that it is mounted.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_HEADER = struct.Struct("<IIQQIIII")
_INIT, _GETATTR, _STATFS, _FORGET, _DESTROY, _BATCH_FORGET = 26, 3, 17, 2, 38, 42
_ENOSYS, _ENOENT, _LOOKUP = 38, 2, 1
_FOLDER_MODE = 0o40700


def _answer(opcode: int) -> tuple[int, bytes]:
    if opcode == _INIT:
        return 0, struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 1, 1, 4_096, 1, 1, 0, 0, *[0] * 7)
    if opcode == _GETATTR:
        return 0, struct.pack(
            "<QII6Q10I", 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, _FOLDER_MODE, 2, os.getuid(), 0, 0, 4_096, 0
        )
    if opcode == _STATFS:
        return 0, struct.pack("<5Q4I6I", 1_000, 900, 900, 10, 9, 4_096, 255, 4_096, 0, *[0] * 6)
    return (-_ENOENT if opcode == _LOOKUP else -_ENOSYS), b""


def serve(folder: str) -> int:
    """Mount and answer until it is unmounted."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(b"sidestep-test", os.fsencode(folder), b"fuse.tiny", 0, options) != 0:
        sys.stdout.write(f"refused: {os.strerror(ctypes.get_errno())}\n")
        return 1
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        try:
            request = os.read(device, 1 << 17)
        except OSError:
            return 0  # it was unmounted
        _, opcode, unique, *_ = _HEADER.unpack_from(request)
        if opcode in {_FORGET, _BATCH_FORGET}:
            continue
        error, body = _answer(opcode)
        os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)
        if opcode == _DESTROY:
            return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
