"""What a fresh interpreter holds after an import: the promise behind the import rules, seen from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NEEDS_MORE = (
    "sidestep.trainer_hooks.integrations.",
    "sidestep.trainer_hooks.kernels.gradient_kernel",
    "sidestep.trainer_hooks.kernels.row_kernel",
)
HEAVY = {"torch", "transformers", "wandb", "tokenizers", "zmq", "plotly", "PIL", "sklearn", "tqdm", "msgpack", "numpy"}

_PROBE = """
import importlib, json, sys
blocked = set(json.loads(sys.argv[2]))

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked or name in blocked:
            raise ModuleNotFoundError(f"{name} is kept out by this test", name=name)

sys.meta_path.insert(0, Block())
before = set(sys.modules)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded_by(modules: list[str], *, blocked: tuple[str, ...] = ()) -> set[str]:
    """Import the modules in a new interpreter and return the names that this added to ``sys.modules``."""
    command = [sys.executable, "-c", _PROBE, json.dumps(modules), json.dumps(blocked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(names)


def modules_of(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    dotted = (".".join(("sidestep", *path.relative_to(ROOT).with_suffix("").parts)) for path in files)
    names = [name.removesuffix(".__init__") for name in dotted if not name.endswith(".__main__")]
    assert names
    return names


def heavy(names: set[str]) -> set[str]:
    return {name for name in names if name in HEAVY}


def test_importing_sidestep_loads_nothing_else() -> None:
    assert loaded_by(["sidestep"]) <= {"sidestep", "__future__"}


def test_the_protocol_loads_numpy_and_msgpack_only() -> None:
    names = loaded_by(modules_of("protocol"))
    assert heavy(names) <= {"numpy", "msgpack"}
    assert not any(name.startswith(("sidestep.worker", "sidestep.trainer_hooks")) for name in names)


def test_every_module_of_the_worker_imports_without_torch_and_the_trainer_side() -> None:
    blocked = ("torch", "transformers", "sklearn", "tqdm", "sidestep.trainer_hooks", "sidestep.examples")
    names = loaded_by(modules_of("worker"), blocked=blocked)
    assert {"sidestep.worker.service", "sidestep.worker.cli", "sidestep.worker.sinks.wandb_sink"} <= names
    assert not names & set(blocked)


@pytest.mark.parametrize("module", ["sidestep.worker.service", "sidestep.worker.cli"])
def test_the_process_that_receives_never_imports_wandb(module: str) -> None:
    assert "wandb" not in loaded_by([module])


def test_the_trainer_side_loads_no_wandb_no_tokenizers_no_worker() -> None:
    modules = [name for name in modules_of("trainer_hooks") if not name.startswith(NEEDS_MORE)]
    names = loaded_by(
        modules, blocked=("wandb", "tokenizers", "triton", "sidestep.worker", "sidestep.examples", "plotly")
    )
    assert {"sidestep.trainer_hooks.hooks", "torch"} <= names
    assert not any(name.startswith(("sidestep.worker", "sidestep.examples")) for name in names)
