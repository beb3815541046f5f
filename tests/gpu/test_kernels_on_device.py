"""The kernels on a real device: right by float64, the same bits each time, no wait, no memory, nothing in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from tests.support.device_memory import extra_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.protocol.messages import Gradients, Losses
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.kernels.choice import kernels, obstacle
from sidestep.trainer_hooks.kernels.row_launch import read_logits
from sidestep.trainer_hooks.reductions.cross_entropy import logits_source
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, gradients_message, reduce_gradients
from sidestep.trainer_hooks.signals.rows import row_signals
from sidestep.trainer_hooks.transport import InProcessTransport

NoSync = Callable[[], AbstractContextManager[None]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EOS = 2


@pytest.fixture(autouse=True)
def kernels_run(cuda: torch.device) -> Iterator[None]:
    reason = obstacle(cuda)
    if reason:
        pytest.skip(f"no kernel runs here: {reason}")
    yield
    assert not kernels.failures, "a kernel could not run, and torch's operations took its place"


def drawn(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    broken = normal(70_001)
    broken[::7], broken[1::7], broken[2::7] = math.nan, math.inf, 0.0
    made = [
        normal(0), normal(), normal(1), normal(511), normal(2048), normal(2049), normal(28_672), normal(3_000_001),
        broken, normal(400, 300).t(), normal(64, 64)[:, ::2], normal(5001)[1:], normal(1_000_000) * 1e-3 + 1.0,
        torch.zeros(100_000, device=device), torch.full((200_000,), -0.5, device=device),
    ]  # fmt: skip
    return [each.to(dtype) for each in made]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_float64_and_themselves(cuda: torch.device, no_sync: NoSync, dtype: torch.dtype) -> None:
    tensors = drawn(cuda, dtype)
    if dtype == torch.float32:
        tensors += [tensors[7] * 1e-30, tensors[7] * 1e30]
    held = [LocalGradient(index, index % 3, tensor) for index, tensor in enumerate(tensors)]
    first = reduce_gradients(held)
    with no_sync():
        second = reduce_gradients(held)
    assert torch.equal(first["sums"], second["sums"])
    assert torch.equal(first["histograms"], second["histograms"])
    message = gradients_message(step=0, arrays={name: part.numpy(force=True) for name, part in first.items()})
    for index, tensor in enumerate(tensors):
        finite = tensor.double().flatten().cpu().numpy()
        finite = finite[np.isfinite(finite)]
        assert message.nonfinite[index] == tensor.numel() - finite.size
        assert message.zeros[index] == np.count_nonzero(finite == 0)
        if finite.size:
            unit = math.ldexp(1.0, int(message.exponents[index]))
            std = math.sqrt(message.m2[index] / finite.size) * unit
            assert message.means[index] * unit == pytest.approx(finite.mean(), rel=1e-5, abs=1e-5 * finite.std())
            assert std == pytest.approx(finite.std(), rel=1e-5, abs=1e-7 * np.abs(finite).max())
            assert message.absmax[index] == np.abs(finite).max()
    for module, row in enumerate(message.histograms):
        values = torch.cat([tensor.double().flatten() for tensor in tensors[module::3]]).abs().cpu().numpy()
        values = values[np.isfinite(values) & (values != 0)]
        wanted = np.bincount(np.clip(np.floor((np.log10(values) + 12) * 4), 0, 63).astype(int), minlength=64)
        assert row.sum() == values.size
        assert np.abs(np.cumsum(row - wanted)).max() <= 1 + values.size // 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 4096, 50_257])
def test_rows_equal_float64_and_themselves(cuda: torch.device, no_sync: NoSync, dtype: torch.dtype, width: int) -> None:
    logits = (torch.randn((3, 40, width), device=cuda) * 4).to(dtype)
    row, place = torch.arange(120, device=cuda) // 40, torch.arange(120, device=cuda) % 40
    targets = torch.randint(0, width, (120,), device=cuda)
    weights = (torch.arange(120, device=cuda) % 5 != 0).float()
    source = logits_source(logits, 3, 40)
    first = row_signals(source, row, place, targets, eos_id=EOS, weights=weights)
    with no_sync():
        second = row_signals(source, row, place, targets, eos_id=EOS, weights=weights)
    for name in ("numbers", "predictions", "mean_sum"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    kept = weights != 0
    wide = logits.flatten(0, 1)[kept].double()
    logp = wide.log_softmax(dim=1)
    p = logp.exp()
    losses = F.cross_entropy(wide, targets[kept], reduction="none")
    torch.testing.assert_close(first.numbers[0, kept].double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.numbers[1, kept].double(), -(p * logp).sum(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.numbers[2, kept].double(), p[:, EOS], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(first.numbers[3, kept].double(), p.max(dim=1).values, rtol=1e-4, atol=1e-9)
    chosen = wide.gather(1, first.predictions[kept].long().unsqueeze(1)).squeeze(1)
    assert torch.equal(chosen, wide.max(dim=1).values)
    torch.testing.assert_close(first.mean_sum.double(), p.sum(dim=0), rtol=1e-4, atol=1e-6)
    assert first.numbers[:, ~kept].eq(0).all()


def test_nothing_is_materialised(cuda: torch.device) -> None:
    gradients = [LocalGradient(0, 0, torch.zeros(100_000_000, device=cuda))]  # 400 MB
    assert extra_bytes(lambda: reduce_gradients(gradients)) <= 8 << 20
    logits = torch.zeros((4, 1024, 50_000), dtype=torch.bfloat16, device=cuda)  # 410 MB
    targets = torch.zeros(4096, dtype=torch.int64, device=cuda)
    assert extra_bytes(lambda: read_logits(logits, targets, positions=1024, with_mean=False)) <= 1 << 20
    assert extra_bytes(lambda: read_logits(logits, targets, positions=1024)) <= 16 << 20


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 32)
        self.lm_head = nn.Linear(32, 97, bias=False)

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(torch.tanh(self.embedding(input_ids)))
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def train(*, hooked: bool, compiled: str, no_sync: NoSync | None = None) -> tuple[list[float], list[object]]:
    """Train some steps; labels on the device, so that every reduction has its own way there."""
    torch.manual_seed(0)
    model = Model().cuda().train()
    called = model if not compiled else torch.compile(model, mode=compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = HooksConfig(
        token_stats_interval=1, loss_breakdown_interval=1, gradient_log_interval=1, lr_interval=1, eos_id=EOS, pad_id=0,
        generation_eval_interval=0, collapse_detection_interval=0, vocabulary_size=97, overhead_budget=0.0,
    )  # fmt: skip
    ways: list[InProcessTransport] = []

    def transport(*given: object) -> InProcessTransport:
        ways.append(InProcessTransport(*given))  # type: ignore[arg-type]
        return ways[-1]

    hooks = attach(model, optimizer, config=config, transport=transport) if hooked else None
    ids = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(1)).cuda()
    labels = ids.clone()
    labels[:, :9] = -100
    losses = []
    for step in range(6):
        logits, loss = called(ids, labels)
        loss.backward()
        if hooks is not None:
            with no_sync() if no_sync is not None and step >= 2 else nullcontext():  # the first steps compile
                hooks.on_batch(input_ids=ids, labels=labels, logits=logits, loss=loss, epoch=0, shifted=True)
                hooks.before_clip()
        optimizer.step()
        optimizer.zero_grad()
        if hooks is not None:
            hooks.after_step(step)
        losses.append(loss.item())
    if hooks is not None:
        hooks.close()
        assert hooks.failures() == {}
    torch.cuda.synchronize()
    return losses, list(ways[0].messages) if ways else []


@pytest.mark.parametrize("compiled", ["", "default", "reduce-overhead"])
@pytest.mark.timeout(300)
def test_losses_are_bit_identical_and_no_call_waits(
    compiled: str, no_sync: NoSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    try:
        without, again = (train(hooked=False, compiled=compiled)[0] for _ in range(2))
        losses, messages = train(hooked=True, compiled=compiled, no_sync=no_sync)
    finally:
        torch.use_deterministic_algorithms(mode=False)
        torch.compiler.reset()
    assert without == again
    assert losses == without
    seen = [message for message in messages if isinstance(message, Losses)]
    assert [message.labelled for message in seen] == [60] * 6
    assert not any(message.sampled for message in seen), "the kernel reads every labelled row"
    np.testing.assert_allclose([message.losses.mean() for message in seen], losses, rtol=1e-5)
    assert sum(isinstance(message, Gradients) for message in messages) == 6


def test_no_call_does_anything_while_a_graph_is_captured(cuda: torch.device) -> None:
    torch.manual_seed(0)
    model = Model().cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ids = torch.randint(3, 97, (2, 8), device=cuda)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(ids, ids)[1].backward()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    ways: list[InProcessTransport] = []

    def transport(*given: object) -> InProcessTransport:
        ways.append(InProcessTransport(*given))  # type: ignore[arg-type]
        return ways[-1]

    hooks = attach(model, optimizer, config=HooksConfig(gradient_log_interval=1), transport=transport)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, loss = model(ids, ids)
        hooks.on_batch(input_ids=ids, labels=ids, logits=logits, loss=loss, epoch=0)
        loss.backward()
        hooks.before_clip()
    graph.replay()
    optimizer.step()
    hooks.after_step(0)
    hooks.close()
    assert hooks.failures() == {}
