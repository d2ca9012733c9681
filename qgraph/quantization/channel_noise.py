"""What quantization is expected to cost a layer, from the ranges of its input channels.

A layer computes `y_o = sum_i w_oi x_i`. If `x_i` is multiplied by `s_i` and `w_oi` divided by it, the variance of the
noise that rounding adds to `y_o` is

    step_x^2 / 12 * sum_i w_oi^2 / s_i^2  +  step_o^2 / 12 * sum_i E[x_i^2] s_i^2
    step_x = max_i(a_i s_i) / levels_x        a_i: largest magnitude of x_i
    step_o = max_i |w_oi / s_i| / levels_w    one scale per output channel

The first term is smallest for `s_i = 1 / a_i`, the second where the weights have equal ranges; the geometric mean of
both choices is the one of SmoothQuant (Xiao et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log10
from typing import Any

import torch
from torch import fx

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.evaluate import evaluate
from qgraph.ir.node_info import ExampleInputs
from qgraph.ir.shapes import tensor_spec
from qgraph.quantization.channel_axes import Layer, channels


@dataclass(frozen=True)
class ChannelRanges:
    """What was seen of the channels of a value.

    Args:
        largest: largest magnitude, float64 `[C]`.
        power: mean square, float64 `[C]`.
    """

    largest: torch.Tensor
    power: torch.Tensor

    def joined(self, other: ChannelRanges) -> ChannelRanges:
        """Of two values that share the channels: the larger ranges."""
        return ChannelRanges(torch.maximum(self.largest, other.largest), torch.maximum(self.power, other.power))


def layer_input(call: fx.Node) -> fx.Node:
    """The value that a layer's weight is multiplied with."""
    value: fx.Node = bind(call).operand("input")
    return value


def input_dim(call: fx.Node, layer: Layer) -> int:
    """The channel dimension of a layer's input."""
    spec = tensor_spec(layer_input(call))
    weight: Any = layer.module.weight
    space = weight.dim() - 2 if layer.scales_in else 0
    return (0 if spec is None else len(spec.shape)) - 1 - space


def channel_ranges(
    gm: fx.GraphModule, batches: Iterable[ExampleInputs], layers: Iterable[Layer]
) -> dict[fx.Node, ChannelRanges]:
    """Ranges of the channels that the layers read, over all batches.

    Returns:
        The input node of every call of a layer, with what was seen of it.
    """
    wanted = {layer_input(call): input_dim(call, layer) for layer in layers for call in layer.calls}
    largest: dict[fx.Node, torch.Tensor] = {}
    squares: dict[fx.Node, torch.Tensor] = {}
    counts: dict[fx.Node, int] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node not in wanted:
            return
        dim = wanted[node]
        others = [other for other in range(value.dim()) if other != dim]
        high = value.abs().amax(others).double() if others else value.abs().double()
        total = value.square().sum(others, dtype=torch.float64) if others else value.double().square()
        largest[node] = torch.maximum(largest[node], high) if node in largest else high
        squares[node] = squares[node] + total if node in squares else total
        counts[node] = counts.get(node, 0) + value.numel() // max(value.shape[dim], 1)

    with torch.no_grad():
        for batch in batches:
            evaluate(gm, batch.args, batch.kwargs, observe=observe)
    return {node: ChannelRanges(largest[node], squares[node] / max(counts[node], 1)) for node in largest}


class LayerNoise:
    """The noise of one layer as a function of its input's factors.

    Args:
        layer: a convolution or linear.
        ranges: of its input channels.
        input_levels, weight_levels: codes on one side of zero; None where the input is not rounded.
    """

    def __init__(self, layer: Layer, ranges: ChannelRanges, input_levels: int | None, weight_levels: int) -> None:
        self.ranges, self.input_levels, self.weight_levels = ranges, input_levels, weight_levels
        weight = _by_channels(layer).double()
        self.index = _input_index(layer).to(weight.device)
        self.taps = weight.shape[2]
        self.squares, self.largest = weight.square().sum(2), weight.abs().amax(2)
        self.alive = (self.squares * ranges.power[self.index]).sum(1) > 0

    def __call__(self, factors: torch.Tensor) -> torch.Tensor:
        """Mean of log2 of the noise's variance over output channels, a number `[]`, for factors `[C]`."""
        if not bool(self.alive.any()):
            return factors.new_zeros(())
        own = factors[self.index]
        step = self.largest.div(own).amax(1) / self.weight_levels
        noise = step.square() * self.taps * (self.ranges.power[self.index] * own.square()).sum(1)
        if self.input_levels is not None:
            rounding = (self.ranges.largest * factors).amax() / self.input_levels
            noise = noise + rounding.square() * (self.squares / own.square()).sum(1)
        return noise[self.alive].log2().mean()

    def weight_ranges(self) -> torch.Tensor:
        """How large the weights of each input channel are, relative to the signal they make: `[C]`."""
        signal = (self.squares * self.ranges.power[self.index]).sum(1, keepdim=True).sqrt()
        relative = torch.where(signal > 0, self.largest / signal, 0.0)
        found = torch.zeros_like(self.ranges.largest)
        return found.scatter_reduce(0, self.index.flatten(), relative.flatten(), "amax")


def result_ranges(layer: Layer, ranges: ChannelRanges | None) -> torch.Tensor:
    """How large a layer's output channels can become, `[C_out]`: two standard deviations for inputs of these powers.

    Without ranges every input has power 1.
    """
    module: Any = layer.module
    if not layer.scales_in:
        spread = module.weight.detach().double().abs()
    elif ranges is None:
        spread = _by_channels(layer).flatten(1).norm(dim=1).double()
    else:
        spread = (_by_channels(layer).double().square().sum(2) * ranges.power[_input_index(layer)]).sum(1).sqrt()
    bias = getattr(module, "bias", None)
    reach: torch.Tensor = 2 * spread + (0 if bias is None else bias.detach().double().abs())
    return reach


def column_ranges(layer: Layer) -> torch.Tensor:
    """The largest weight of each input channel: `[C_in]`."""
    largest, index = _by_channels(layer).abs().amax(2), _input_index(layer)
    found: torch.Tensor = largest.new_zeros(channels(layer.op, layer.module)[1])
    found.scatter_reduce_(0, index.flatten(), largest.flatten(), "amax")
    return found


def decibels(log2_ratio: float) -> float:
    """A ratio of powers, given as its log2, in dB."""
    return 10 * log10(2) * log2_ratio


def _by_channels(layer: Layer) -> torch.Tensor:
    """The weight as `[C_out, C_in / groups, taps]`."""
    module: Any = layer.module
    weight: torch.Tensor = module.weight.detach()
    groups = getattr(module, "groups", 1)
    if layer.op in ops.TRANSPOSED:
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return parts.transpose(1, 2).reshape(groups * weight.shape[1], weight.shape[0] // groups, -1)
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def _input_index(layer: Layer) -> torch.Tensor:
    """Which input channel each entry of `_by_channels` belongs to: `[C_out, C_in / groups]`."""
    outputs, inputs = channels(layer.op, layer.module)
    groups = getattr(layer.module, "groups", 1)
    index = torch.arange(inputs).reshape(groups, 1, inputs // groups)
    return index.expand(groups, outputs // groups, -1).reshape(outputs, -1)
