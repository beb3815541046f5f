"""A small file system of a test's own, to be filled and freed; such a test skips where none can be mounted."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

_PAGE_BYTES = 4_096


class SmallDisk:
    """A memory file system of so many MiB, mounted for one test."""

    def __init__(self, folder: Path, size_mib: int) -> None:
        self.folder = folder
        self._filler = folder / "filler"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "sidestep-test", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"no file system of its own can be mounted here: {error}")
        if done.returncode != 0:
            pytest.skip(f"no file system of its own can be mounted here: {done.stderr.strip()}")

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self) -> None:
        """Take every page that is free, whoever else takes some meanwhile."""
        with self._filler.open("ab") as filler:
            wanted = self.free_bytes
            while wanted >= _PAGE_BYTES:
                try:
                    os.posix_fallocate(filler.fileno(), filler.seek(0, os.SEEK_END), wanted)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    wanted //= 2

    def free(self) -> None:
        """Give it all back."""
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Take the file system away, whoever still holds a file of it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True, timeout=10)
