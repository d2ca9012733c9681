"""Scales, weights and inputs for prepared graphs, chosen so that ties between two codes are frequent."""

from __future__ import annotations

import torch
from torch import fx, nn

import qgraph
from qgraph.nn import Fused
from qgraph.numerics import QParams, QType, Scheme, quint8
from qgraph.quantization.fake_quantize import FakeQuantize, WeightFakeQuantize
from qgraph.quantization.observers import Observer

_ROUND = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


class Given(Observer):
    """An observer that knows its result."""

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

    def qparams(self, qtype: QType, scheme: Scheme) -> QParams:  # type: ignore[override]
        return self.known


class Chance:
    """Random numbers of one case; `ties` draws scales whose ratios have few bits."""

    def __init__(self, seed: int, ties: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.ties = ties

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def scales(self, count: int, around: float) -> torch.Tensor:
        """float32 `[count]`."""
        if self.ties:
            picks = torch.randint(len(_ROUND), (count,), generator=self.generator)
            power = 2.0 ** round(torch.log2(torch.tensor(around)).item())
            return torch.tensor(_ROUND)[picks] * power
        return torch.exp(torch.randn(count, generator=self.generator) * 0.7).mul(around).float()

    def codes(self, shape: torch.Size, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def input(self, shape: tuple[int, ...], qparams: QParams) -> torch.Tensor:
        """Reals around the codes of `qparams`; half steps among them where ties are wanted."""
        codes = self.codes(torch.Size(shape), -20, 275) - qparams.zero
        parts = self.codes(torch.Size(shape), 0, 3) / (2.0 if self.ties else 4.0)
        return (codes + parts) * qparams.scale


def assign(prepared: fx.GraphModule, chance: Chance) -> None:
    """Gives every site a scale and zero point, and every weight and bias values."""
    for module in prepared.modules():
        if isinstance(module, WeightFakeQuantize) or (isinstance(module, FakeQuantize) and module.fixed_scale):
            continue
        if isinstance(module, FakeQuantize):
            zero = torch.tensor(chance.integer(0, 255) if chance.integer(0, 1) else 2 * chance.integer(40, 90) + 1)
            module.observer = Given(QParams(chance.scales(1, 0.06)[0], quint8, zero))
    for module in prepared.modules():
        if isinstance(module, Fused):
            _assign_weights(module, chance)


def _assign_weights(module: nn.Module, chance: Chance) -> None:
    weight, quantizer = module.weight, module.weight_fake_quant
    assert isinstance(weight, torch.Tensor)
    assert isinstance(quantizer, WeightFakeQuantize)
    per_output = weight[0].numel()
    scales = chance.scales(weight.shape[0], 0.02 / per_output**0.5)
    reach = 127 if chance.integer(0, 2) else 60
    codes = chance.codes(weight.shape, -reach, reach)
    with torch.no_grad():
        weight.copy_(codes * scales.reshape(-1, *[1] * (weight.dim() - 1)))
        if isinstance(module.bias, torch.Tensor):
            steps = chance.codes(module.bias.shape, -400, 400) / 2.0
            module.bias.copy_(steps * (0.06 / 4 if not chance.ties else 2.0**-6))
    quantizer.observer = Given(QParams(scales, quantizer.qtype, axis=0))


def input_scale(prepared: fx.GraphModule, position: int) -> QParams:
    """Parameters given to an input of the model."""
    stubs = [n for n in prepared.graph.nodes if n.op == "call_module" and qgraph.info(n).op.name == "quant_stub"]
    quantizer = prepared.get_submodule(str(next(iter(stubs[position].users)).target))
    assert isinstance(quantizer, FakeQuantize)
    assert isinstance(quantizer.observer, Given)
    return quantizer.observer.known
