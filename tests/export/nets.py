"""Small networks, and scales that seek ties, for tests of export."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph.numerics import QParams, QType, Scheme
from qgraph.quantization.fake_quantize import FakeQuantize, WeightFakeQuantize
from qgraph.quantization.observers import Observer


class Mixed(nn.Module):
    """Residual sum, concatenation, pools, functions, an affine head: everything between codes."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.act = nn.LeakyReLU(0.1)
        self.fc = nn.Linear(2 * channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = F.relu(self.depth(x) + x)
        y = self.pool(torch.cat([self.act(y), torch.sigmoid(y)], 1))
        y = y * torch.tanh(y)
        result: torch.Tensor = self.fc(y.mean((2, 3)))
        return result


class Sequence(nn.Module):
    """Linears on three dimensions, products of two values, moves, functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.a(x).reshape(x.shape[0], x.shape[1], 4, 4).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2)
        mixed = (F.hardsigmoid(scores) @ heads).transpose(1, 2).flatten(2)
        parts = self.b(F.gelu(mixed)).chunk(2, -1)
        result: torch.Tensor = torch.stack([parts[0] * 0.5, parts[1] + 1.5], 1)[:, :, 1:]
        return result


class _Given(Observer):
    def __init__(self, known: QParams) -> None:
        super().__init__(-1 if known.axis is None else known.axis)
        self.known = known

    @property
    def observed(self) -> bool:
        return True

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def reset(self) -> None:
        """Nothing to forget."""

    def qparams(self, qtype: QType, scheme: Scheme) -> QParams:
        return self.known


def prepared(
    model: nn.Module, example: torch.Tensor, *, target: str | qgraph.Target = "onnxruntime", qconfig: object = None
) -> fx.GraphModule:
    """A prepared graph calibrated on its example."""
    settle(model)
    gm = qgraph.prepare(model.eval(), (example,), qconfig, target=target)
    qgraph.calibrate(gm, [(example,)], progress=False)
    return gm


def settle(model: nn.Module) -> None:
    """Statistics of batch norms that are not the trivial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def seek_ties(gm: fx.GraphModule, how: str = "few bits", *, parity: int | None = None) -> None:
    """Gives every site a scale near the calibrated one, so that sums and products land on ties.

    Args:
        how: "few bits"; "powers" of two, with which float32 sums are exact; or "common": of any bits, but ratios of
            activations and scales of weights are powers of two.
        parity: 0 for even zero points, 1 for odd ones.
    """
    common = 1 + torch.rand(())
    for module in gm.modules():
        if not isinstance(module, FakeQuantize) or module.observer is None:
            continue
        if isinstance(module, WeightFakeQuantize):
            parent = next(owner for owner in gm.modules() if getattr(owner, "weight_fake_quant", None) is module)
            module.observer(parent.weight)
        known = module.observer.qparams(module.qtype, module.scheme)
        scale = 2.0 ** torch.round(torch.log2(known.scale))
        if how == "few bits":
            scale = scale * torch.randint(4, 9, scale.shape) / 4
        elif how == "common" and not isinstance(module, WeightFakeQuantize):
            scale = scale * common
        zero = known.zero_point
        if parity is not None and zero is not None:
            zero = zero // 2 * 2 + parity
        module.observer = _Given(QParams(scale, module.qtype, zero, known.axis))


def on_ties(gm: fx.GraphModule) -> None:
    """Gives the only product a result whose scale is its accumulator's step times a power of two."""
    weight = next(module for module in gm.modules() if isinstance(module, WeightFakeQuantize))
    source, *_, result = (
        m for m in gm.modules() if isinstance(m, FakeQuantize) and not isinstance(m, WeightFakeQuantize)
    )
    assert weight.observer is not None
    assert source.observer is not None
    assert result.observer is not None
    parent = next(owner for owner in gm.modules() if getattr(owner, "weight_fake_quant", None) is weight)
    weight.observer(parent.weight)
    known = weight.observer.qparams(weight.qtype, weight.scheme)
    known = QParams(known.scale.max().expand_as(known.scale).clone(), weight.qtype, axis=known.axis)
    weight.observer = _Given(known)
    given, wanted = (m.observer.qparams(m.qtype, m.scheme) for m in (source, result))  # type: ignore[union-attr]
    step = given.scale * known.scale[0]
    scale = step * 2.0 ** torch.round(torch.log2(wanted.scale / step))
    result.observer = _Given(QParams(scale, result.qtype, wanted.zero_point))


def real_inputs(gm: fx.GraphModule, shape: tuple[int, ...]) -> torch.Tensor:
    """Inputs at halves and quarters of the input's steps, beyond its range too."""
    stub = next(node for node in gm.graph.nodes if qgraph.info(node).op.name == "quant_stub")
    site = gm.get_submodule(str(next(iter(stub.users)).target))
    assert isinstance(site, FakeQuantize)
    scale = site.qparams().scale if site.has_scale else torch.tensor(0.03)
    return torch.randint(-600, 600, shape) / 4 * scale
