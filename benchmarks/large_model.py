"""A model with the parameter table of nanoVLM-460M: 440 tensors, 460,113,984 parameters, none of them loaded.

Its contract is nanoVLM's (``forward``, ``generate``, a ``decoder`` with a key-value cache, ``MP``, ``vision_encoder``),
its shapes those of SigLIP-base with tiles of 512 pixels and of SmolLM2-360M with grouped keys. The weights are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.decoder import KeyValues, rotate, visible
from sidestep.examples.digits_vqa.vision import pixel_shuffle

IGNORE_INDEX = -100
HEAD_WIDTH = 64
WEIGHT_STD = 0.02
ROTARY_BASE = 100_000.0
MAX_POSITIONS = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of the model; the defaults are those of nanoVLM-460M."""

    layers: int = 32
    """Blocks of the decoder."""
    width: int = 960
    """Its hidden states; heads are of 64."""
    key_heads: int = 5
    """Its heads of keys and values."""
    inner: int = 2_560
    """Width within its perceptrons."""
    vocabulary: int = 49_218
    """Ids, the added ones included."""
    vision_layers: int = 12
    """Blocks of the vision encoder."""
    vision_width: int = 768
    """Its hidden states; the perceptrons are of four times that."""
    tile_pixels: int = 512
    """Side of a tile."""
    patch_pixels: int = 16
    """Side of a patch."""
    shuffle: int = 4
    """So many patches a side become one token."""

    def image_tokens(self) -> int:
        """Return the tokens of a tile."""
        return (self.tile_pixels // self.patch_pixels // self.shuffle) ** 2


def scaled_down(layers: int) -> Shape:
    """Return a small shape of ``layers`` blocks, for a CPU: the same tensors a block, none of them large."""
    return Shape(
        layers=layers, width=192, key_heads=1, inner=512, vocabulary=2_048,
        vision_layers=max(1, layers * 12 // 32), vision_width=128, tile_pixels=128,
    )  # fmt: skip


class DecoderBlock(nn.Module):
    """Pre-norm attention with grouped keys, then a gated perceptron: 9 tensors."""

    def __init__(self, shape: Shape) -> None:
        """Create the block's weights."""
        super().__init__()
        keys = shape.key_heads * HEAD_WIDTH
        self.norm1 = nn.RMSNorm(shape.width)
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, keys, bias=False)
        self.v_proj = nn.Linear(shape.width, keys, bias=False)
        self.out_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.norm2 = nn.RMSNorm(shape.width)
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(
        self, hidden: torch.Tensor, angles: KeyValues, seen: torch.Tensor, cache: KeyValues | None
    ) -> tuple[torch.Tensor, KeyValues]:
        """Return hidden states [B, Q, D], and the keys and values of all T positions so far."""
        normed = self.norm1(hidden)
        query, key, value = (_heads(made(normed)) for made in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, *angles).to(value.dtype), rotate(key, *angles).to(value.dtype)
        if cache is not None:
            key, value = torch.cat((cache[0], key), dim=2), torch.cat((cache[1], value), dim=2)
        shared = query.shape[1] // key.shape[1]
        attended = functional.scaled_dot_product_attention(
            query, key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1), attn_mask=seen
        )
        hidden = hidden + self.out_proj(attended.transpose(1, 2).flatten(2))
        normed = self.norm2(hidden)
        return hidden + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed)), (key, value)


class LanguageModel(nn.Module):
    """A decoder over embeddings; it returns hidden states, ``head`` makes logits of them."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        """Create embedding, blocks and the tied head."""
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(DecoderBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.token_embedding.weight
        half = HEAD_WIDTH // 2
        frequencies = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(MAX_POSITIONS, dtype=torch.float32)[:, None] * frequencies.repeat(2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        kv_cache: list[KeyValues] | None = None,
        start_pos: int = 0,
    ) -> tuple[torch.Tensor, list[KeyValues]]:
        """Return hidden states [B, Q, D], and each block's keys and values of all T = ``start_pos`` + Q positions.

        Args:
            embeddings: [B, Q, D], the positions that are new.
            attention_mask: [B, T], cached and new positions.
            kv_cache: what was returned for the positions before.
            start_pos: how many those are.
        """
        length = start_pos + embeddings.shape[1]
        seen = visible(attention_mask, embeddings.shape[1])
        angles = (self.cosine[start_pos:length], self.sine[start_pos:length])
        hidden = embeddings
        continued: list[KeyValues] = []
        for position, block in enumerate(self.blocks):
            hidden, key_values = block(hidden, angles, seen, kv_cache[position] if kv_cache else None)
            continued.append(key_values)
        return self.norm(hidden), continued


class VisionBlock(nn.Module):
    """Pre-norm attention over all patches, then a two-layer perceptron: 12 tensors."""

    def __init__(self, width: int) -> None:
        """Create the block's weights."""
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches of the same shape, [N, P, D]."""
        query, key, value = (_heads(part) for part in self.qkv_proj(self.ln1(patches)).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(query, key, value)
        patches = patches + self.out_proj(attended.transpose(1, 2).flatten(2))
        hidden: torch.Tensor = self.fc2(functional.gelu(self.fc1(self.ln2(patches))))
        return patches + hidden


class VisionEncoder(nn.Module):
    """A vision transformer without a class token."""

    def __init__(self, shape: Shape) -> None:
        """Create patch embedding, positions and blocks."""
        super().__init__()
        size, num_patches = shape.patch_pixels, (shape.tile_pixels // shape.patch_pixels) ** 2
        self.patch_embedding = nn.Conv2d(3, shape.vision_width, kernel_size=size, stride=size)
        self.position_embedding = nn.Parameter(torch.zeros(1, num_patches, shape.vision_width))
        self.blocks = nn.ModuleList(VisionBlock(shape.vision_width) for _ in range(shape.vision_layers))
        self.layer_norm = nn.LayerNorm(shape.vision_width)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the patches of tiles [N, 3, side, side] as [N, P, D]."""
        patches = self.patch_embedding(tiles).flatten(2).transpose(1, 2) + self.position_embedding
        for block in self.blocks:
            patches = block(patches)
        normed: torch.Tensor = self.layer_norm(patches)
        return normed


class Projector(nn.Module):
    """Pixel shuffle, then a linear map to the decoder's width: one tensor."""

    def __init__(self, shape: Shape) -> None:
        """Create the linear map."""
        super().__init__()
        self._factor = shape.shuffle
        self.proj = nn.Linear(shape.vision_width * shape.shuffle**2, shape.width, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches [N, P, D] as the decoder's tokens [N, tokens, width]."""
        projected: torch.Tensor = self.proj(pixel_shuffle(patches, factor=self._factor))
        return projected


class LargeModel(nn.Module):
    """Tiles and conversations in, answers out."""

    def __init__(self, shape: Shape, *, image_token_id: int) -> None:
        """Draw the weights from torch's global generator."""
        super().__init__()
        self.image_token_id = image_token_id
        self.vision_encoder = VisionEncoder(shape)
        self.MP = Projector(shape)
        self.decoder = LanguageModel(shape)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=WEIGHT_STD)

    def forward(
        self,
        input_ids: torch.Tensor,
        images: Sequence[Sequence[torch.Tensor]],
        attention_mask: torch.Tensor,
        targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits [B, T, V] and their mean cross-entropy; without targets hidden states [B, T, D] and None.

        Args:
            input_ids: int64 [B, T], so many placeholders a tile as ``Shape.image_tokens`` says.
            images: each row's tiles, float32 [1, 3, side, side].
            attention_mask: [B, T], 0 at padding and separators.
            targets: int64 [B, T], what the logits at the same place should say; -100 where nothing is asked.
        """
        hidden, _ = self.decoder(self._embed(input_ids, images), attention_mask)
        if targets is None:
            return hidden, None
        logits = self.decoder.head(hidden)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        return logits, loss

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        images: Sequence[Sequence[torch.Tensor]],
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        *,
        greedy: bool,
    ) -> torch.Tensor:
        """Return only the new ids, int64 [B, max_new_tokens]; it never ends early, like nanoVLM's.

        Raises:
            ValueError: anything but greedy decoding is asked for.
        """
        if not greedy:
            raise ValueError("this model decodes greedily")
        embeddings, cache = self._embed(input_ids, images), None
        new_ids = []
        for _ in range(max_new_tokens):
            num_cached = attention_mask.shape[1] - embeddings.shape[1]
            hidden, cache = self.decoder(embeddings, attention_mask, kv_cache=cache, start_pos=num_cached)
            new_ids.append(self.decoder.head(hidden[:, -1]).argmax(dim=-1))
            embeddings = self.decoder.token_embedding(new_ids[-1][:, None])
            attention_mask = torch.cat((attention_mask, torch.ones_like(attention_mask[:, :1])), dim=1)
        return torch.stack(new_ids, dim=1)

    def _embed(self, input_ids: torch.Tensor, images: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return token embeddings [B, T, D] with each tile's tokens in the places of its placeholders."""
        embeddings: torch.Tensor = self.decoder.token_embedding(input_ids)
        tiles = torch.cat([tile.to(embeddings.device, non_blocking=True) for row in images for tile in row])
        pictures = self.MP(self.vision_encoder(tiles)).flatten(0, 1).to(embeddings.dtype)
        places = (input_ids == self.image_token_id).flatten()
        order = (places.cumsum(dim=0) - 1).clamp(min=0)  # a mask as an index would ask the device how many there are
        placed = pictures.index_select(0, order).view_as(embeddings)
        return torch.where(places.view(*input_ids.shape, 1), placed, embeddings)


def _heads(states: torch.Tensor) -> torch.Tensor:
    """Return [B, T, H * 64] as [B, H, T, 64]."""
    batch_size, num_positions = states.shape[:2]
    return states.view(batch_size, num_positions, -1, HEAD_WIDTH).transpose(1, 2)
