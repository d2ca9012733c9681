"""Operators that choose or order elements by value or by index.

Indices are integers, not codes: results that are indices have `QuantRule.PLAIN`, operands that are indices are `plain`.
`x.max(dim)`, `topk` and `sort` return values and indices; `canonicalize` writes them as indices and a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir import functional as QF
from qgraph.ir.op import Function, Op, OpKind, QuantRule, ShapeRule, Spelling
from qgraph.ir.op_table.define import args, aten, define


def _indices(name: str, function: Function, example: Callable[..., object], **more: Any) -> Op:
    """Codes in, indices out."""
    more.setdefault("lowering", name)
    return define(name, OpKind.SELECT, example, target=function, quant=QuantRule.PLAIN, **more)


ARGMAX = _indices(
    "argmax",
    torch.argmax,
    lambda input, dim=None, keepdim=False: None,
    spelled=("argmax", aten.argmax.default),
    lowering="arg_extreme",
)
ARGMIN = _indices(
    "argmin",
    torch.argmin,
    lambda input, dim=None, keepdim=False: None,
    spelled=("argmin", aten.argmin.default),
    lowering="arg_extreme",
)
ARGSORT = _indices(
    "argsort",
    QF.argsort,
    lambda input, dim=-1, descending=False, stable=False: None,
    spelled=(torch.argsort, "argsort"),
    shape=ShapeRule.OTHER,
)
TOP_INDICES = _indices("top_indices", QF.top_indices, lambda input, k, dim=-1, largest=True, sorted=True: None)
TOPK = define(
    "topk",
    OpKind.SELECT,
    lambda input, k, dim=-1, largest=True, sorted=True: None,
    target=torch.topk,
    spelled=("topk",),
)
SORT = define(
    "sort",
    OpKind.SELECT,
    lambda input, dim=-1, descending=False, stable=False: None,
    target=torch.sort,
    spelled=("sort",),
)


def _extreme_overload(given: tuple[Any, ...]) -> tuple[str, ...]:
    """Parameters of `max(x, dim, keepdim)` and of `max(x, other)`, by the second argument."""
    second = given[1] if len(given) > 1 else None
    return ("input", "dim", "keepdim") if second is None or isinstance(second, int) else ("input", "other")


def _extreme(name: str, function: Function) -> Op:
    """One name in torch for the largest element, the largest along a dimension, and the larger of two."""
    overloaded = Spelling(_extreme_overload)
    return define(
        name,
        OpKind.SELECT,
        lambda input, dim=None, keepdim=False, other=None: None,
        "input other",
        target=function,
        spelled=((function, overloaded), (name, overloaded)),
    )


MAX = _extreme("max", torch.max)
MIN = _extreme("min", torch.min)

GATHER = define(
    "gather",
    OpKind.MOVE,
    lambda input, dim, index, sparse_grad=False: None,
    "input index",
    target=torch.gather,
    spelled=("gather", aten.gather.default),
    plain=("index",),
    quant=QuantRule.SAME,
    lowering="move",
)
TAKE_ALONG_DIM = define(
    "take_along_dim",
    OpKind.MOVE,
    lambda input, indices, dim=None: None,
    "input indices",
    target=torch.take_along_dim,
    spelled=("take_along_dim",),
    plain=("indices",),
    quant=QuantRule.SAME,
    lowering="move",
)
EMBEDDING = define(
    "embedding",
    OpKind.MOVE,
    lambda input, weight, padding_idx=None: None,
    "input weight",
    target=F.embedding,
    spelled=(
        (
            F.embedding,
            args(
                "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
                ignored="max_norm norm_type scale_grad_by_freq sparse",
                unless=lambda given, named: named.get("max_norm") is not None or any(n is not None for n in given[3:4]),
            ),
        ),
        (
            torch.embedding,
            args("weight input padding_idx scale_grad_by_freq sparse", ignored="scale_grad_by_freq sparse"),
        ),
    ),
    modules=(nn.Embedding,),
    parameters=("weight",),
    plain=("input",),
    quant=QuantRule.SAME,
    lowering="embedding",
)
CUMSUM = define(
    "cumsum",
    OpKind.REDUCE,
    lambda input, dim, dtype=None: None,
    target=torch.cumsum,
    spelled=("cumsum", aten.cumsum.default),
    quant=QuantRule.OWN,
    lowering="cumsum",
)

DYNAMIC_SHAPE = "the shape of its result depends on the values, and an integer graph has fixed shapes"


def _refused(name: str, function: Function, why: str, *methods: str, example: Any = None, **more: Any) -> Op:
    example = example or (lambda input, dim=None, keepdim=False, dtype=None: None)
    return define(name, OpKind.SELECT, example, target=function, spelled=methods or (name,), refusal=why, **more)


NONZERO = _refused("nonzero", torch.nonzero, DYNAMIC_SHAPE, example=lambda input, as_tuple=False: None)
MASKED_SELECT = _refused(
    "masked_select", torch.masked_select, DYNAMIC_SHAPE, example=lambda input, mask: None, operands="input mask"
)
PROD = _refused("prod", torch.prod, "the product of many codes fits no accumulator")
LOGSUMEXP = _refused(
    "logsumexp",
    torch.logsumexp,
    "its sum of exponentials spans more than an accumulator; write it as amax, exp, sum and log",
)
