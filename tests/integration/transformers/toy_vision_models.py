"""Toy vision-language models of ``transformers``, from their configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tests.integration.transformers.toy_batches import (
    BATCH,
    BOS,
    CLOSE,
    EOS,
    IGNORED,
    IMAGE,
    OPEN,
    PAD,
    PATCH,
    SIDE,
    VIDEO,
    VOCABULARY,
    Inputs,
    MakeBatch,
    Row,
    Toy,
    collate,
    make_rows,
    patches_of,
    with_pixels,
)  # fmt: skip
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

RAGGED = [2, 1, 1, 1, 1, 1, 1, 1]


def text(**more: Any) -> dict[str, Any]:
    """Return the configuration of a language model, with other fields."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **more,
    }  # fmt: skip


def vision(**more: Any) -> dict[str, Any]:
    """Return the configuration of a vision tower, with other fields."""
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH, **more,
    }  # fmt: skip


def _wide(generator: torch.Generator) -> bool:
    return bool(torch.randint(0, 2, (), generator=generator))


# ------------------------------------------------------------------------------------------------ LLaVA's family


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision(), projection_dim=32), text_config=hf.LlamaConfig(**text()),
        image_token_id=IMAGE, image_seq_length=16, vision_feature_layer=-2,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


PINPOINTS = [[16, 16], [16, 32], [32, 16]]


def _llava_next() -> Any:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**vision(), projection_dim=32), text_config=hf.LlamaConfig(**text()),
        image_token_id=IMAGE, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision()), text_config=hf.Qwen2Config(**text()), image_token_id=IMAGE,
        video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _tiled(generator: torch.Generator) -> Inputs:
    """Images of two tiles beside each other, or one above the other, and a whole view: of as many sizes."""
    rows = make_rows(generator, [1] * BATCH)
    sizes = {id(row): (16, 32) if _wide(generator) else (32, 16) for row in rows}

    def placeholders(row: Row) -> list[int]:
        height, width = (each // PATCH for each in sizes[id(row)])
        return [IMAGE] * (16 + height * (width + 1))  # each row of patches ends with one more

    inputs = collate(rows, placeholders)
    inputs["pixel_values"] = torch.stack([torch.stack([row.images[0]] * 3) for row in rows])
    inputs["image_sizes"] = torch.tensor([sizes[id(row)] for row in rows])
    return inputs


def _pixtral(*, merged: bool) -> Any:
    seen, words = hf.PixtralVisionConfig(**vision(head_dim=8)), hf.MistralConfig(**text(head_dim=8))
    given: dict[str, Any] = {
        "vision_config": seen, "text_config": words, "image_token_index": IMAGE, "vision_feature_layer": -1,
    }  # fmt: skip
    if merged:
        return hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(spatial_merge_size=2, **given))
    config = hf.LlavaConfig(vision_feature_select_strategy="full", **given)
    return hf.LlavaForConditionalGeneration(config)


def _cropped(merge: int) -> MakeBatch:
    """Images of two widths, filled up to one."""

    def made(generator: torch.Generator) -> Inputs:
        rows = make_rows(generator, [1] * BATCH)
        widths = {id(row): SIDE if _wide(generator) else SIDE // 2 for row in rows}
        cell = PATCH * merge
        inputs = collate(rows, lambda row: [*[IMAGE] * (SIDE // cell * widths[id(row)] // cell), CLOSE])
        inputs["pixel_values"] = torch.zeros(BATCH, 3, SIDE, SIDE)
        for number, row in enumerate(rows):
            inputs["pixel_values"][number, :, :, : widths[id(row)]] = row.images[0][:, :, : widths[id(row)]]
        inputs["image_sizes"] = torch.tensor([(SIDE, widths[id(row)]) for row in rows])
        return inputs

    return made


# ------------------------------------------------------------------------------------- images by rows, and prefixes


def _idefics3() -> Any:
    config = hf.Idefics3Config(
        vision_config=Idefics3VisionConfig(**vision()), text_config=hf.LlamaConfig(**text()), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> Any:
    config = hf.SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(**vision()), text_config=hf.LlamaConfig(**text()), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return hf.SmolVLMForConditionalGeneration(config)


def _pixel_mask(inputs: Inputs) -> Inputs:
    return {"pixel_attention_mask": inputs["pixel_values"].ne(0).any(dim=2).long()}


def _paligemma(words: str) -> Callable[[], Any]:
    def build() -> Any:
        config = hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**vision(), projection_dim=32, vision_use_head=False),
            text_config=getattr(hf, words)(**text(head_dim=8)), image_token_id=IMAGE, projection_dim=32, hidden_size=32,
        )  # fmt: skip
        return hf.PaliGemmaForConditionalGeneration(config)

    return build


def _gemma3() -> Any:
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**vision(), vision_use_head=False), mm_tokens_per_image=4,
        text_config=hf.Gemma3TextConfig(**text(head_dim=8, sliding_window=16)), boi_token_index=OPEN,
        eoi_token_index=CLOSE, image_token_index=IMAGE,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _internvl() -> Any:
    seen = InternVLVisionConfig(**vision(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]))
    config = hf.InternVLConfig(
        vision_config=seen, text_config=hf.Qwen2Config(**text()), image_token_id=IMAGE, image_seq_length=4,
        downsample_ratio=0.5,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _mllama() -> Any:
    seen = vision(
        attention_heads=4, num_global_layers=1, vision_output_dim=64, intermediate_layers_indices=[0], max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    words = text(num_hidden_layers=3, cross_attention_layers=[1])
    words["rope_scaling"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = hf.MllamaConfig(
        vision_config=MllamaVisionConfig(**seen), text_config=MllamaTextConfig(**words), image_token_index=IMAGE
    )
    return hf.MllamaForConditionalGeneration(config)


def _crossed(generator: torch.Generator) -> Inputs:
    """Images of one tile or two, which answers look at by cross attention."""
    rows = make_rows(generator, [1] * BATCH)
    inputs = collate(rows, lambda _row: [IMAGE])
    tiles = torch.tensor([1 + _wide(generator) for _ in rows])
    is_tile = (torch.arange(2) < tiles.unsqueeze(1)).long()
    is_behind = (inputs["input_ids"] == IMAGE).cumsum(dim=1)
    images = torch.stack([row.images[0] for row in rows])
    inputs["pixel_values"] = images[:, None, None] * is_tile[:, None, :, None, None, None]
    inputs["aspect_ratio_ids"] = tiles.unsqueeze(1)
    inputs["aspect_ratio_mask"] = is_tile.unsqueeze(1)
    inputs["cross_attention_mask"] = is_behind[:, :, None, None] * is_tile[:, None, None]
    return inputs


# --------------------------------------------------------------------------------------------------- packed patches


def _qwen(kind: str, **seen: Any) -> Callable[[], Any]:
    def build() -> Any:
        words = text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0})
        looks = {
            "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "out_hidden_size": 32, "intermediate_size": 64, **seen,
        }  # fmt: skip
        config = getattr(hf, f"{kind}Config")(
            text_config={**words, "head_dim": 8}, vision_config=looks, image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=OPEN, vision_end_token_id=CLOSE,
        )  # fmt: skip
        return getattr(hf, f"{kind}ForConditionalGeneration")(config)

    return build


def _packed(generator: torch.Generator) -> Inputs:
    """Patches of images of two widths one after another, four that are merged together, each seen twice."""
    rows = make_rows(generator, [1] * BATCH)
    images = {id(row): torch.cat([row.images[0]] * (1 + _wide(generator)), dim=2) for row in rows}
    grids = {name: (1, SIDE // PATCH, image.shape[2] // PATCH) for name, image in images.items()}
    inputs = collate(rows, lambda row: [OPEN, *[IMAGE] * (grids[id(row)][1] * grids[id(row)][2] // 4), CLOSE])
    parts = []
    for row in rows:
        _, high, wide = grids[id(row)]
        cut = patches_of(images[id(row)]).view(high // 2, 2, wide // 2, 2, 3, PATCH, PATCH).transpose(1, 2)
        parts.append(cut.reshape(-1, 3, 1, PATCH, PATCH).expand(-1, -1, 2, -1, -1).flatten(1))
    inputs["pixel_values"] = torch.cat(parts)
    inputs["image_grid_thw"] = torch.tensor([grids[id(row)] for row in rows])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def _lfm2_vl() -> Any:
    seen = hf.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=PATCH,
        num_patches=16, vision_use_head=False,
    )  # fmt: skip
    words = hf.Lfm2Config(**text(layer_types=["conv", "full_attention"]))
    config = hf.Lfm2VlConfig(
        vision_config=seen, text_config=words, image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=32
    )
    return hf.Lfm2VlForConditionalGeneration(config)


def _rows_of_patches(generator: torch.Generator) -> Inputs:
    """Patches of images of two widths, filled up to as many for each."""
    rows = make_rows(generator, [1] * BATCH)
    widths = {id(row): 4 if _wide(generator) else 2 for row in rows}
    inputs = collate(rows, lambda row: [IMAGE] * widths[id(row)])
    inputs["pixel_values"] = torch.zeros(BATCH, 16, 3 * PATCH * PATCH)
    for number, row in enumerate(rows):
        cut = patches_of(row.images[0][:, :, : PATCH * widths[id(row)]]).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)
        inputs["pixel_values"][number, : len(cut)] = cut
    inputs["pixel_attention_mask"] = inputs["pixel_values"].ne(0).any(dim=2).long()
    inputs["spatial_shapes"] = torch.tensor([(4, widths[id(row)]) for row in rows])
    return inputs


VISION_MODELS = [
    Toy(name="llava", model=_llava, batch=with_pixels(16)),
    Toy(name="llava, padded on the right", model=_llava, batch=with_pixels(16, left=False)),
    Toy(name="llava, two images a row", model=_llava, batch=with_pixels(16, images_of=[2] * BATCH), num_images=16),
    Toy(name="llava_next", model=_llava_next, batch=_tiled),
    Toy(name="llava_onevision", model=_llava_onevision, batch=_tiled),
    Toy(name="pixtral", model=lambda: _pixtral(merged=False), batch=_cropped(1)),
    Toy(name="mistral3", model=lambda: _pixtral(merged=True), batch=_cropped(2)),
    Toy(name="idefics3", model=_idefics3, num_images=16,
        batch=with_pixels(4, images_of=[2] * BATCH, by_rows=True, framed=True, more=_pixel_mask)),
    Toy(name="smolvlm, rows of one image and of two", model=_smolvlm, num_images=9,
        batch=with_pixels(4, images_of=RAGGED, by_rows=True, framed=True, left=False, more=_pixel_mask)),
    Toy(name="paligemma", model=_paligemma("GemmaConfig"), batch=with_pixels(
        16, more=lambda inputs: {"token_type_ids": (inputs["labels"] != IGNORED).long()})),
    Toy(name="paligemma 2, padded on the right", model=_paligemma("Gemma2Config"), batch=with_pixels(
        16, left=False, more=lambda inputs: {"token_type_ids": (inputs["labels"] != IGNORED).long()})),
    Toy(name="gemma3", model=_gemma3, batch=with_pixels(
        4, framed=True, more=lambda inputs: {"token_type_ids": (inputs["input_ids"] == IMAGE).long()})),
    Toy(name="internvl", model=_internvl, batch=with_pixels(4, framed=True)),
    Toy(name="internvl, three tiles an image", model=_internvl, batch=with_pixels(12, tiles=3, framed=True),
        num_images=24),
    Toy(name="mllama", model=_mllama, batch=_crossed),
    Toy(name="qwen2_vl", model=_qwen("Qwen2VL", embed_dim=32, mlp_ratio=2), batch=_packed),
    Toy(name="qwen2_5_vl", batch=_packed, model=_qwen("Qwen2_5_VL", window_size=16, fullatt_block_indexes=[1])),
    Toy(name="qwen3_vl", batch=_packed,
        model=_qwen("Qwen3VL", num_position_embeddings=64, deepstack_visual_indexes=[0])),
    Toy(name="lfm2_vl", model=_lfm2_vl, batch=_rows_of_patches),
]  # fmt: skip
