"""fuse-conv-bn-add-relu: every combination, every spelling, the algebra, and each guard with its reason."""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.ao.nn.quantized import FloatFunctional as TorchFloatFunctional

from qgraph.capture import trace
from qgraph.errors import UserError
from qgraph.ir.node_info import graph_info, info, module_of
from qgraph.ir.op_table import ADD, BATCH_NORM, FUSABLE, RELU, RELU6
from qgraph.ir.stage import Stage
from qgraph.nn import Activation, FloatFunctional, Fused
from qgraph.pipeline import CheckLevel, Pipeline
from tests.passes.models import FOLD_RTOL, FUSE, before_and_after, check_all, check_values, computing, randomize_norms
from tests.support.models import Forward
from tests.support.passes import assert_idempotent, nodes_of, reasons, refusal_with, relative_error, run_passes

SPLIT_AND_FUSE = f"split-shared-modules,{FUSE}"


class Kind(NamedTuple):
    """One of the operators that take over what follows them."""

    build: Callable[..., nn.Module]
    functional: Callable[..., torch.Tensor]
    norm: type[nn.Module]
    shape: tuple[int, ...]


KINDS = {
    "conv1d": Kind(lambda: nn.Conv1d(4, 6, 3, padding=1), F.conv1d, nn.BatchNorm1d, (2, 4, 7)),
    "conv2d": Kind(lambda: nn.Conv2d(4, 6, 3, padding=1), F.conv2d, nn.BatchNorm2d, (2, 4, 5, 6)),
    "conv3d": Kind(lambda: nn.Conv3d(4, 6, 3, padding=1), F.conv3d, nn.BatchNorm3d, (2, 4, 3, 4, 5)),
    "conv_transpose1d": Kind(
        lambda: nn.ConvTranspose1d(4, 6, 3, padding=1), F.conv_transpose1d, nn.BatchNorm1d, (2, 4, 7)
    ),
    "conv_transpose2d": Kind(
        lambda: nn.ConvTranspose2d(4, 6, 3, padding=1), F.conv_transpose2d, nn.BatchNorm2d, (2, 4, 5, 6)
    ),
    "conv_transpose3d": Kind(
        lambda: nn.ConvTranspose3d(4, 6, 3, padding=1), F.conv_transpose3d, nn.BatchNorm3d, (2, 4, 3, 4, 5)
    ),
    "linear": Kind(lambda: nn.Linear(4, 6), F.linear, nn.BatchNorm1d, (2, 4)),
}
STEPS = list(itertools.product(("", "bn"), ("", "add"), ("", "relu", "relu6")))
IMAGE = (2, 4, 6, 6)


def image() -> torch.Tensor:
    return torch.randn(IMAGE)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def norm(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, **options)


def only_node(gm: fx.GraphModule) -> fx.Node:
    """The one node that computes; it must be a matrix operator."""
    nodes = computing(gm)
    assert [info(node).op in FUSABLE for node in nodes] == [True], [node.name for node in nodes]
    return nodes[0]


# --- combinations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "-".join(filter(None, steps)) or "alone")
def test_every_combination_becomes_one_node(kind: str, steps: tuple[str, ...]) -> None:
    bn, add, activation = steps
    build, _, norm_class, shape = KINDS[kind]
    children: dict[str, nn.Module] = {"op": build()}
    if bn:
        children["bn"] = norm_class(6)
    if activation:
        children["act"] = nn.ReLU() if activation == "relu" else nn.ReLU6()

    def forward(m, x, r):
        y = m.op(x)
        y = m.bn(y) if bn else y
        y = y + r if add else y
        return m.act(y) if activation else y

    model = randomize_norms(Forward(forward, **children)).eval()
    x = torch.randn(shape)
    example = (x, torch.randn(model.op(x).shape))
    result = run_passes(model, example, FUSE)
    node = only_node(result.gm)
    record, module = info(node), module_of(node)
    sites = ["op"] + ["bn"] * bool(bn) + ["_generated_add_0"] * bool(add) + ["act"] * bool(activation)
    assert (record.site, record.op.name) == ("op", kind)
    assert record.stands_for == tuple(sites)
    assert record.source is not None
    assert record.source.function == "forward"
    assert len(node.args) == 1 + bool(add)
    if len(sites) > 1:
        assert isinstance(module, Fused)
        assert (module.adds, module.activation) == (bool(add), Activation(activation or "none"))
    assert result.refusals == ()
    assert graph_info(result.gm).stage is Stage.FUSED
    check_all(model, result, example, FUSE, FOLD_RTOL if bn else 0.0)


# --- spellings ---------------------------------------------------------------------------------------------------

ADDS = {
    "operator": lambda m, a, b: a + b,
    "operator.add": lambda m, a, b: operator.add(a, b),
    "in place operator": lambda m, a, b: operator.iadd(a, b),
    "torch.add": lambda m, a, b: torch.add(a, b),
    "torch.add by name": lambda m, a, b: torch.add(input=a, other=b, alpha=1),
    "method": lambda m, a, b: a.add(b),
    "in place method": lambda m, a, b: a.add_(b),
    "aten": lambda m, a, b: torch.ops.aten.add.Tensor(a, b),
    "FloatFunctional": lambda m, a, b: m.ours.add(a, b),
    "torch.ao FloatFunctional": lambda m, a, b: m.theirs.add(a, b),
}
ADD_RELUS = {
    "FloatFunctional": lambda m, a, b: m.ours.add_relu(a, b),
    "torch.ao FloatFunctional": lambda m, a, b: m.theirs.add_relu(a, b),
}
RELUS = {
    "nn.ReLU": lambda m, y: m.relu(y),
    "nn.ReLU in place": lambda m, y: m.relu_(y),
    "F.relu": lambda m, y: F.relu(y),
    "F.relu in place": lambda m, y: F.relu(y, inplace=True),
    "F.relu_": lambda m, y: F.relu_(y),
    "torch.relu": lambda m, y: torch.relu(y),
    "torch.relu_": lambda m, y: torch.relu_(y),
    "method": lambda m, y: y.relu(),
    "in place method": lambda m, y: y.relu_(),
    "clamp": lambda m, y: y.clamp(min=0),
    "clamp in place": lambda m, y: y.clamp_(min=0),
    "clamp_min": lambda m, y: y.clamp_min(0),
    "torch.clamp": lambda m, y: torch.clamp(y, 0.0),
    "aten": lambda m, y: torch.ops.aten.relu.default(y),
}
RELU6S = {
    "nn.ReLU6": lambda m, y: m.relu6(y),
    "nn.Hardtanh": lambda m, y: m.hardtanh(y),
    "F.relu6": lambda m, y: F.relu6(y),
    "F.relu6 in place": lambda m, y: F.relu6(y, inplace=True),
    "clamp": lambda m, y: y.clamp(0, 6),
    "clamp by name": lambda m, y: y.clamp(max=6.0, min=0.0),
    "torch.clip": lambda m, y: torch.clip(y, 0, 6),
    # BUG: every F.hardtanh is refused by the verifier ("unknown argument ['min_val', 'max_val']").
    "F.hardtanh": lambda m, y: F.hardtanh(y, 0.0, 6.0),
}


def spelled_model(forward: Callable[..., Any]) -> nn.Module:
    return Forward(
        forward,
        conv=conv(),
        ours=FloatFunctional(),
        theirs=TorchFloatFunctional(),
        relu=nn.ReLU(),
        relu_=nn.ReLU(inplace=True),
        relu6=nn.ReLU6(),
        hardtanh=nn.Hardtanh(0.0, 6.0),
    ).eval()


@pytest.mark.parametrize("first", [True, False], ids=["conv first", "conv second"])
@pytest.mark.parametrize("spelling", ADDS)
def test_spellings_of_add(spelling: str, first: bool) -> None:
    def forward(m, x):
        y, r = m.conv(x), x * 2
        return ADDS[spelling](m, *((y, r) if first else (r, y)))

    model = spelled_model(forward)
    result = run_passes(model, image(), FUSE)
    (node,) = [node for node in computing(result.gm) if info(node).op in FUSABLE]
    assert len(computing(result.gm)) == 2
    assert isinstance(module_of(node), Fused)
    assert module_of(node).adds
    check_all(model, result, image(), FUSE)


@pytest.mark.parametrize("spelling", ADD_RELUS)
def test_add_relu_as_one_call(spelling: str) -> None:
    model = spelled_model(lambda m, x: ADD_RELUS[spelling](m, x, m.conv(x)))
    result = run_passes(model, image(), FUSE)
    node = only_node(result.gm)
    attribute = "ours" if spelling == "FloatFunctional" else "theirs"
    assert info(node).stands_for == ("conv", f"{attribute}[add_relu]", f"{attribute}[add_relu](1)")
    assert module_of(node).adds
    assert module_of(node).activation is Activation.RELU
    check_all(model, result, image(), FUSE)


@pytest.mark.parametrize(
    ("spelling", "activation"),
    [(name, Activation.RELU) for name in RELUS] + [(name, Activation.RELU6) for name in RELU6S],
    ids=lambda value: value if isinstance(value, str) and not isinstance(value, Activation) else str(value),
)
def test_spellings_of_activations(spelling: str, activation: Activation) -> None:
    functions = RELUS if activation is Activation.RELU else RELU6S
    model = spelled_model(lambda m, x: functions[spelling](m, m.conv(x * 4)))
    result = run_passes(model, image(), FUSE)
    (node,) = [node for node in computing(result.gm) if info(node).op in FUSABLE]
    assert len(computing(result.gm)) == 2
    assert module_of(node).activation is activation
    check_all(model, result, image(), FUSE)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_matrix_operators_with_the_models_weights(kind: str) -> None:
    build, functional, norm_class, shape = KINDS[kind]
    options = {} if kind == "linear" else {"padding": 1}
    model = randomize_norms(
        Forward(
            lambda m, x: F.relu(m.bn(functional(x, m.op.weight, m.op.bias, **options))), op=build(), bn=norm_class(6)
        )
    ).eval()
    result = run_passes(model, torch.randn(shape), FUSE)
    node = only_node(result.gm)
    assert info(node).stands_for == (f"_generated_{kind}_0", "bn", "_generated_relu_0")
    check_all(model, result, torch.randn(shape), FUSE, FOLD_RTOL)


class OwnConv(nn.Conv2d):
    """A user's subclass: its forward is recorded, not taken for granted."""


NORMS = {
    "BatchNorm2d": (lambda m, y: m.bn(y), norm),
    "SyncBatchNorm": (lambda m, y: m.bn(y), lambda: nn.SyncBatchNorm(4)),
    "F.batch_norm by position": (
        lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, False, 0.1, 1e-3),
        norm,
    ),
    "F.batch_norm by name": (
        lambda m, y: F.batch_norm(
            y, m.bn.running_mean, m.bn.running_var, bias=m.bn.bias, weight=m.bn.weight, training=False, eps=1e-2
        ),
        norm,
    ),
    "F.batch_norm without weights": (lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var), norm),
    "F.batch_norm without bias": (
        lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var, m.bn.weight),
        norm,
    ),
}


@pytest.mark.parametrize("build", [conv, lambda: OwnConv(4, 4, 3)], ids=["Conv2d", "subclass"])
@pytest.mark.parametrize("spelling", NORMS)
def test_spellings_of_batch_norm(spelling: str, build: Callable[[], nn.Module]) -> None:
    function, norm_class = NORMS[spelling]
    model = randomize_norms(Forward(lambda m, x: function(m, m.op(x)), op=build(), bn=norm_class())).eval()
    result = run_passes(model, image(), FUSE)
    only_node(result.gm)
    check_all(model, result, image(), FUSE, FOLD_RTOL)


def test_a_computed_weight_can_be_folded_first() -> None:
    model = randomize_norms(
        Forward(lambda m, x: m.bn(F.conv2d(x, m.w * 2, padding=1)), w=nn.Parameter(torch.randn(4, 4, 3, 3)), bn=norm())
    ).eval()
    result = run_passes(model, image(), f"fold-constants,{FUSE}")
    only_node(result.gm)
    check_values(model, result.gm, image(), FOLD_RTOL)


# --- which convolution takes the add -----------------------------------------------------------------------------


def add_of_two(m, x):
    return F.relu(m.bn1(m.conv1(x)) + m.bn2(m.conv2(x)))


def add_of_two_one_activated(m, x):
    return F.relu(m.bn1(m.conv1(x))) + m.bn2(m.conv2(x))


def add_of_its_own_input(m, x):
    y = m.bn1(m.conv1(x))
    return y + m.bn2(m.conv2(y))


def residual_after_the_convolution(m, x):
    y = m.bn1(m.conv1(x))
    r = torch.sigmoid(m.bn2(m.conv2(x)))
    return F.relu6(y + r)


@pytest.mark.parametrize(
    ("forward", "adder"),
    [
        (add_of_two, "conv1"),
        (add_of_two_one_activated, "conv2"),
        (add_of_its_own_input, "conv2"),
        (residual_after_the_convolution, "conv1"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_one_of_two_convolutions_takes_the_add(forward: Callable[..., Any], adder: str) -> None:
    model = randomize_norms(Forward(forward, conv1=conv(), conv2=conv(bias=False), bn1=norm(), bn2=norm())).eval()
    result = run_passes(model, image(), FUSE)
    matrix = [node for node in computing(result.gm) if info(node).op in FUSABLE]
    assert [info(node).site for node in matrix if len(node.args) == 2] == [adder]
    assert not nodes_of(result.gm, ADD)
    assert not nodes_of(result.gm, BATCH_NORM)
    check_all(model, result, image(), FUSE, 2 * FOLD_RTOL)


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.conv(x) + m.r, lambda m, x: m.conv(m.r) + x], ids=["residual", "convolution"]
)
def test_a_constant_of_batch_one_still_broadcasts(forward: Callable[..., Any]) -> None:
    """At the example's batch of 1 the shapes agree; they do not at others."""
    model = Forward(forward, conv=conv(), r=nn.Parameter(torch.randn(1, *IMAGE[1:]))).eval()
    result = run_passes(model, torch.randn(1, *IMAGE[1:]), FUSE)
    check_values(model, result.gm, image())


# --- batch-norm algebra ------------------------------------------------------------------------------------------


def plain_stats(bn: Any) -> None:
    randomize_norms(bn)


def tiny_variance(bn: Any) -> None:
    randomize_norms(bn)
    bn.running_var.fill_(1e-12)


def huge_variance(bn: Any) -> None:
    randomize_norms(bn)
    bn.running_var.fill_(1e12)


def zero_variance(bn: Any) -> None:
    randomize_norms(bn)
    bn.running_var.zero_()


def mixed_variance(bn: Any) -> None:
    randomize_norms(bn)
    bn.running_var.copy_(torch.logspace(-8, 8, bn.num_features))


def negative_gamma(bn: Any) -> None:
    randomize_norms(bn)
    nn.init.uniform_(bn.weight, -3, -0.5)


def zero_gamma(bn: Any) -> None:
    randomize_norms(bn)
    bn.weight.data[::2] = 0


STATISTICS = [
    plain_stats,
    tiny_variance,
    huge_variance,
    zero_variance,
    mixed_variance,
    negative_gamma,
    zero_gamma,
]
OPERATORS = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "without bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "depthwise multiplier": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "strided dilated": lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    "transposed groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    "transposed groups without bias": lambda: nn.ConvTranspose2d(4, 10, 2, groups=2, bias=False),
    "transposed depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
}


def fold_error(op: nn.Module, bn: nn.Module, x: torch.Tensor) -> float:
    """Error of the folded operator against the model."""
    model = Forward(lambda m, x: m.bn(m.op(x)), op=op, bn=bn).eval()
    result = run_passes(model, x, FUSE)
    only_node(result.gm)
    assert_idempotent(result.gm, FUSE)
    inputs = torch.randn(3, *x.shape[1:], dtype=x.dtype)
    with torch.no_grad():
        return relative_error(model(inputs), result.gm(inputs))


@pytest.mark.parametrize("statistics", STATISTICS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("op", OPERATORS)
def test_batch_norm_algebra(op: str, statistics: Callable[[Any], None]) -> None:
    module = OPERATORS[op]()
    bn = nn.BatchNorm2d(module.out_channels)
    statistics(bn)
    assert fold_error(module, bn, torch.randn(2, 4, 7, 7)) <= FOLD_RTOL


@pytest.mark.parametrize("options", [{"eps": 0.5}, {"eps": 1e-12}, {"affine": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("op", ["conv", "without bias", "transposed groups"])
def test_batch_norm_options(op: str, options: dict[str, Any]) -> None:
    module = OPERATORS[op]()
    bn = randomize_norms(nn.BatchNorm2d(module.out_channels, **options))
    assert fold_error(module, bn, torch.randn(2, 4, 7, 7)) <= FOLD_RTOL


def test_float64_is_folded_in_float64() -> None:
    op, bn = nn.Conv2d(4, 6, 3).double(), randomize_norms(nn.BatchNorm2d(6)).double()
    assert fold_error(op, bn, torch.randn(2, 4, 7, 7, dtype=torch.float64)) <= 1e-14


def test_two_batch_norms_in_a_row() -> None:
    model = randomize_norms(Forward(lambda m, x: m.b(m.a(m.conv(x))), conv=conv(), a=norm(), b=norm())).eval()
    result = run_passes(model, image(), FUSE)
    assert info(only_node(result.gm)).stands_for == ("conv", "a", "b")
    check_all(model, result, image(), FUSE, 2 * FOLD_RTOL)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 3]),
    width=st.integers(1, 3),
    kernel=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 1000),
)
def test_batch_norm_algebra_property(
    transposed: bool, groups: int, width: int, kernel: int, bias: bool, affine: bool, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    op = kind(2 * groups, width * groups, kernel, groups=groups, bias=bias)
    bn = randomize_norms(nn.BatchNorm1d(width * groups, affine=affine))
    bn.running_var.mul_(10.0**exponent)
    bn.running_mean.mul_(10.0 ** min(exponent / 2, 0))
    assert fold_error(op, bn, torch.randn(2, 2 * groups, 5)) <= FOLD_RTOL


def test_folding_replaces_tensors_and_leaves_the_captured_graph_alone() -> None:
    model = randomize_norms(Forward(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=norm())).eval()
    gm = trace(model, image())
    held = {name: (tensor, tensor.clone()) for name, tensor in gm.state_dict(keep_vars=True).items()}
    result = Pipeline.parse(FUSE).run(gm)
    assert gm.state_dict(keep_vars=True).keys() == held.keys()
    for name, tensor in gm.state_dict(keep_vars=True).items():
        assert tensor is held[name][0]
        assert torch.equal(tensor, held[name][1])
    check_values(model, gm, image())
    assert result.gm.conv.weight is not gm.conv.weight
    assert result.gm.conv.weight.requires_grad


# --- guards ------------------------------------------------------------------------------------------------------


class Guard(NamedTuple):
    """A model in which a rule must not fire, why, and what stays; the refusal names the line marked `# here`."""

    forward: Callable[..., Any]
    rule: str
    reason: str
    site: str
    kept: dict[Any, int]
    children: dict[str, Callable[[], Any]] = {}  # noqa: RUF012
    passes: str = FUSE
    shape: tuple[int, ...] = IMAGE


def several_users(m, x):
    y = m.conv(x)  # here
    return F.relu(y), torch.sigmoid(y)


def several_users_of_a_norm(m, x):
    y = m.conv(x)  # here
    return m.bn(y), torch.sigmoid(y)


def several_users_of_an_add(m, x):
    y = m.conv(x)  # here
    return (y + x) * torch.sigmoid(y)


def also_an_output(m, x):
    y = m.conv(x)  # here
    return y, F.relu(y)


def also_an_output_in_a_dict(m, x):
    y = m.conv(x)  # here
    return {"features": [y], "result": m.bn(y)}


def shared_module(m, x):
    y = F.relu(
        m.conv(x)  # here
    )
    return F.relu(m.conv(y))


def batch_statistics(m, x):
    y = m.conv(x)
    return m.bn(y)  # here


def computed_statistics(m, x):
    y = m.conv(x)
    return F.batch_norm(y, m.mean * 2, m.mean.exp())  # here


def scaled_by_alpha(m, x):
    y = m.conv(x)
    return torch.add(y, x, alpha=2)  # here


def broadcast_residual(m, x):
    y = m.conv(x)
    return y + m.mean.reshape(1, 4, 1, 1)  # here


def broadcast_residual_of_other_rank(m, x):
    y = m.conv(x)
    return m.row + y  # here


def broadcast_convolution(m, x):
    y = m.conv(F.adaptive_avg_pool2d(x, 1))
    return x + y  # here


def adds_a_number(m, x):
    y = m.conv(x)
    return y + 3  # here


def a_number_adds(m, x):
    y = m.conv(x)
    return 3 + y  # here


def other_dtype(m, x):
    y = m.conv(x)
    return y + x.double()  # here


def computed_weight_then_relu(m, x):
    y = F.conv2d(x, m.w * 2, padding=1)  # here
    return F.relu(y)


def computed_weight_then_norm(m, x):
    y = F.conv2d(x, m.w * 2, padding=1)  # here
    return m.bn(y)


def computed_weight_then_add(m, x):
    y = F.conv2d(x, m.w * 2, padding=1)  # here
    return y + x


def weight_from_an_input(m, x):
    y = F.conv2d(x, x[:1, :, :3, :3].expand(4, -1, -1, -1), padding=1)  # here
    return F.relu(y)


def norms_differ(m, x):
    y = m.bn(
        m.conv(x)  # here
    )
    return m.bn2(m.tied(y))


def norm_on_one_only(m, x):
    y = m.bn(
        m.conv(x)  # here
    )
    return m.tied(y)


def norm_of_a_sequence(m, x):
    y = m.linear(x)
    return m.bn(y)  # here


def second_add(m, x):
    y = m.conv(x) + x  # here
    return y + torch.sigmoid(x)


def relu_then_add(m, x):
    y = F.relu(m.conv(x))  # here
    return y + x


def relu_twice(m, x):
    y = F.relu(m.conv(x))  # here
    return F.relu(y)


def relu_then_relu6(m, x):
    y = F.relu(m.conv(x))  # here
    return F.relu6(y)


def relu_then_norm(m, x):
    y = F.relu(m.conv(x))
    return m.bn(y)  # here


def add_then_norm(m, x):
    y = m.conv(x) + x
    return m.bn(y)  # here


def view_written(m, x):
    y = m.conv(x)  # here
    y.view(-1).mul_(2)
    return F.relu(y)


def view_written_before_a_norm(m, x):
    y = m.conv(x)  # here
    y.flatten(1).add_(1)
    return m.bn(y)


def view_written_before_an_add(m, x):
    y = m.conv(x)  # here
    y.permute(0, 2, 3, 1).mul_(2)
    return y + x


USERS = "its result has other users: _generated_sigmoid_0"
OUTPUT = "its result is also an output of the graph"
COMPUTED = "its weight is computed in the forward, not a constant of the model"
WRITTEN = "its memory is written in place"
FULL = "the convolution already has an add or activation"
BETWEEN = "an add or activation stands between"
NORM, ADDITION, ACTIVATION = "fold-batch-norm", "fuse-add", "fuse-activation"
GUARDS = [
    Guard(several_users, ACTIVATION, USERS, "conv", {RELU: 1}),
    Guard(several_users_of_a_norm, NORM, USERS, "conv", {BATCH_NORM: 1}),
    Guard(several_users_of_an_add, ADDITION, USERS, "conv", {ADD: 1}),
    Guard(also_an_output, ACTIVATION, OUTPUT, "conv", {RELU: 1}),
    Guard(also_an_output_in_a_dict, NORM, OUTPUT, "conv", {BATCH_NORM: 1}),
    Guard(
        shared_module, ACTIVATION, "its module conv is called several times: split-shared-modules", "conv", {RELU: 2}
    ),
    Guard(
        batch_statistics,
        NORM,
        "it normalizes with the statistics of the batch",
        "bn",
        {BATCH_NORM: 1},
        {"bn": lambda: norm(track_running_stats=False)},
    ),
    Guard(
        computed_statistics,
        NORM,
        "its statistics are computed in the forward",
        "_generated_batch_norm_0",
        {BATCH_NORM: 1},
    ),
    Guard(scaled_by_alpha, ADDITION, "it scales one operand by alpha", "_generated_add_0", {ADD: 1}),
    Guard(
        broadcast_residual,
        ADDITION,
        "the residual is broadcast: [1, 4, 1, 1] onto [2, 4, 6, 6]",
        "_generated_add_0",
        {ADD: 1},
    ),
    Guard(
        broadcast_residual_of_other_rank,
        ADDITION,
        "the residual is broadcast: [6] onto [2, 4, 6, 6]",
        "_generated_add_0",
        {ADD: 1},
    ),
    # BUG: the reason has it the wrong way round: "the residual is broadcast: [2, 4, 6, 6] onto [2, 4, 1, 1]".
    Guard(broadcast_convolution, ADDITION, "[2, 4, 1, 1] onto [2, 4, 6, 6]", "_generated_add_0", {ADD: 1}),
    Guard(adds_a_number, ADDITION, "it adds a number, not a tensor", "_generated_add_0", {ADD: 1}),
    Guard(a_number_adds, ADDITION, "it adds a number, not a tensor", "_generated_add_0", {ADD: 1}),
    Guard(other_dtype, ADDITION, "the operands have different dtypes", "_generated_add_0", {ADD: 1}),
    Guard(computed_weight_then_relu, ACTIVATION, COMPUTED, "_generated_conv2d_0", {RELU: 1}),
    Guard(computed_weight_then_norm, NORM, COMPUTED, "_generated_conv2d_0", {BATCH_NORM: 1}),
    Guard(computed_weight_then_add, ADDITION, COMPUTED, "_generated_conv2d_0", {ADD: 1}),
    Guard(weight_from_an_input, ACTIVATION, COMPUTED, "_generated_conv2d_0", {RELU: 1}),
    Guard(norms_differ, NORM, "its weight is shared with tied, which the same batch norm", "conv", {BATCH_NORM: 2}),
    Guard(norm_on_one_only, NORM, "its weight is shared with tied, which the same batch norm", "conv", {BATCH_NORM: 1}),
    Guard(
        norm_of_a_sequence,
        NORM,
        "dimension 1 of its input, which it normalizes, is not the channels or features",
        "bn",
        {BATCH_NORM: 1},
        {"linear": lambda: nn.Linear(6, 4), "bn": lambda: nn.BatchNorm1d(4)},
        shape=(2, 4, 6),
    ),
    Guard(second_add, ADDITION, FULL, "conv", {ADD: 1}),
    Guard(relu_then_add, ADDITION, FULL, "conv", {ADD: 1}),
    Guard(relu_twice, ACTIVATION, "the convolution already has an activation", "conv", {RELU: 1}),
    Guard(relu_then_relu6, ACTIVATION, "the convolution already has an activation", "conv", {RELU6: 1}),
    Guard(relu_then_norm, NORM, BETWEEN, "bn", {BATCH_NORM: 1}),
    Guard(add_then_norm, NORM, BETWEEN, "bn", {BATCH_NORM: 1}),
    Guard(view_written, ACTIVATION, WRITTEN, "conv", {RELU: 1}),
    Guard(view_written_before_a_norm, NORM, WRITTEN, "conv", {BATCH_NORM: 1}),
    Guard(view_written_before_an_add, ADDITION, WRITTEN, "conv", {ADD: 1}),
]


def guarded_model(guard: Guard) -> nn.Module:
    children: dict[str, Any] = {
        "conv": conv(),
        "tied": conv(),
        "bn": norm(),
        "bn2": norm(),
        "w": nn.Parameter(torch.randn(4, 4, 3, 3)),
        "mean": torch.randn(4),
        "row": torch.randn(6),
    } | {name: build() for name, build in guard.children.items()}
    children["tied"].weight = children["conv"].weight
    return randomize_norms(Forward(guard.forward, **children)).eval()


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.forward.__name__)
def test_refused_with_reason_and_line(guard: Guard) -> None:
    model, example = guarded_model(guard), torch.randn(guard.shape)
    result = run_passes(model, example, guard.passes)
    refusal = refusal_with(result, guard.reason)
    assert (refusal.rule, refusal.site) == (guard.rule, guard.site)
    assert refusal.source is not None
    assert "# here" in linecache.getline(refusal.source.file, refusal.source.line)
    assert guard.site in refusal.members
    assert {op: len(nodes_of(result.gm, op)) for op in guard.kept} == guard.kept
    assert refusal in graph_info(result.gm).refusals
    batches = (2,) if guard.forward is batch_statistics else (1, 2, 5)
    check_values(model, result.gm, example, batches=batches)
    assert_idempotent(result.gm, guard.passes)


def test_training_statistics_are_not_folded() -> None:
    gm = trace(Forward(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=norm()).eval(), image())
    gm.train()
    result = Pipeline.parse(FUSE).run(gm, checks=CheckLevel.STRUCTURE)
    assert refusal_with(result, "it normalizes with the statistics of the batch").site == "bn"
    assert len(nodes_of(result.gm, BATCH_NORM)) == 1


def test_needs_canonical_first() -> None:
    gm = trace(Forward(lambda m, x: F.relu(m.conv(x)), conv=conv()).eval(), image())
    with pytest.raises(UserError, match="fuse-conv-bn-add-relu needs 'canonical' first"):
        Pipeline.parse("fuse-conv-bn-add-relu").run(gm)
    with pytest.raises(UserError, match=r"established by canonicalize"):
        Pipeline.parse("fuse-conv-bn-add-relu,canonicalize").run(gm)


# --- sharing -----------------------------------------------------------------------------------------------------


def test_split_calls_of_a_shared_module_are_fused_apart() -> None:
    model = Forward(lambda m, x: F.relu(m.conv(F.relu6(m.conv(x)))), conv=conv()).eval()
    result = run_passes(model, image(), SPLIT_AND_FUSE)
    assert [info(node).site for node in computing(result.gm)] == ["conv", "conv(1)"]
    assert [module_of(node).activation for node in computing(result.gm)] == [Activation.RELU6, Activation.RELU]
    assert module_of(computing(result.gm)[0]).weight is module_of(computing(result.gm)[1]).weight
    check_all(model, result, image(), SPLIT_AND_FUSE)


# BUG: once the first of them is folded, the other no longer sees the batch norm after it and is refused: half folded,
# the weight is no longer one, and a second run folds the rest (not idempotent).
@pytest.mark.parametrize("how", ["one module", "tied modules"])
def test_a_shared_weight_followed_by_the_same_norm_stays_one_tensor(how: str) -> None:
    first = conv()
    second = first if how == "one module" else conv()
    second.weight, second.bias = first.weight, first.bias
    model = randomize_norms(
        Forward(
            lambda m, x: F.relu(m.bn(m.first(x))) + m.bn(m.second(torch.sigmoid(x))),
            first=first,
            second=second,
            bn=norm(),
        )
    ).eval()
    result = run_passes(model, image(), SPLIT_AND_FUSE)
    assert not nodes_of(result.gm, BATCH_NORM)
    one, two = [module_of(node) for node in computing(result.gm) if info(node).op in FUSABLE]
    assert one.weight is two.weight
    assert one.bias is two.bias
    check_all(model, result, image(), SPLIT_AND_FUSE, 2 * FOLD_RTOL)


# BUG: see above; and the memo of folded weights does not tell a transposed convolution (factors along dimension 1)
# from a plain one (along dimension 0), so once both fold, the second gets the first one's weight.
def test_a_weight_shared_by_a_convolution_and_a_transposed_one() -> None:
    encoder, decoder = nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)
    decoder.weight, decoder.bias = encoder.weight, encoder.bias
    model = randomize_norms(
        Forward(lambda m, x: m.bn(m.decoder(m.bn(m.encoder(x)))), encoder=encoder, decoder=decoder, bn=norm())
    ).eval()
    result = run_passes(model, image(), SPLIT_AND_FUSE)
    check_all(model, result, image(), SPLIT_AND_FUSE, 4 * FOLD_RTOL)


# BUG: the forward reads `conv.weight` itself; folding replaces it under that reader, and the outputs change.
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.bn(m.conv(x)) * m.conv.weight.mean(),
        lambda m, x: m.bn(m.conv(x)) + F.conv_transpose2d(x, m.conv.weight, padding=1),
        lambda m, x: m.bn(m.conv(x)) + m.conv.bias.reshape(1, 4, 1, 1),
    ],
    ids=["weight", "tied functional", "bias"],
)
def test_a_weight_that_the_forward_reads_itself(forward: Callable[..., Any]) -> None:
    model = randomize_norms(Forward(forward, conv=conv(), bn=norm())).eval()
    result = run_passes(model, image(), FUSE)
    check_all(model, result, image(), FUSE, 2 * FOLD_RTOL)


# --- further places where it must not go wrong -------------------------------------------------------------------


# BUG: the convolution becomes its own residual; the verifier stops the pipeline ("it reads conv, which comes later").
@pytest.mark.parametrize("forward", [lambda m, y: y + y, lambda m, y: F.relu(torch.add(y, y))], ids=["add", "add relu"])
def test_a_result_added_to_itself(forward: Callable[..., Any]) -> None:
    model = Forward(lambda m, x: forward(m, m.conv(x)), conv=conv()).eval()
    result = run_passes(model, image(), FUSE)
    assert len(nodes_of(result.gm, ADD)) == 1
    assert reasons(result)
    check_all(model, result, image(), FUSE)


# BUG: fusing the add moves the convolution behind a write to its input, so it reads the new values.
def test_a_convolution_does_not_move_past_a_write_to_its_input() -> None:
    def forward(m, x):
        h = x * 2
        view = h.view(-1)
        y = m.conv(h)
        view.add_(1)
        return y + h

    model = Forward(forward, conv=conv()).eval()
    result = run_passes(model, image(), FUSE)
    check_values(model, result.gm, image(), batches=(2,))
    assert_idempotent(result.gm, FUSE)


# BUG: a convolution of one unbatched sample gives [C, L]; a batch norm then normalizes L, not C, and yet is folded:
# a shape error inside the pass if C != L, wrong numbers if C == L.
@pytest.mark.parametrize("channels", [5, 6])
def test_batch_norm_after_an_unbatched_convolution(channels: int) -> None:
    model = randomize_norms(
        Forward(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv1d(4, channels, 3, padding=1), bn=nn.BatchNorm1d(6))
    ).eval()
    result = run_passes(model, torch.randn(4, 6), FUSE)
    assert len(nodes_of(result.gm, BATCH_NORM)) == 1
    check_values(model, result.gm, torch.randn(4, 6), batches=(4,))


# --- golden ------------------------------------------------------------------------------------------------------


class ResidualNet(nn.Module):
    """What residual networks are made of, and one place of each kind where nothing may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(4)
        self.conv1, self.bn1 = conv(bias=False), norm()
        self.conv2, self.bn2 = conv(), norm()
        self.skip, self.skip_bn = nn.Conv2d(4, 4, 1, bias=False), norm()
        self.add = FloatFunctional()
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2)
        self.up_bn = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.relu(self.stem_bn(self.stem(x)), inplace=True)
        y = self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(x)))))
        y = self.add.add_relu(self.skip_bn(self.skip(x)), y)
        y = self.up_bn(self.up(y)).clamp(0, 6)
        logits = self.fc(y.mean((2, 3)))
        return {"logits": logits, "positive": torch.relu(logits)}


def test_golden(golden: Callable[[str], None]) -> None:
    model, example = randomize_norms(ResidualNet()).eval(), torch.randn(2, 3, 4, 4)
    result = run_passes(model, example, FUSE)
    golden(before_and_after(model, example, result))
    check_all(model, result, example, FUSE, 4 * FOLD_RTOL)
