"""Options of operators, and whether a device has them."""

from __future__ import annotations

from typing import Any

from torch import fx

from qgraph.errors import InternalError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, module_of, where
from qgraph.ir.shapes import tensor_spec
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target


def spatial(value: Any, rank: int) -> list[int]:
    """An option given once or per dimension, as one integer per dimension."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return [int(v) for v in (values if len(values) == rank else values * rank)]


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a tensor node on the example run.

    Raises:
        InternalError: it is not known.
    """
    spec = tensor_spec(node)
    if spec is None:
        raise InternalError("the shape of a value is not known", where=where(node))
    return spec.shape


def has_options(node: fx.Node, target: Target) -> Verdict:
    """Whether the target has what a call's options ask of its operator."""
    rule = target.rule(info(node).op.name)
    if rule is None:
        return yes()
    for name in rule.without:
        if any(value != 1 for value in spatial(_option(node, name), 1)):
            return no(f"{target.name} has no {name} in {info(node).op}", node)
    if rule.tensorflow_padding and not _padded_as_tensorflow(node):
        return no(f"{target.name} pads windows as TensorFlow does (SAME), or not at all", node)
    return yes()


def _option(node: fx.Node, name: str) -> Any:
    return getattr(module_of(node), name) if node.op == "call_module" else bind(node).option(name)


def _padded_as_tensorflow(node: fx.Node) -> bool:
    """SAME: as many windows as there are strides, centred, the odd element of padding behind; VALID: whole windows."""
    size_in, size_out = shape_of(bind(node).operand("input"))[2:], shape_of(node)[2:]
    rank = len(size_out)
    kernel, padding = (spatial(_option(node, name), rank) for name in ("kernel_size", "padding"))
    given = _option(node, "stride")
    stride = kernel if given is None else spatial(given, rank)
    along = list(zip(size_in, size_out, kernel, stride, padding, strict=True))
    reach = [(n_out - 1) * step + k for _, n_out, k, step, _ in along]
    same = all(
        n_out == -(-n_in // step) and pad == max(r - n_in, 0) // 2
        for (n_in, n_out, _, step, pad), r in zip(along, reach, strict=True)
    )
    return same or all(pad == 0 and r <= n_in for (n_in, *_, pad), r in zip(along, reach, strict=True))
