"""The language model: rotary positions, RMS norms, gated perceptrons, a head tied with the token embedding."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

KeyValues = tuple[torch.Tensor, torch.Tensor]

_WIDTH = 96
_NUM_HEADS = 4
_NUM_BLOCKS = 2
_MLP_WIDTH = 256
_ROTARY_BASE = 10_000.0
MAX_POSITIONS = 1_024


def visible(attention_mask: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Return which keys each of the last `num_queries` positions may see, bool [B, 1, Q, T].

    A position sees earlier real ones of its own document. Masked positions (padding, separators) divide the row into
    documents: without that, packed samples would read each other. Every position sees itself, so that no row of the
    softmax is empty.

    Args:
        attention_mask: [B, T], 0 at padding and separators.
        num_queries: Q, at most T.
    """
    length = attention_mask.shape[1]
    real = attention_mask != 0
    documents = (~real).cumsum(dim=1)
    positions = torch.arange(length, device=attention_mask.device)
    queries = positions[length - num_queries :, None]
    same_document = documents[:, length - num_queries :, None] == documents[:, None, :]
    seen = same_document & (positions <= queries) & real[:, None, :]
    return (seen | (positions == queries))[:, None]


def rotate(vectors: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Return query or key vectors [B, H, T, d] turned by their positions' angles [T, d]."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat((-second, first), dim=-1) * sine


class DecoderBlock(nn.Module):
    """Pre-norm causal attention, then a gated perceptron."""

    def __init__(self) -> None:
        """Create the block's weights."""
        super().__init__()
        self.norm1 = nn.RMSNorm(_WIDTH)
        self.qkv_proj = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
        self.out_proj = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.norm2 = nn.RMSNorm(_WIDTH)
        self.gate_proj = nn.Linear(_WIDTH, _MLP_WIDTH, bias=False)
        self.up_proj = nn.Linear(_WIDTH, _MLP_WIDTH, bias=False)
        self.down_proj = nn.Linear(_MLP_WIDTH, _WIDTH, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        angles: KeyValues,
        seen: torch.Tensor,
        cache: KeyValues | None,
    ) -> tuple[torch.Tensor, KeyValues]:
        """Return hidden states [B, Q, D] and the keys and values of all T positions so far."""
        batch_size, num_queries, width = hidden.shape
        qkv = self.qkv_proj(self.norm1(hidden)).view(batch_size, num_queries, 3, _NUM_HEADS, width // _NUM_HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = torch.cat((cache[0], key), dim=2), torch.cat((cache[1], value), dim=2)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        hidden = hidden + self.out_proj(attended.transpose(1, 2).reshape(batch_size, num_queries, width))
        normed = self.norm2(hidden)
        hidden = hidden + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return hidden, (key, value)


class LanguageModel(nn.Module):
    """A decoder over embeddings; it returns hidden states, `head` makes logits of them."""

    width = _WIDTH
    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, vocabulary_size: int) -> None:
        """Create embedding, blocks and the tied head."""
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, _WIDTH)
        self.blocks = nn.ModuleList(DecoderBlock() for _ in range(_NUM_BLOCKS))
        self.norm = nn.RMSNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, vocabulary_size, bias=False)
        self.head.weight = self.token_embedding.weight
        half = _WIDTH // _NUM_HEADS // 2
        frequencies = _ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(MAX_POSITIONS, dtype=torch.float32)[:, None] * frequencies.repeat(2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        kv_cache: list[KeyValues] | None = None,
        start_pos: int = 0,
    ) -> tuple[torch.Tensor, list[KeyValues]]:
        """Return hidden states and the cache that continues them.

        Args:
            embeddings: [B, Q, D], the positions that are new.
            attention_mask: [B, T], cached and new positions; all are real when absent.
            kv_cache: keys and values of the `start_pos` positions before, one pair per block.
            start_pos: how many positions are cached; T = start_pos + Q.

        Returns:
            Hidden states [B, Q, D], and keys and values of all T positions.

        Raises:
            ValueError: T exceeds 1,024 positions.
        """
        batch_size, num_queries = embeddings.shape[:2]
        length = start_pos + num_queries
        if length > MAX_POSITIONS:
            raise ValueError(f"{length} positions, the decoder has angles for {MAX_POSITIONS}")
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, length), dtype=torch.int64, device=embeddings.device)
        seen = visible(attention_mask, num_queries)
        angles = (self.cosine[start_pos:length], self.sine[start_pos:length])
        hidden = embeddings
        continued: list[KeyValues] = []
        for position, block in enumerate(self.blocks):
            hidden, key_values = block(hidden, angles, seen, kv_cache[position] if kv_cache else None)
            continued.append(key_values)
        return self.norm(hidden), continued
