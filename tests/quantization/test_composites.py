"""Composites from the float model to integers: outputs near the float model's, sites equal to fake quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import qgraph
from qgraph import FakeQuantState, QConfig, compare_sites
from qgraph.errors import QuantizationError
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import OPS
from qgraph.numerics import qint16
from qgraph.quantization.fake_quantize import WeightFakeQuantize
from tests.support.models import Forward


def rms(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The norm as language models write it."""
    return m.gain * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))


def visible(x: torch.Tensor) -> torch.Tensor:
    return (x @ x.transpose(-2, -1) > 0) | torch.eye(x.shape[-2], dtype=torch.bool)


def cells(m: Any, x: torch.Tensor) -> torch.Tensor:
    h, c = m.cell(x[:, 0])
    h, c = m.cell(x[:, 1], (h, c))
    return m.gru_cell(x[:, 2], h) + c


# Least signal over noise in dB, with int8 and with int16 activations; weights and one operand of a product are int8.
CASES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], float, float]] = {
    "group norm": (lambda m, x: m.group(x), 35, 60),
    "instance norm": (lambda m, x: m.instance(x), 35, 60),
    "rms norm": (lambda m, x: m.rms(x), 35, 60),
    "rms norm by hand": (rms, 25, 45),
    "unit length": (lambda m, x: F.normalize(x, dim=-1), 35, 60),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), 30, 35),
    "causal attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), 30, 35),
    "masked attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=visible(x)), 30, 35),
    "attention with a bias": (lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.additive), 30, 35),
    "multihead attention": (lambda m, x: m.attn(x, x, x), 30, 35),
    "padded multihead attention": (
        lambda m, x: m.attn(x, x, x, key_padding_mask=x[..., 0] > 1.5, need_weights=False)[0],
        30,
        35,
    ),
    "masked softmax": (lambda m, x: (x @ x.transpose(1, 2)).masked_fill(~visible(x), -1e9).softmax(-1), 25, 30),
    "lstm": (lambda m, x: m.lstm(x), 30, 40),
    "gru": (lambda m, x: m.gru(x), 30, 35),
    "cells": (cells, 30, 35),
    "einsum": (lambda m, x: torch.einsum("bij,bkj->bik", x, x), 30, 35),
    "baddbmm": (lambda m, x: torch.baddbmm(x, x @ x.transpose(1, 2), x, beta=0.5), 30, 35),
    "addmm": (lambda m, x: torch.addmm(m.bias, x.flatten(1), m.weight), 30, 35),
}


def model_of(forward: Callable[[Any, torch.Tensor], Any]) -> nn.Module:
    torch.manual_seed(1)
    return Forward(
        forward,
        group=nn.GroupNorm(5, 5),
        instance=nn.InstanceNorm1d(5, affine=True),
        rms=nn.RMSNorm(8),
        gain=nn.Parameter(torch.rand(8) + 0.5),
        attn=nn.MultiheadAttention(8, 2, batch_first=True),
        additive=torch.randn(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf),
        lstm=nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True),
        gru=nn.GRU(8, 6, batch_first=True),
        cell=nn.LSTMCell(8, 6),
        gru_cell=nn.GRUCell(8, 6),
        bias=nn.Parameter(torch.randn(4)),
        weight=nn.Parameter(torch.randn(40, 4)),
    ).eval()


def signal_over_noise(expected: torch.Tensor, actual: torch.Tensor) -> float:
    noise = (expected.double() - actual.double()).square().sum()
    return (10 * torch.log10(expected.double().square().sum() / noise)).item()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", CASES)
def test_from_float_to_integers(name: str, bits: int) -> None:
    forward, *bounds = CASES[name]
    model, x = model_of(forward), torch.randn(2, 5, 8)
    prepared = qgraph.prepare(model, x, None if bits == 8 else QConfig(output=qint16))
    assert graph_info(prepared).batch_fixed is None
    reasons = {info(node).float_reason for node in prepared.graph.nodes} - {None}
    assert reasons <= {"it makes a mask, whose 0 and 1 are exact codes"}
    qgraph.calibrate(prepared, [x, torch.randn(3, 5, 8)], progress=False)
    integer = qgraph.convert(prepared)
    simulated = tree_leaves(qgraph.Simulator(integer)(x))
    with torch.no_grad():
        expected = tree_leaves(model(x))
    for one, two in zip(expected, simulated, strict=True):
        assert signal_over_noise(one, two) >= bounds[bits == 16]
    qgraph.set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    for site in compare_sites(prepared, integer, (x,)):
        interpolated = OPS.named(site.op).kind is OpKind.TABLE  # a table of int16 stands for a function between entries
        assert site.unexplained == 0 or interpolated, site


def test_a_weight_used_at_every_step_is_one_site() -> None:
    prepared = qgraph.prepare(model_of(lambda m, x: m.gru(x)[0]), torch.randn(2, 5, 8))
    sites = {module.site for module in prepared.modules() if isinstance(module, WeightFakeQuantize)}
    assert sites == {"gru.l0.input.weight", "gru.l0.t1.state.weight"}
    activations = {info(node).site for node in prepared.graph.nodes}
    assert {f"gru.l0.t{step}.hidden" for step in range(5)} <= activations


def test_steps_of_a_composite_are_int16() -> None:
    prepared = qgraph.prepare(model_of(lambda m, x: m.attn(x, x, x)[0]), torch.randn(2, 5, 8))
    formats = {info(node).site: str(info(node).plan.format) for node in prepared.graph.nodes if info(node).plan}
    assert {formats[f"attn.{name}"] for name in ("scores", "softmax.exp", "softmax.sum")} == {"int16"}
    assert {formats[f"attn.{name}"] for name in ("q_proj", "softmax", "context")} == {"int8"}


def test_an_infinite_mask_costs_the_scores_nothing() -> None:
    """The scale of what is masked holds the scores, not minus infinity."""
    prepared = qgraph.prepare(
        model_of(lambda m, x: (x @ x.transpose(1, 2) + m.additive).softmax(-1)), torch.randn(2, 5, 8)
    )
    qgraph.calibrate(prepared, [torch.randn(2, 5, 8)], progress=False)
    integer = qgraph.convert(prepared)
    scales = [info(node).qparams.scale.max().item() for node in integer.graph.nodes if info(node).qparams is not None]
    assert max(scales) <= 1.0


def test_an_infinite_constant_that_is_no_mask_is_refused() -> None:
    model = Forward(lambda m, x: x.clamp(max=1) * m.additive, additive=torch.tensor([0.0, -torch.inf])).eval()
    with pytest.raises(QuantizationError, match="additive holds NaN or infinite values"):
        qgraph.prepare(model, torch.rand(2, 2), checks=qgraph.CheckLevel.STRUCTURE)
