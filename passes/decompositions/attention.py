"""Attention, as one function and as torch's module.

    scaled_dot_product_attention    s = q @ k^T * scale   w = softmax(s, masked)   y = w @ v
    MultiheadAttention              q = x @ Wq^T + bq, likewise k and v, each in heads   y = attention @ Wo^T + bo
The module's scale enters Wq and bq. Its packed input weight becomes three linears with sites of their own. Nothing
depends on the batch size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from passes.decompositions.batch import fixed_axis
from passes.decompositions.masks import Mask, both, constant_mask, read_mask, reshaped
from passes.decompositions.softmax import MASKED, factors
from passes.decompositions.steps import Decomposition, Steps, float_input, parts_only, shape_of
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import module_of
from qgraph.rewrite import Verdict, no, yes


def _check_attention(node: fx.Node) -> Verdict:
    bound = bind(node)
    query, key = bound.operand("query"), bound.operand("key")
    verdict = float_input(node, "query", "key", "value")
    if not verdict:
        return verdict
    if bound.option("dropout_p"):
        return no("its dropout is on", node)
    if isinstance(bound.option("scale"), fx.Node):
        return no("its scale is computed in the forward", node)
    if bound.option("enable_gqa") and _groups(bound) > 1 and len(shape_of(key)) < 3:
        return no("it groups queries of a single head", node)
    if bound.option("is_causal"):
        return fixed_axis(query, -2, "queries") and fixed_axis(key, -2, "keys")
    return yes()


def _groups(bound: Any) -> int:
    """How many heads of the query share one of key and value."""
    query, key = shape_of(bound.operand("query")), shape_of(bound.operand("key"))
    return query[-3] // key[-3] if len(query) > 2 and len(key) > 2 else 1


def _attention(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    query, key, value = (bound.operand(name) for name in ("query", "key", "value"))
    mask = read_mask(steps, bound.operand("attn_mask"))
    if bound.option("is_causal"):
        allowed = torch.ones(shape_of(query)[-2], shape_of(key)[-2], dtype=torch.bool).tril()
        mask = both(steps, mask, constant_mask(steps, allowed, "causal"))
    if bound.option("enable_gqa") and _groups(bound) > 1:
        key = _repeated(steps, key, _groups(bound), "key")
        value = _repeated(steps, value, _groups(bound), "value")
    scale = bound.option("scale")
    weights = _weights(steps, query, key, 1 / math.sqrt(shape_of(query)[-1]) if scale is None else scale, mask)
    steps.finish(ops.MATMUL, weights, value)


def _repeated(steps: Steps, x: fx.Node, times: int, name: str) -> fx.Node:
    """Every head `times` times in a row."""
    lead = [-1] * (len(shape_of(x)) - 2)
    single = steps.step(f"{name}_groups", ops.UNSQUEEZE, x, dim=-3)
    repeated = steps.step(f"{name}_repeated", ops.EXPAND, single, size=(*lead, times, -1, -1))
    return steps.step(f"{name}_heads", ops.FLATTEN, repeated, start_dim=-4, end_dim=-3)


def _weights(steps: Steps, query: fx.Node, key: fx.Node, scale: float, mask: Mask) -> fx.Node:
    """Where each query looks, a softmax over the keys."""
    turned = steps.step("key_transposed", ops.TRANSPOSE, key, dim0=-2, dim1=-1)
    scores = steps.step("scores", ops.MATMUL, query, turned)
    if scale != 1.0:
        scores = steps.step("scale", ops.MUL, scores, float(scale))
    return steps.step("softmax", ops.MUL, *factors(steps, scores, -1, mask, "softmax."), inner=False)


def _check_module(node: fx.Node) -> Verdict:
    bound, module = bind(node), _module(node)
    verdict = float_input(node, "query", "key", "value") and parts_only(node)
    if not verdict:
        return verdict
    if module.training and module.dropout:
        return no("its dropout is on", node)
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return no("it adds keys and values of its own (add_bias_kv, add_zero_attn)", node)
    for name in ("key_padding_mask", "attn_mask"):
        mask = bound.operand(name)
        if mask is not None and not isinstance(mask, fx.Node):
            return no(f"its {name} is {mask!r}", node)
    if bound.operand("attn_mask") is not None and len(shape_of(bound.operand("attn_mask"))) not in (2, 3):
        return no("its attn_mask is no tensor of 2 or 3 dimensions", node)
    return yes()


def _module(node: fx.Node) -> Any:
    return module_of(node)


def _multihead(node: fx.Node, steps: Steps) -> None:
    bound, module = bind(node), _module(node)
    batched = len(shape_of(bound.operand("query"))) == 3
    to_heads, from_heads = _permutations(batched, bool(module.batch_first))
    heads = []
    for name, (weight, bias) in _input_weights(module).items():
        value = bound.operand({"q": "query", "k": "key", "v": "value"}[name])
        projected = steps.linear(f"{name}_proj", value, weight, bias, key=(id(module), name))
        split = steps.step(f"{name}_split", ops.UNFLATTEN, projected, dim=-1, sizes=(module.num_heads, module.head_dim))
        heads.append(steps.step(f"{name}_heads", ops.PERMUTE, split, dims=to_heads))
    query, key, value = heads
    weights = _weights(steps, query, key, 1.0, _module_mask(steps, bound, module, batched))
    context = steps.step("context", ops.MATMUL, weights, value, inner=False)
    joined = steps.step("context_heads", ops.PERMUTE, context, dims=from_heads)
    flat = steps.step("context_flat", ops.FLATTEN, joined, start_dim=-2)
    out = module.out_proj
    result = steps.linear("out_proj", flat, out.weight, out.bias, key=(id(module), "out"))
    shown = None
    if bound.option("need_weights") and any(bind(user).option("index") == 1 for user in node.users):
        shown = weights
        if bound.option("average_attn_weights"):
            shown = steps.step("weights_mean", ops.MEAN, weights, dim=(-3,), inner=False)
    steps.finish_parts((result, shown))


def _permutations(batched: bool, batch_first: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """From `[.., heads, size]` of the module's layout to heads before positions, and back."""
    if not batched:
        return (1, 0, 2), (1, 0, 2)
    return ((0, 2, 1, 3), (0, 2, 1, 3)) if batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))


def _module_mask(steps: Steps, bound: Any, module: Any, batched: bool) -> Mask:
    """Both masks of the module, for scores `[batch, heads, queries, keys]`."""
    mask = read_mask(steps, bound.operand("attn_mask"), name="attn_mask", inverted=True)
    if bound.operand("attn_mask") is not None and len(shape_of(bound.operand("attn_mask"))) == 3 and batched:
        mask = reshaped(steps, mask, ops.UNFLATTEN, "attn_mask_heads", dim=0, sizes=(-1, module.num_heads))
    padding = read_mask(steps, bound.operand("key_padding_mask"), name="key_padding_mask", inverted=True)
    if bound.operand("key_padding_mask") is not None:
        padding = reshaped(steps, padding, ops.UNSQUEEZE, "key_padding_mask_heads", dim=-2)
        if batched:
            padding = reshaped(steps, padding, ops.UNSQUEEZE, "key_padding_mask_queries", dim=-2)
    return both(steps, mask, padding)


def _input_weights(module: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter | None]]:
    """Weight and bias of the linears for query, key and value; the query's are scaled."""
    size = module.embed_dim
    if module._qkv_same_embed_dim:
        weights = list(module.in_proj_weight.detach().split(size))
    else:
        weights = [getattr(module, f"{name}_proj_weight").detach() for name in "qkv"]
    packed = module.in_proj_bias
    biases = [None] * 3 if packed is None else list(packed.detach().split(size))
    scale = 1 / math.sqrt(module.head_dim)
    trained = next(module.parameters()).requires_grad
    found: dict[str, tuple[nn.Parameter, nn.Parameter | None]] = {}
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        factor = scale if name == "q" else 1.0
        held = [None if t is None else nn.Parameter((t.double() * factor).float(), trained) for t in (weight, bias)]
        assert held[0] is not None
        found[name] = (held[0], held[1])
    return found


_STEPS = (*MASKED, ops.MATMUL, ops.TRANSPOSE)
ATTENTION = Decomposition(_check_attention, _attention, _STEPS)
MULTIHEAD_ATTENTION = Decomposition(
    _check_module, _multihead, (*_STEPS, ops.LINEAR, ops.UNFLATTEN, ops.PERMUTE, ops.FLATTEN, ops.MEAN)
)
