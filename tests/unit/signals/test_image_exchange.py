"""Images in the place of others: whole ones, like ones, from other rows, and never those that fill a batch up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidestep.trainer_hooks.image_exchange import MAX_IMAGES, find_partners, read_images
from sidestep.trainer_hooks.image_probe import has_several, rolled, rolled_rows
from sidestep.trainer_hooks.signals.images import describe_images, image_numbers
from sidestep.trainer_hooks.signals.packed_images import PackedImages, images_of, packed_images


def ids(rows: int) -> torch.Tensor:
    return torch.zeros(rows, 5, dtype=torch.int64)


def numbered(*shape: int) -> torch.Tensor:
    """Images [.., 3, 2, 2] whose pixels are the number of the image, from 1 on."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + 1).view(*shape, 1, 1, 1).expand(*shape, 3, 2, 2).contiguous()


def exchanged(given: dict[str, Any], name: str = "pixel_values") -> Any:
    moved = rolled(given)
    assert moved is not None
    value = moved[0][name]
    assert value.shape == given[name].shape
    return value


def numbers_of(images: torch.Tensor) -> Any:
    return images.flatten(-3).select(-1, 0).to(torch.int64).tolist()


def test_one_image_a_row_comes_from_the_row_before() -> None:
    given = {"input_ids": ids(4), "pixel_values": numbered(4)}
    assert numbers_of(exchanged(given)) == [4, 1, 2, 3]
    assert numbers_of(exchanged({"pixel_values": numbered(2, 3)})) == [[6, 1, 2], [3, 4, 5]]


def test_tiles_come_from_half_a_batch_away_where_there_are_more_than_rows() -> None:
    """Those beside each other may be tiles of one image, which it would see all but one of."""
    flat = {"input_ids": ids(4), "pixel_values": numbered(12)}
    assert numbers_of(exchanged(flat)) == [7, 8, 9, 10, 11, 12, 1, 2, 3, 4, 5, 6]
    by_rows = {"input_ids": ids(4), "pixel_values": numbered(4, 3)}
    assert numbers_of(exchanged(by_rows)) == [[7, 8, 9], [10, 11, 12], [1, 2, 3], [4, 5, 6]]


def test_images_that_fill_a_batch_up_stay_and_the_others_change() -> None:
    """A model leaves them out: with them moved along, the images would be the same in the same order."""
    images = numbered(4, 2)
    images[1:, 1] = 0
    mask = images[:, :, 0].ne(0).long()
    given = {"input_ids": ids(4), "pixel_values": images, "pixel_attention_mask": mask}
    moved = rolled(given)
    assert moved is not None
    assert numbers_of(moved[0]["pixel_values"]) == [[5, 7], [1, 0], [2, 0], [3, 0]]
    assert torch.equal(moved[0]["pixel_attention_mask"], mask)
    assert int(moved[1]) == 5
    told = read_images(given)
    assert told is not None
    assert told.tokens_by_rows().tolist() == [2, 1, 1, 1]


def test_a_mask_goes_with_its_image() -> None:
    mask = torch.arange(4).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    given = {"input_ids": ids(4), "pixel_values": numbered(4, 1), "pixel_attention_mask": mask}
    assert exchanged(given, "pixel_attention_mask")[:, 0, 0, 0].tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("kind", ["image_sizes", "spatial_shapes", "image_grid_thw"])
def test_whole_images_change_places_with_those_of_their_size(kind: str) -> None:
    """And one that is alone in its size gets another's pixels, as far as they go."""
    sizes = torch.tensor([[2, 4], [4, 2], [2, 4], [4, 2], [9, 9]])
    if kind == "image_grid_thw":
        sizes = torch.cat((torch.ones(5, 1, dtype=torch.int64), sizes), dim=1)
    given = {"input_ids": ids(5), "pixel_values": numbered(5, 3), kind: sizes}
    assert [row[0] for row in numbers_of(exchanged(given))] == [7, 10, 1, 4, 7]
    assert [row[2] for row in numbers_of(exchanged(given))] == [9, 12, 3, 6, 9], "with all of their tiles"


def test_images_of_tiles_change_places_with_those_whose_tiles_lie_alike() -> None:
    """A tile of zeros that fills an image up is not put in the place of one that is looked at."""
    images = numbered(4, 1, 2)
    images[:2, :, 1] = 0
    ratios = torch.tensor([[1], [1], [2], [2]])
    moved = rolled({"input_ids": ids(4), "pixel_values": images, "aspect_ratio_ids": ratios})
    assert moved is not None
    assert numbers_of(moved[0]["pixel_values"]) == [[[3, 0]], [[1, 0]], [[7, 8]], [[5, 6]]]
    assert int(moved[1]) == 4


def test_what_does_not_belong_to_images_says_nothing_of_them() -> None:
    images = numbered(4)
    for odd in ({"image_sizes": torch.ones(3, 2, dtype=torch.int64)}, {"image_sizes": [(2, 2)] * 4},
                {"image_sizes": torch.ones(4, 2)}, {"spatial_shapes": None}):  # fmt: skip
        assert numbers_of(exchanged({"input_ids": ids(4), "pixel_values": images, **odd})) == [4, 1, 2, 3]
    assert read_images({"pixel_values": images[0]}) is None
    assert read_images({"pixel_values": images[:1]}) is None
    assert read_images({"pixel_values": list(images)}) is None
    assert read_images({}) is None
    assert read_images({"pixel_values": torch.zeros(MAX_IMAGES + 1, 1, 1, 1)}) is None


def test_partners_are_found_within_a_kind_and_what_is_not_usable_keeps_its_place() -> None:
    kinds = torch.tensor([[1], [2], [1], [2], [1], [3]])
    usable = torch.tensor([True, True, True, True, False, True])
    assert find_partners(kinds, usable, far=False).tolist() == [2, 3, 0, 1, 4, 2]
    assert find_partners(kinds, ~usable, far=True).tolist() == list(range(6))
    alike = torch.zeros(6, 1)
    assert find_partners(alike, torch.ones(6, dtype=torch.bool), far=True).tolist() == [3, 4, 5, 0, 1, 2]


# ------------------------------------------------------------------------------------------------ packed patches


GRIDS = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 2], [1, 4, 2], [1, 2, 4]])
LENGTHS = [4, 8, 4, 8, 8]


def packed(repeated: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    parts = [torch.randn(length, 12) + number for number, length in enumerate(LENGTHS)]
    if repeated:
        parts[2] = parts[0]
    return {"input_ids": ids(5), "pixel_values": torch.cat(parts), "image_grid_thw": GRIDS}


def test_packed_patches_are_told_apart_by_image() -> None:
    given = packed(repeated=True)
    images = images_of(given)
    assert isinstance(images, PackedImages)
    numbers = images.numbers()
    hashes, deviations, means = describe_images([numbers.numpy()])
    assert len(set(hashes.tolist())) == 4
    assert hashes[0] == hashes[2]
    parts = given["pixel_values"].split(LENGTHS)
    for number, part in enumerate(parts):
        assert means[number] == pytest.approx(float(part.mean()), abs=1e-5)
        assert deviations[number] == pytest.approx(float(part.std(correction=0)), rel=1e-4)
    alone = image_numbers(parts[1].view(1, 1, *parts[1].shape))
    assert alone is not None
    torch.testing.assert_close(numbers[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_patch_that_is_moved_makes_another_image_and_order_within_a_batch_does_not() -> None:
    given = packed()
    value, grids = given["pixel_values"], given["image_grid_thw"]
    plain = PackedImages(value, grids).numbers()
    within = value.clone()
    within[[4, 11]] = value[[11, 4]]
    changed = PackedImages(within, grids).numbers()
    assert (plain != changed).any(dim=1).tolist() == [False, True, False, False, False]
    backwards = PackedImages(torch.cat(value.split(LENGTHS)[::-1]), grids.flip(0)).numbers()
    torch.testing.assert_close(backwards.flip(0), plain)


def test_packed_images_change_places_with_those_of_their_grid() -> None:
    given = packed()
    moved = rolled(given)
    assert moved is not None
    before, after = given["pixel_values"].split(LENGTHS), moved[0]["pixel_values"].split(LENGTHS)
    for number, partner in ((0, 2), (2, 0), (1, 4), (4, 1)):
        assert torch.equal(after[number], before[partner])
    assert not torch.equal(after[3], before[3]), "alone in its grid, it gets what lies elsewhere"
    assert int(moved[1]) == 5
    assert set(moved[0]) == {"pixel_values"}


def test_grids_that_are_not_of_these_patches_tell_nothing() -> None:
    given = packed()
    moved = rolled({**given, "image_grid_thw": GRIDS + 1})
    assert moved is not None
    assert int(moved[1]) == 0
    assert packed_images({**given, "image_grid_thw": GRIDS.float()}) is None
    assert packed_images({"pixel_values": given["pixel_values"]}) is None
    assert packed_images({"pixel_values": [given["pixel_values"]], "image_grid_thw": GRIDS}) is None
    assert rolled({"input_ids": ids(5), "pixel_values": given["pixel_values"]}) is None
    assert images_of({}) is None


def test_videos_have_grids_of_their_own() -> None:
    given = packed()
    videos = {"pixel_values_videos": given["pixel_values"], "video_grid_thw": GRIDS}
    found = packed_images(videos)
    assert found is not None
    assert found.num_images == 5
    assert has_several(videos)


def test_images_of_every_second_row_alone() -> None:
    given = packed()
    given["image_grid_thw"], given["pixel_values"] = GRIDS[[1, 0, 1, 2]], torch.randn(24, 12)
    given["input_ids"] = ids(4)
    moved = rolled_rows(given, 4)
    assert moved is not None
    lengths = [8, 4, 8, 4]
    before, after = given["pixel_values"].split(lengths), moved[0]["pixel_values"].split(lengths)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [False, True, False, True]
    assert torch.equal(after[0], before[2])
    assert list(moved[2]) == lengths
    assert rolled_rows(packed(), 4) is None
    by_rows = rolled_rows({"input_ids": ids(4), "pixel_values": numbered(4, 2)}, 4)
    assert by_rows is not None
    assert numbers_of(by_rows[0]["pixel_values"]) == [[5, 6], [3, 4], [1, 2], [7, 8]]
    assert rolled_rows({"input_ids": ids(4), "pixel_values": numbered(6)}, 4) is None


def test_rows_of_patches_are_images() -> None:
    shapes = torch.tensor([[2, 2]] * 3)
    given = {"input_ids": ids(3), "pixel_values": torch.randn(3, 4, 12), "spatial_shapes": shapes}
    numbers = image_numbers(images_of(given))
    assert numbers is not None
    assert len(set(describe_images([numbers.numpy()])[0].tolist())) == 3
    assert has_several(given)
    assert not has_several({"pixel_values": given["pixel_values"]})
    assert torch.equal(exchanged(given), given["pixel_values"].roll(1, dims=0))


def test_one_image_has_no_others_place() -> None:
    given = packed()
    given["image_grid_thw"], given["pixel_values"] = GRIDS[:1], torch.randn(4, 12)
    assert not has_several(given)
    assert rolled(given) is None
