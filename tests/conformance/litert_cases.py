"""Prepared graphs for LiteRT with scales that make ties frequent, and inputs that reach them and saturation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

import qgraph
from qgraph.nn import Fused
from qgraph.numerics import QParams, QType, qint8
from qgraph.quantization import QConfig, calibrate
from qgraph.quantization.fake_quantize import FakeQuantize, WeightFakeQuantize
from qgraph.targets import Target

_PARTS = (1.0, 1.0, 0.75, 0.625)  # of a power of two: products and quotients have few bits


@dataclass
class Draw:
    """Random numbers of one case.

    Args:
        seed: where they come from.
        ties: whether scales have few bits, so that rescaled values often lie between two codes.
    """

    seed: int
    ties: bool

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def integer(self, low: int, high: int) -> int:
        """A number between two bounds, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Any) -> Any:
        """One of a sequence."""
        return options[self.integer(0, len(options) - 1)]

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Normally distributed reals, some of them large."""
        values = torch.randn(shape, generator=self.generator)
        return values * (4.0 if self.integer(0, 3) == 0 else 1.0)

    def snapped(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale close to the given one, or smaller so that codes saturate."""
        if not self.ties:
            return scale * (0.3 if self.integer(0, 7) == 0 else 1.0)
        power = torch.exp2(torch.round(torch.log2(scale)))
        return power * float(self.choice(_PARTS)) * (0.5 if self.integer(0, 5) == 0 else 1.0)


def prepared(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    draw: Draw,
    output: QType = qint8,
    target: Target | str = "litert",
) -> fx.GraphModule:
    """The model calibrated, then given scales and zero points of the draw."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=draw.generator)
    gm = qgraph.prepare(model.eval(), inputs, QConfig(output=output), target=target)
    calibrate(gm, [inputs], progress=False)
    for module in gm.modules():
        if isinstance(module, Fused) and draw.ties:
            _snap_weight(module, draw)
        if isinstance(module, WeightFakeQuantize):
            continue
        if isinstance(module, FakeQuantize) and module.fixed_scale is None:
            module.settle()
            _assign(module, draw)
    return gm


def _assign(module: FakeQuantize, draw: Draw) -> None:
    found = module.qparams()
    zero = None
    if found.zero_point is not None:
        edge = draw.choice((found.zero, found.zero, found.qtype.qmin, found.qtype.qmax, 0, draw.integer(-100, 100)))
        zero = torch.tensor(edge)
    module._keep(QParams(draw.snapped(found.scale), found.qtype, zero))
    assert module.observer is not None
    module.observer.reset()  # or convert would compute the scale again


def _snap_weight(module: Fused, draw: Draw) -> None:
    """Weights that are codes times a scale of few bits, the largest code among them in every channel."""
    weight: Any = module.weight
    quantizer = module.weight_fake_quant
    assert isinstance(quantizer, WeightFakeQuantize)
    axis = quantizer.axis or 0
    with torch.no_grad():
        for channel in range(weight.shape[axis]):
            part = weight.select(axis, channel)
            scale = draw.snapped(part.abs().max() / quantizer.qtype.qmax)
            codes = quantizer.qtype.saturate(torch.round(part / scale)).clamp(min=-quantizer.qtype.qmax)
            codes.flatten()[0] = quantizer.qtype.qmax
            part.copy_(codes * scale)


def inputs_at_ties(gm: fx.GraphModule, shapes: list[tuple[int, ...]], draw: Draw) -> tuple[torch.Tensor, ...]:
    """Reals of every kind, half of them between two codes of the input's scale, and what has no code."""
    found = []
    for node, shape in zip(gm.graph.find_nodes(op="placeholder"), shapes, strict=True):
        values = draw.normal(shape) * draw.choice((0.5, 1.0, 3.0))
        quantizer = _first_quantizer(node)
        scale = None if quantizer is None else quantizer.qparams().scale
        if scale is not None and (draw.ties or draw.integer(0, 1)):
            values = torch.round(values / scale * 2) / 2 * scale
        flat = values.flatten()
        if draw.integer(0, 3) == 0 and flat.numel() > 8:
            flat[:6] = torch.tensor([1e30, -1e30, float("inf"), float("-inf"), float("nan"), -0.0])
        found.append(flat.reshape(shape))
    return tuple(found)


def every_code(gm: fx.GraphModule) -> torch.Tensor:
    """Reals of all codes of the one input, `[256, n]`."""
    quantizer = _first_quantizer(next(iter(gm.graph.find_nodes(op="placeholder"))))
    assert quantizer is not None
    qparams = quantizer.qparams()
    codes = torch.arange(qparams.qtype.qmin, qparams.qtype.qmax + 1)
    return ((codes - qparams.zero) * qparams.scale).reshape(256, -1)


def give_scale(gm: fx.GraphModule, scale: float) -> None:
    """The one input gets another scale."""
    quantizer = _first_quantizer(next(iter(gm.graph.find_nodes(op="placeholder"))))
    assert quantizer is not None
    old = quantizer.qparams()
    quantizer._keep(QParams(torch.tensor(scale), old.qtype, old.zero_point))


def _first_quantizer(node: fx.Node) -> FakeQuantize | None:
    pending = list(node.users)
    while pending:
        user = pending.pop(0)
        module = (
            user.graph.owning_module.get_submodule(str(user.target))  # type: ignore[union-attr]
            if user.op == "call_module"
            else None
        )
        if isinstance(module, FakeQuantize):
            return module
        pending += list(user.users)
    return None


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs) if self._modules else self.function(*inputs)
