"""Entries defined in this package."""

from __future__ import annotations

import torch
from torch import nn

from tools.bench.models import build
from tools.zoo import convolutional, detectors, sequences
from tools.zoo.entry import Entry, Inputs, image, sequence


def _cameras(batch: int) -> Inputs:
    return {"x": torch.randn(batch, 3, 3, 32, 32)}


def _pillars(batch: int) -> Inputs:
    return {"x": torch.randn(batch, 64, 5, 4)}


def _pair(batch: int) -> Inputs:
    return {"x": torch.randn(batch, 8), "y": torch.randn(batch, 8)}


ENTRIES = [
    Entry("resnet-18", "cnn", lambda: build("resnet18"), image(64)),
    Entry("resnet-50", "cnn", lambda: build("resnet50"), image(64)),
    Entry("mobilenet-v2", "cnn", lambda: build("mobilenetv2"), image(64)),
    Entry("vit-tiny", "transformer", lambda: build("vit_tiny"), image(224)),
    Entry("vgg", "cnn", convolutional.vgg, image(name="input")),
    Entry("squeezenet", "cnn", convolutional.squeezenet, image()),
    Entry("densenet", "cnn", convolutional.densenet, image()),
    Entry("inception", "cnn", convolutional.inception, image()),
    Entry("shufflenet-v2", "cnn", convolutional.shufflenet, image()),
    Entry("se-resnet", "cnn", convolutional.se_resnet, image()),
    Entry("mobilenet-v3", "cnn", convolutional.mobilenet_v3, image()),
    Entry("ghostnet", "cnn", convolutional.ghostnet, image()),
    Entry("res2net", "cnn", convolutional.res2net, image()),
    Entry("repvgg", "cnn", convolutional.repvgg, image()),
    Entry("convmixer", "cnn", convolutional.convmixer, image()),
    Entry("cbam", "cnn", convolutional.cbam, image()),
    Entry("u-net", "cnn", convolutional.UNet, image()),
    Entry("deeplab aspp", "cnn", convolutional.ASPP, image()),
    Entry("sub-pixel cnn", "cnn", convolutional.superresolution, image(name="input")),
    Entry("autoencoder", "cnn", convolutional.autoencoder, image(name="input")),
    Entry("spatial transformer", "cnn", convolutional.SpatialTransformer, image()),
    Entry("retinanet", "detector", detectors.FPN, image(64)),
    Entry("yolo", "detector", detectors.Yolo, image()),
    Entry("centernet", "detector", detectors.CenterNet, image()),
    Entry("detr", "detector", detectors.DETR, image()),
    Entry("deformable encoder", "detector", detectors.DeformableEncoder, image()),
    Entry("lift-splat", "detector", detectors.LiftSplat, _cameras),
    Entry("cross-view", "detector", detectors.CrossView, _cameras),
    Entry("pointpillars", "detector", detectors.PillarNet, _pillars),
    Entry("lstm", "sequence", lambda: sequences.Recurrent(nn.LSTM, num_layers=2), sequence(5, 8)),
    Entry("bidirectional lstm", "sequence", lambda: sequences.Recurrent(nn.LSTM, bidirectional=True), sequence(5, 8)),
    Entry("gru", "sequence", lambda: sequences.Recurrent(nn.GRU), sequence(5, 8)),
    Entry("temporal cnn", "sequence", sequences.Temporal, sequence(20, 8)),
    Entry("mlp-mixer", "transformer", sequences.Mixer, image()),
    Entry("transformer encoder", "transformer", sequences.encoder, sequence(6, 16, "src")),
    Entry("pointnet", "other", sequences.PointNet, sequence(32, 3)),
    Entry("nerf", "other", sequences.Field, sequence(16, 3)),
    Entry("siamese", "other", sequences.Siamese, _pair),
    Entry("mixture of experts", "other", sequences.Gated, sequence(4, 8)),
]
