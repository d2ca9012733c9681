"""Operators that are taken apart before they are quantized, unless the target runs them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir import functional as QF
from qgraph.ir.op import Function, Op, OpKind, QuantRule, ShapeRule, Spelling
from qgraph.ir.op_table.define import args, aten, define, renamed

_BATCH_NORM = "input weight bias running_mean running_var training momentum eps cudnn_enabled"
BATCH_NORM = define(
    "batch_norm",
    OpKind.COMPOSITE,
    lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: None,
    "input running_mean running_var weight bias",
    target=F.batch_norm,
    spelled=((torch.batch_norm, args(_BATCH_NORM, ignored="cudnn_enabled")),),
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    parameters=("running_mean", "running_var", "weight", "bias"),
    shape=ShapeRule.SAME,
    decomposition="batch_norm",
)
LAYER_NORM = define(
    "layer_norm",
    OpKind.COMPOSITE,
    lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: None,
    "input weight bias",
    target=F.layer_norm,
    spelled=(
        (torch.layer_norm, args("input normalized_shape weight bias eps cudnn_enable", ignored="cudnn_enable")),
        (aten.layer_norm.default, args("input normalized_shape weight bias eps cudnn_enable", ignored="cudnn_enable")),
    ),
    modules=(nn.LayerNorm,),
    parameters=("weight", "bias"),
    shape=ShapeRule.SAME,
    decomposition="layer_norm",
)
_GROUP_NORM = args("input num_groups weight bias eps cudnn_enabled", ignored="cudnn_enabled")
GROUP_NORM = define(
    "group_norm",
    OpKind.COMPOSITE,
    lambda input, num_groups, weight=None, bias=None, eps=1e-5: None,
    "input weight bias",
    target=F.group_norm,
    spelled=((torch.group_norm, _GROUP_NORM), (aten.group_norm.default, _GROUP_NORM)),
    modules=(nn.GroupNorm,),
    parameters=("weight", "bias"),
    shape=ShapeRule.SAME,
    decomposition="group_norm",
)
_INSTANCE_NORM = args(
    "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled", ignored="cudnn_enabled"
)
INSTANCE_NORM = define(
    "instance_norm",
    OpKind.COMPOSITE,
    lambda input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5: None,
    "input running_mean running_var weight bias",
    target=F.instance_norm,
    spelled=((torch.instance_norm, _INSTANCE_NORM), (aten.instance_norm.default, _INSTANCE_NORM)),
    modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    parameters=("running_mean", "running_var", "weight", "bias"),
    shape=ShapeRule.SAME,
    decomposition="instance_norm",
)
RMS_NORM = define(
    "rms_norm",
    OpKind.COMPOSITE,
    lambda input, normalized_shape, weight=None, eps=None: None,
    "input weight",
    target=F.rms_norm,
    spelled=(torch.rms_norm, aten.rms_norm.default),
    modules=(nn.RMSNorm,),
    parameters=("weight",),
    shape=ShapeRule.SAME,
    decomposition="rms_norm",
)
NORMALIZE = define(
    "normalize",
    OpKind.COMPOSITE,
    lambda input, p=2.0, dim=1, eps=1e-12: None,
    target=F.normalize,
    spelled=((F.normalize, args("input p dim eps out", ignored="out")),),
    shape=ShapeRule.SAME,
    decomposition="normalize",
)
SOFTMAX = define(
    "softmax",
    OpKind.COMPOSITE,
    lambda input, dim=None, dtype=None: None,
    target=F.softmax,
    spelled=(
        (F.softmax, args("input dim _stacklevel dtype", ignored="_stacklevel")),
        torch.softmax,
        aten.softmax.int,
        "softmax",
    ),
    modules=(nn.Softmax,),
    shape=ShapeRule.SAME,
    quant=QuantRule.OWN,
    lowering="softmax",
    decomposition="softmax",
)

ATTENTION = define(
    "scaled_dot_product_attention",
    OpKind.COMPOSITE,
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None,
    "query key value attn_mask",
    target=F.scaled_dot_product_attention,
    spelled=(aten.scaled_dot_product_attention.default,),
    decomposition="attention",
)
_ATTENTION_CALL = "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal"
MULTIHEAD_ATTENTION = define(
    "multihead_attention",
    OpKind.COMPOSITE,
    lambda query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False: None,
    "query key value key_padding_mask attn_mask",
    modules=(nn.MultiheadAttention,),
    called_with=tuple(_ATTENTION_CALL.split()),
    decomposition="multihead_attention",
)


def _recurrent(name: str, module: type[nn.Module]) -> Op:
    return define(
        name, OpKind.COMPOSITE, lambda input, hx=None: None, "input hx", modules=(module,), decomposition=name
    )


LSTM = _recurrent("lstm", nn.LSTM)
GRU = _recurrent("gru", nn.GRU)
LSTM_CELL = _recurrent("lstm_cell", nn.LSTMCell)
GRU_CELL = _recurrent("gru_cell", nn.GRUCell)


def _in_sublist_form(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """`einsum(x, [0, 1], y, [1, 2])`: no equation."""
    return not args or not isinstance(args[0], str)


EINSUM = define(
    "einsum",
    OpKind.COMPOSITE,
    lambda equation, operands: None,
    "operands",
    spelled=(
        (torch.einsum, args("equation operands", packed="operands", unless=_in_sublist_form)),
        (aten.einsum.default, args("equation operands path", ignored="path")),
    ),
    decomposition="einsum",
)
_BATCHED = {"batch1": "mat1", "batch2": "mat2"}
ADDMM = define(
    "addmm",
    OpKind.COMPOSITE,
    lambda input, mat1, mat2, beta=1, alpha=1: None,
    "input mat1 mat2",
    spelled=(
        torch.addmm,
        aten.addmm.default,
        "addmm",
        (torch.baddbmm, renamed(**_BATCHED)),
        (aten.baddbmm.default, renamed(**_BATCHED)),
        ("baddbmm", renamed(**_BATCHED)),
    ),
    decomposition="addmm",
)
MASK = define(
    "mask",
    OpKind.COMPOSITE,
    lambda input, above=None, inverted=False: None,
    target=QF.mask,
    refusal="it makes no codes: a mask is taken up by the softmax, comparison or choice that reads it",
)
MASK_BIAS = define(
    "mask_bias",
    OpKind.COMPOSITE,
    lambda input, above: None,
    target=QF.mask_bias,
    refusal="it makes no codes: it stands for a mask outside of a softmax, in float",
)


def _sum_of_product(name: str) -> Op:
    return define(
        name,
        OpKind.COMPOSITE,
        lambda input, tensor1, tensor2, value=1: None,
        "input tensor1 tensor2",
        target=getattr(torch, name),
        spelled=(getattr(aten, name).default, name),
        in_place=(f"{name}_",),
        shape=ShapeRule.BROADCAST,
        decomposition=name,
    )


ADDCMUL = _sum_of_product("addcmul")
ADDCDIV = _sum_of_product("addcdiv")
LERP = define(
    "lerp",
    OpKind.COMPOSITE,
    lambda input, end, weight: None,
    "input end weight",
    target=torch.lerp,
    spelled=(aten.lerp.Scalar, aten.lerp.Tensor, "lerp"),
    in_place=("lerp_",),
    shape=ShapeRule.BROADCAST,
    decomposition="lerp",
)


def _spread_overload(given: tuple[Any, ...]) -> tuple[str, ...]:
    """Parameters of `var(x, dim, unbiased, keepdim)` and of `var(x, unbiased)`, by the second argument."""
    second = given[1] if len(given) > 1 else None
    return ("input", "unbiased") if isinstance(second, bool) else ("input", "dim", "unbiased", "keepdim")


def _spread(name: str, function: Function) -> Op:
    """A measure of how far values lie from their mean."""
    overloaded = Spelling(_spread_overload)
    return define(
        name,
        OpKind.COMPOSITE,
        lambda input, dim=None, unbiased=True, keepdim=False, correction=None: None,
        target=function,
        spelled=((function, overloaded), (name, overloaded)),
        decomposition=name,
    )


VAR = _spread("var", torch.var)
STD = _spread("std", torch.std)
