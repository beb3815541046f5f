from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.trainer_hooks.collective_generation import CollectiveGenerationError
from sidestep.trainer_hooks.decoding import (
    CachedLoop,
    GreedyGenerate,
    LibraryGenerate,
    RecomputingLoop,
    choose_decoding,
    cut,
)
from sidestep.trainer_hooks.generation import Generator, with_prompts
from sidestep.trainer_hooks.samples import Sample

V, EOS, IMAGE, NEW = 31, 0, 1, 12


@pytest.fixture
def model() -> VisionLanguageModel:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    made = VisionLanguageModel(vocabulary_size=V, image_token_id=IMAGE, eos_token_id=EOS)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8)  # an untrained model says one thing; this one says many
    return made.train()


def samples(count: int = 5) -> list[Sample]:
    drawn = torch.Generator().manual_seed(1)
    made = []
    for n in range(count):
        ids = [2, *[IMAGE] * (n % 2), *torch.randint(2, V, (3 + n,), generator=drawn).tolist()]
        tiles = [torch.randn(1, 1, 8, 8, generator=drawn)] * (n % 2)
        made.append(Sample(question="q", target="t", prompt_ids=ids, inputs={"images": tiles}))
    return made


def rows_of(message: Any) -> list[list[int]]:
    bounds = zip(message.offsets[:-1], message.offsets[1:], strict=True)
    return [message.ids[a:b].tolist() for a, b in bounds]


def reference(model: VisionLanguageModel, sample: Sample) -> list[int]:
    modes = [(module, module.training) for module in model.modules()]
    ids = torch.tensor([sample.prompt()])
    rows = model.eval().generate(ids, [sample.inputs["images"]], torch.ones_like(ids), max_new_tokens=NEW, greedy=True)
    for module, training in modes:
        module.training = training
    return cut(rows[0].tolist(), frozenset([EOS]), NEW)


@pytest.mark.parametrize("way", [CachedLoop, GreedyGenerate, RecomputingLoop])
def test_a_batch_says_what_each_prompt_says_alone(model: VisionLanguageModel, way: type[Any]) -> None:
    generator = Generator(model, samples(), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW)
    assert isinstance(generator._decoding, CachedLoop)
    if way is GreedyGenerate:
        generator._decoding = GreedyGenerate(model)
    elif way is RecomputingLoop:
        generator._decoding = RecomputingLoop(model, EOS)
    message = generator.run(7)
    assert (message.step, message.failures, message.max_new_tokens) == (7, (), NEW)
    assert message.samples.tolist() == [0, 1, 2, 3, 4]
    assert rows_of(message) == [reference(model, sample) for sample in samples()]
    assert len({tuple(row) for row in rows_of(message)}) > 1


def test_it_ends_when_all_have_ended(model: VisionLanguageModel) -> None:
    calls: list[int] = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    eos_id = reference(model, samples(1)[0])[0]
    ended = Generator(model, samples(1), eos_id=eos_id, pad_id=EOS, max_new_tokens=NEW)
    del calls[:]
    assert rows_of(ended.run(0)) == [[eos_id]]
    assert len(calls) == 1


def test_ranks_share_the_samples_and_one_alone_takes_all(model: VisionLanguageModel) -> None:
    whole = Generator(model, samples(), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW).run(0)
    parts = [Generator(model, samples(), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW, share=(r, 3)) for r in range(3)]
    made = [part.run(0) for part in parts]
    assert [part.samples.tolist() for part in made] == [list(range(r, len(samples()), 3)) for r in range(3)]
    joined = {row: ids for part in made for row, ids in zip(part.samples.tolist(), rows_of(part), strict=True)}
    assert [joined[row] for row in sorted(joined)] == rows_of(whole)
    assert rows_of(parts[0].run(1, alone=True)) == rows_of(whole)
    assert [part.is_first for part in parts] == [True, False, False]
    nothing = Generator(model, samples(1), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW, share=(1, 2)).run(0)
    assert (nothing.samples.size, nothing.offsets.tolist(), nothing.failures) == (0, [0], ())


def test_together_it_runs_to_the_end_and_a_failure_is_one_that_no_handler_takes(model: VisionLanguageModel) -> None:
    calls: list[int] = []
    together = Generator(model, samples(1), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW, is_collective=True)
    plain = Generator(model, samples(1), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    made = together.run(0)
    handle.remove()
    assert len(calls) == NEW, "one forward of the whole model a token, whatever has ended"
    assert rows_of(made) == rows_of(plain.run(0))

    def broken(*_: object) -> None:
        raise ValueError("a broken forward")

    model.register_forward_hook(broken)
    with pytest.raises(CollectiveGenerationError, match="a broken forward") as caught:
        together.run(1)
    assert not isinstance(caught.value, Exception)


def test_modes_random_state_and_gradients_are_as_before(model: VisionLanguageModel) -> None:
    model.vision_encoder.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    random.seed(11)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index]  # noqa: NPY002

    def drawing(_model: nn.Module, given: Sequence[Sample], _limit: int) -> list[list[int]]:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        np.random.rand(2)  # noqa: NPY002
        random.random()
        return [[5, EOS, 9]] * len(given)

    generator = Generator(model, samples(), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW, generate_fn=drawing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        message = generator.run(0)
        assert torch.is_autocast_enabled("cpu")
    assert rows_of(message) == [[5, EOS]] * 5
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == states[2]


def test_after_generating_a_backward_still_works(model: VisionLanguageModel) -> None:
    generator = Generator(model, samples(), eos_id=EOS, pad_id=EOS, max_new_tokens=NEW)
    for way in (generator._decoding, GreedyGenerate(model)):
        generator._decoding = way
        generator.run(0)
        ids = torch.randint(2, V, (2, 6))
        model(ids, [], targets=ids)[1].backward()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def test_a_sample_that_raises_is_counted_and_the_others_are_shown(model: VisionLanguageModel) -> None:
    wrong = Sample(question="q", target="t", prompt_ids=[2, IMAGE], inputs={"images": [torch.zeros(1, 1, 5, 5)]})
    message = Generator(model, [*samples(2), wrong, wrong], eos_id=EOS, pad_id=EOS, max_new_tokens=NEW).run(0)
    assert message.samples.tolist() == [0, 1]
    assert message.failed.tolist() == [2, 3]
    assert len(message.failures) == 1
    assert rows_of(message) == [reference(model, sample) for sample in samples(2)]


def test_a_callers_own_way_is_held_to_its_word(model: VisionLanguageModel) -> None:
    generator = Generator(
        model, samples(2), eos_id=EOS, pad_id=EOS, max_new_tokens=3, generate_fn=lambda _m, _s, _n: [[4, 4, 4, 4]]
    )
    message = generator.run(0)  # one row for two samples is refused; asked one by one, it answers
    assert rows_of(message) == [[4, 4, 4], [4, 4, 4]]


def test_inputs_that_the_model_does_not_take_are_refused_at_once(model: VisionLanguageModel) -> None:
    wrong = Sample(question="q", target="t", prompt_ids=[2], inputs={"pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match="pixel_values"):
        Generator(model, [wrong], eos_id=EOS, pad_id=EOS, max_new_tokens=NEW)


class Library(nn.Module):
    """A transformers-like model: the next id is one more than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = SimpleNamespace(eos_token_id=[EOS, 9])

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        raise NotImplementedError

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **given: Any) -> torch.Tensor:
        assert given.pop("pad_token_id") == EOS
        assert given == {"do_sample": False, "num_beams": 1, "max_new_tokens": 4}
        assert attention_mask.shape == input_ids.shape
        return torch.cat((input_ids, input_ids[:, -1:] + torch.arange(1, 5)), dim=1)


def test_transformers_generate_is_called_greedily_and_cut_at_any_of_its_ends() -> None:
    given = [Sample(question="", target="", prompt_ids=[3, 7]), Sample(question="", target="", prompt_ids=[2])]
    generator = Generator(Library(), given, eos_id=EOS, pad_id=EOS, max_new_tokens=4)
    assert isinstance(generator._decoding, LibraryGenerate)
    assert rows_of(generator.run(0)) == [[8, 9], [3, 4, 5, 6]]


class Plain(nn.Module):
    """Logits only, and no mask: prompts must go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, V)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(idx.shape))
        logits: torch.Tensor = self.embedding(idx)
        return logits


def test_a_forward_without_a_mask_is_given_one_prompt_at_a_time() -> None:
    model = Plain()
    given = [Sample(question="", target="", prompt_ids=ids) for ids in ([3, 4, 5], [6])]
    generator = Generator(model, given, eos_id=None, pad_id=None, max_new_tokens=2)
    assert isinstance(choose_decoding(model, None, 0), RecomputingLoop)
    assert [len(row) for row in rows_of(generator.run(0))] == [2, 2]
    assert {shape[0] for shape in model.shapes} == {1}


class Tokenizer:
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) % 20 for c in text]


class ChatTokenizer(Tokenizer):
    chat_template = "x"

    def apply_chat_template(self, turns: Any, *, add_generation_prompt: bool, tokenize: bool) -> dict[str, list[int]]:
        assert turns == [{"role": "user", "content": "hi"}]
        assert add_generation_prompt
        assert tokenize
        return {"input_ids": [5, 6]}


def test_prompts_are_made_of_questions_where_they_are_not_given() -> None:
    asked = Sample(question="hi", target="")
    assert with_prompts([asked], Tokenizer())[0].prompt() == Tokenizer().encode("hi")
    assert with_prompts([asked], ChatTokenizer())[0].prompt() == [5, 6]
    with pytest.raises(ValueError, match="prompt_ids"):
        with_prompts([Sample(question="hi", target="", image=np.zeros((2, 2)))], Tokenizer())
    with pytest.raises(ValueError, match="no encode"):
        with_prompts([asked], object())
