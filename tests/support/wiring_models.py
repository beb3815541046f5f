"""Small transformers whose attention sees what it is told to, and a training of one with its probes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sidestep
from sidestep.protocol.messages import Probe, StepEnd
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.transport import InProcessTransport

VOCABULARY, WIDTH, EOS, PAD, IMAGE, IGNORE = 31, 16, 1, 0, 2, -100


class Transformer(nn.Module):
    """Two layers of attention; documents, padding and the mask as it is told, or as it forgets."""

    forwards: torch.Tensor

    def __init__(self, seen: str = "causal") -> None:
        super().__init__()
        self.seen = seen
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attending = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.normalised = nn.BatchNorm1d(WIDTH)
        self.dropped = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.calls = 0

    def mask(self, shape: torch.Size, documents: torch.Tensor | None, real: torch.Tensor | None) -> torch.Tensor:
        rows, length = shape
        seen = torch.ones(rows, length, length, dtype=torch.bool)
        if self.seen == "causal" or (self.seen == "lost in training" and not self.training):
            seen = seen.tril()
        if documents is not None:
            seen = seen & (documents.unsqueeze(1) == documents.unsqueeze(2))
        if real is not None:
            seen = seen & (real != 0).unsqueeze(1)
        return seen | torch.eye(length, dtype=torch.bool)

    def logits(
        self, input_ids: torch.Tensor, documents: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        self.calls += 1
        hidden = self.embedding(input_ids)
        mask = self.mask(input_ids.shape, documents, attention_mask)
        for layer in self.attending:
            query, key, value = self.dropped(layer(hidden)).chunk(3, dim=-1)
            hidden = hidden + F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if self.training:
            self.forwards += 1
        made: torch.Tensor = self.head(hidden)
        return made

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(input_ids, documents, attention_mask)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE), logits


class Shifted(Transformer):
    """The same with labels that are shifted already."""

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(input_ids, documents, attention_mask)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE), logits


class Fused(Transformer):
    """No logits where there are labels and it is trained."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **given: Any
    ) -> dict[str, torch.Tensor]:
        if labels is None:
            return {"logits": self.logits(input_ids, given.get("documents"), given.get("attention_mask"))}
        loss, logits = super().forward(input_ids, labels, **given)
        return {"loss": loss} if self.training else {"loss": loss, "logits": logits}


class FusedWhenAsked(Transformer):
    """As TRL's: asked for a fused loss it needs labels, and shows no logits."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, *, fused_lm_head: bool = False, **given: Any
    ) -> dict[str, torch.Tensor]:
        if not fused_lm_head:
            return {"logits": self.logits(input_ids, given.get("documents"), given.get("attention_mask"))}
        assert labels is not None
        return {"loss": super().forward(input_ids, labels)[0]}


class Checkpointed(Transformer):
    """Its layers are computed again in backward, by the way that warns where nothing wants a gradient."""

    def logits(self, *given: Any) -> torch.Tensor:
        made = checkpoint(super().logits, *given, use_reentrant=torch.is_grad_enabled() is False)
        assert isinstance(made, torch.Tensor)
        return made


def rows(kind: str, seed: int = 0, count: int = 4) -> dict[str, torch.Tensor]:
    """A batch of answers behind prompts, with labels that are not shifted."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 20), generator=draw)
    labels = torch.full_like(ids, IGNORE)
    given = {"input_ids": ids, "labels": labels}
    if kind == "packed":  # ten documents of a prompt and one answer token a row
        labels[:, 1::2] = ids[:, 1::2]
        given["documents"] = torch.arange(20).expand(count, 20) // 2
    elif kind == "padded":
        ids[:, :6], ids[:, 2] = PAD, IMAGE
        labels[:, 12:] = ids[:, 12:]
        given["attention_mask"] = (ids != PAD).long()
    elif kind == "one token":
        labels[:, 12] = ids[:, 12]
    elif kind == "one token alike":
        ids[:, 12] = labels[:, 12] = 7
        ids[0, 12] = labels[0, 12] = 8
    elif kind == "text":
        labels[:] = ids
    else:
        labels[:, 10:] = ids[:, 10:]
        ids[:, 15] = labels[:, 15] = EOS
    return given


class Trained:
    """A training of some steps, what its hooks sent, and how often they failed."""

    def __init__(
        self, model: nn.Module, kind: str = "answers", *, steps: int = 13, accumulation: int = 1, **config: Any
    ) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        transports: list[InProcessTransport] = []

        def opened(*arguments: Any) -> InProcessTransport:
            transports.append(InProcessTransport(*arguments))
            return transports[-1]

        defaults = {"wiring_probe_interval": 40, "image_probe_interval": 0, "eos_id": EOS, "pad_id": PAD}
        hooks = sidestep.attach(model, self.optimizer, config=HooksConfig(**{**defaults, **config}), transport=opened)
        self.losses: list[float] = []
        for step in range(steps):
            for place in range(accumulation):
                self.losses.append(self.trained_on(rows(kind, seed=step * accumulation + place)))
            self.optimizer.step()
            self.optimizer.zero_grad()
            hooks.after_step(step)
            assert transports[0].messages
        hooks.close()
        self.failures = hooks.failures()
        self.probes: list[Probe] = [each for each in transports[0].messages if isinstance(each, Probe)]
        self.ends: list[StepEnd] = [each for each in transports[0].messages if isinstance(each, StepEnd)]

    def trained_on(self, given: dict[str, torch.Tensor]) -> float:
        if isinstance(self.model, Shifted):
            given["targets"] = F.pad(given.pop("labels"), (-1, 1), value=IGNORE)
        asked = {"fused_lm_head": True} if isinstance(self.model, FusedWhenAsked) else {}
        made = self.model(**given, **asked)
        loss = made["loss"] if isinstance(made, dict) else made[0]
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())
