"""Architectures of `transformers`, small, with random weights: the class definitions are real, the sizes are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Architecture(NamedTuple):
    """A model class, how to build it small, and the arguments of one call."""

    name: str
    build: Callable[[Any], nn.Module]
    example: Callable[[], dict[str, Any]]
    waive: tuple[str, ...] = ()


def tokens(length: int = 8) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 64, (2, length))}


def masked_tokens() -> dict[str, Any]:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    return {**tokens(), "attention_mask": mask}


def pixels(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def _of(model: str, config: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda hf: getattr(hf, model)(getattr(hf, config)(**options))


ARCHITECTURES = [
    Architecture("bert", _of("BertModel", "BertConfig", **_TEXT), tokens),
    Architecture("roberta", _of("RobertaModel", "RobertaConfig", **{**_TEXT, "max_position_embeddings": 40}), tokens),
    Architecture("electra", _of("ElectraModel", "ElectraConfig", embedding_size=32, **_TEXT), tokens),
    Architecture("albert", _of("AlbertModel", "AlbertConfig", embedding_size=16, **_TEXT), tokens),
    Architecture(
        "distilbert",
        _of("DistilBertModel", "DistilBertConfig", vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
        tokens,
    ),
    Architecture(
        "gpt2", _of("GPT2Model", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False), tokens
    ),
    Architecture("llama", _of("LlamaModel", "LlamaConfig", **_DECODER), tokens),
    Architecture("mistral", _of("MistralModel", "MistralConfig", **_DECODER), tokens),
    Architecture("qwen2", _of("Qwen2Model", "Qwen2Config", **_DECODER), tokens),
    Architecture(
        "t5_encoder",
        _of("T5EncoderModel", "T5Config", vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        tokens,
    ),
    Architecture("vit", _of("ViTModel", "ViTConfig", **_IMAGE), pixels()),
    Architecture("deit", _of("DeiTModel", "DeiTConfig", **_IMAGE), pixels()),
    Architecture("dinov2", _of("Dinov2Model", "Dinov2Config", **_IMAGE), pixels()),
    Architecture("beit", _of("BeitModel", "BeitConfig", **_IMAGE), pixels()),
    Architecture("yolos", _of("YolosModel", "YolosConfig", **{**_IMAGE, "image_size": [32, 32]}), pixels()),
    Architecture(
        "swin",
        _of(
            "SwinModel",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        pixels(),
    ),
    Architecture(
        "convnext", _of("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), pixels()
    ),
    Architecture(
        "resnet",
        _of("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        pixels(),
    ),
    Architecture("mobilenet_v2", _of("MobileNetV2Model", "MobileNetV2Config", depth_multiplier=0.25), pixels(64)),
    Architecture(
        "segformer",
        _of(
            "SegformerModel",
            "SegformerConfig",
            depths=[1, 1],
            num_encoder_blocks=2,
            hidden_sizes=[8, 16],
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[2, 2],
            mlp_ratios=[2, 2],
        ),
        pixels(),
    ),
    Architecture("clip_vision", _of("CLIPVisionModel", "CLIPVisionConfig", **_IMAGE), pixels()),
    Architecture(
        "whisper_encoder",
        lambda hf: hf.WhisperModel(
            hf.WhisperConfig(
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_source_positions=20,
                num_mel_bins=8,
            )
        ).encoder,
        lambda: {"input_features": torch.randn(2, 8, 40)},
    ),
    Architecture("bert_masked", _of("BertModel", "BertConfig", **_TEXT), masked_tokens, ("scalar",)),
]
