"""nanoVLM: what its train.py adds to be watched, five lines (docs/nanovlm.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import nn

from sidestep.protocol.messages import Command
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.hooks import Hooks
from sidestep.trainer_hooks.hooks import attach as attach_hooks
from sidestep.trainer_hooks.isolation import undisturbed
from sidestep.trainer_hooks.parameters import unwrapped
from sidestep.trainer_hooks.samples import Sample, samples_from_dataset
from sidestep.trainer_hooks.topology import read_topology
from sidestep.trainer_hooks.transport import OpenTransport

MODULES: Mapping[str, str] = {
    "vision_encoder": "vision_encoder",
    "MP": "modality_projector",
    "decoder": "decoder",
}
"""Prefixes of nanoVLM's parameter names to the modules that gradients are shown under."""

LMMS_EVAL_STEP = "<lmms-eval-step>"
"""nanoVLM's own step axis for ``lmms_eval/*``."""

_LOOKED_AT_PER_SAMPLE = 8
"""Conversations that are looked at for each sample that is wanted: a data set without labels is not read to its end."""


class Summary:
    """Takes ``run.summary[name] = value``: W&B's summary of a name is the value that was logged last."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def __setitem__(self, name: str, value: Any) -> None:
        self._hooks.log({name: value})


class NanoVLMHooks:
    """The hooks as nanoVLM's train.py calls them, and the ``run`` that it logs to, in one object.

    No call raises, waits, or changes a number of the training.
    """

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.summary = Summary(hooks)
        self._axes: dict[str, str] = {"lmms_eval/*": LMMS_EVAL_STEP}

    def on_batch(self, batch: Mapping[str, Any], epoch: int | None = None) -> None:
        """Show a micro-batch right after its forward: the collator's own tensors, which are still on the CPU.

        Args:
            batch: ``input_ids``, ``labels`` (rolled by one already) and ``attention_mask``, int64 [b, t]. Logits and
                loss are those that the forward returned.
            epoch: the epoch that it belongs to.
        """
        self.hooks.on_batch(
            input_ids=batch.get("input_ids"),
            labels=batch.get("labels"),
            attention_mask=batch.get("attention_mask"),
            shifted=True,
            epoch=epoch,
        )

    def before_clip(self) -> None:
        """Say that an update step's last backward is done and nothing is clipped yet."""
        self.hooks.before_clip()

    def after_step(self, global_step: int) -> Command | None:
        """End an update step, just before ``global_step += 1``: what was logged for it stands in its row."""
        return self.hooks.after_step(global_step)

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Take what train.py gives to ``run.log``.

        Args:
            values: names to values; those that have a step axis of their own, and its value beside them, stand on it.
            step: the optimizer step; left out, the one that goes on.
        """
        rest = dict(values)
        for pattern, axis in self._axes.items():
            place = rest.get(axis)
            names = [name for name in rest if name != axis and fnmatchcase(name, pattern)]
            if isinstance(place, int) and names:
                self.hooks.log({name: rest.pop(name) for name in names}, step=place, step_key=axis)
                del rest[axis]
        if rest:
            self.hooks.log(rest, step=step)

    def define_metric(self, name: str, step_metric: str) -> None:
        """Give names that fit ``name`` a step axis of their own, as ``run.define_metric`` does."""
        self._axes[name] = step_metric

    def finish(self) -> None:
        """Send what is left and say goodbye, as ``run.finish`` ends a run of W&B; ``close`` is the same."""
        self.hooks.close()

    close = finish


def attach(
    model: nn.Module,
    optimizer: Any,
    val_loader: Any = None,
    vlm_cfg: Any = None,
    train_cfg: Any = None,
    *,
    name: str | None = None,
    project: str = "nanoVLM",
    entity: str | None = None,
    tags: Sequence[str] = (),
    tokenizer: Any = None,
    samples: Sequence[Sample] | None = None,
    step: int = 0,
    endpoint: str | None = None,
    run_id: str | None = None,
    transport: OpenTransport | None = None,
    **overrides: Any,
) -> NanoVLMHooks:
    """Attach to nanoVLM's training, on every rank, after ``torch.compile`` and DDP.

    Args:
        model: as the loop calls it.
        optimizer: its AdamW.
        val_loader: its validation loader, from whose conversations rank 0 makes samples; None: no generation.
        vlm_cfg: its VLMConfig, shown with the run.
        train_cfg: its TrainConfig, shown with the run; read by ``HooksConfig.from_train_config``.
        name: of the run.
        project: of the run.
        entity: of the run; left out, ``train_cfg.wandb_entity``.
        tags: of the run.
        tokenizer: left out, the model's own.
        samples: in place of those of ``val_loader``.
        step: the number that the next finished optimizer step carries.
        endpoint: see ``sidestep.attach``; so are run_id and transport.
        run_id: see endpoint.
        transport: see endpoint.
        **overrides: fields of ``HooksConfig``, taken as they are.

    Raises:
        TypeError: see ``sidestep.attach``.
        ValueError: see ``sidestep.attach``.
    """
    config = HooksConfig.from_train_config({} if train_cfg is None else train_cfg, **{"shifted": True, **overrides})
    inner = unwrapped(model)
    tokenizer = getattr(inner, "tokenizer", None) if tokenizer is None else tokenizer
    wanted = config.generation_eval_interval or config.collapse_detection_interval
    if samples is None and val_loader is not None and config.log_wandb and wanted and read_topology(model).rank == 0:
        samples = _samples_or_line(inner, val_loader, tokenizer, train_cfg, config)
    return NanoVLMHooks(
        attach_hooks(
            model,
            optimizer,
            tokenizer=tokenizer,
            samples=samples,
            config=config,
            project=project,
            entity=getattr(train_cfg, "wandb_entity", None) if entity is None else entity,
            name=name,
            tags=tags,
            run_config={"VLMConfig": vlm_cfg, "TrainConfig": train_cfg},
            step=step,
            modules=MODULES,
            endpoint=endpoint,
            run_id=run_id,
            transport=transport,
        )
    )


def validation_samples(
    val_loader: Any, tokenizer: Any, *, count: int, train_cfg: Any = None, ignore_index: int = -100
) -> list[Sample]:
    """Make samples of the validation loader's conversations: prompts end where the first answer begins.

    The loader is not iterated, which would draw from its generator and start its processes, and neither are its packed
    rows: the data set beneath is read in its order, each conversation's images prepared once (0.14 s an image).

    Args:
        val_loader: nanoVLM's loader, its packed or its plain data set, or rows as ``samples_from_dataset`` takes them.
        tokenizer: the model's.
        count: how many samples to make, at most.
        train_cfg: its bounds on length and images hold for samples as they do for training.
        ignore_index: the label of a position without a target.

    Raises:
        ValueError: no conversation has a labelled position after a prompt.
    """
    usable = (row for row in _conversations(val_loader) if row is not None and _fits(row, train_cfg))
    return samples_from_dataset(
        islice(usable, _LOOKED_AT_PER_SAMPLE * count),
        tokenizer,
        count=count,
        shifted=True,
        ignore_index=ignore_index,
        image_token_id=getattr(tokenizer, "image_token_id", None),
    )


def _conversations(source: Any) -> Iterator[Any]:
    """Yield the rows of the data set that nanoVLM's loader and its packing are wrapped around."""
    held, inner = source, source
    if isinstance(source, torch.utils.data.DataLoader):
        held = inner = source.dataset
    while not hasattr(inner, "iter_for_worker") and hasattr(inner, "dataset"):
        inner = inner.dataset
    yield from inner.iter_for_worker() if hasattr(inner, "iter_for_worker") else held


def _fits(row: Any, train_cfg: Any) -> bool:
    """Tell whether nanoVLM's packing would take the conversation."""
    ids, images = row["input_ids"], row.get("images") or ()
    longest = getattr(train_cfg, "max_sample_length", None)
    most = getattr(train_cfg, "max_images_per_example", None)
    return (longest is None or ids.shape[-1] < longest) and (most is None or ids.dim() > 1 or len(images) <= most)


def _samples_or_line(
    model: nn.Module, val_loader: Any, tokenizer: Any, train_cfg: Any, config: HooksConfig
) -> list[Sample] | None:
    """Make the samples, random state put back; what keeps them from being made is said, and training goes on."""
    try:
        with undisturbed(model):
            return validation_samples(
                val_loader,
                tokenizer,
                count=config.generation_samples,
                train_cfg=train_cfg,
                ignore_index=config.ignore_index,
            )
    except Exception as error:  # noqa: BLE001  (a data set may raise anything; it is said, and the run has no samples)
        Console().line(
            f"sidestep: no samples could be made of the validation loader ({type(error).__name__}: {error}); "
            "generation and the collapse rules are off."
        )
        return None
