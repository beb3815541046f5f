"""What holds for every test: no network, no account, no state outside its own folders, one thread a process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Read by OpenMP when torch or numpy is first loaded, and by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # a program that asks for more threads does not spin on shared cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when Triton is first imported, by whichever test comes first: without a device its kernels run interpreted.
if not os.path.exists("/dev/nvidiactl"):  # noqa: PTH110  (before anything else is imported)
    os.environ["TRITON_INTERPRET"] = "1"

# The caller's own settings must not steer a test, nor a test write to the caller's account.
_UNSET_PREFIXES = ("SIDESTEP_", "WANDB_", "TORCHELASTIC_")
_UNSET_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session", autouse=True)
def isolated_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the whole session a home of its own and an offline W&B; child processes inherit it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(_UNSET_PREFIXES) or name in _UNSET_NAMES:
                patch.delenv(name)
        for name, folder in {
            "XDG_STATE_HOME": "state",
            "XDG_CACHE_HOME": "cache",
            "XDG_CONFIG_HOME": "config",
            "XDG_RUNTIME_DIR": "runtime",
            "WANDB_DIR": "wandb",
            "WANDB_CACHE_DIR": "wandb-cache",
            "WANDB_CONFIG_DIR": "wandb-config",
            "WANDB_DATA_DIR": "wandb-staging",
        }.items():
            place = home / folder
            place.mkdir(mode=0o700)
            patch.setenv(name, str(place))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield
