"""What a user gets: the sdist against the tree, and the wheel built from that sdist, used from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sidestep

ROOT = Path(__file__).parents[3]
PACKAGES = ("protocol", "trainer_hooks", "worker", "examples")
LINKS = {f"src/sidestep/{name}" for name in PACKAGES}
ONLY_IN_THE_REPOSITORY = (".ci/",)
FOLDERS_IN_THE_WHEEL = tuple(f"{name}/" for name in PACKAGES)
TOP_OF_THE_WHEEL = {"sidestep/__init__.py", "sidestep/py.typed"}

pytestmark = pytest.mark.timeout(240)


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command outside of the tree's reach and return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=inherited | (environment or {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tree() -> set[str]:
    """Return the files of the working tree that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tree has no list of its files")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in listed if os.path.lexists(ROOT / name)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, unpacked, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fresh environment's programs; the wheel is installed, its dependencies are borrowed."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    programs = environment / "bin"
    # --python makes this interpreter's pip install into the other environment, without the network.
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=environment)
    site = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment)
    # A path line does not make .pth files of the borrowed folder work, so an editable install there stays unseen.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site.strip()) / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    return programs


def test_the_sdist_holds_the_tree_without_the_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if not (member.isfile() or member.isdir())] == []
    packed = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    expected = {name for name in tree() if name not in LINKS and not name.startswith(ONLY_IN_THE_REPOSITORY)}
    assert packed - {"PKG-INFO"} == expected


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    packed = {name for name in names if ".dist-info/" not in name}
    expected = {f"sidestep/{name}" for name in tree() if name.startswith(FOLDERS_IN_THE_WHEEL)}
    assert packed == expected | TOP_OF_THE_WHEEL
    base = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    assert {line.split(">")[0] for line in base} == {line.split(">")[0] for line in declared}
    assert not any(line.startswith("torch") for line in base)
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_wheel_imports_from_another_folder(installed: Path, tmp_path: Path) -> None:
    names = ["sidestep", *(f"sidestep.{name}" for name in PACKAGES)]
    script = "import importlib, sys\nfor n in sys.argv[1:]: m = importlib.import_module(n); print(m.__file__)\n"
    script += "print(sys.modules['sidestep'].__version__)"
    *files, version = run(installed / "python", "-c", script, *names, cwd=tmp_path).splitlines()
    assert version == sidestep.__version__
    assert all(Path(file).is_relative_to(installed.parent) for file in files), files


def test_the_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    told = run(installed / "sidestep", "--help", cwd=tmp_path)
    assert {"demo", "worker", "run", "status", "replay", "report"} <= set(re.findall(r"[a-z]+", told))


def test_the_trainers_names_come_with_the_wheel(installed: Path, tmp_path: Path) -> None:
    told = run(installed / "python", "-c", "import sidestep; print(sidestep.attach.__module__)", cwd=tmp_path)
    assert told.strip() == "sidestep.trainer_hooks.hooks"


@pytest.mark.slow
def test_the_demo_of_the_wheel_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(installed / "sidestep", "demo", "--steps", "20", "--out", out, cwd=tmp_path)
    assert (out / "report.html").stat().st_size > 0
    assert list((out / "wandb").rglob("*.wandb")) != []
