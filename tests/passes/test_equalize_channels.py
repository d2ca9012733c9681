"""equalize-channels: where channels differ widely, in every form a group can have, bit exact; refusals with reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.node_info import graph_info
from qgraph.pipeline import Pipeline
from qgraph.quantization import ModuleNameQconfigSetter, QConfig, calibrate, convert, prepare, prepare_pipeline
from qgraph.quantization.channel_axes import ChannelAxes
from qgraph.simulator import Simulator
from tests.passes.models import before_and_after, check_all
from tests.support.models import Forward
from tests.support.passes import refusal_with, run_passes

EQUALIZE = "canonicalize,fuse-conv-bn-add-relu,equalize-channels"
WIDTH = 8


def factors(width: int = WIDTH) -> torch.Tensor:
    return torch.logspace(0, 4, width)[torch.randperm(width, generator=torch.Generator().manual_seed(0))]


def unbalance(*, makes: tuple[nn.Module, ...], reads: tuple[nn.Module, ...], width: int = WIDTH) -> None:
    """Multiplies the first dimension of some weights, and divides the second of others."""
    by = factors(width)
    with torch.no_grad():
        for module in makes:
            module.weight.mul_(by.reshape(-1, *[1] * (module.weight.dim() - 1)))
            if module.bias is not None:
                module.bias.mul_(by)
        for module in reads:
            block = by.repeat_interleave(module.weight.shape[1] // width)
            module.weight.div_(block.reshape(1, -1, *[1] * (module.weight.dim() - 2)))


def chain() -> nn.Module:
    a, b = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3)
    unbalance(makes=(a,), reads=(b,))
    return Forward(lambda m, x: m.b(F.max_pool2d(F.leaky_relu(m.a(x)), 2)), a=a, b=b).eval()


def with_depthwise() -> nn.Module:
    a, b = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
    depthwise = nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH)
    unbalance(makes=(a, depthwise), reads=(b,))
    with torch.no_grad():  # the depthwise weights stay as they are, its input and output differ
        depthwise.weight.div_(factors()[:, None, None, None])
    return Forward(lambda m, x: m.b(F.relu(m.d(F.relu(m.a(x))))), a=a, d=depthwise, b=b).eval()


def with_residual() -> nn.Module:
    stem, a, b = (nn.Conv2d(size, WIDTH, 3, padding=1) for size in (3, WIDTH, WIDTH))
    head = nn.Conv2d(WIDTH, 4, 1)
    unbalance(makes=(stem, b), reads=(a, head))

    def forward(m, x):
        y = F.relu(m.stem(x))
        return m.head(F.avg_pool2d(F.relu(m.b(F.relu(m.a(y))) + y), 2))

    return Forward(forward, stem=stem, a=a, b=b, head=head).eval()


def with_flatten() -> nn.Module:
    a, b = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH * 16, 4)
    unbalance(makes=(a,), reads=(b,))
    return Forward(lambda m, x: m.b(F.adaptive_avg_pool2d(F.relu(m.a(x)), 4).flatten(1)), a=a, b=b).eval()


def with_permute() -> nn.Module:
    a, b = nn.Conv2d(3, WIDTH, 1), nn.Linear(WIDTH, 4)
    unbalance(makes=(a,), reads=(b,))
    return Forward(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1)), a=a, b=b).eval()


def with_norm() -> nn.Module:
    norm, one, two = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    unbalance(makes=(norm,), reads=(one, two))
    lift = nn.Conv2d(3, WIDTH, 1)

    def forward(m, x):
        y = m.norm(m.lift(x).flatten(2).transpose(1, 2))
        return m.one(y) * m.two(y).sigmoid()

    return Forward(forward, lift=lift, norm=norm, one=one, two=two).eval()


def with_transposed_and_groups() -> nn.Module:
    a, b = nn.ConvTranspose2d(4, WIDTH, 2, stride=2, groups=2), nn.Conv2d(WIDTH, WIDTH, 3, groups=2)
    by = factors()
    with torch.no_grad():
        a.weight.mul_(by.reshape(2, 1, 4).expand(-1, 2, -1).reshape(4, 4, 1, 1))
        a.bias.mul_(by)
        b.weight.div_(by.reshape(2, 1, 4).expand(-1, 4, -1).reshape(WIDTH, 4, 1, 1))
    return Forward(lambda m, x: m.b(m.a(m.lift(x)).relu()), lift=nn.Conv2d(3, 4, 1), a=a, b=b).eval()


def with_shared_module() -> nn.Module:
    a, shared, b = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
    unbalance(makes=(a, shared), reads=(shared, b))
    return Forward(lambda m, x: m.b(m.s(m.s(m.a(x)).relu()).relu()), a=a, s=shared, b=b).eval()


FORMS = (
    chain,
    with_depthwise,
    with_residual,
    with_flatten,
    with_permute,
    with_norm,
    with_transposed_and_groups,
    with_shared_module,
)


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("build", [chain, with_residual], ids=lambda build: build.__name__)
def test_golden(build: Callable[[], nn.Module], golden: Callable[[str], None]) -> None:
    torch.manual_seed(0)
    model, x = build(), image()
    golden(before_and_after(model, x, run_passes(model, x, EQUALIZE)))


@pytest.mark.parametrize("build", FORMS, ids=lambda build: build.__name__)
def test_every_form_is_scaled_bit_for_bit(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model, x = build(), image()
    result = run_passes(model, x, EQUALIZE)
    assert "channels from" in " ".join(result.notes), f"nothing was scaled; refused: {result.refusals}"
    fused = Pipeline.parse("canonicalize,fuse-conv-bn-add-relu")
    assert str(fused) + ",equalize-channels" == EQUALIZE
    check_all(run_passes(model, x, str(fused)).gm, result, x, EQUALIZE)


@pytest.mark.parametrize("build", FORMS, ids=lambda build: build.__name__)
def test_integers_come_closer(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(2)
    model, x = build(), image()
    with torch.no_grad():
        expected = model(x)
    errors = []
    for pipeline in (prepare_pipeline().remove("equalize-channels"), prepare_pipeline()):
        prepared = prepare(model, x, pipeline=pipeline)
        calibrate(prepared, [x], progress=False)
        errors.append((Simulator(convert(prepared))(x) - expected).square().mean().item())
    assert errors[1] < errors[0] / 4, errors


def test_factors_are_powers_of_two_and_the_model_stays_as_it_was() -> None:
    torch.manual_seed(3)
    model, x = chain(), image()
    before = weights(model)
    prepared = prepare(model, x)
    after = {name: value for name, value in prepared.named_parameters() if name in before}
    assert all(torch.equal(value, weights(model)[name]) for name, value in before.items())
    mantissas = {name: torch.frexp(value)[0].abs() for name, value in after.items()}
    assert all(torch.equal(mantissas[name], torch.frexp(before[name])[0].abs()) for name in mantissas)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert any("channels from a to b scaled by" in note for note in graph_info(prepared).notes)


def test_balanced_channels_are_left_alone() -> None:
    torch.manual_seed(4)
    a, b = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, 4, 3)
    model, x = Forward(lambda m, x: m.b(m.a(x).relu()), a=a, b=b).eval(), image()
    result = run_passes(model, x, EQUALIZE)
    assert "channels from" not in " ".join(result.notes)
    assert torch.equal(result.gm.get_submodule("a").weight, a.weight)
    assert not graph_info(prepare(model, x)).notes


def test_the_least_gain_is_an_option() -> None:
    torch.manual_seed(5)
    model, x = chain(), image()
    result = run_passes(model, x, EQUALIZE + "{least_gain=200.0}")
    assert torch.equal(result.gm.get_submodule("a").weight, model.a.weight)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (F.relu6, "relu6 has the same bound for every channel"),
        (lambda y: y.clamp(0, 3), "clamp has the same bound for every channel"),
        (torch.sigmoid, "sigmoid does not keep the channels apart"),
        (lambda y: y + 1.0, "add mixes it or cannot follow it"),
        (lambda y: torch.cat([y, y], 1)[:, :WIDTH], "cat does not keep the channels apart"),
    ],
    ids=["relu6", "clamp", "sigmoid", "add number", "cat"],
)
def test_refusals(between: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    torch.manual_seed(6)
    a, b = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
    unbalance(makes=(a,), reads=(b,))
    model, x = Forward(lambda m, x: m.b(between(m.a(x)).abs()), a=a, b=b).eval(), image()
    # Before and behind a barrier the axes are pinned, and no group has both a producer and a consumer.
    gm = run_passes(model, x, "canonicalize,fuse-conv-bn-add-relu").gm
    assert reason in [pin[0] for pin in ChannelAxes(gm, lambda node: False)._pins.values()]
    result = run_passes(model, x, EQUALIZE)
    assert torch.equal(result.gm.get_submodule("b").weight, b.weight)


def test_a_result_that_is_also_an_output_is_refused_with_its_line() -> None:
    torch.manual_seed(7)
    a, b = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
    unbalance(makes=(a,), reads=(b,))

    def forward(m, x):
        y = m.a(x).relu()
        return m.b(y), y

    refusal = refusal_with(
        run_passes(Forward(forward, a=a, b=b).eval(), image(), EQUALIZE), "it is an output of the model"
    )
    assert "times the median" in refusal.reason


def test_a_weight_that_the_forward_reads_is_left_alone() -> None:
    torch.manual_seed(8)
    a, b = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
    unbalance(makes=(a,), reads=(b,))
    model = Forward(lambda m, x: m.b(m.a(x).relu()) + m.a.weight.sum(), a=a, b=b).eval()
    refusal_with(run_passes(model, image(), EQUALIZE), "its weight or bias is read by another node")


def test_a_fixed_scale_is_respected() -> None:
    torch.manual_seed(9)
    model, x = chain(), image()
    prepared = prepare(model, x, ModuleNameQconfigSetter({"a": QConfig(fixed_scale=0.1)}))
    assert torch.equal(prepared.get_submodule("a").weight, model.a.weight)
    assert any("its scale is fixed" in refusal.reason for refusal in graph_info(prepared).refusals)
