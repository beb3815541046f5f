"""The probe of the wiring on the demo's model: nothing in a sound one, and each fault that it is there for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from sidestep.examples.digits_vqa.digits import load_splits
from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.examples.digits_vqa.packing import PackedRows, collate
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer
from sidestep.protocol.messages import Probe
from sidestep.trainer_hooks.capture import Batch, ForwardReader
from sidestep.trainer_hooks.image_probe import rolled
from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.wiring_probe import FIRST_STEP, WiringProbe
from sidestep.worker.detectors.settings import DetectorSettings

RULES = DetectorSettings()
SINGLE, PACKED = 90, 192
"""Lengths of rows that hold one conversation, and several."""
COUNT = 6
Given = dict[str, Any]


@cache
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer()


def batch(length: int = PACKED, count: int = COUNT) -> Given:
    """Return a forward's arguments; rows are padded on the left."""
    rows = iter(PackedRows(load_splits()[0], tokenizer(), length=length, seed=1))
    packed = collate([next(rows) for _ in range(count)])
    given = {name: packed[name] for name in ("input_ids", "images", "attention_mask")}
    return {**given, "targets": packed["labels"]}


def without_images(length: int = PACKED) -> Given:
    given = batch(length)
    ids = given["input_ids"]
    return {**given, "input_ids": torch.where(ids == tokenizer().image_token_id, 7, ids), "images": []}


def with_tiles(given: Given) -> Given:
    """The first row's images become two tiles each, with as many placeholders before its first one."""
    first, *others = given["images"]
    ids, image_token_id = given["input_ids"].clone(), tokenizer().image_token_id
    begin = int((ids[0] == image_token_id).nonzero()[0])
    ids[0, begin - len(first) : begin] = image_token_id
    return {**given, "input_ids": ids, "images": [[torch.cat((tile, tile.flip(-1))) for tile in first], *others]}


def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    ids = tokenizer()
    return VisionLanguageModel(
        vocabulary_size=len(ids), image_token_id=ids.image_token_id, eos_token_id=ids.eos_token_id
    )


def looked_at(asked: nn.Module, given: Given, *, dtype: torch.dtype | None = None, known: bool = True) -> Probe:
    """Probe a model, thoroughly where the brief look asks for it; the id of placeholders is ``known`` or not."""
    image_token_id = tokenizer().image_token_id if known else None
    probe = WiringProbe(asked, ForwardReader(asked, len(tokenizer())), 500, image_token_id=image_token_id)
    assert not probe.is_due(0)
    for step in (FIRST_STEP, FIRST_STEP + 1):
        assert probe.is_due(step)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            probe.see(given)
        probe.keep(Batch(labels=given["targets"]), lambda kept: align(input_ids=None, labels=kept.labels, shifted=True))
        made = probe.run(step)
        assert made is not None
        tensors, finish = made
        (found,) = finish({name: tensor.numpy() for name, tensor in tensors.items()})
        if not probe.is_due(step + 1):
            break
    assert not probe.is_due(step + 1)
    assert isinstance(found, Probe)
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("length", [SINGLE, PACKED])
def test_a_sound_model_shows_exactly_nothing_but_its_images(
    length: int, known: bool, dtype: torch.dtype | None
) -> None:
    found = looked_at(model(), batch(length), dtype=dtype, known=known)
    assert (found.future_rows, found.apart_rows, found.padding_rows) == (3, 3, 3)
    assert found.future_change == found.apart_change == found.padding_change == 0.0
    assert found.image_rows == (3 if known else 6)
    assert found.image_change > 1e-3


class OtherImages(nn.Module):
    """The demo's model, with the images of each row put in otherwise."""

    def __init__(self, put: Callable[[list[Any]], list[Any]]) -> None:
        super().__init__()
        self.whole, self._put = model(), put

    def forward(
        self,
        input_ids: torch.Tensor,
        images: list[Any],
        attention_mask: torch.Tensor,
        targets: torch.Tensor | None = None,
    ) -> Any:
        return self.whole(input_ids, [self._put(row) for row in images], attention_mask, targets)


class Leaving(nn.Module):
    """A block that is left out by chance, by a generator of its own."""

    def __init__(self, block: nn.Module, seed: int) -> None:
        super().__init__()
        self.block, self._draw = block, torch.Generator().manual_seed(seed)

    def forward(self, hidden: torch.Tensor, *others: Any) -> Any:
        made = self.block(hidden, *others)
        is_left_out = torch.rand((), generator=self._draw).item() < 0.4
        if not is_left_out:
            return made
        return hidden if isinstance(made, torch.Tensor) else (hidden, *made[1:])


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_draws_by_itself_tells_nothing_of_its_wiring(seed: int) -> None:
    asked = model()
    blocks = asked.decoder.blocks
    for place in range(len(blocks)):
        blocks[place] = Leaving(blocks[place], 10 * seed + place)
    found = looked_at(asked, batch())
    assert (found.future_rows, found.apart_rows, found.padding_rows, found.misplaced_rows) == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_last_image_of_a_row_changes_what_is_behind_it_alone(dtype: torch.dtype | None) -> None:
    given = batch()
    assert max(map(len, given["images"])) > 1
    found = looked_at(model(), given, dtype=dtype)
    assert found.last_image_rows > 3
    assert found.last_image_change > 0
    assert (found.misplaced_change, found.misplaced_rows > 3) == (0.0, True)
    none = [[] if row == 1 else images for row, images in enumerate(given["images"])]
    ids = given["input_ids"].clone()
    ids[1] = ids[1].where(ids[1] != tokenizer().image_token_id, 7)
    found = looked_at(model(), {**given, "input_ids": ids, "images": none}, dtype=dtype)
    assert found.last_image_rows > 2
    assert found.misplaced_change == 0.0


def test_images_of_a_row_in_another_order_are_misplaced() -> None:
    found = looked_at(OtherImages(lambda row: row[::-1]), batch())
    assert found.misplaced_change > RULES.image_misplaced.threshold
    assert found.image_change > 0


def test_one_image_for_a_whole_row_reaches_not_what_others_are_asked_about() -> None:
    found = looked_at(OtherImages(lambda row: row[:1] * len(row)), batch())
    assert found.last_image_rows > 3
    assert found.last_image_change == found.misplaced_change == 0.0
    assert found.image_change > 0


def test_where_placeholders_are_not_known_nothing_is_said_of_the_last_one() -> None:
    found = looked_at(model(), batch(), known=False)
    assert found.last_image_rows == found.misplaced_rows == 0


@pytest.mark.parametrize("length", [SINGLE, PACKED])
def test_without_images_nothing_is_said_of_them(length: int) -> None:
    found = looked_at(model(), without_images(length))
    assert (found.future_rows, found.apart_rows, found.padding_rows, found.image_rows) == (3, 3, 3, 0)
    assert found.future_change == found.apart_change == found.padding_change == found.image_change == 0.0


def test_answers_in_rows_whose_images_stay_say_nothing_of_images() -> None:
    given = batch(SINGLE)
    targets = given["targets"].clone()
    targets[::2] = -100
    found = looked_at(model(), {**given, "targets": targets})
    assert (found.image_rows, found.apart_rows) == (0, 3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_few_rows_all_are_changed(count: int) -> None:
    found = looked_at(model(), batch(count=count))
    assert (found.future_rows, found.apart_rows, found.padding_rows) == (count, 0, count)
    assert found.future_change == found.padding_change == 0.0
    assert found.image_rows == count
    assert found.image_change > 0


def test_images_that_are_all_the_same_tell_nothing() -> None:
    given = batch()
    tile = given["images"][0][0]
    found = looked_at(model(), {**given, "images": [[tile] * len(row) for row in given["images"]]})
    assert (found.image_rows, found.image_change) == (0, 0.0)
    assert found.padding_rows == 3


def test_images_that_are_the_same_though_their_tiles_differ_tell_nothing_either() -> None:
    given = batch(SINGLE, count=2)
    ids, image_token_id = given["input_ids"].clone(), tokenizer().image_token_id
    ids[ids == image_token_id] = 7
    ids[:, 40:42] = image_token_id
    tiles = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    assert rolled({"images": [[tiles], [tiles.clone()]]})[1] == 0  # type: ignore[index]
    found = looked_at(model(), {**given, "input_ids": ids, "images": [[tiles], [tiles.clone()]]})
    assert (found.image_rows, found.image_change) == (0, 0.0)
    assert rolled({"images": [[tiles]]}) is None
    alone = looked_at(model(), {**given, "input_ids": ids[:1], "attention_mask": given["attention_mask"][:1],
                                "targets": given["targets"][:1], "images": [[tiles]]})  # fmt: skip
    assert alone.image_rows == 1
    assert alone.image_change > 0


def test_images_of_several_tiles_are_exchanged_tile_by_tile() -> None:
    given = with_tiles(batch(SINGLE))
    sound = looked_at(model(), given)
    assert sound.image_rows == 3
    assert sound.image_change > 1e-3
    assert looked_at(unmerged(model()), given).image_change == 0.0


def test_a_mask_that_is_zero_at_answers_is_not_taken_for_padding() -> None:
    given = batch(SINGLE)
    inverted = {**given, "attention_mask": 1 - given["attention_mask"]}
    assert looked_at(unmasked(model()), inverted).padding_rows == 0


def unmerged(asked: VisionLanguageModel) -> nn.Module:
    """Nothing is put in the place of a placeholder."""
    asked.MP.register_forward_hook(lambda _module, _inputs, output: output * 0)
    return asked


def plain_text(asked: VisionLanguageModel) -> nn.Module:
    """The model looks for another id than the placeholder's."""

    def embed(input_ids: torch.Tensor, images: Any) -> torch.Tensor:
        pictures = asked.MP(asked.vision_encoder(torch.cat([tile for row in images for tile in row])))
        made: torch.Tensor = asked.decoder.token_embedding(input_ids) + 0 * pictures.sum()
        return made

    asked._embed = embed  # type: ignore[method-assign]
    return asked


def unmasked(asked: VisionLanguageModel) -> nn.Module:
    """The attention mask does not reach the attention."""

    def forget(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        embeddings, _mask, *rest = given
        return (embeddings, None, *rest)

    asked.decoder.register_forward_pre_hook(forget)
    return asked


def reshaped(asked: VisionLanguageModel) -> nn.Module:
    """One block's output has its axes of rows and of positions exchanged by ``reshape``."""

    def mix(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.transpose(0, 1).reshape(output.shape)

    asked.decoder.get_submodule("blocks.1.out_proj").register_forward_hook(mix)
    return asked


def averaged(asked: VisionLanguageModel) -> nn.Module:
    """A state is normalised over the rows of the batch, though it should be over features."""
    asked.decoder.get_submodule("blocks.1.norm2").register_forward_hook(
        lambda _module, _inputs, output: output - output.mean(dim=0, keepdim=True)
    )
    return asked


def misplaced(asked: VisionLanguageModel) -> nn.Module:
    """Each image is put in the place of the next."""
    asked.MP.register_forward_hook(lambda _module, _inputs, output: output.roll(1, dims=0))
    return asked


Break = Callable[[VisionLanguageModel], nn.Module]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("length", [SINGLE, PACKED])
@pytest.mark.parametrize("fault", [reshaped, averaged])
def test_rows_that_see_each_other(fault: Break, length: int, dtype: torch.dtype | None) -> None:
    found = looked_at(fault(model()), batch(length), dtype=dtype)
    assert found.apart_rows == 3
    assert found.apart_change > 2 * RULES.rows_mixed.threshold


@pytest.mark.parametrize("length", [SINGLE, PACKED])
def test_images_that_are_put_into_other_rows(length: int) -> None:
    found = looked_at(misplaced(model()), batch(length))
    assert (found.apart_rows, found.future_change, found.padding_change) == (3, 0.0, 0.0)
    assert found.apart_change > 2 * RULES.rows_mixed.threshold
    unknown = looked_at(misplaced(model()), batch(length), known=False)
    assert (unknown.apart_rows, unknown.apart_change) == (3, 0.0)  # nobody says which row an image belongs to
    assert unknown.image_change > 0


def test_images_that_do_not_come_by_rows_tell_nothing_of_them() -> None:
    given = batch(SINGLE)
    tiles = [tile for row in given["images"] for tile in row]
    for images in ([*tiles[:5], tiles[5:]], [torch.cat(tiles)]):
        found = looked_at(model(), {**given, "images": [each if isinstance(each, list) else [each] for each in images]})
        assert (found.apart_rows, found.apart_change, found.image_rows) == (3, 0.0, 6)
        assert found.image_change > 1e-3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("length", [SINGLE, PACKED])
def test_padding_that_is_read(length: int, dtype: torch.dtype | None) -> None:
    found = looked_at(unmasked(model()), batch(length), dtype=dtype)
    assert found.padding_rows == 6
    assert found.padding_change > 2 * RULES.padding_visible.threshold
    assert found.apart_change == 0.0


@pytest.mark.parametrize("length", [SINGLE, PACKED])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fault", [unmerged, plain_text])
def test_images_that_reach_no_answer(fault: Break, length: int, known: bool) -> None:
    found = looked_at(fault(model()), batch(length), known=known)
    assert (found.image_rows, found.image_change) == (3 if known else 6, 0.0)
    assert found.apart_change == found.padding_change == 0.0


def test_a_placeholder_that_is_spelled_is_found_as_well() -> None:
    given = without_images()
    found = looked_at(plain_text(model()), {**given, "images": batch()["images"]})
    assert (found.image_rows, found.image_change) == (6, 0.0)


class Refusing(VisionLanguageModel):
    """Raises where padding is another id than it should be."""

    def forward(self, input_ids: torch.Tensor, *given: Any, **named: Any) -> Any:
        mask = named["attention_mask"]
        if (input_ids[mask == 0] != self.eos_token_id).any():
            raise ValueError("that is no padding")
        return super().forward(input_ids, *given, **named)


def test_what_the_model_refuses_is_left_out_and_the_rest_is_asked_soon_again() -> None:
    asked, given = model(), batch()
    asked.__class__ = Refusing
    probe = WiringProbe(asked, ForwardReader(model(), len(tokenizer())), 500)
    assert not probe.is_due(100)

    def look(step: int) -> Mapping[str, torch.Tensor]:
        assert probe.is_due(step)
        probe.see(given)
        probe.keep(Batch(labels=given["targets"]), lambda kept: align(input_ids=None, labels=kept.labels, shifted=True))
        made = probe.run(step)
        assert made is not None
        return made[0]

    with pytest.raises(ValueError, match="no padding"):
        look(100 + FIRST_STEP)
    assert look(100 + 2 * FIRST_STEP)["rows"].tolist() == [3, 3, 0, 6, 0, 0]


def test_no_trace_is_left() -> None:
    asked = model()
    asked.vision_encoder.eval()
    before = {name: value.clone() for name, value in asked.state_dict().items()}
    modes = [module.training for module in asked.modules()]
    state = torch.get_rng_state()
    given = batch()
    kept = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    tiles = [tile.clone() for row in given["images"] for tile in row]
    looked_at(asked, given)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in asked.modules()]
    assert all(parameter.grad is None for parameter in asked.parameters())
    assert all(torch.equal(value, before[name]) for name, value in asked.state_dict().items())
    assert all(torch.equal(given[name], value) for name, value in kept.items())
    assert all(torch.equal(mine, was) for mine, was in zip((t for r in given["images"] for t in r), tiles, strict=True))
