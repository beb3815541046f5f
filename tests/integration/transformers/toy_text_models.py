"""Toy language models and encoder-decoders of ``transformers``, from their configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tests.integration.transformers.toy_batches import (
    BATCH,
    BOS,
    EOS,
    IGNORED,
    IMAGE,
    PAD,
    VOCABULARY,
    Inputs,
    MakeBatch,
    Toy,
    collate,
    make_rows,
    padded,
)  # fmt: skip
from tests.integration.transformers.toy_vision_models import text, vision


def _texts(*, left: bool = True, positions: bool = False, flat: bool = False) -> MakeBatch:
    def made(generator: torch.Generator) -> Inputs:
        rows = make_rows(generator, [0] * BATCH)
        inputs = collate(rows, lambda _row: [], left=left)
        mask = inputs["attention_mask"]
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        if flat:  # one row without padding, whose positions start anew with each document
            is_real = mask != 0
            return {
                name: values[is_real].unsqueeze(0)
                for name, values in (("input_ids", inputs["input_ids"]), ("labels", inputs["labels"]),
                                     ("position_ids", places))
            }  # fmt: skip
        return {**inputs, "position_ids": places} if positions else inputs

    return made


def causal(name: str, config: str, *, batch: MakeBatch | None = None, told: tuple[str, ...] = (), **more: Any) -> Toy:
    """Return a language model; ``told`` names what is odd about it (fields of ``Toy``)."""

    def build() -> Any:
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**text(**more)))

    odd: dict[str, Any] = dict.fromkeys(told, True)
    return Toy(name=name, model=build, batch=batch or _texts(), num_images=0, **odd)


EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LANGUAGE_MODELS = [
    causal("llama", "LlamaConfig"),
    causal("llama, padded on the right", "LlamaConfig", batch=_texts(left=False)),
    causal("llama, positions made of the mask", "LlamaConfig", batch=_texts(positions=True)),
    causal("llama, packed without padding", "LlamaConfig", batch=_texts(flat=True)),
    causal("gpt2", "GPT2Config", batch=_texts(positions=True), n_embd=32, n_layer=2, n_head=4, n_positions=128),
    causal("gemma2", "Gemma2Config", head_dim=8, sliding_window=8),
    causal("phi3", "Phi3Config"),
    causal("mixtral", "MixtralConfig", told=("has_other_loss",), num_local_experts=4, output_router_logits=True),
    causal("qwen3_moe", "Qwen3MoeConfig", head_dim=8, mlp_only_layers=[], **EXPERTS),
    causal("gpt_oss", "GptOssConfig", head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    causal("bloom", "BloomConfig", n_head=4, n_layer=2),
    causal("mamba", "MambaConfig", state_size=8),
    causal("jamba", "JambaConfig", num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
           expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    causal("recurrent_gemma", "RecurrentGemmaConfig", told=("reads_padding",), lru_width=32,
           block_types=["recurrent", "attention"], attention_window_size=64),
]  # fmt: skip


BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}  # fmt: skip


def _answered(num_tokens: int = 0, *, length: int = 0, told: bool = False, text_alone: bool = False) -> MakeBatch:
    """Questions for an encoder, and answers for a decoder, of lengths of their own or of one length."""

    def made(generator: torch.Generator) -> Inputs:
        rows = make_rows(generator, [0 if text_alone else 1] * BATCH)
        fill = [IGNORED] * length
        labels = padded([(row.answer + fill)[: length or len(row.answer)] for row in rows], IGNORED)
        inputs: Inputs = {"labels": labels}
        if not text_alone:
            inputs["pixel_values"] = torch.stack([row.images[0] for row in rows])
        if text_alone or num_tokens:
            asked = [[*[IMAGE] * num_tokens, *row.question, EOS, *[PAD] * length] for row in rows]
            ids = padded([each[: length or len(each)] for each in asked], PAD)
            inputs |= {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        if told:
            moved = labels.new_full(labels.shape, EOS)
            moved[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, PAD)
            inputs["decoder_input_ids"] = moved
        return inputs

    return made


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=PAD,
        eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))


def _florence2() -> Any:
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig  # noqa: PLC0415

    seen = Florence2VisionConfig(
        depths=(1, 1), patch_size=(3, 3), patch_stride=(2, 2), patch_padding=(1, 1), patch_prenorm=(False, True),
        embed_dim=(16, 32), num_heads=(2, 4), num_groups=(2, 4), window_size=4, projection_dim=32, drop_path_rate=0.0,
        max_temporal_embeddings=4, max_position_embeddings=16,
    )  # fmt: skip
    words = transformers.BartConfig(**BART)
    config = transformers.Florence2Config(text_config=words, vision_config=seen, image_token_id=IMAGE)
    return transformers.Florence2ForConditionalGeneration(config)


def _trocr() -> Any:
    words = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    seen = transformers.ViTConfig(**vision())
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seen, words)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = BOS, PAD, EOS
    return transformers.VisionEncoderDecoderModel(config)


def _encoder_decoder(name: str, model: Callable[[], Any], batch: MakeBatch, num_images: int = 0) -> Toy:
    return Toy(name=name, model=model, batch=batch, num_images=num_images, is_decoder=False)


ENCODER_DECODERS = [
    _encoder_decoder("t5", _t5, _answered(text_alone=True)),
    _encoder_decoder("t5, questions as long as answers", _t5, _answered(text_alone=True, length=8)),
    _encoder_decoder("bart, with the decoder's ids", _bart, _answered(text_alone=True, told=True)),
    _encoder_decoder("florence2", _florence2, _answered(17), BATCH),
    _encoder_decoder("vision_encoder_decoder", _trocr, _answered(), BATCH),
]
