"""A folder for the files that wandb makes on its way and leaves behind.

Every picture of a table stays in a temporary folder until the process exits by Python's own way, which the sink never
does: in a container whose /tmp is memory, a long run would fill it. What W&B needs of them (offline until ``wandb
sync``) it copies into its staging folder first.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Final

_LOG: Final = logging.getLogger(__name__)

_FOLDERS_OF_THE_PROCESS: Final = ("wandb-media", "wandb-artifacts")
"""How the names of those end that wandb makes once, when it is imported."""


class Scratch:
    """The process's temporary files, in a folder of its own. One at a time, before wandb is imported."""

    def __init__(self, folder: Path) -> None:
        """Take the place of the system's temporary folder; what an earlier process left there is removed."""
        self._folder = folder
        self.remove()
        folder.mkdir(exist_ok=True)
        tempfile.tempdir = str(folder.resolve())  # not TMPDIR: wandb-core's socket needs a short path

    def clear(self) -> None:
        """Remove what is no longer needed: everything, when no call into wandb is under way."""
        for place in self._folder.iterdir():
            if place.name.endswith(_FOLDERS_OF_THE_PROCESS):
                for file in place.iterdir():
                    _remove(file)
            else:
                _remove(place)

    def remove(self) -> None:
        """Remove the folder."""
        if self._folder.exists():
            _remove(self._folder)


def _remove(place: Path) -> None:
    try:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    except OSError as error:  # it costs room, no row
        _LOG.warning("a temporary file cannot be removed: %s", error)
