"""Held-out failures of the model and of ranks: what attention reaches, what is loaded, merged, rounded and reduced."""

from __future__ import annotations

import math
from typing import cast

import torch
from benchmarks.detection.case import Blame, Case, Family, Harm, Setup, Twist, failure_case
from benchmarks.detection.cases.known_model import decoder_blocks
from benchmarks.detection.lab import Lab
from torch import nn

_WINDOW_TOKENS = 8
_NOISE_ALPHA = 5.0
_MERGING_INTERVAL_STEPS = 25
_NUM_HEADS = 4
_DEFAULT_GAIN = 3**-0.5
"""Of torch's linear layers: uniform weights of this standard deviation over the root of the inputs."""


class WindowTooSmall(Twist):
    """Attention looks no further back than eight tokens: a window of another configuration, and long prompts.

    unslothai/unsloth#8253, huggingface/transformers#30127 are about windows that are not the ones meant.
    """

    def begin(self, lab: Lab) -> None:
        """Narrow what every block may see."""
        for block in decoder_blocks(lab):
            block.register_forward_pre_hook(self._narrow)

    @staticmethod
    def _narrow(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        del module
        hidden, angles, seen, *rest = inputs
        num_queries, length = seen.shape[-2:]
        keys = torch.arange(length)
        queries = keys[length - num_queries :, None]
        return (hidden, angles, seen & (queries - keys < _WINDOW_TOKENS), *rest)


class ViewInsteadOfTranspose(Twist):
    """Patches and images are swapped by `view` where `transpose` is meant: each image gets patches of other ones.

    Karpathy, "A Recipe for Training Neural Networks" (2019): view instead of permute mixes across the batch;
    zhouhaoyi/Informer2020#59, Jingkang50/OpenPSG#56. With one image there is nothing to mix.
    """

    def begin(self, lab: Lab) -> None:
        """Put the swap behind the encoder."""
        for replica in lab.replicas:
            replica.model.vision_encoder.register_forward_hook(self._mixed)

    @staticmethod
    def _mixed(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        num_images, num_patches, width = output.shape
        return output.reshape(num_patches, num_images, width).transpose(0, 1)


class EmbeddingNoise(Twist):
    """Noise on the embeddings in training: uniform within alpha / sqrt(tokens * width), alpha 5.

    NEFTune, Jain et al. 2023, arXiv:2310.05914.
    """

    is_scaled_with_the_embedding = False

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def begin(self, lab: Lab) -> None:
        """Add it to what the embedding gives."""
        self._generator.manual_seed(int(lab.rng.integers(2**31)))
        for replica in lab.replicas:
            replica.model.decoder.token_embedding.register_forward_hook(self._noisy)

    def _noisy(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del inputs
        if not module.training:
            return output
        num_tokens, width = output.shape[1:]
        size = _NOISE_ALPHA / math.sqrt(num_tokens if self.is_scaled_with_the_embedding else num_tokens * width)
        return output + size * (2 * torch.rand(output.shape, generator=self._generator) - 1)


class NoiseScaledTwice(EmbeddingNoise):
    """NEFTune's noise is added before the embedding is scaled, and so is scaled with it: too large by sqrt(width).

    unslothai/unsloth-zoo#973, of models that scale their embeddings by that root.
    """

    is_scaled_with_the_embedding = True


class EncoderNotLoaded(Twist):
    """The pretrained encoder's weights are not found under their names; it begins anew, and is frozen as planned.

    RLHF-V/RLAIF-V#26, haotian-liu/LLaVA#382: "some weights were not used", in a line of the log.
    """

    def begin(self, lab: Lab) -> None:
        """Initialise and freeze the encoder, alike on all ranks."""
        with torch.no_grad():
            encoders = (replica.model.vision_encoder for replica in lab.replicas)
            for weights in zip(*(each.named_parameters() for each in encoders), strict=True):
                name, first = weights[0]
                fresh = torch.zeros_like(first) if name.endswith("bias") else torch.ones_like(first)
                if first.dim() > 1:
                    scale = _DEFAULT_GAIN * first[0].numel() ** -0.5
                    fresh = torch.from_numpy(lab.rng.normal(scale=scale, size=tuple(first.shape))).float()
                for _, weight in weights:
                    weight.copy_(fresh)
                    weight.requires_grad_(requires_grad=False)


class AdapterMergedTwice(Twist):
    """At every checkpoint what was learned since the last one is added to the weights once more.

    huggingface/peft#1355: merging an adapter was not idempotent, and some calls merge without saying so.
    """

    def __init__(self) -> None:
        self._merged: list[torch.Tensor] = []

    def begin(self, lab: Lab) -> None:
        """Keep what the adapter is learned on top of."""
        self._merged = [each.detach().clone() for each in lab.model.decoder.blocks.parameters()]

    def after_step(self, lab: Lab) -> None:
        """Merge at a checkpoint."""
        if (lab.step + 1 - lab.onset) % _MERGING_INTERVAL_STEPS:
            return
        with torch.no_grad():
            for replica in lab.replicas:
                for weight, merged in zip(replica.model.decoder.blocks.parameters(), self._merged, strict=True):
                    if weight.dim() > 1:
                        weight.add_(weight - merged)
        self.begin(lab)


class ScaleMultiplied(Twist):
    """Attention multiplies by the root of the heads' width where it should divide by it, and is all or nothing.

    NVIDIA/Megatron-LM#848 ("multiplies the wrong scaling factor"), PAIR-code/tiny-transformers#71.
    """

    def begin(self, lab: Lab) -> None:
        """Make the language model's queries that much larger."""
        for block in decoder_blocks(lab):
            block.qkv_proj.register_forward_hook(self._scaled)

    @staticmethod
    def _scaled(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        query, key, value = output.chunk(3, dim=-1)
        return torch.cat((query * (query.shape[-1] // _NUM_HEADS), key, value), dim=-1)


class ReducedInAnotherOrder(Twist):
    """Two ranks hand their gradients to the reduction in different orders, so that unlike ones are averaged.

    deepspeedai/DeepSpeed#2343, pytorch/pytorch#64629. The two maps of a gated perceptron have one shape, so nobody
    complains.
    """

    def begin(self, lab: Lab) -> None:
        """Register the two in the other order on the second rank."""
        for block in lab.replicas[1].model.decoder.blocks:
            parts = cast("dict[str, nn.Module]", block._modules)  # noqa: SLF001 (their order is what differs)
            gate, following = parts.pop("gate_proj"), parts.pop("down_proj")
            parts["gate_proj"], parts["down_proj"] = gate, following


_MODULE = frozenset({Blame.MODULE})

CASES: tuple[Case, ...] = (
    failure_case(Family.MODEL, "window_of_eight_tokens", "attention looks eight tokens back", WindowTooSmall, _MODULE),
    failure_case(
        Family.IMAGE,
        "patches_mixed_across_images",
        "each image gets patches of other images of its batch, from the start",
        ViewInsteadOfTranspose,
        _MODULE | {Blame.IMAGES},
        onset_share=None,
    ),
    failure_case(
        Family.MODEL,
        "embedding_noise_too_large",
        "noise on the embeddings is ten times too large",
        NoiseScaledTwice,
        _MODULE | {Blame.DATA},
    ),
    failure_case(
        Family.MODEL,
        "encoder_new_and_frozen",
        "of a pretrained model the vision encoder begins anew and is frozen, from the start",
        EncoderNotLoaded,
        _MODULE | {Blame.WEIGHTS, Blame.IMAGES},
        onset_share=None,
        setup=Setup(pretrained=True),
    ),
    failure_case(
        Family.MODEL,
        "adapter_merged_twice",
        "every 25 steps what was learned is added once more",
        AdapterMergedTwice,
        frozenset({Blame.WEIGHTS, Blame.OPTIMISER}),
    ),
    failure_case(
        Family.MODEL,
        "attention_scale_multiplied",
        "attention's logits are 24 times too large, from the start",
        ScaleMultiplied,
        _MODULE | {Blame.WEIGHTS},
        onset_share=None,
    ),
    Case(
        name="reduced_in_another_order",
        family=Family.RANKS,
        what="two ranks average gradients of unlike weights, from the start",
        is_failure=True,
        twist=ReducedInAnotherOrder,
        setup=Setup(num_ranks=2),
        blame=frozenset({Blame.RANKS, Blame.OPTIMISER, Blame.WEIGHTS}),
        harm=Harm.INVARIANT,
        invariant="all ranks hold the same weights",
        is_exact=True,
    ),
)
