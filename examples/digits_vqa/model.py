"""The vision-language model, with nanoVLM's `forward` and `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.decoder import LanguageModel
from sidestep.examples.digits_vqa.packing import IGNORE_INDEX
from sidestep.examples.digits_vqa.vision import ModalityProjector, VisionEncoder

_POSITION_STD = 0.02


class VisionLanguageModel(nn.Module):
    """Digits and questions in, answers out."""

    def __init__(self, *, vocabulary_size: int, image_token_id: int, eos_token_id: int) -> None:
        """Create the weights from torch's global generator."""
        super().__init__()
        self.image_token_id = image_token_id
        self.eos_token_id = eos_token_id
        self.vision_encoder = VisionEncoder()
        self.MP = ModalityProjector(LanguageModel.width)
        self.decoder = LanguageModel(vocabulary_size)
        self.apply(_initialise)

    def forward(
        self,
        input_ids: torch.Tensor,
        images: Sequence[Sequence[torch.Tensor]] | Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and loss, or, without targets, hidden states and None.

        Args:
            input_ids: int64 [B, T], one image placeholder per tile.
            images: rows of tiles, or tiles, each float32 [N, 1, 8, 8], in the order of the placeholders.
            attention_mask: [B, T], 0 at padding and separators.
            targets: int64 [B, T], `targets[t]` is what `logits[t]` should say, -100 where nothing is asked.

        Returns:
            With targets, logits [B, T, V] and their mean cross-entropy in float32. Without, hidden states [B, T, D]
            that `decoder.head` turns into logits.
        """
        hidden, _ = self.decoder(self._embed(input_ids, images), attention_mask)
        if targets is None:
            return hidden, None
        logits = self.decoder.head(hidden)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        return logits, loss

    @torch.inference_mode()
    def generate(  # noqa: PLR0917 (the signature is nanoVLM's)
        self,
        input_ids: torch.Tensor,
        images: Sequence[Sequence[torch.Tensor]] | Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 5,
        top_k: int = 50,
        top_p: float = 0.9,
        temperature: float = 0.5,
        greedy: bool = False,  # noqa: FBT001, FBT002
    ) -> torch.Tensor:
        """Return only the new ids, int64 [B, max_new_tokens]; what follows an answer's first EOS is EOS.

        Prompts are padded on the left. It never stops early, like the original.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeddings, cache = self._embed(input_ids, images), None
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        new_ids = []
        for _ in range(max_new_tokens):
            num_cached = attention_mask.shape[1] - embeddings.shape[1]
            hidden, cache = self.decoder(embeddings, attention_mask, kv_cache=cache, start_pos=num_cached)
            logits = self.decoder.head(hidden[:, -1])
            chosen = logits.argmax(dim=-1) if greedy else sample(logits, top_k, top_p, temperature)
            chosen = torch.where(ended, self.eos_token_id, chosen)
            ended = ended | (chosen == self.eos_token_id)
            new_ids.append(chosen)
            embeddings = self.decoder.token_embedding(chosen[:, None])
            attention_mask = torch.cat((attention_mask, torch.ones_like(attention_mask[:, :1])), dim=1)
        return torch.stack(new_ids, dim=1)

    def _embed(
        self,
        input_ids: torch.Tensor,
        images: Sequence[Sequence[torch.Tensor]] | Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return token embeddings [B, T, D] with each image in the place of its placeholder."""
        embeddings: torch.Tensor = self.decoder.token_embedding(input_ids)
        tiles = [tile for row in images for tile in ([row] if isinstance(row, torch.Tensor) else row)]
        if not tiles:
            return embeddings
        pictures = self.MP(self.vision_encoder(torch.cat(tiles).to(embeddings.device)))
        placed = embeddings.clone()
        placed[input_ids == self.image_token_id] = pictures.flatten(0, 1).to(placed.dtype)
        return placed


def sample(logits: torch.Tensor, top_k: int, top_p: float, temperature: float) -> torch.Tensor:
    """Return one id per row of logits [B, V], drawn from the top_k likeliest that together hold top_p."""
    values, ids = (logits / temperature).topk(min(top_k, logits.shape[-1]), dim=-1)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    drawn = torch.multinomial(probabilities.masked_fill(before > top_p, 0.0), num_samples=1)
    return ids.gather(-1, drawn)[:, 0]


def _initialise(module: nn.Module) -> None:
    """Scale what torch's defaults leave too large; linear layers keep theirs.

    Embedding rows of length one let image and words meet at one scale: with rows of 0.2 the model learns to name digits
    but not, within this run, to compare a picture with a word.
    """
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    if isinstance(module, VisionEncoder):
        nn.init.normal_(module.position_embedding, std=_POSITION_STD)
