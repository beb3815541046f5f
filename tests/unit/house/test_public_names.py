"""The names at the top of the package: looked up late, listed, and honest about a broken checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import sidestep

ROOT = Path(__file__).parents[3]
PACKAGES = ("protocol", "trainer_hooks", "worker", "examples")
HOMES = {
    "Command": "sidestep.protocol.messages",
    "Hooks": "sidestep.trainer_hooks.hooks",
    "HooksConfig": "sidestep.trainer_hooks.config",
    "Sample": "sidestep.trainer_hooks.samples",
    "attach": "sidestep.trainer_hooks.hooks",
}
NEED_A_LIBRARY = {"LightningCallback": "lightning", "TrainerCallback": "transformers"}
"""Names whose home imports what is not Sidestep's to install; tests/unit/integrations looks them up."""


@pytest.mark.parametrize("name", HOMES)
def test_a_lazy_name_is_the_one_of_its_home(name: str) -> None:
    assert getattr(sidestep, name) is getattr(import_module(HOMES[name]), name)


def test_the_lazy_names_are_all_that_is_offered() -> None:
    assert set(sidestep.__all__) == {*HOMES, *NEED_A_LIBRARY, "__version__"}
    assert set(sidestep.__all__) <= set(dir(sidestep))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sidestep' has no attribute 'detach'"):
        _ = sidestep.detach  # type: ignore[attr-defined]


def test_the_version_stands_once_more_in_the_project_file() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == sidestep.__version__


def test_a_checkout_without_symbolic_links_names_the_cure(tmp_path: Path) -> None:
    """Clone a real repository with symbolic links off, as git does on Windows, and import from it."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    shutil.copytree(ROOT / "src", origin / "src", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "-q", str(origin))
    git("-C", str(origin), "add", ".")
    git("-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "links")
    git("clone", "-q", "-c", "core.symlinks=false", str(origin), str(clone))
    package = clone / "src" / "sidestep"
    assert {name: (package / name).read_text() for name in PACKAGES} == {name: f"../../{name}" for name in PACKAGES}

    done = import_from(clone / "src")
    assert done.returncode == 1
    assert re.search(r"ImportError: .*protocol is a plain file.*git config core\.symlinks true.*wheel", done.stderr)

    # The cure that the message names, taken literally.
    git("-C", str(clone), "config", "core.symlinks", "true")
    shutil.rmtree(package)
    git("-C", str(clone), "checkout", "--", "src/sidestep")
    assert import_from(clone / "src").returncode == 0


@pytest.mark.parametrize("flattened", PACKAGES)
def test_one_flattened_link_is_enough(tmp_path: Path, flattened: str) -> None:
    package = tmp_path / "sidestep"
    package.mkdir()
    shutil.copy(ROOT / "src" / "sidestep" / "__init__.py", package)
    (package / flattened).write_text(f"../../{flattened}")
    done = import_from(tmp_path)
    assert done.returncode == 1
    assert f"sidestep/{flattened} is a plain file" in done.stderr


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, timeout=30, capture_output=True)


def import_from(folder: Path) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path.insert(0, {str(folder)!r}); import sidestep; print(sidestep.__file__)"
    command = [sys.executable, "-I", "-c", script]
    return subprocess.run(command, check=False, timeout=30, capture_output=True, text=True)
