"""decompose-layers: attention, recurrent layers, sums of products become products and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgraph.capture import trace
from qgraph.ir.node_info import graph_info, info, module_of
from qgraph.ir.op_table import LINEAR, MASK, MASK_BIAS, QUANT_STUB, UNFLATTEN
from qgraph.pipeline import CheckLevel, PassContext, Pipeline
from qgraph.targets import get_target
from tests.passes.models import before_and_after, capture_and_run, check_all, check_values
from tests.support.models import Forward
from tests.support.passes import count_ops, nodes_of, refusal_with, relative_error, run_passes

DECOMPOSE = "decompose-layers"
LAYERS = f"fold-constants,canonicalize,eliminate-dead-code,{DECOMPOSE}"
RTOL = 1e-5
WHOLE = {
    "scaled_dot_product_attention",
    "multihead_attention",
    "lstm",
    "gru",
    "lstm_cell",
    "gru_cell",
    "einsum",
    "addmm",
}


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, 8)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(8, 2, **options)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    return module


def visible(x: torch.Tensor) -> torch.Tensor:
    """A boolean mask computed from the input; every row may look at itself."""
    return (x @ x.transpose(-2, -1) > 0) | torch.eye(x.shape[-2], dtype=torch.bool)


ATTENTION: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x * 2, x + 1),
    "causal": lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "causal, more keys than queries": lambda m, x: F.scaled_dot_product_attention(x[:, :3], x, x, is_causal=True),
    "with a scale": lambda m, x: F.scaled_dot_product_attention(x, x, x, scale=0.2),
    "of heads": lambda m, x: F.scaled_dot_product_attention(heads(x, 2), heads(x, 2), heads(x, 2)),
    "of grouped heads": lambda m, x: F.scaled_dot_product_attention(
        heads(x, 4), heads(x[..., :4], 2), heads(x[..., :4], 2), enable_gqa=True
    ),
    "a boolean mask": lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=visible(x)),
    "a constant boolean mask": lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.lower),
    "an additive mask": lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.additive),
    "an additive mask with values": lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.additive + m.bias),
    "a computed additive mask": lambda m, x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.where(visible(x), x.mean(), -torch.inf)
    ),
    "a mask that allows everything": lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.everything),
    "rows with nothing allowed": lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.late),
    "module": lambda m, x: m.attn(x, x, x)[0],
    "module, sequence first": lambda m, x: m.other(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0],
    "module with weights": lambda m, x: m.attn(x, x, x),
    "module with the weights of every head": lambda m, x: m.attn(x, x, x, average_attn_weights=False),
    "module without weights": lambda m, x: m.attn(x, x[:, :3], x[:, :3], need_weights=False)[0],
    "module with both masks": lambda m, x: m.attn(
        x, x, x, key_padding_mask=x[..., 0] > 1.5, attn_mask=m.upper, need_weights=False
    )[0],
    "module with a mask per head": lambda m, x: m.attn(
        x, x, x, attn_mask=(x @ x.transpose(1, 2) < -1).repeat_interleave(2, 0), need_weights=False
    )[0],
    "module with an additive mask": lambda m, x: m.attn(x, x, x, attn_mask=m.additive, is_causal=True)[0],
    "module with other keys": lambda m, x: m.keys(x, x[..., :6], x[..., :4])[0],
    "module called twice": lambda m, x: m.attn(m.attn(x, x, x)[0], x, x)[0],
    "softmax behind a filled mask": lambda m, x: (x @ x.transpose(1, 2)).masked_fill(~visible(x), -1e9).softmax(-1),
    "softmax behind where": lambda m, x: torch.where(visible(x), x @ x.transpose(1, 2), -1e9).softmax(-1),
    "softmax behind where, the other way": lambda m, x: torch.where(
        ~visible(x), torch.tensor(-torch.inf), x @ x.transpose(1, 2)
    ).softmax(-1),
    "softmax behind where, as a method": lambda m, x: (x @ x.transpose(1, 2)).where(visible(x), -1e9).softmax(-1),
    "softmax behind a mask filled by name": lambda m, x: torch.masked_fill(
        x @ x.transpose(1, 2), mask=~visible(x), value=-1e9
    ).softmax(-1),
    "softmax behind an additive mask": lambda m, x: (x @ x.transpose(1, 2) + m.additive).softmax(-1),
    "softmax behind a moved mask": lambda m, x: (m.additive[None] + m.bias + x @ x.transpose(1, 2)).softmax(-1),
    "softmax behind an extended mask": lambda m, x: (
        x @ x.transpose(1, 2) + torch.where(visible(x), 0.0, torch.finfo(torch.float32).min)
    ).softmax(-1),
}


def with_attention(forward: Callable[[Any, torch.Tensor], Any]) -> nn.Module:
    torch.manual_seed(3)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    return Forward(
        forward,
        attn=attention(batch_first=True),
        other=attention(bias=False),
        keys=attention(kdim=6, vdim=4, batch_first=True),
        lower=lower,
        upper=~lower,
        everything=torch.ones(5, 5, dtype=torch.bool),
        late=torch.arange(5)[:, None].repeat(1, 5) > 1,
        additive=torch.zeros(5, 5).masked_fill(~lower, -torch.inf),
        bias=torch.randn(5, 5),
    ).eval()


@pytest.mark.parametrize("name", [name for name in ATTENTION if name.startswith("softmax behind")])
def test_scores_are_masked_by_a_factor(name: str) -> None:
    gm = run_passes(with_attention(ATTENTION[name]), tokens(), LAYERS).gm
    sites = {info(node).site.rpartition(".")[2] for node in gm.graph.nodes}
    assert {"lift", "masked", "kept"} <= sites


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_equal_and_idempotent(name: str) -> None:
    model, x = with_attention(ATTENTION[name]), tokens()
    result = run_passes(model, x, LAYERS)
    assert result.changed
    assert graph_info(result.gm).batch_fixed is None
    assert not set(count_ops(result.gm)) & WHOLE
    check_all(model, result, x, DECOMPOSE, rtol=RTOL)


RECURRENT: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "lstm": lambda m, x: m.lstm(x)[0],
    "lstm, all results": lambda m, x: m.lstm(x),
    "lstm, two layers both ways": lambda m, x: m.deep(x)[0],
    "lstm with a state": lambda m, x: m.lstm(x, (m.start.expand(1, x.shape[0], 6), m.start.expand(1, x.shape[0], 6))),
    "lstm without bias": lambda m, x: m.unbiased(x)[1][1],
    "lstm, sequence first": lambda m, x: m.first(x.transpose(0, 1))[0],
    "gru": lambda m, x: m.gru(x),
    "gru, two layers both ways": lambda m, x: m.deep_gru(x)[1],
    "gru with a state": lambda m, x: m.gru(x, m.start.expand(1, x.shape[0], 6))[0],
    "gru without bias": lambda m, x: m.unbiased_gru(x)[0],
    "lstm cell": lambda m, x: m.cell(x[:, 0])[0],
    "lstm cell, two steps": lambda m, x: m.cell(x[:, 1], m.cell(x[:, 0])),
    "gru cell, two steps": lambda m, x: m.gru_cell(x[:, 1], m.gru_cell(x[:, 0])),
}


def with_recurrence(forward: Callable[[Any, torch.Tensor], Any]) -> nn.Module:
    torch.manual_seed(3)
    return Forward(
        forward,
        lstm=nn.LSTM(8, 6, batch_first=True),
        deep=nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True),
        unbiased=nn.LSTM(8, 6, bias=False, batch_first=True),
        first=nn.LSTM(8, 6),
        gru=nn.GRU(8, 6, batch_first=True),
        deep_gru=nn.GRU(8, 6, 2, batch_first=True, bidirectional=True),
        unbiased_gru=nn.GRU(8, 6, bias=False, batch_first=True),
        cell=nn.LSTMCell(8, 6),
        gru_cell=nn.GRUCell(8, 6),
        start=torch.randn(1, 1, 6),
    ).eval()


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrence_is_equal_and_idempotent(name: str) -> None:
    model, x = with_recurrence(RECURRENT[name]), tokens()
    result = run_passes(model, x, LAYERS)
    assert not set(count_ops(result.gm)) & WHOLE
    check_all(model, result, x, DECOMPOSE, rtol=RTOL)


EQUATIONS = (
    "bij,bkj->bik",
    "bij,bjk->bik",
    "bji,bjk->bki",
    "bti,tij->btj",
    "bij,kj->bik",
    "bij,kj",
    "bij,bij->b",
    "bij,j->bi",
    "bij,bij->bij",
    "bij,k->bkij",
    "bij,jkl->blik",
    "bij,bijl->bl",
    "bij,bkl->bik",
    "bij->jb",
    "bij->ib",
)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_is_equal_and_idempotent(equation: str) -> None:
    sizes = {"b": 2, "i": 5, "j": 8, "k": 3, "l": 4, "t": 5}
    left, right = ([*equation.partition("->")[0].split(","), ""])[:2]
    letters = {"bti": (2, 5, 8), "tij": (5, 8, 3)}
    shapes = [letters.get(part, tuple(sizes[letter] for letter in part)) for part in (left, right)]
    if equation == "bti,tij->btj":
        shapes = [(2, 5, 8), (5, 8, 3)]
    constant = right and "b" not in right
    inputs = tuple(torch.randn(shape) for shape in shapes[: 1 if constant or not right else 2])
    model = Forward(
        lambda m, *xs: torch.einsum(equation, *xs, *([m.w] if constant else [])), w=torch.randn(shapes[1])
    ).eval()
    result = run_passes(model, inputs, LAYERS)
    assert "einsum" not in count_ops(result.gm)
    check_all(model, result, inputs, DECOMPOSE, rtol=RTOL)


PRODUCTS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "addmm": lambda m, x: torch.addmm(m.bias, x.flatten(1), m.weight),
    "addmm method": lambda m, x: m.bias.addmm(x.flatten(1), m.weight),
    "addmm, scaled": lambda m, x: torch.addmm(m.bias, x.flatten(1), m.weight, beta=0.5, alpha=2),
    "baddbmm": lambda m, x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2), beta=0.5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_add(name: str) -> None:
    model = Forward(PRODUCTS[name], weight=nn.Parameter(torch.randn(40, 3)), bias=nn.Parameter(torch.randn(3))).eval()
    result = run_passes(model, tokens(), LAYERS)
    check_all(model, result, tokens(), DECOMPOSE, rtol=RTOL)
    assert (len(nodes_of(result.gm, LINEAR)) == 1) == (name in ("addmm", "addmm method"))


def test_golden_attention(golden: Callable[[str], None]) -> None:
    model, x = with_attention(ATTENTION["module with both masks"]), tokens()
    golden(before_and_after(model, x, run_passes(model, x, LAYERS)))


def test_golden_recurrence(golden: Callable[[str], None]) -> None:
    model = Forward(
        lambda m, x: m.lstm(x)[0] + m.gru(x)[0],
        lstm=nn.LSTM(3, 2, batch_first=True),
        gru=nn.GRU(3, 2, batch_first=True),
    ).eval()
    x = torch.randn(1, 2, 3)
    golden(before_and_after(model, x, run_passes(model, x, LAYERS)))


def test_steps_are_sites_named_after_the_layer() -> None:
    model = with_attention(ATTENTION["module"])
    gm = run_passes(model, tokens(), LAYERS).gm
    sites = {info(node).site: info(node) for node in gm.graph.nodes}
    assert {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.softmax.exp", "attn.softmax", "attn.out_proj"} <= set(
        sites
    )
    assert sites["attn.softmax.exp"].inner
    assert not sites["attn.q_proj"].inner
    assert sites["attn.softmax.exp"].stands_for == ("attn",)
    assert sites["attn.out_proj"].stands_for == ("attn", "attn[0]")


def test_a_packed_weight_becomes_trainable_linears() -> None:
    model = with_attention(ATTENTION["module called twice"])
    gm = run_passes(model, tokens(), LAYERS).gm
    calls = [node for node in nodes_of(gm, LINEAR) if info(node).site.endswith("q_proj")]
    assert [info(node).site for node in calls] == ["attn.q_proj", "attn(1).q_proj"]
    assert module_of(calls[0]) is module_of(calls[1]), "one weight for both calls"
    assert module_of(calls[0]).weight.requires_grad


def test_every_time_step_calls_one_linear() -> None:
    model = with_recurrence(RECURRENT["lstm"])
    gm = run_passes(model, tokens(), LAYERS).gm
    linears = nodes_of(gm, LINEAR)
    assert len(linears) == 5, "the input's, and the state's at every step but the first"
    assert len({id(module_of(node).weight) for node in linears}) == 2


def test_the_mask_becomes_codes_0_and_1() -> None:
    model = with_attention(ATTENTION["softmax behind an additive mask"])
    gm = run_passes(model, tokens(), LAYERS).gm
    stubs = nodes_of(gm, QUANT_STUB)
    assert [module_of(stub).scale for stub in stubs] == [1.0]
    assert not nodes_of(gm, MASK), "a constant mask is computed now"
    for name, buffer in gm.named_buffers():
        if any(node.target == name for node in gm.graph.nodes):
            assert torch.isfinite(buffer).all(), name


def test_a_mask_of_unknown_values_keeps_them() -> None:
    model = with_attention(ATTENTION["a computed additive mask"])
    gm = run_passes(model, tokens(), LAYERS).gm
    assert len(nodes_of(gm, MASK)) == len(nodes_of(gm, MASK_BIAS)) == 1


def test_zeros_filled_with_a_low_number_add_nothing() -> None:
    """As torch's own encoder turns a boolean mask into an additive one."""
    model = with_attention(
        lambda m, x: m.attn(x, x, x, attn_mask=torch.zeros_like(m.bias).masked_fill_(visible(x)[0] < 1, -torch.inf))[0]
    )
    gm = capture_and_run(model, tokens(), LAYERS).gm
    assert len(nodes_of(gm, MASK)) == 1
    assert not nodes_of(gm, MASK_BIAS)


def test_scores_far_below_zero_keep_their_weights() -> None:
    """A masked score is never the largest of its row, however low the others are."""
    model = Forward(lambda m, x: (x.masked_fill(m.hidden, -1e9)).softmax(-1), hidden=torch.ones(5, 8).triu(3).bool())
    result = run_passes(model.eval(), tokens(), LAYERS)
    for offset in (-300.0, 300.0):
        x = tokens() + offset * torch.ones(5, 8).tril(2)
        assert relative_error(model(x), result.gm(x)) <= RTOL


def test_the_batch_size_is_no_length() -> None:
    """A sequence-first layer on an input whose first dimension is left open cannot be unrolled."""
    model = Forward(lambda m, x: m.first(x)[0], first=nn.LSTM(8, 6)).eval()
    result = run_passes(model, tokens(), LAYERS)
    refusal_with(result, "the number of time steps is the batch size")
    check_values(model, result.gm, tokens())


REFUSED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "its dropout is on": lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=1e-9),
    "it adds keys and values of its own": lambda m, x: m.extra(x, x, x)[0],
    "it projects its hidden state": lambda m, x: m.projected(x)[0],
    "its input has no batch": lambda m, x: m.lstm(x[0])[0],
    "its equation has an ellipsis": lambda m, x: torch.einsum("...i,...i->...", x, x),
    "its equation has a diagonal": lambda m, x: torch.einsum("bii->bi", x[..., :5]),
    "it multiplies 3 tensors at once": lambda m, x: torch.einsum("bij,bjk,bkl->bil", x, x.transpose(1, 2), x),
    "it broadcasts a dimension of size 1": lambda m, x: torch.einsum("bij,bij->bi", x, x[:, :1]),
    "the number of queries is the batch size": lambda m, x: F.scaled_dot_product_attention(
        x[:, 0], m.w, m.w, is_causal=True
    ),
    "it does not compute in float32": lambda m, x: F.scaled_dot_product_attention(x.double(), x.double(), x.double()),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_reason_and_source(reason: str) -> None:
    model = Forward(
        REFUSED[reason],
        extra=nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        projected=nn.LSTM(8, 6, proj_size=3, batch_first=True),
        lstm=nn.LSTM(8, 6, batch_first=True),
        w=torch.randn(4, 8),
    ).eval()
    waive = ("random",) if "dropout" in reason else ()
    gm = trace(model, tokens(), waive=waive, verify=not waive)
    result = Pipeline.parse(LAYERS).run(gm, checks=CheckLevel.STRUCTURE)
    refusal = refusal_with(result, reason)
    assert refusal.rule == "decompose-layers"
    assert "test_decompose_layers.py" in str(refusal.source)
    reasons = [info(node).float_reason for node in result.gm.graph.nodes]
    assert any(reason in (found or "") for found in reasons), "the float island says why"


def test_a_named_layer_is_left_whole() -> None:
    model = with_attention(ATTENTION["module"])
    result = run_passes(model, tokens(), f"{LAYERS}{{skip=multihead_attention}}")
    assert count_ops(result.gm)["multihead_attention"] == 1


def test_stays_whole_where_the_target_lacks_a_step() -> None:
    bpu = get_target("bpu")
    poor = dataclasses.replace(bpu, ops={name: rule for name, rule in bpu.ops.items() if name != UNFLATTEN.name})
    gm = trace(with_attention(ATTENTION["module"]), tokens())
    result = Pipeline.parse(LAYERS).run(gm, PassContext(target=poor), checks=CheckLevel.CLAIMS)
    refusal_with(result, "the target has no unflatten")
    assert count_ops(result.gm)["multihead_attention"] == 1
