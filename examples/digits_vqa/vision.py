"""The vision encoder and the projector that turns one image into one token of the decoder."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_PATCH_SIZE_PIXELS = 2
_PATCHES_PER_SIDE = 4
_WIDTH = 64
_NUM_HEADS = 4
_NUM_BLOCKS = 2
_MLP_FACTOR = 4


class VisionBlock(nn.Module):
    """Pre-norm attention over all patches, then a two-layer perceptron."""

    def __init__(self) -> None:
        """Create the block's weights."""
        super().__init__()
        self.ln1 = nn.LayerNorm(_WIDTH)
        self.qkv_proj = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out_proj = nn.Linear(_WIDTH, _WIDTH)
        self.ln2 = nn.LayerNorm(_WIDTH)
        self.fc1 = nn.Linear(_WIDTH, _MLP_FACTOR * _WIDTH)
        self.fc2 = nn.Linear(_MLP_FACTOR * _WIDTH, _WIDTH)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches of the same shape, [N, P, D]."""
        num_images, num_patches, width = patches.shape
        qkv = self.qkv_proj(self.ln1(patches)).view(num_images, num_patches, 3, _NUM_HEADS, width // _NUM_HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        patches = patches + self.out_proj(attended.transpose(1, 2).reshape(num_images, num_patches, width))
        hidden: torch.Tensor = self.fc2(functional.gelu(self.fc1(self.ln2(patches))))
        return patches + hidden


class VisionEncoder(nn.Module):
    """A small vision transformer without a class token."""

    width = _WIDTH
    patches_per_side = _PATCHES_PER_SIDE

    def __init__(self) -> None:
        """Create patch embedding, positions and blocks."""
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, _WIDTH, kernel_size=_PATCH_SIZE_PIXELS, stride=_PATCH_SIZE_PIXELS)
        self.position_embedding = nn.Parameter(torch.zeros(1, _PATCHES_PER_SIDE**2, _WIDTH))
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(_NUM_BLOCKS))
        self.layer_norm = nn.LayerNorm(_WIDTH)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the patches of tiles [N, 1, 8, 8] as [N, 16, 64]."""
        patches = self.patch_embedding(tiles).flatten(2).transpose(1, 2) + self.position_embedding
        for block in self.blocks:
            patches = block(patches)
        normed: torch.Tensor = self.layer_norm(patches)
        return normed


class ModalityProjector(nn.Module):
    """Pixel shuffle of all patches into one token, then a linear map to the decoder's width."""

    def __init__(self, decoder_width: int) -> None:
        """Create the linear map."""
        super().__init__()
        self.proj = nn.Linear(_WIDTH * _PATCHES_PER_SIDE**2, decoder_width, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return [N, 16, 64] as [N, 1, decoder_width]."""
        projected: torch.Tensor = self.proj(pixel_shuffle(patches, factor=_PATCHES_PER_SIDE))
        return projected


def pixel_shuffle(patches: torch.Tensor, *, factor: int) -> torch.Tensor:
    """Return [N, S*S, D] with every square of factor x factor neighbours joined: [N, (S/factor)^2, D*factor^2]."""
    num_images, num_patches, width = patches.shape
    side = int(num_patches**0.5)
    joined = side // factor
    grid = patches.view(num_images, joined, factor, joined, factor, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(num_images, joined**2, width * factor**2)
