"""decompose-composites: softmax, layer norm, quotients and lone batch norms become operators of the hardware."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgraph.capture import trace
from qgraph.ir.node_info import info
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import BATCH_NORM, LAYER_NORM
from qgraph.pipeline import CheckLevel, PassContext, Pipeline
from qgraph.targets import get_target
from tests.passes.models import before_and_after, check_all, check_values, randomize_norms
from tests.support.models import Forward
from tests.support.passes import count_ops, nodes_of, refusal_with, run_passes

DECOMPOSE = "canonicalize,decompose-composites"
RTOL = 1e-5


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, 8)


def everything() -> nn.Module:
    def forward(m, x):
        y = m.norm(x).softmax(-1)
        return m.bn(y) / (x.abs() + 1)

    model = Forward(forward, norm=nn.LayerNorm(8), bn=nn.BatchNorm1d(5))
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return randomize_norms(model)


CASES = {
    "softmax": lambda m, x: x.softmax(-1),
    "softmax of a middle dimension": lambda m, x: F.softmax(x, dim=1),
    "softmax module": lambda m, x: m.softmax(x),
    "layer norm": lambda m, x: m.norm(x),
    "layer norm over two dimensions": lambda m, x: m.wide(x),
    "layer norm without weights": lambda m, x: m.plain(x),
    "layer norm without bias": lambda m, x: m.unbiased(x),
    "layer norm with a large eps": lambda m, x: m.eps(x),
    "group norm": lambda m, x: m.group(x),
    "group norm of one group": lambda m, x: F.group_norm(x, 1),
    "group norm of images": lambda m, x: m.group(x.unflatten(-1, (4, 2))),
    "functional group norm": lambda m, x: F.group_norm(x, 5, m.w5, m.w5),
    "instance norm": lambda m, x: m.instance(x),
    "instance norm with running statistics": lambda m, x: m.running(x),
    "functional instance norm": lambda m, x: F.instance_norm(x, weight=m.w5, bias=m.w5),
    "rms norm": lambda m, x: m.rms(x),
    "rms norm without weights": lambda m, x: F.rms_norm(x, (5, 8), eps=0.1),
    "functional rms norm": lambda m, x: F.rms_norm(x, (8,), m.w8),
    "unit length": lambda m, x: F.normalize(x, dim=-1),
    "unit length of zeros": lambda m, x: F.normalize(x * m.zeros, eps=1e-3),
    "layer norm of torch": lambda m, x: torch.layer_norm(x, (8,), m.w8, m.w8),
    "quotient": lambda m, x: x / (x * x + 1),
    "broadcast quotient": lambda m, x: x / (x.abs().sum(-1, keepdim=True) + 1),
    "quotient of a number": lambda m, x: 2.0 / (x * x + 1),
    "quotient by a constant": lambda m, x: x / m.divisor,
    "batch norm": lambda m, x: m.bn(x),
    "batch norm without affine": lambda m, x: m.bn_plain(x),
}


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def with_children(forward: Callable[..., torch.Tensor]) -> nn.Module:
    torch.manual_seed(3)
    return randomize_norms(
        Forward(
            forward,
            softmax=nn.Softmax(dim=-1),
            norm=nn.LayerNorm(8),
            wide=nn.LayerNorm((5, 8)),
            plain=nn.LayerNorm(8, elementwise_affine=False),
            unbiased=nn.LayerNorm(8, bias=False),
            eps=nn.LayerNorm(8, eps=0.5),
            divisor=torch.rand(8) + 0.5,
            group=randomized(nn.GroupNorm(5, 5, eps=0.1)),
            instance=randomized(nn.InstanceNorm1d(5, affine=True)),
            running=nn.InstanceNorm1d(5, track_running_stats=True),
            rms=randomized(nn.RMSNorm(8)),
            w5=torch.randn(5),
            w8=nn.Parameter(torch.randn(8)),
            zeros=torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])[:, None],
            bn=nn.BatchNorm1d(5, eps=0.1),
            bn_plain=nn.BatchNorm1d(5, affine=False),
        )
    ).eval()


def test_golden(golden: Callable[[str], None]) -> None:
    model, x = everything(), tokens()
    golden(before_and_after(model, x, run_passes(model, x, DECOMPOSE)))


@pytest.mark.parametrize("name", CASES)
def test_equal_and_idempotent(name: str) -> None:
    model, x = with_children(CASES[name]), tokens()
    result = run_passes(model, x, DECOMPOSE)
    assert result.changed
    left = set(count_ops(result.gm)) & {
        "softmax",
        "layer_norm",
        "batch_norm",
        "group_norm",
        "instance_norm",
        "rms_norm",
        "normalize",
    }
    assert not left
    check_all(model, result, x, DECOMPOSE, rtol=RTOL)


def test_large_logits_do_not_overflow() -> None:
    model = Forward(lambda m, x: (x * 100).softmax(-1)).eval()
    result = run_passes(model, tokens(), DECOMPOSE)
    check_values(model, result.gm, tokens(), rtol=RTOL)


def test_inner_steps_are_sites_of_their_own() -> None:
    model = with_children(lambda m, x: m.norm(x).softmax(-1))
    gm = run_passes(model, tokens(), DECOMPOSE).gm
    sites = {info(node).site: info(node) for node in gm.graph.nodes}
    assert sites["norm.rsqrt"].inner
    assert not sites["norm"].inner, "the last step is the layer norm's own site"
    assert sites["norm.var_mean.pre_mean"].stands_for == ("norm",)
    assert any(site.endswith(".exp") for site in sites)


def test_a_named_composite_is_left_whole() -> None:
    model = with_children(lambda m, x: m.norm(x).softmax(-1))
    result = run_passes(model, tokens(), "canonicalize,decompose-composites{skip=softmax}")
    assert count_ops(result.gm)["softmax"] == 1
    assert count_ops(result.gm)["layer_norm"] == 0


REFUSED = {
    "its weights are computed in the forward": lambda m, x: F.layer_norm(x, (8,), m.w * x.mean(), m.w),
    "it normalizes with the statistics of the batch": lambda m, x: m.instance(x),
    "its statistics are computed in the forward": lambda m, x: F.batch_norm(x, x.mean((0, 2)), x.var((0, 2))),
    "it normalizes by the norm of order 1": lambda m, x: F.normalize(x, p=1),
    "it computes in torch.float64": lambda m, x: x.softmax(-1, dtype=torch.float64),
    "it does not compute in float32": lambda m, x: x.double().softmax(-1),
    "it rounds its quotient": lambda m, x: torch.div(x, m.w + x.abs(), rounding_mode="trunc"),
    "it divides by batch_size, a number that follows from the batch size": lambda m, x: x / x.size(0),
    "its dimension to torch's deprecated default": lambda m, x: m.implicit(x),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_reason_and_source(reason: str) -> None:
    model = Forward(
        REFUSED[reason],
        w=torch.rand(8) + 1,
        instance=nn.BatchNorm1d(5, track_running_stats=False),
        implicit=nn.Softmax(),
    )
    result = run_passes(model, tokens(), DECOMPOSE)
    refusal = refusal_with(result, reason)
    assert refusal.rule == "decompose-composites"
    if "statistics of the batch" not in reason and "default" not in reason:
        assert "test_decompose_composites.py" in str(refusal.source)


def test_stays_whole_where_the_target_lacks_a_step() -> None:
    bpu = get_target("bpu")
    poor = dataclasses.replace(bpu, ops={name: rule for name, rule in bpu.ops.items() if name != "exp"})
    model = with_children(lambda m, x: m.norm(x).softmax(-1))
    gm = trace(model, tokens())
    result = Pipeline.parse(DECOMPOSE).run(gm, PassContext(target=poor), checks=CheckLevel.CLAIMS)
    refusal_with(result, "the target has no exp")
    assert count_ops(result.gm)["softmax"] == 1


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_with_weight_or_bias_alone(weight: bool, bias: bool) -> None:
    model = Forward(
        lambda m, x: F.layer_norm(x, (6,), m.w if weight else None, m.b if bias else None),
        w=nn.Parameter(torch.randn(6)),
        b=nn.Parameter(torch.randn(6)),
    )
    example = torch.randn(3, 6)
    gm = run_passes(model, example, "canonicalize,decompose-composites").gm
    assert not nodes_of(gm, LAYER_NORM)
    torch.testing.assert_close(gm(example), model(example), rtol=1e-5, atol=1e-6)


def test_a_convolution_with_a_computed_weight_is_quantized() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    gm = run_passes(model, torch.randn(2, 3, 8, 8), "fold-constants,canonicalize,fuse-conv-bn-add-relu").gm
    assert [info(node).op.name for node in gm.graph.nodes if info(node).op.kind is OpKind.MATMUL] == ["conv2d"]
    assert not nodes_of(gm, BATCH_NORM)
    assert all(parameter.requires_grad for parameter in gm.parameters())
