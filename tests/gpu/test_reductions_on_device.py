"""The reductions on a real device: no wait, the right values, a bounded memory (docs/trainer.md, sections 3 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support.device_memory import extra_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.reductions.answers import answers_message, reduce_answers
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, gradients_message, reduce_gradients
from sidestep.trainer_hooks.reductions.learning_rate import learning_rates_message, reduce_learning_rates
from sidestep.trainer_hooks.reductions.loss import reduce_loss
from sidestep.trainer_hooks.reductions.loss_message import losses_message
from sidestep.trainer_hooks.reductions.tokens import reduce_tokens, tokens_message

NoSync = Callable[[], AbstractContextManager[None]]

ROWS, POSITIONS, VOCABULARY, EOS, REPEATS = 4, 256, 1000, 2, 3


class PinnedOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses copies to the device from pageable memory, which may wait and which torch's own mode does not report."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if isinstance(source, Tensor) and source.device.type == "cpu" and result.device.type == "cuda":
                assert source.is_pinned(), f"{func} from pageable memory"
        return result


@contextmanager
def never_waiting(no_sync: NoSync) -> Iterator[None]:
    with no_sync(), PinnedOnly():  # type: ignore[no-untyped-call]
        yield


def arrays(parts: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: part.numpy(force=True) for name, part in parts.items()}


def batch_arguments(device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (ROWS, POSITIONS), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.05] = EOS
    labels = ids.roll(-1, dims=1)
    labels[torch.rand(ids.shape, generator=generator) < 0.4] = -100
    labels[:, -1] = -100
    mask = (torch.rand(ids.shape, generator=generator) < 0.9).long()
    documents = torch.cumsum((torch.rand(ids.shape, generator=generator) < 0.03).long(), dim=1)
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask, "documents": documents}
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"shifted": True, "eos_id": EOS}


def test_tokens_and_answers_equal_those_of_the_host(cuda: torch.device, no_sync: NoSync) -> None:
    on_host = align(**batch_arguments(torch.device("cpu")))
    arguments = batch_arguments(cuda)
    reduce_tokens(align(**arguments), VOCABULARY)
    answers = reduce_answers(align(**arguments))
    with never_waiting(no_sync):
        for _ in range(REPEATS):
            tokens = reduce_tokens(align(**arguments), VOCABULARY)
            answers = answers + reduce_answers(align(**arguments))
    message = tokens_message(step=0, microstep=0, arrays=arrays(tokens))
    wanted = tokens_message(step=0, microstep=0, arrays=arrays(reduce_tokens(on_host, VOCABULARY)))
    for field in ("positions", "padding", "answers"):
        assert getattr(message, field) == getattr(wanted, field)
    for field in ("real_ids", "real_counts", "labelled_ids", "labelled_counts", "content_counts"):
        np.testing.assert_array_equal(getattr(message, field), getattr(wanted, field))
    lengths = answers_message(step=0, epoch=0, arrays=arrays({"answers": answers}))
    wanted_lengths = answers_message(
        step=0, epoch=0, arrays=arrays({"answers": reduce_answers(on_host) * (1 + REPEATS)})
    )
    np.testing.assert_array_equal(lengths.lengths, wanted_lengths.lengths)
    np.testing.assert_array_equal(lengths.counts, wanted_lengths.counts)
    assert (lengths.labelled, lengths.batches) == (wanted_lengths.labelled, wanted_lengths.batches)


def plain_losses(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    wide = logits.to(torch.float64).flatten(0, 1)
    return torch.nn.functional.cross_entropy(wide, targets.flatten(), reduction="none").cpu().numpy()


@pytest.mark.parametrize("labels_at", ["host", "device"])
@pytest.mark.parametrize("source", ["logits", "short logits", "token_losses", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_equal_float64(
    cuda: torch.device, no_sync: NoSync, labels_at: str, source: str, dtype: torch.dtype
) -> None:
    arguments = batch_arguments(cuda if labels_at == "device" else torch.device("cpu"))
    hidden = torch.randn((ROWS, POSITIONS, 32), device=cuda)
    head = torch.randn((VOCABULARY, 32), device=cuda)
    logits = (hidden @ head.t()).to(dtype)
    targets = arguments["labels"].to(cuda)
    wanted = plain_losses(hidden.double() @ head.double().t() if source == "head" else logits, targets)
    given: dict[str, Any] = {
        "logits": {"logits": logits},
        "short logits": {"logits": logits[:, :-1]},
        "token_losses": {"token_losses": torch.from_numpy(wanted).float().to(cuda)},
        "head": {"hidden": hidden, "head": head},
    }[source]

    def reduce(seed: int) -> dict[str, Tensor]:
        batch = align(**arguments)
        return reduce_loss(batch, **given, trainer_loss=logits.float().mean(), max_rows=200, seed=seed)

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        reduce(0)
        with never_waiting(no_sync):
            for seed in range(REPEATS):
                parts = reduce(seed)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    got = arrays(parts)
    message = losses_message(step=0, microstep=0, arrays=got)
    labelled = int((arguments["labels"] != -100).sum())
    whole = source == "token_losses" or (labels_at == "host" and source != "head")
    assert message.labelled == labelled
    assert message.sampled != whole
    assert message.losses.size == (labelled if whole else 200)
    rows = got.get("rows", np.arange(ROWS * POSITIONS))
    rows = np.sort(rows[got["roles"] & 0x80 != 0])
    np.testing.assert_allclose(message.losses, wanted[rows], rtol=1e-5, atol=2e-5 if source == "head" else 1e-6)
    np.testing.assert_array_equal(message.target_ids, targets.flatten().cpu().numpy()[rows])


def gradient_tensors(device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    broken = normal(5000)
    broken[::7], broken[1::7], broken[2::7] = math.nan, math.inf, 0.0
    return [
        normal(3_000, 2_000), normal(300) * 1e-30, normal(400) * 1e30, normal(5_000_001) * 1e-3 + 1.0, broken,
        normal(64, 32).t(), normal(2048).to(torch.bfloat16), normal(33).to(torch.float16), normal(), normal(0),
    ]  # fmt: skip


def test_gradients_equal_float64(cuda: torch.device, no_sync: NoSync) -> None:
    tensors = gradient_tensors(cuda)
    gradients = [LocalGradient(index, index % 2, tensor) for index, tensor in enumerate(tensors)]
    scale = torch.tensor(1024.0, device=cuda)
    reduce_gradients(gradients, scale)
    with never_waiting(no_sync):
        for _ in range(REPEATS):
            parts = reduce_gradients(gradients, scale)
    message = gradients_message(step=0, arrays=arrays(parts))
    assert message.scale == 1024.0
    nonzero = 0
    for index, tensor in enumerate(tensors):
        wide = tensor.double().flatten().cpu().numpy()
        finite = wide[np.isfinite(wide)]
        nonzero += int(np.count_nonzero(finite))
        assert message.nonfinite[index] == wide.size - finite.size
        assert message.zeros[index] == np.count_nonzero(finite == 0)
        if not finite.size:
            continue
        unit = 2.0 ** int(message.exponents[index])
        assert message.means[index] * unit == pytest.approx(finite.mean(), rel=1e-5, abs=1e-5 * finite.std())
        assert math.sqrt(message.m2[index] / finite.size) * unit == pytest.approx(finite.std(), rel=1e-5, abs=0.0)
        assert message.absmax[index] == np.abs(finite).max()
    assert message.histograms.sum() == nonzero


def test_learning_rates(cuda: torch.device, no_sync: NoSync) -> None:
    groups: list[dict[str, Any]] = [{"lr": torch.tensor(0.5, device=cuda)}, {"lr": 0.25}]
    with never_waiting(no_sync):
        parts = reduce_learning_rates(groups)
    assert learning_rates_message(step=0, arrays=arrays(parts)).rates.tolist() == [0.5, 0.25]


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def test_all_of_it_runs_where_algorithms_must_be_deterministic(cuda: torch.device, no_sync: NoSync) -> None:
    arguments = batch_arguments(cuda)
    logits = torch.randn((ROWS, POSITIONS, VOCABULARY), device=cuda)
    gradients = [LocalGradient(index, 0, tensor) for index, tensor in enumerate(gradient_tensors(cuda))]

    def everything() -> dict[str, Tensor]:
        batch = align(**arguments)
        answers = {"answers": reduce_answers(batch)}
        return (
            reduce_tokens(batch, VOCABULARY) | reduce_loss(batch, logits=logits) | reduce_gradients(gradients) | answers
        )

    with deterministic():
        everything()
        with never_waiting(no_sync):
            first, second = everything(), everything()
    for name, part in first.items():
        assert torch.equal(part, second[name]), name


def test_memory_of_the_losses_is_that_of_a_chunk(cuda: torch.device) -> None:
    labels = torch.zeros((2, 2048), dtype=torch.int64)
    logits = torch.zeros((2, 2048, 50_000), dtype=torch.bfloat16, device=cuda)  # 410 MB
    batch = align(input_ids=labels, labels=labels, shifted=True)
    assert extra_bytes(lambda: reduce_loss(batch, logits=logits)) <= 96 << 20


def test_memory_of_the_gradients_is_that_of_a_block(cuda: torch.device) -> None:
    large, small = torch.zeros(150_000_000, device=cuda), torch.zeros(7, device=cuda)  # 600 MB
    gradients = [LocalGradient(0, 0, large), LocalGradient(1, 0, small)]
    assert extra_bytes(lambda: reduce_gradients(gradients)) <= 128 << 20
