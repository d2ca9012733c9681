"""Scales channels so that one scale for all of them loses less: chooses factors, group by group, and applies them.

    relu(w x + b)  ->  v        becomes        relu(s w x + s b)  ->  v / s

Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019; Xiao et al.,
"SmoothQuant", 2022. Factors are powers of two, so that the float graph computes the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qgraph.ir import op_table as ops
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import info
from qgraph.nn import clone_module
from qgraph.numerics import QType
from qgraph.quantization.channel_axes import Axis, ChannelAxes, Group, Layer
from qgraph.quantization.channel_noise import (
    ChannelRanges,
    LayerNoise,
    column_ranges,
    decibels,
    layer_input,
    result_ranges,
)

Levels = Callable[[fx.Node], "tuple[QType | None, QType]"]
"""For a call of a layer: the formats of its input and of its weight; None for an input that is not rounded."""

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHIFTS = (0.0, 0.25, 0.5, 0.75)  # where rounding to powers of two goes up or down
_LARGEST_EXPONENT = 20
_UNEVEN = 4.0  # times the median


@dataclass(frozen=True)
class Choice:
    """Factors for one group.

    Args:
        group: what they are for.
        factors: powers of two, float64 `[group.size]`.
        gain: by how much the noise of the consumers is expected to fall, in dB.
        spread: ratio of the widest channel to the median one before.
    """

    group: Group
    factors: torch.Tensor
    gain: float
    spread: float


def uneven_groups(axes: ChannelAxes) -> dict[Axis, Group]:
    """Groups whose weights alone make it likely that channels differ: a quick look that needs no data."""
    return {root: group for root, group in axes.groups().items() if _is_uneven(axes, group)}


def _is_uneven(axes: ChannelAxes, group: Group) -> bool:
    for weight in group.producers:
        made = result_ranges(axes.layers[weight], None)
        if made.max() > _UNEVEN * made.median():
            return True
    for weight in group.consumers:
        read = column_ranges(axes.layers[weight])
        if read.max() > _UNEVEN * read.median():
            return True
    return False


def layers_of(axes: ChannelAxes, groups: Iterable[Group]) -> list[Layer]:
    """The layers that make or read the channels of some groups."""
    weights = dict.fromkeys(weight for group in groups for weight in (*group.producers, *group.consumers))
    return [axes.layers[weight] for weight in weights]


def choose_factors(
    axes: ChannelAxes,
    groups: Mapping[Axis, Group],
    ranges: Mapping[fx.Node, ChannelRanges],
    levels: Levels,
    *,
    sampled: bool,
) -> dict[Axis, Choice]:
    """The best factors for some groups.

    Args:
        axes: all groups of a graph.
        groups: those to look at.
        ranges: of every layer's input, from `channel_ranges`.
        levels: formats of inputs and weights.
        sampled: whether the ranges come from data of the kind the model is for; otherwise what a channel can reach is
            bounded from below by the weights that make it, so that a channel that happens to be quiet is not blown up.
    """
    chosen = {}
    for root, group in groups.items():
        choice = _choose(axes, group, ranges, levels, sampled)
        if choice is not None:
            chosen[root] = choice
    return chosen


def _choose(
    axes: ChannelAxes, group: Group, ranges: Mapping[fx.Node, ChannelRanges], levels: Levels, sampled: bool
) -> Choice | None:
    floor = None if sampled else _floor(axes, group, ranges)
    noises: list[tuple[LayerNoise, int]] = []
    for weight in group.consumers:
        layer = axes.layers[weight]
        seen = _seen(layer, ranges)
        repeat = axes.root(("in", weight))[1]
        if seen is None or not bool(torch.isfinite(seen.power).all()):
            return None
        if floor is not None:
            seen = ChannelRanges(torch.maximum(seen.largest, floor.repeat_interleave(repeat)), seen.power)
        input_format, weight_format = levels(layer.calls[0])
        input_levels = None if input_format is None else input_format.qmax
        noises.append((LayerNoise(layer, seen, input_levels, weight_format.qmax), repeat))
    width = torch.stack([_blocks(noise.ranges.largest, repeat) for noise, repeat in noises]).amax(0)
    weights = torch.stack([_blocks(noise.weight_ranges(), repeat) for noise, repeat in noises]).amax(0)
    if not bool((width > 0).any() and (weights > 0).any()):
        return None

    def cost(factors: torch.Tensor) -> float:
        return sum(float(noise(factors.repeat_interleave(repeat))) for noise, repeat in noises) / len(noises)

    candidates = [_powers_of_two(weights, width, share, shift) for share in _SHARES for shift in _SHIFTS]
    best = min(candidates, key=cost)
    before, after = cost(torch.ones_like(best)), cost(best)
    spread = float(width.max() / width[width > 0].median())
    return Choice(group, best, decibels(before - after), spread)


def _powers_of_two(weights: torch.Tensor, width: torch.Tensor, share: float, shift: float) -> torch.Tensor:
    """`weights^(1 - share) / width^share`, rounded to powers of two around a median of 1."""
    tiny = torch.finfo(torch.float32).tiny
    exponents = (1 - share) * weights.clamp(min=tiny).log2() - share * width.clamp(min=tiny).log2()
    useful = (weights > 0) & (width > 0)
    exponents = (exponents - exponents[useful].median() if bool(useful.any()) else exponents) + shift
    exponents = torch.where(useful, exponents.round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT), 0.0)
    # A channel that nobody reads, or that is always zero, may at most be made quieter.
    unread = (weights == 0) & (width > 0)
    quiet = (width[useful].amax().log2() + exponents[useful].amax() - width.clamp(min=tiny).log2()).floor().clamp(max=0)
    return torch.exp2(torch.where(unread, quiet.clamp(min=-_LARGEST_EXPONENT), exponents))


def _seen(layer: Layer, ranges: Mapping[fx.Node, ChannelRanges]) -> ChannelRanges | None:
    found = [ranges[layer_input(call)] for call in layer.calls if layer_input(call) in ranges]
    joined = found[0] if found else None
    for other in found[1:]:
        joined = other if joined is None else joined.joined(other)
    return joined


def _floor(axes: ChannelAxes, group: Group, ranges: Mapping[fx.Node, ChannelRanges]) -> torch.Tensor:
    """What each channel of a group can reach, by the weights that make it: `[group.size]`."""
    found = []
    for weight in group.producers:
        layer = axes.layers[weight]
        found.append(_blocks(result_ranges(layer, _seen(layer, ranges)), axes.root(("out", weight))[1]))
    return torch.stack(found).amax(0)


def _blocks(values: torch.Tensor, repeat: int) -> torch.Tensor:
    """The largest of each `repeat` values in a row."""
    return values.reshape(-1, repeat).amax(1)


def apply_factors(axes: ChannelAxes, chosen: Mapping[Axis, Choice], edit: Editor) -> None:
    """Multiplies and divides the weights and biases; every holder of a tensor gets the same new one."""
    renewed: dict[int, nn.Parameter] = {}
    done: set[str] = set()
    for weight, layer in axes.layers.items():
        for call in layer.calls:
            path = str(call.target)
            if path in done:
                continue
            done.add(path)
            clone = clone_module(edit.gm.get_submodule(path))
            out, into = _factors(axes, ("out", weight), chosen), _factors(axes, ("in", weight), chosen)
            if out is None and into is None:
                continue
            for name in ("weight", "bias"):
                tensor = getattr(clone, name, None)
                if tensor is None or (name == "bias" and out is None):
                    continue
                if id(tensor) not in renewed:
                    scaled = _scaled(layer, tensor.detach(), out, into) if name == "weight" else tensor.detach() * out
                    renewed[id(tensor)] = nn.Parameter(scaled, tensor.requires_grad)
                clone._parameters[name] = renewed[id(tensor)]
            edit.set_module(path, clone)


def _factors(axes: ChannelAxes, axis: Axis, chosen: Mapping[Axis, Choice]) -> torch.Tensor | None:
    root, repeat = axes.root(axis)
    choice = chosen.get(root)
    return None if choice is None else choice.factors.float().repeat_interleave(repeat)


def _scaled(layer: Layer, weight: torch.Tensor, out: torch.Tensor | None, into: torch.Tensor | None) -> torch.Tensor:
    """The weight with its output channels multiplied and its input channels divided, in its own layout."""
    if not layer.scales_in:
        return weight if out is None else weight * out
    groups = getattr(layer.module, "groups", 1)
    transposed = layer.op in ops.TRANSPOSED
    per_group = weight.shape[1]
    own = weight.shape[0] // groups
    tail = [1] * (weight.dim() - 2)
    first, second = (into, out) if transposed else (out, into)
    factor = torch.ones(weight.shape[:2], device=weight.device)
    if first is not None:
        along = first if not transposed else 1 / first
        factor = factor * along[:, None]
    if second is not None:
        along = second if transposed else 1 / second
        factor = factor * along.reshape(groups, 1, per_group).expand(-1, own, -1).reshape(weight.shape[:2])
    return weight * factor.reshape(*weight.shape[:2], *tail)


def loses_digits(axes: ChannelAxes, chosen: Mapping[Axis, Choice], weights: Iterable[int]) -> bool:
    """Whether a power of two would push one of these weights out of float32's normal numbers."""
    limits = torch.finfo(torch.float32)
    for weight in weights:
        layer = axes.layers[weight]
        module: Any = layer.module
        given = module.weight.detach()
        out, into = _factors(axes, ("out", weight), chosen), _factors(axes, ("in", weight), chosen)
        scaled = _scaled(layer, given, out, into).abs()
        if not bool(((scaled >= limits.tiny) | (given == 0)).all() and torch.isfinite(scaled).all()):
            return True
    return False


def describe(axes: ChannelAxes, choice: Choice) -> str:
    """What is scaled and what it is expected to gain, in words."""
    made = ", ".join(_sites(axes, choice.group.producers))
    read = ", ".join(_sites(axes, choice.group.consumers))
    low, high = float(choice.factors.min()), float(choice.factors.max())
    return (
        f"channels from {made} to {read} scaled by {low:g} to {high:g} (powers of two): "
        f"the widest was {choice.spread:.3g} times the median, expected noise {choice.gain:.1f} dB lower"
    )


def _sites(axes: ChannelAxes, weights: Iterable[int]) -> list[str]:
    return [info(call).site for weight in weights for call in axes.layers[weight].calls]
