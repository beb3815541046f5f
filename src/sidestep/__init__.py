"""Sidestep: sidecar metrics that never step into the training loop.

Importing this package loads nothing else. The trainer's names (``attach``, ``Hooks``, ``HooksConfig``, ``Sample``,
``Command``, ``LightningCallback``, ``TrainerCallback``) are looked up on first use, so that a worker, which has no
torch, can live in the same distribution.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own flag, without the import of typing: type checkers read this name as true
if TYPE_CHECKING:
    from sidestep.protocol.messages import Command
    from sidestep.trainer_hooks.config import HooksConfig
    from sidestep.trainer_hooks.hooks import Hooks, attach
    from sidestep.trainer_hooks.integrations.lightning import LightningCallback
    from sidestep.trainer_hooks.integrations.transformers import TrainerCallback
    from sidestep.trainer_hooks.samples import Sample

__version__ = "0.1.0"

__all__ = (
    "Command",
    "Hooks",
    "HooksConfig",
    "LightningCallback",
    "Sample",
    "TrainerCallback",
    "__version__",
    "attach",
)

_HOMES = {
    "Command": "sidestep.protocol.messages",
    "Hooks": "sidestep.trainer_hooks.hooks",
    "HooksConfig": "sidestep.trainer_hooks.config",
    "LightningCallback": "sidestep.trainer_hooks.integrations.lightning",
    "Sample": "sidestep.trainer_hooks.samples",
    "TrainerCallback": "sidestep.trainer_hooks.integrations.transformers",
    "attach": "sidestep.trainer_hooks.hooks",
}
_PACKAGES = ("protocol", "trainer_hooks", "worker", "examples")


def _refuse_flattened_links() -> None:
    """Raise ImportError when the checkout holds the package links as text files.

    In the repository ``sidestep/worker`` and its siblings are symbolic links to the top-level folders; git writes
    plain files that hold the target's path where symbolic links are off. The check costs one ``stat`` a package.
    """
    import os  # noqa: PLC0415  (os is loaded in every interpreter; kept out of the module's public names)

    flattened = [name for name in _PACKAGES if os.path.isfile(os.path.join(__path__[0], name))]  # noqa: PTH113, PTH118
    if flattened:
        message = (
            f"sidestep/{flattened[0]} is a plain file, not a link to the folder {flattened[0]}/: this checkout was "
            "made without symbolic links. Cure: `git config core.symlinks true`, then remove src/sidestep and run "
            "`git checkout -- src/sidestep` (Windows: switch the developer mode on first), or install the wheel, "
            "which holds no links."
        )
        raise ImportError(message)


if not TYPE_CHECKING:  # a type checker then knows the names above, and that there are no others

    def __getattr__(name: str) -> object:
        """Look up one of the lazy public names; raises AttributeError for any other."""
        home = _HOMES.get(name)
        if home is None:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        import importlib  # noqa: PLC0415  (nothing is imported until a name is asked for)

        value: object = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Names that the module offers, the lazy ones included."""
    return sorted({*globals(), *__all__})


_refuse_flattened_links()
