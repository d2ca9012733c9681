"""Class definitions of `transformers` with small random configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tools.zoo.entry import Entry, Inputs, image, tokens

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
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
_STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def _built(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def _pixels(size: int = 32) -> Callable[[int], Inputs]:
    return image(size, name="pixel_values")


def _audio(samples: int = 400) -> Callable[[int], Inputs]:
    return lambda batch: {"input_values": torch.randn(batch, samples)}


def _masked(batch: int) -> Inputs:
    mask = torch.ones(batch, 8, dtype=torch.long)
    mask[-1, 6:] = 0
    return {"input_ids": torch.randint(0, 64, (batch, 8)), "attention_mask": mask}


def _text(name: str, model: str, config: str, waive: tuple[str, ...] = (), **options: Any) -> Entry:
    return Entry(name, "transformer", _built(model, config, **options), tokens(), waive)


def _vision(name: str, model: str, config: str, size: int = 32, **options: Any) -> Entry:
    return Entry(name, "transformer", _built(model, config, **options), _pixels(size))


def _conv(name: str, model: str, config: str, size: int = 32, **options: Any) -> Entry:
    return Entry(name, "cnn", _built(model, config, **options), _pixels(size))


def _whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
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
    return transformers.WhisperModel(config).encoder


def _bart_encoder() -> nn.Module:
    import transformers

    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=40,
    )
    return transformers.BartModel(config).encoder


ENTRIES = [
    _text("bert", "BertModel", "BertConfig", **_TEXT),
    Entry("bert with a mask", "transformer", _built("BertModel", "BertConfig", **_TEXT), _masked, ("scalar",)),
    _text("roberta", "RobertaModel", "RobertaConfig", **_TEXT),
    _text("xlm-roberta", "XLMRobertaModel", "XLMRobertaConfig", **_TEXT),
    _text("electra", "ElectraModel", "ElectraConfig", embedding_size=32, **_TEXT),
    _text("albert", "AlbertModel", "AlbertConfig", embedding_size=16, **_TEXT),
    _text(
        "distilbert", "DistilBertModel", "DistilBertConfig", vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64
    ),
    _text("mpnet", "MPNetModel", "MPNetConfig", **_TEXT),
    _text("deberta-v2", "DebertaV2Model", "DebertaV2Config", **_TEXT),
    _text("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", embedding_size=32, **_TEXT),
    _text("fnet", "FNetModel", "FNetConfig", **_TEXT),
    _text("roformer", "RoFormerModel", "RoFormerConfig", **_TEXT),
    _text("modernbert", "ModernBertModel", "ModernBertConfig", pad_token_id=0, **_TEXT),
    _text("gpt2", "GPT2Model", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False),
    _text("gpt-neox", "GPTNeoXModel", "GPTNeoXConfig", use_cache=False, **_TEXT),
    _text(
        "opt",
        "OPTModel",
        "OPTConfig",
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=40,
        use_cache=False,
    ),
    _text("llama", "LlamaModel", "LlamaConfig", **_DECODER),
    _text("mistral", "MistralModel", "MistralConfig", **_DECODER),
    _text("qwen2", "Qwen2Model", "Qwen2Config", **_DECODER),
    _text("qwen3", "Qwen3Model", "Qwen3Config", head_dim=8, **_DECODER),
    _text("gemma", "GemmaModel", "GemmaConfig", head_dim=8, **_DECODER),
    _text("phi", "PhiModel", "PhiConfig", **_DECODER),
    _text(
        "t5 encoder",
        "T5EncoderModel",
        "T5Config",
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    ),
    Entry("bart encoder", "transformer", _bart_encoder, tokens()),
    _text("clip text", "CLIPTextModel", "CLIPTextConfig", **_TEXT),
    _vision("vit", "ViTModel", "ViTConfig", **_IMAGE),
    _vision("deit", "DeiTModel", "DeiTConfig", **_IMAGE),
    _vision("dinov2", "Dinov2Model", "Dinov2Config", **_IMAGE),
    _vision("beit", "BeitModel", "BeitConfig", **_IMAGE),
    _vision("siglip", "SiglipVisionModel", "SiglipVisionConfig", **_IMAGE),
    _vision("clip vision", "CLIPVisionModel", "CLIPVisionConfig", **_IMAGE),
    _vision("ijepa", "IJepaModel", "IJepaConfig", **_IMAGE),
    _vision("yolos", "YolosModel", "YolosConfig", **{**_IMAGE, "image_size": [32, 32]}),
    _vision(
        "swin",
        "SwinModel",
        "SwinConfig",
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    _vision(
        "swinv2",
        "Swinv2Model",
        "Swinv2Config",
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    _vision(
        "segformer",
        "SegformerModel",
        "SegformerConfig",
        num_encoder_blocks=2,
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        **_STAGES,
    ),
    _vision(
        "pvt-v2",
        "PvtV2Model",
        "PvtV2Config",
        image_size=64,
        size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 2, 2, 4],
    ),
    _vision(
        "mobilevit",
        "MobileViTModel",
        "MobileViTConfig",
        size=64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
    ),
    _vision("mobilevit-v2", "MobileViTV2Model", "MobileViTV2Config", size=64, image_size=64, width_multiplier=0.25),
    _vision(
        "levit",
        "LevitModel",
        "LevitConfig",
        size=64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    _vision("poolformer", "PoolFormerModel", "PoolFormerConfig", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]),
    _vision(
        "cvt",
        "CvtModel",
        "CvtConfig",
        embed_dim=[8, 16, 16],
        num_heads=[1, 2, 2],
        depth=[1, 1, 1],
    ),
    _conv("convnext", "ConvNextModel", "ConvNextConfig", num_stages=2, **_STAGES),
    _conv("convnext-v2", "ConvNextV2Model", "ConvNextV2Config", num_stages=2, **_STAGES),
    _conv("resnet (hf)", "ResNetModel", "ResNetConfig", embedding_size=8, layer_type="basic", **_STAGES),
    _conv("regnet", "RegNetModel", "RegNetConfig", embedding_size=8, groups_width=8, **_STAGES),
    _conv("bit", "BitModel", "BitConfig", embedding_size=8, num_groups=4, **_STAGES),
    _conv("mobilenet-v1", "MobileNetV1Model", "MobileNetV1Config", size=64, depth_multiplier=0.25),
    _conv("mobilenet-v2 (hf)", "MobileNetV2Model", "MobileNetV2Config", size=64, depth_multiplier=0.25),
    _conv("efficientnet", "EfficientNetModel", "EfficientNetConfig", size=64, width_coefficient=0.25, hidden_dim=320),
    _conv(
        "focalnet", "FocalNetModel", "FocalNetConfig", image_size=32, embed_dim=8, depths=[1, 1], hidden_sizes=[8, 16]
    ),
    Entry("whisper encoder", "sequence", _whisper, lambda batch: {"input_features": torch.randn(batch, 8, 40)}),
    Entry("wav2vec2", "sequence", _built("Wav2Vec2Model", "Wav2Vec2Config", **_SPEECH), _audio()),
    Entry("hubert", "sequence", _built("HubertModel", "HubertConfig", **_SPEECH), _audio()),
]
