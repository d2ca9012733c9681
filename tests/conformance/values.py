"""Scales, zero points, weights, biases and inputs of a prepared graph: given, or drawn towards ties and saturation.

Scales are drawn while the graph runs once: each site sees its values, rounded as its operands will be, and chooses a
scale whose ratio to the others has few bits, or one that saturates, or any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op_table import FUSABLE, QUANT_STUB
from qgraph.lowering.products import accumulator_step, scale_repeats
from qgraph.nn import Fused
from qgraph.numerics import QParams, QType, Scheme
from qgraph.quantization.fake_quantize import BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from qgraph.quantization.observers import Observer
from qgraph.quantization.sites import source_quantizer
from qgraph.quantization.states import FakeQuantState
from tests.conformance.operators import Chance

SCALE_KINDS = ("ties", "ties", "ties", "free", "saturating", "coarse", "mixed", "mixed")
CODE_KINDS = ("any", "any", "powers", "powers", "small", "small", "ends", "lowest", "highest", "equal", "sparse")
INPUT_KINDS = (
    "codes",
    "codes",
    "powers",
    "powers",
    "ties",
    "ties",
    "ends",
    "lowest",
    "highest",
    "beyond",
    "free",
    "small",
)
ODD = (1, 1, 1, 1, 1, 3, 3, 5, 7, 11)


@dataclass
class Values:
    """What a prepared graph needs besides its structure.

    Args:
        scales: scale (or scales) and zero point by site, weights among them.
        weights: codes by weight site.
        biases: reals by bias site.
        inputs: the model's inputs.
    """

    scales: dict[str, tuple[list[float], int]] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class Given(Observer):
    """An observer that knows its result."""

    def __init__(self, known: QParams, axis: int = -1) -> None:
        super().__init__(axis)
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


class _Choosing(Observer):
    """An observer that draws its result when it first sees values."""

    def __init__(self, site: FakeQuantize, drawing: Drawing) -> None:
        super().__init__(-1)
        self.site, self.drawing = (site,), drawing

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.drawing.choose(self.site[0], values)
        return values


@dataclass
class Drawing:
    """One drawing of everything that `given` does not hold already."""

    gm: fx.GraphModule
    chance: Chance
    given: Values
    overflow: bool = True

    def __post_init__(self) -> None:
        self.kind = self.chance.choice(SCALE_KINDS)
        self.settled: set[FakeQuantize] = set()

    def run(self) -> Values:
        """Assigns everything; the values kept, with what was drawn."""
        fused = list(fused_nodes(self.gm))
        for node, module in fused:
            self._weight(node, module)
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            self._input(node)
        for module in self.gm.modules():
            if isinstance(module, BiasFakeQuantize):
                module.state = FakeQuantState.FLOAT
            elif isinstance(module, FakeQuantize):
                weight = isinstance(module, WeightFakeQuantize)
                module.state = FakeQuantState.VALIDATION if weight else FakeQuantState.QAT
                if not weight and module.fixed_scale is None and module not in self.settled:
                    self._activation(module)
        hooks = [m.register_forward_pre_hook(partial(self._bias, n)) for n, m in fused if m.bias is not None]
        with torch.no_grad():
            self.gm(*(self.given.inputs[str(node.target)] for node in placeholders))
        for hook in hooks:
            hook.remove()
        return self.given

    # --- scales ---

    def _activation(self, site: FakeQuantize) -> None:
        if site.site in self.given.scales:
            self._give(site, *self.given.scales[site.site])
        else:
            site.observer = _Choosing(site, self)

    def choose(self, site: FakeQuantize, values: torch.Tensor) -> None:
        """Draws scale and zero point of a site from the values it sees."""
        reach = float(values.abs().max()) if values.numel() else 1.0
        reach = reach if math.isfinite(reach) and reach > 0 else 1.0
        scale = self.scale(reach / (1 << (site.qtype.bits - 1)))
        self._give(site, [scale], self.zero(site))

    def _give(self, site: FakeQuantize, scales: list[float], zero: int) -> None:
        axis = site.axis
        scale = torch.tensor(scales if axis is not None else scales[0], dtype=torch.float32)
        zeros = torch.full_like(scale, zero, dtype=torch.int64) if site.scheme is Scheme.AFFINE else None
        site.observer = Given(QParams(scale, site.qtype, zeros, axis), -1 if axis is None else axis)
        site._keep(site.observer.known)
        self.settled.add(site)
        self.given.scales[site.site] = (scales, zero)

    def scale(self, around: float) -> float:
        """A scale near `around`, or away from it on purpose."""
        chance = self.chance
        kind = chance.choice(SCALE_KINDS[:6]) if self.kind == "mixed" else self.kind
        if kind == "free":
            return _float32(around * math.exp(chance.gauss(0, 0.7)))
        away = {"saturating": -chance.randint(1, 6), "coarse": chance.randint(1, 7)}.get(kind, chance.randint(-1, 1))
        odd = chance.choice(ODD)
        return odd * 2.0 ** (round(math.log2(around / odd)) + away)

    def zero(self, site: FakeQuantize) -> int:
        if site.scheme is not Scheme.AFFINE:
            return 0
        low, high = site.qtype.qmin, site.qtype.qmax
        middle = (low + high + 1) // 2
        odd = 2 * self.chance.randint(low // 2, high // 2) + 1
        return self.chance.choice([low, high, middle, middle + 1, odd, odd, self.chance.randint(low, high)])

    # --- weights and biases ---

    def _weight(self, node: fx.Node, module: Fused) -> None:
        site = module.weight_fake_quant
        assert isinstance(site, WeightFakeQuantize)
        weight = module.weight
        if site.site not in self.given.weights:
            self.given.weights[site.site] = self.codes(tuple(weight.shape), site.qtype, site.scheme)
        if site.site not in self.given.scales:
            axis = site.axis
            count = 1 if axis is None else weight.shape[axis]
            self.given.scales[site.site] = (self._weight_scales(count), 0)
        self._give(site, *self.given.scales[site.site])
        scales = site.qparams().shaped(site.qparams().scale, weight.dim())
        with torch.no_grad():
            weight.copy_(self.given.weights[site.site].to(torch.float32) * scales)

    def _weight_scales(self, count: int) -> list[float]:
        first = self.scale(2.0 ** self.chance.randint(-10, -4))
        if self.chance.likely(0.4):
            return [first] * count
        wide = self.chance.likely(0.1)
        return [self.scale(first) * (2.0 ** self.chance.randint(-16, 8) if wide else 1.0) for _ in range(count)]

    def codes(self, shape: tuple[int, ...], qtype: QType, scheme: Scheme) -> torch.Tensor:
        """int64 codes of a weight."""
        low = -qtype.qmax if scheme is Scheme.SYMMETRIC_NARROW else qtype.qmin
        return self._codes(shape, self.chance.choice(CODE_KINDS), low, qtype.qmax, 0)

    def _codes(self, shape: tuple[int, ...], kind: str, low: int, high: int, zero: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.chance.getrandbits(40))

        def between(first: int, last: int) -> torch.Tensor:
            return torch.randint(first, last + 1, shape, generator=generator)

        if kind == "small":
            return (zero + between(-3, 3)).clamp(low, high)
        if kind == "powers":  # sums with trailing zeros, whose halves are ties
            signs = torch.where(between(0, 1) == 0, 1, -1)
            top = (high - low + 1).bit_length() - 2
            return (zero + signs * (1 << between(0, top))).clamp(low, high)
        if kind == "ends":
            return torch.tensor([low, high, low + 1, zero])[between(0, 3)]
        if kind in ("lowest", "highest", "equal"):
            return torch.full(shape, {"lowest": low, "highest": high}.get(kind, self.chance.randint(low, high)))
        if kind == "sparse":
            return torch.where(between(0, 3) == 0, torch.where(between(0, 1) == 0, 1, -1), 0) + zero
        return between(low, high)

    def _bias(self, node: fx.Node, module: nn.Module, args: Any) -> None:
        """Draws a bias just before its module runs, when the accumulator's step is known."""
        assert isinstance(module, Fused)
        quantizer = module.bias_fake_quant
        site = quantizer.site if isinstance(quantizer, BiasFakeQuantize) else f"{info(node).site}.bias"
        bias = module.bias
        source, weight = source_quantizer(bind(node).operand("input")), module.weight_fake_quant
        assert bias is not None
        assert source is not None
        assert isinstance(weight, FakeQuantize)
        if site not in self.given.biases:
            step = accumulator_step(source.qparams(), weight.qparams(), scale_repeats(node))
            self.given.biases[site] = (self._bias_steps(tuple(bias.shape)) * step).to(torch.float32)
        with torch.no_grad():
            bias.copy_(self.given.biases[site])

    def _bias_steps(self, shape: tuple[int, ...]) -> torch.Tensor:
        """float64 biases in steps of the accumulator; halves are ties, and the largest reach its ends."""
        kind = self.chance.choice(["small", "ties", "ties", "any", "huge", "ends" if self.overflow else "huge"])
        if kind == "ends":
            limit = 1 << 31
            return self._codes(shape, "ends", -limit + 2000, limit - 2000, 0).double()
        reach = {"small": 9, "huge": 1 << 24}.get(kind, 3000)
        return self._codes(shape, "any", -reach, reach, 0).double() + (0.5 if kind == "ties" else 0.0)

    # --- inputs ---

    def _input(self, node: fx.Node) -> None:
        name = str(node.target)
        stubs = [site for site in _stub_sites(node) if site.fixed_scale is None]
        for site in stubs:
            if site.site not in self.given.scales:
                self._give(site, [self.scale(2.0 ** self.chance.randint(-8, 0))], self.zero(site))
            else:
                self._give(site, *self.given.scales[site.site])
        if name in self.given.inputs:
            return
        shape = tuple(info(node).value.shape)  # type: ignore[union-attr]
        if not stubs:
            self.given.inputs[name] = torch.zeros(shape)
            return
        qtype, scales = stubs[0].qtype, self.given.scales[stubs[0].site]
        self.given.inputs[name] = self._reals(shape, qtype, scales[0][0], scales[1])

    def _reals(self, shape: tuple[int, ...], qtype: QType, scale: float, zero: int) -> torch.Tensor:
        kind = self.chance.choice(INPUT_KINDS)
        low, high = qtype.qmin, qtype.qmax
        if kind == "free":
            generator = torch.Generator().manual_seed(self.chance.getrandbits(40))
            return torch.randn(shape, generator=generator) * (scale * (high - low) / 5)
        drawn = {"codes": "any", "ties": self.chance.choice(["any", "small"])}.get(kind, kind)
        if kind == "beyond":
            low, high, drawn = low - 200, high + 200, "any"
        steps = self._codes(shape, drawn, low, high, zero).double() - zero
        return ((steps + (0.5 if kind == "ties" else 0.0)) * scale).to(torch.float32)


def fused_nodes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Fused]]:
    """Every module with a quantized weight, at its first call."""
    seen: set[Fused] = set()
    for node in gm.graph.nodes:
        module = module_of(node) if node.op == "call_module" else None
        if info(node).op not in FUSABLE or not isinstance(module, Fused) or module in seen:
            continue
        if isinstance(module.weight_fake_quant, WeightFakeQuantize):
            seen.add(module)
            yield node, module


def _stub_sites(node: fx.Node) -> list[FakeQuantize]:
    """Fake quantizations of the stubs that read an input."""
    found = []
    for stub in node.users:
        if info(stub).op is QUANT_STUB:
            for user in stub.users:
                module = module_of(user) if user.op == "call_module" else None
                if isinstance(module, FakeQuantize):
                    found.append(module)
    return found


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
