"""The rules of who imports what, read from the source: exact allow-lists, imports within functions included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("protocol", "trainer_hooks", "worker", "examples")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# What each package may use beside the standard library and itself; "sidestep" is for the version.
TRAINER_SIDE = {"numpy", "torch", "zmq", "sidestep", "sidestep.protocol"}
ALLOWED_BY_PACKAGE = {
    "protocol": {"numpy", "msgpack"},
    "trainer_hooks": TRAINER_SIDE,
    "trainer_hooks.kernels": TRAINER_SIDE | {"triton"},
    "trainer_hooks.integrations": TRAINER_SIDE | {"transformers", "lightning", "pytorch_lightning"},
    "worker": {
        "numpy",
        "zmq",
        "wandb",
        "tokenizers",
        "plotly",
        "prometheus_client",
        "PIL",
        "sidestep",
        "sidestep.protocol",
    },
    "examples": TRAINER_SIDE - {"zmq"} | {"sklearn", "tqdm", "tokenizers", "sidestep.trainer_hooks"},
}
# The modules (as patterns) through which a third party comes in.
DOORS = {
    ("trainer_hooks", "lightning"): ("trainer_hooks.integrations.lightning",),
    ("trainer_hooks", "pytorch_lightning"): ("trainer_hooks.integrations.lightning",),
    ("trainer_hooks", "transformers"): ("trainer_hooks.integrations.transformers",),
    ("trainer_hooks", "triton"): ("trainer_hooks.kernels.*_kernel", "trainer_hooks.kernels.gradient_launch"),
    ("trainer_hooks", "zmq"): ("trainer_hooks.connection",),
    ("worker", "zmq"): ("worker.intake.receiver", "worker.intake.authentication", "worker.keys"),
    ("worker", "wandb"): ("worker.sinks.wandb_sink",),
    ("worker", "tokenizers"): ("worker.text.detokenizer",),
    ("worker", "prometheus_client"): ("worker.prometheus",),
    ("worker", "plotly"): ("worker.sinks.report*",),
    ("worker", "PIL"): ("worker.text.*", "worker.sinks.*"),
}
PRINTERS = ("worker.cli*", "worker.sinks.console_sink", "examples.*")
LONGEST_MODULE_LINES = 500


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield f"{node.module}"


def owner(imported: str) -> str:
    """Return the top-level name, or for our own packages the first two."""
    parts = imported.split(".")
    return ".".join(parts[:2]) if parts[0] == "sidestep" else parts[0]


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def test_the_tree_is_seen() -> None:
    seen = {module_name(path).split(".")[0] for path in SOURCES}
    assert seen == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    strangers = []
    for path in SOURCES:
        module = module_name(path)
        if module.split(".")[0] != package:
            continue
        key = max((k for k in ALLOWED_BY_PACKAGE if f"{module}.".startswith(f"{k}.")), key=len)
        allowed = ALLOWED_BY_PACKAGE[key] | {f"sidestep.{package}"} | sys.stdlib_module_names
        strangers += [f"{module} -> {name}" for name in imported_names(path) if owner(name) not in allowed]
    assert strangers == []


@pytest.mark.parametrize(("package", "third_party"), DOORS)
def test_a_third_party_has_one_door(package: str, third_party: str) -> None:
    users = {
        module_name(path)
        for path in SOURCES
        if module_name(path).split(".")[0] == package and third_party in map(owner, imported_names(path))
    }
    assert users, f"nothing in {package} imports {third_party}: the rule has lost its subject"
    assert {module for module in users if not matches(module, DOORS[package, third_party])} == set()


def test_only_the_console_the_command_line_and_the_examples_print() -> None:
    printers = {
        module_name(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert {module for module in printers if not matches(module, PRINTERS)} == set()


def test_every_folder_with_modules_is_a_package() -> None:
    assert sorted({str(path.parent) for path in SOURCES if not (path.parent / "__init__.py").is_file()}) == []


def test_src_holds_the_links_and_nothing_else() -> None:
    entries = {path.name: path for path in (ROOT / "src" / "sidestep").iterdir() if path.name != "__pycache__"}
    assert set(entries) == {*PACKAGES, "__init__.py", "py.typed"}
    assert {name: str(entries[name].readlink()) for name in PACKAGES} == {name: f"../../{name}" for name in PACKAGES}


def test_modules_stay_readable() -> None:
    lengths = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {module: lines for module, lines in lengths.items() if lines >= LONGEST_MODULE_LINES} == {}


def test_declared_names_are_the_public_ones() -> None:
    """Hold ``__all__``, where a module has one, against what the module defines or re-exports."""
    differences = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        declared = _declared(tree)
        if declared is None:
            continue
        defined = _defined(tree)
        wrong = (set(declared) - defined) | (_own_public(tree) - set(declared))
        if wrong or len(set(declared)) != len(declared):
            differences[module_name(path)] = sorted(wrong) or ["a name stands twice"]
    assert differences == {}


def _declared(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and target.id == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)] if node.value is not None else None
    return None


def _own_public(tree: ast.Module) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def _defined(tree: ast.Module) -> set[str]:
    names = _own_public(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
