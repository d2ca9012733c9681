"""Inputs that look for disagreement: ranges, extremes, zeros, and values that quantization rounds on exact ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qgraph.capture.values.layout import laid_out_as
from qgraph.capture.values.structure import Path, leaves, map_leaves
from qgraph.capture.values.variants import varied
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info
from qgraph.ir.op_table import FIELD, GUARD, ITEM, SIZE
from qgraph.numerics import QParams

Inputs = dict[str, Any]
_MOST_CODES = (1 << 16) + 1
_NEIGHBOURS = 4


@dataclass(frozen=True)
class InputUse:
    """What the graph does with one input tensor.

    Args:
        qparams: how it is quantized; None if it enters float arithmetic only.
        only_quantized: whether nothing else reads it, so that NaN and infinities stay out of float arithmetic.
    """

    qparams: QParams | None
    only_quantized: bool


def generated_inputs(gm: fx.GraphModule, example: Inputs, seed: int) -> Iterator[tuple[str, Inputs]]:
    """Named sets of inputs, shapes, dtypes and layouts of the example kept.

    `uniform` covers the range of each quantized input and a tenth more; `extremes` holds its ends, the borders of
    saturation and values far outside; `zeros` holds both zeros; `ties` holds values whose quantization is an exact tie;
    `special` adds NaN, infinities and subnormal numbers where an input is only quantized. Integers are the example's,
    permuted.
    """
    uses = input_uses(gm, example)
    yield "example", example
    for position, (name, draw) in enumerate(_DRAWS.items()):
        generator = torch.Generator().manual_seed(seed + position)
        yield name, _drawn(varied(example, seed + position), uses, draw, generator)


def input_uses(gm: fx.GraphModule, example: Inputs) -> dict[tuple[str, Path], InputUse]:
    """For each input tensor, what the graph does with it."""
    placeholders = {str(node.target): node for node in gm.graph.nodes if node.op == "placeholder"}
    return {
        (name, path): _use(_part(placeholders[name], path))
        for name, value in example.items()
        for path, leaf in leaves(value)
        if isinstance(leaf, torch.Tensor)
    }


def ties(qparams: QParams) -> torch.Tensor:
    """Sorted float32 values `x` for which `x * (1 / scale)`, rounded to float32, is exactly `k + 0.5`.

    All of them near `(k + 0.5) * scale`, for each `k` from one step below the lowest code to one above the highest; of
    formats wider than 16 bits, for 65537 of these. Not every `k` has one: the product is rounded, too.
    """
    qtype, zero = qparams.qtype, int(qparams.zero_points())
    low, high = qtype.qmin - zero - 1, qtype.qmax - zero
    k = torch.linspace(low, high, min(high - low + 1, _MOST_CODES), dtype=torch.float64).round()
    wanted = (k + 0.5).float()
    inverse = qparams.scale.reciprocal()
    near = wanted * qparams.scale
    candidates = [near]
    for direction in (-torch.inf, torch.inf):
        step = near
        for _ in range(_NEIGHBOURS):
            step = torch.nextafter(step, torch.full_like(step, direction))
            candidates.append(step)
    tried = torch.stack(candidates)
    found: torch.Tensor = tried[tried * inverse == wanted].unique()
    return found


def _use(node: fx.Node | None) -> InputUse:
    users = [] if node is None else [user for user in node.users if info(user).op not in (GUARD, SIZE)]
    quantizers = [user for user in users if integer_name(user.target) == "quantize"]
    qparams = info(quantizers[0]).qparams if quantizers else None
    return InputUse(qparams, bool(quantizers) and len(quantizers) == len(users))


def _part(node: fx.Node, path: Path) -> fx.Node | None:
    """The node that takes a part out of a structured input; None if nothing reads it."""
    found: fx.Node | None = node
    for _, key in path:
        users = [] if found is None else list(found.users)
        found = next((user for user in users if info(user).op in (ITEM, FIELD) and user.args[1] == key), None)
    return found


Draw = Callable[[torch.Tensor, InputUse, torch.Generator], torch.Tensor]


def _drawn(example: Inputs, uses: dict[tuple[str, Path], InputUse], draw: Draw, generator: torch.Generator) -> Inputs:
    def of(name: str, value: Any) -> Any:
        places = iter([path for path, _ in leaves(value)])

        def replaced(leaf: Any) -> Any:
            path = next(places)
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                return leaf
            drawn = draw(leaf.cpu().float(), uses[name, path], generator)
            return laid_out_as(drawn.to(leaf.dtype).to(leaf.device), leaf)

        return map_leaves(replaced, value)

    return {name: of(name, value) for name, value in example.items()}


def _range(tensor: torch.Tensor, use: InputUse) -> tuple[float, float]:
    if use.qparams is None or use.qparams.per_channel:
        return (float(tensor.min()), float(tensor.max())) if tensor.numel() else (0.0, 0.0)
    qtype, zero, scale = use.qparams.qtype, int(use.qparams.zero_points()), float(use.qparams.scale)
    return (qtype.qmin - zero) * scale, (qtype.qmax - zero) * scale


def _uniform(tensor: torch.Tensor, use: InputUse, generator: torch.Generator) -> torch.Tensor:
    low, high = _range(tensor, use)
    wider = 1.0 if use.qparams is None else 1.1
    return torch.rand(tensor.shape, generator=generator) * ((high - low) * wider) + low * wider


def _pick(values: torch.Tensor, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return values[torch.randint(values.numel(), tensor.shape, generator=generator)]


def _extremes(tensor: torch.Tensor, use: InputUse, generator: torch.Generator) -> torch.Tensor:
    low, high = _range(tensor, use)
    if use.qparams is None or use.qparams.per_channel:
        return _pick(torch.tensor([low, high]), tensor, generator)
    half = float(use.qparams.scale) / 2
    ends = torch.tensor([low, high, low - half, high + half, 4 * low, 4 * high])
    beside = [torch.nextafter(ends, torch.full_like(ends, way)) for way in (-torch.inf, torch.inf)]
    return _pick(torch.cat([ends, *beside]), tensor, generator)


def _zeros(tensor: torch.Tensor, use: InputUse, generator: torch.Generator) -> torch.Tensor:
    return _pick(torch.tensor([0.0, -0.0]), tensor, generator)


def _ties(tensor: torch.Tensor, use: InputUse, generator: torch.Generator) -> torch.Tensor:
    if use.qparams is None or use.qparams.per_channel:
        return _uniform(tensor, use, generator)
    found = ties(use.qparams)
    return _pick(found, tensor, generator) if found.numel() else _uniform(tensor, use, generator)


def _special(tensor: torch.Tensor, use: InputUse, generator: torch.Generator) -> torch.Tensor:
    plain = _uniform(tensor, use, generator)
    if not use.only_quantized:
        return plain
    limits = torch.finfo(torch.float32)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, limits.max, limits.min, limits.tiny / 2, -0.0])
    chosen = torch.rand(tensor.shape, generator=generator) < 0.25
    return torch.where(chosen, _pick(odd, tensor, generator), plain)


_DRAWS: dict[str, Draw] = {
    "uniform": _uniform,
    "extremes": _extremes,
    "zeros": _zeros,
    "ties": _ties,
    "special": _special,
}
