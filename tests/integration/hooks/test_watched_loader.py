"""Hashes that a data loader's worker processes make, against those of the forward's own tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sidestep
from sidestep.protocol.messages import Kind, Signals
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.loader import HashedBatch
from sidestep.trainer_hooks.transport import InProcessTransport

ROWS, LENGTH, VOCABULARY, IGNORE = 4, 9, 31, -100
Sample = dict[str, torch.Tensor]


def samples(num_samples: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(3)
    made = []
    for _ in range(num_samples):
        ids = torch.randint(2, VOCABULARY, (LENGTH,), generator=draw)
        labels = ids.clone()
        labels[:4] = IGNORE
        made.append({"input_ids": ids, "labels": labels, "images": torch.rand(1, 5, 5, generator=draw)})
    return made


def without_labels(batch: list[Sample]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in batch]) for name in ("input_ids", "images")}


def with_odd_images(batch: list[Sample]) -> dict[str, Any]:
    made: dict[str, Any] = {name: torch.stack([each[name] for each in batch]) for name in ("input_ids", "labels")}
    return {**made, "images": torch.zeros(ROWS, 1, 5, 5).to_sparse()}


class Model(nn.Module):
    """Images and ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.modality_projector = nn.Linear(25, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.modality_projector(images.flatten(1)).unsqueeze(1)
        logits = self.head(self.embedding(input_ids) + seen)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


class Training:
    """A training over a loader, watched or not, of whole batches or of halves."""

    def __init__(self, loader: Iterable[Any], *, watched: bool, pieces: int = 1) -> None:
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        transports: list[InProcessTransport] = []

        def opened(*arguments: Any) -> InProcessTransport:
            transports.append(InProcessTransport(*arguments))
            return transports[-1]

        self.hooks = sidestep.attach(
            model, optimizer, config=HooksConfig(eos_id=1, vocabulary_size=VOCABULARY), transport=opened
        )
        self.losses: list[float] = []
        for batch in self.hooks.watch_loader(loader) if watched else loader:
            for part in range(pieces):
                rows = slice(part * ROWS // pieces, (part + 1) * ROWS // pieces)
                loss, _ = model(batch["input_ids"][rows], labels=batch["labels"][rows], images=batch["images"][rows])
                loss.backward()
                self.losses.append(loss.item())
            self.hooks.before_clip()
            optimizer.step()
            optimizer.zero_grad()
            self.hooks.after_step()
        self.hooks.close()
        self.signals = [each for each in transports[0].messages if isinstance(each, Signals)]
        self.notices = [each.text for each in transports[0].messages if each.kind is Kind.NOTICE]  # type: ignore[attr-defined]

    @property
    def hashes(self) -> list[tuple[list[int], list[int]]]:
        return [(each.sample_hashes.tolist(), each.image_hashes.tolist()) for each in self.signals]


def loader(num_workers: int) -> DataLoader[Sample]:
    data: Any = samples(5 * ROWS)
    return DataLoader(
        data, batch_size=ROWS, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loaders_hashes_are_those_of_the_forwards_tensors(num_workers: int) -> None:
    plain = Training(loader(0), watched=False)
    watched = Training(loader(num_workers), watched=True)
    assert len(watched.signals) == 5
    assert all(len(samples) == len(images) == ROWS for samples, images in watched.hashes)
    assert watched.hashes == plain.hashes
    for mine, theirs in zip(watched.signals, plain.signals, strict=True):
        np.testing.assert_allclose(mine.image_deviations, theirs.image_deviations, rtol=1e-5)
    assert watched.losses == plain.losses
    assert watched.hooks.failures() == {}


def test_hashes_are_taken_from_the_loader_and_not_made_again() -> None:
    class Doctored(DataLoader[Sample]):
        def __iter__(self) -> Any:
            for hashed in super().__iter__():
                assert isinstance(hashed, HashedBatch)
                assert hashed.hashes is not None
                hashed.hashes.samples[:] = 77
                yield hashed

    data: Any = samples(2 * ROWS)
    watched = Training(Doctored(data, batch_size=ROWS), watched=True)
    assert [samples for samples, _ in watched.hashes] == [[77] * ROWS] * 2


def test_batches_that_are_cut_into_pieces_are_hashed_as_without_it() -> None:
    assert Training(loader(0), watched=True, pieces=2).hashes == Training(loader(0), watched=False, pieces=2).hashes


def test_batches_without_labels_pass_as_they_are() -> None:
    data: Any = samples(ROWS)
    hooks = Training([], watched=False).hooks
    (batch,) = hooks.watch_loader(DataLoader(data, batch_size=ROWS, collate_fn=without_labels))
    assert sorted(batch) == ["images", "input_ids"]


def test_what_cannot_be_hashed_is_trained_on_and_counted() -> None:
    data: Any = samples(ROWS)
    plain = DataLoader(data, batch_size=ROWS, collate_fn=with_odd_images)
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = sidestep.attach(
        model, optimizer, config=HooksConfig(eos_id=1, vocabulary_size=VOCABULARY), transport=InProcessTransport
    )
    (batch,) = hooks.watch_loader(plain)
    assert batch["labels"].shape == (ROWS, LENGTH)
    assert hooks.failures() == {"watch_loader": 1}
    hooks.close()


def test_the_loader_is_passed_on_and_wrapped_once() -> None:
    hooks = Training([], watched=False).hooks
    plain = loader(0)
    watched = hooks.watch_loader(hooks.watch_loader(plain))
    assert len(watched) == len(plain) == 5
    assert watched.dataset is plain.dataset
    assert [sorted(batch) for batch in watched] == [["images", "input_ids", "labels"]] * 5


def test_what_is_no_loader_is_refused() -> None:
    hooks = Training([], watched=False).hooks
    with pytest.raises(TypeError, match="takes a DataLoader"):
        hooks.watch_loader([1, 2, 3])
