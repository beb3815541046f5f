"""The probe of the wiring: exactly 0 in a causal model, whatever its labels and rows, and not without its mask.

What a brief look finds changed is looked at thoroughly as soon as its numbers are on the host: a step or two later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sidestep
from sidestep.protocol.messages import Probe, StepEnd
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.transport import InProcessTransport
from sidestep.trainer_hooks.wiring_changes import MAX_PER_ROW, MAX_ROWS, every_second, find_answers
from sidestep.trainer_hooks.wiring_probe import FIRST_STEP, MAX_FAILURES
from sidestep.worker.detectors.settings import DetectorSettings

VOCABULARY, WIDTH, EOS, PAD, IMAGE, IGNORE = 31, 16, 1, 0, 2, -100
LIMIT = DetectorSettings().future_visible.threshold
ALL = torch.ones(4, dtype=torch.bool)


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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["answers", "packed", "padded", "one token", "one token alike", "text"])
@pytest.mark.parametrize("model", [Transformer, Shifted])
@pytest.mark.parametrize("seen", ["causal", "everything", "lost in training"])
def test_a_causal_model_shows_nothing_and_one_without_its_mask_does(
    kind: str, model: type[Transformer], seen: str
) -> None:
    trained = Trained(model(seen), kind)
    assert trained.failures == {}
    first, probe = trained.probes[0], trained.probes[-1]
    assert first.step == FIRST_STEP
    assert (first.padding_change, first.future_change, first.apart_change) == (0.0, 0.0, 0.0)
    if seen == "causal":
        assert probe is first
        assert probe.padding_rows == (2 if kind == "padded" else 0)
        assert probe.future_change == 0.0
    else:
        assert (first.future_rows, first.apart_rows, first.padding_rows) == (0, 0, 0)
        assert FIRST_STEP < probe.step <= FIRST_STEP + 2
        assert probe.padding_rows == (4 if kind == "padded" else 0)
        assert probe.future_change > 2 * LIMIT
    assert probe.future_rows == (1 if kind == "one token alike" else 2)
    assert (probe.apart_rows, probe.apart_change) == (2, 0.0)
    assert (probe.padding_change, probe.image_rows, probe.image_change) == (0.0, 0, 0.0)
    assert probe.images == probe.labelled == 0
    assert probe.loss != probe.loss
    assert probe.seconds > 0


def test_a_sound_model_is_run_twice_and_another_as_often_as_there_are_changes() -> None:
    for seen, looks in (("causal", [2]), ("everything", [2, 6])):
        model = Transformer(seen)
        trained = Trained(model, "padded")
        assert model.calls - 13 == sum(looks)
        assert len(trained.probes) == len(looks)


def test_what_was_found_once_is_looked_at_briefly_again() -> None:
    model = Transformer("everything")
    trained = Trained(model, "padded", steps=40, wiring_probe_interval=24)
    assert [probe.future_rows for probe in trained.probes] == [0, 2] * 3
    assert model.calls - 40 == (2 + 6) + (2 + 4) * 2, "how far equal forwards differ is asked three times at first"


class Unsteady(Transformer):
    """Adds in another order each time, let us say."""

    def logits(self, *given: Any) -> torch.Tensor:
        return super().logits(*given) + 1e-6 * (self.calls % 5)


class Drawing(Transformer):
    """Leaves a layer out by chance, by numbers of its own."""

    def logits(self, *given: Any) -> torch.Tensor:
        made = super().logits(*given)
        return made * (1 + 0.1 * (self.calls % 3))


@pytest.mark.parametrize(("of", "rows_told"), [(Unsteady, 2), (Drawing, 0)])
def test_forwards_that_differ_anyway_are_looked_at_thoroughly_and_say_nothing(
    of: type[Transformer], rows_told: int
) -> None:
    trained = Trained(of(), "padded", steps=40, wiring_probe_interval=24)
    assert trained.failures == {}
    thorough = trained.probes[1:]
    assert [probe.step for probe in thorough[1:]] == [12, 36], "without a brief look before"
    assert {probe.future_rows for probe in thorough} == {rows_told}
    for probe in thorough:
        assert max(probe.future_change, probe.apart_change, probe.padding_change) < LIMIT or not rows_told


class Unpadded(Transformer):
    """Its mask does not reach the attention."""

    def logits(self, input_ids: torch.Tensor, documents: torch.Tensor | None, _: Any) -> torch.Tensor:
        return super().logits(input_ids, documents, None)


def test_padding_that_is_read_is_named() -> None:
    trained = Trained(Unpadded(), "padded")
    probe = trained.probes[-1]
    assert (probe.future_change, probe.apart_change) == (0.0, 0.0)
    assert probe.padding_rows == 4
    assert probe.padding_change > 2 * DetectorSettings().padding_visible.threshold


class Choosy(Transformer):
    """Raises at padding that is not padding."""

    def logits(self, input_ids: torch.Tensor, documents: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is not None and (input_ids[attention_mask == 0] > IMAGE).any():
            raise ValueError("there is something at padding")
        return super().logits(input_ids, documents, attention_mask)


def test_a_model_that_raises_at_other_padding_is_asked_for_the_rest() -> None:
    trained = Trained(Choosy(), "padded", steps=20)
    assert trained.failures == {"wiring_probe": 1}
    assert [probe.step for probe in trained.probes] == [2 * FIRST_STEP]
    assert (trained.probes[0].future_rows, trained.probes[0].padding_rows) == (2, 0)


def test_it_is_due_early_and_between_the_probes_of_images() -> None:
    trained = Trained(Transformer(), steps=41, wiring_probe_interval=12)
    assert [probe.step for probe in trained.probes] == [6, FIRST_STEP, 18, 30]
    assert [end.step for end in trained.ends if end.sent.get("probe")] == [6, FIRST_STEP, 18, 30]
    assert Trained(Transformer(), steps=21, wiring_probe_interval=0).probes == []
    assert Trained(Transformer(), steps=21, signal_rows_per_step=0).probes == []


@pytest.mark.parametrize("seen", ["causal", "everything"])
def test_half_precision_is_exact_as_well(seen: str) -> None:
    trained = Trained(Transformer(seen).bfloat16(), "text")
    assert trained.failures == {}
    probe = trained.probes[-1]
    assert probe.future_rows == 2
    assert (probe.future_change == 0.0) if seen == "causal" else (probe.future_change > 2 * LIMIT)


class Cast(Transformer):
    """Remembers the dtype of its logits."""

    def logits(self, *given: Any) -> torch.Tensor:
        made = super().logits(*given)
        self.dtypes = [*getattr(self, "dtypes", []), (torch.is_grad_enabled(), made.dtype)]
        return made


def test_it_runs_under_the_autocast_of_the_training_and_leaves_its_cache_alone() -> None:
    model = Cast()
    before = model.head.weight.detach().clone()

    class Autocast(Trained):
        def trained_on(self, given: dict[str, torch.Tensor]) -> float:
            with torch.autocast("cpu", torch.bfloat16):
                return super().trained_on(given)

    trained = Autocast(model)
    assert trained.failures == {}
    assert trained.probes[0].future_change == 0.0
    assert set(model.dtypes) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert not torch.equal(before, model.head.weight)


class Flattened(Transformer):
    """Its rows are one long row to the attention, as where a mask of the wrong shape is taken for causal alone."""

    def logits(self, input_ids: torch.Tensor, *given: Any) -> torch.Tensor:
        return super().logits(input_ids.reshape(1, -1), None, None).view(*input_ids.shape, VOCABULARY)


def test_rows_that_one_causal_mask_lets_see_those_above() -> None:
    probe = Trained(Flattened()).probes[-1]
    assert probe.apart_rows == 2
    assert probe.apart_change > 2 * DetectorSettings().rows_mixed.threshold


@pytest.mark.parametrize("model", [Transformer, Shifted, Checkpointed, Fused])
def test_no_bit_of_the_training_changes(model: type[Transformer]) -> None:
    runs = []
    for interval in (0, 1):
        torch.manual_seed(3)
        runs.append(Trained(model("everything"), "padded", steps=12, accumulation=2, wiring_probe_interval=interval))
    plain, probed = runs
    assert len(probed.probes) == 11
    assert plain.failures == probed.failures == {}
    assert plain.losses == probed.losses
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, probed.model.state_dict()[name]), name
    assert all(each.training for each in probed.model.modules())
    assert probed.model.calls > plain.model.calls >= 24  # type: ignore[operator]


def test_a_forward_of_the_probe_is_not_taken_for_one_of_the_training() -> None:
    trained = Trained(Transformer(), "text", steps=12, wiring_probe_interval=1, answer_length_interval=1)
    assert len(trained.probes) == 11
    assert all(end.sent["signals"] == 1 for end in trained.ends)
    assert trained.ends[-1].step == 11


@pytest.mark.parametrize("kind", [Fused, FusedWhenAsked])
def test_a_fused_loss_is_asked_for_logits_without_labels(kind: type[Transformer]) -> None:
    for seen in ("causal", "everything"):
        trained = Trained(kind(seen))
        assert trained.failures == {}
        change = trained.probes[-1].future_change
        assert (change == 0.0) if seen == "causal" else (change > 2 * LIMIT)


class Encoder(nn.Module):
    """No token ids: features and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(features)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE), logits


class WithFeatures(Trained):
    def trained_on(self, given: dict[str, torch.Tensor]) -> float:
        return super().trained_on({"features": torch.rand(4, 20, WIDTH), "labels": given["labels"]})


class Silent(Transformer):
    """Never shows logits."""

    def forward(self, *given: Any, **named: Any) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (super().forward(*given, **named)[0],)


class Translating(Transformer):
    """Says that it has an encoder."""

    class config:  # noqa: N801  (an attribute of that name)
        is_encoder_decoder = True


@pytest.mark.parametrize("of", [Encoder, Translating])
def test_a_model_that_cannot_be_asked_says_nothing(of: type[nn.Module]) -> None:
    trained = (WithFeatures if of is Encoder else Trained)(of())
    assert trained.failures == {}
    assert trained.probes == []


class Failing(Transformer):
    """Raises where gradients are off."""

    def forward(self, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_grad_enabled():
            self.forwards += 1
            raise RuntimeError("not now")
        return super().forward(*given, **named)


class Synchronised(Transformer):
    """Counts over all ranks in its forward."""

    def logits(self, *given: Any) -> torch.Tensor:
        dist.all_reduce(torch.ones(()))
        return super().logits(*given)


def test_what_fails_is_said_once_and_switched_off(capfd: pytest.CaptureFixture[str]) -> None:
    trained = Trained(Failing(), steps=12, wiring_probe_interval=1)
    assert trained.failures == {"wiring_probe": MAX_FAILURES}
    assert trained.probes == []
    assert capfd.readouterr().err.count("a measurement failed in wiring_probe") == 1
    assert isinstance(trained.model, Failing)
    assert int(trained.model.forwards) == 12  # what a failed one counted was put back


@pytest.fixture
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_a_collective_is_refused_before_it_waits_for_the_other_ranks() -> None:
    trained = Trained(Synchronised(), steps=12, wiring_probe_interval=1)
    assert trained.failures == {"wiring_probe": MAX_FAILURES}
    assert trained.probes == []


@pytest.mark.parametrize("shifted", [False, True])
def test_only_answer_tokens_are_exchanged_and_all_of_them_behind_the_position(shifted: bool) -> None:
    given = rows("padded")
    ids, labels = given["input_ids"], given["labels"]
    ids[:, 12], ids[:, 13] = torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9, 10, 11])
    labels[:, 12:14] = ids[:, 12:14]
    labels[3] = IGNORE
    labels[2, 13:] = IGNORE
    told = F.pad(labels, (-1, 1), value=IGNORE) if shifted else labels
    answers = find_answers(ids, align(input_ids=ids, labels=told, shifted=shifted))
    assert answers is not None
    assert [sorted(set(row)) for row in answers.candidates.tolist()[:3]] == [[*range(11, 19)]] * 2 + [[11]]
    made, is_exchanged = answers.exchanged(torch.tensor([[14], [11], [11], [0]]), ALL)
    assert is_exchanged.tolist() == [True, True, True, False]
    moved = made != ids
    assert moved.any(dim=0).nonzero().flatten().tolist() == [*range(12, 20)]
    assert moved[0].nonzero().flatten().tolist() == [*range(15, 20)]
    assert moved[1].nonzero().flatten().tolist() == [*range(12, 20)]
    assert moved[2].nonzero().flatten().tolist() == [12]
    assert int(made[2, 12]) == int(ids[1, 12])  # its own only token stands there already
    assert set(made[0][moved[0]].tolist()) <= set(labels[0].tolist())


def test_placeholders_of_images_stay_where_they_are_labelled() -> None:
    given = rows("padded")
    labels = given["input_ids"].clone()
    batch = align(input_ids=given["input_ids"], labels=labels, attention_mask=given["attention_mask"])
    answers = find_answers(given["input_ids"], batch, IMAGE)
    assert answers is not None
    made, _ = answers.exchanged(torch.zeros(4, 1, dtype=torch.int64), ALL)
    assert torch.equal(made == IMAGE, given["input_ids"] == IMAGE)
    assert (made != given["input_ids"]).any(dim=1).all()


def test_labels_that_are_not_the_next_tokens_are_left_alone() -> None:
    ids = torch.arange(3, 23).expand(2, 20)
    answers = find_answers(ids, align(input_ids=ids, labels=ids, shifted=True))  # not shifted, and said to be
    assert answers is not None
    made, is_exchanged = answers.exchanged(answers.candidates[:, :1], ALL[:2])
    assert not is_exchanged.any()
    assert torch.equal(made, ids)
    assert find_answers(ids[:, :10], align(input_ids=None, labels=ids)) is None


@pytest.mark.parametrize(("count", "looked_at"), [(MAX_ROWS + 8, 1), (100, 5), (3, MAX_PER_ROW)])
def test_at_most_so_many_positions_are_looked_at(count: int, looked_at: int) -> None:
    ids = torch.randint(3, VOCABULARY, (count, 40))
    answers = find_answers(ids, align(input_ids=ids, labels=ids))
    assert answers is not None
    assert answers.candidates.shape == (min(count, MAX_ROWS), looked_at)
    made, is_exchanged = answers.exchanged(answers.candidates[:, -1:], every_second(ids))
    assert is_exchanged.shape == (min(count, MAX_ROWS),)
    assert made.shape == ids.shape
