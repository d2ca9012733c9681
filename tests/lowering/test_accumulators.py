"""Sums that may leave their accumulator are told of when a graph is lowered, with operator and bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph.errors import QuantizationError
from qgraph.ir.node_info import graph_info, info
from qgraph.lowering.accumulators import overflowing
from qgraph.quantization import ModuleNameQconfigSetter, QConfig, calibrate, convert, prepare
from qgraph.simulator import Simulator
from tests.support.models import Forward


def calibrated(model: nn.Module, example: Any, target: str = "bpu", result: str = "int8") -> fx.GraphModule:
    config: Any = QConfig(output=result, weight="int8")
    prepared = prepare(model.eval(), example, _Everywhere(config), target=target)
    calibrate(prepared, [example], progress=False)
    return prepared


class _Everywhere:
    """One setting for all sites."""

    name = "everywhere"

    def __init__(self, config: QConfig) -> None:
        self.config = config

    def decide(self, query: object) -> QConfig:
        return self.config

    def unused(self, queries: object) -> list[str]:
        return []


def notes(gm: fx.GraphModule) -> list[str]:
    return [note for note in graph_info(gm).notes if note.startswith("accumulator:")]


def with_bias(value: float) -> nn.Module:
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, value)
    return model


@pytest.mark.parametrize("target", ["bpu", "onnxruntime", "litert"])
def test_a_bias_at_the_end_of_the_accumulator(target: str) -> None:
    x = torch.ones(1, 4)
    step = 1 / 127 * 0.5 / 127
    assert not notes(convert(calibrated(with_bias(1000.0), x, target)))
    prepared = calibrated(with_bias(step * (2.0**31 - 3000)), x, target)
    integer = convert(prepared)
    (note,) = notes(integer)
    assert "linear" in note
    assert str(overflowing(integer)[0].bound) in note
    assert "int32:wrap" in note
    with pytest.raises(QuantizationError, match="may leave their accumulator") as caught:
        convert(prepared, strict=True)
    assert "node " in str(caught.value)
    assert str(overflowing(integer)[0].bound) in str(caught.value)


def test_weights_count_not_only_their_number() -> None:
    """1024 products of 16 and 8 bits may need 33 bits; with small weights they do not."""
    model = nn.Linear(1024, 2, bias=False)
    x = torch.rand(1, 1024)
    nn.init.constant_(model.weight, 1.0)
    integer = convert(calibrated(model, x, result="int16"))
    (found,) = overflowing(integer)
    assert found.bound == 1024 * 32768 * 127
    with torch.no_grad():
        model.weight[:, 8:] = 0.0
    assert not notes(convert(calibrated(model, x, result="int16")))


CASES: dict[str, tuple[Callable[[nn.Module, torch.Tensor], Any], tuple[int, ...], dict[str, nn.Module], int | None]] = {
    "conv": (lambda m, x: m.c(x), (1, 600, 3, 3), {"c": nn.Conv2d(600, 2, 1, bias=False)}, 600 * 32768 * 127),
    "grouped": (lambda m, x: m.c(x), (1, 600, 3, 3), {"c": nn.Conv2d(600, 2, 1, groups=2, bias=False)}, None),
    "transposed": (
        lambda m, x: m.c(x),
        (1, 600, 3, 3),
        {"c": nn.ConvTranspose2d(600, 4, 1, groups=1, bias=False)},
        600 * 32768 * 127,
    ),
    "matmul": (lambda m, x: torch.matmul(x, x.transpose(1, 2)), (1, 1, 140000), {}, 140000 * 128 * 128),
    "mean": (lambda m, x: x.relu().mean((2, 3)), (1, 2, 300, 300), {}, 90000 * 32767),
    "global": (lambda m, x: F.adaptive_avg_pool2d(x, 1), (1, 2, 300, 300), {}, 90000 * 32768),
    "small": (lambda m, x: F.avg_pool2d(x, 3), (1, 2, 9, 9), {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_bounds(name: str) -> None:
    forward, shape, children, bound = CASES[name]
    for child in children.values():
        nn.init.constant_(child.weight, 0.25)  # type: ignore[arg-type]
    integer = convert(
        calibrated(Forward(forward, **children), torch.rand(shape), result="int8" if name == "matmul" else "int16")
    )
    found = overflowing(integer)
    assert [entry.bound for entry in found] == ([] if bound is None else [bound])
    assert len(notes(integer)) == len(found)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_bound_is_reached(groups: int) -> None:
    """By the codes that are worst for the row with most weight."""
    model = nn.ConvTranspose2d(2048, 4, 1, groups=groups, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.where(torch.rand(model.weight.shape) < 0.1, -0.5, 0.5))
    model.weight.data[0, 0] = 1.0
    integer = convert(calibrated(model, torch.rand(1, 2048, 1, 1), result="int16"))
    (found,) = overflowing(integer)
    weight = integer.get_buffer(str(found.node.args[1].target)).long()  # type: ignore[union-attr]
    rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).reshape(4, -1)
    worst = [
        max(abs(int(torch.where((row > 0) == side, row * 32767, row * -32768).sum())) for side in (True, False))
        for row in rows
    ]
    assert found.bound == max(worst)


def test_what_does_not_fit_wraps_as_told() -> None:
    x = torch.ones(1, 4)
    step = 1 / 127 * 0.5 / 127
    integer = convert(calibrated(with_bias(step * (2.0**31 - 3000)), x))
    (found,) = overflowing(integer)
    run = Simulator(integer, kernels="reference").run(x, record=True)
    codes = run.values[info(found.node).site]
    assert int(codes.max()) < 0, "a large positive sum became negative"


class Deep(nn.Module):
    """Two convolutions of many channels; the codes pass a pooling and a permutation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 600, 1)
        self.second = nn.Conv2d(600, 4, 1)
        nn.init.constant_(self.second.weight, 0.5)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.max_pool2d(self.first(x), 2).transpose(2, 3))


def prepared_with(model: nn.Module, x: torch.Tensor, **own: QConfig) -> fx.GraphModule:
    setters = [ModuleNameQconfigSetter(own)] if own else []
    everywhere = _Everywhere(QConfig(output="int16", weight="int8"))
    prepared = prepare(model.eval(), x, [*setters, everywhere])
    calibrate(prepared, [x], progress=False)
    return prepared


def test_the_refusal_says_what_to_do_and_it_helps() -> None:
    model, x = Deep(), torch.randn(1, 3, 4, 4)
    prepared = prepared_with(model, x)
    (found,) = overflowing(convert(prepared))
    assert (found.high, found.low) == (600 * 127 * 32767, -600 * 127 * 32768)
    assert (found.bits, found.narrowed) == (33, ("first",))
    (note,) = notes(convert(prepared))
    for word in ("second (conv2d)", str(found.bound), "33 bits", "int32:wrap", "int8 codes for first would fit"):
        assert word in note
    with pytest.raises(QuantizationError) as caught:
        convert(prepared, strict=True)
    message = str(caught.value)
    for word in ("node second", "(conv2d)", "33 bits", 'ModuleNameQconfigSetter({"first": QConfig(output="int8")})'):
        assert word in message
    assert not notes(convert(prepared_with(model, x, first=QConfig(output="int8")), strict=True))


def test_no_codes_of_eight_bits_are_promised_where_they_do_not_help() -> None:
    step = 0.5 / 127 / 32767
    prepared = calibrated(with_bias(step * (2.0**31 - 3000)), torch.ones(1, 4), result="int16")
    with pytest.raises(QuantizationError) as caught:
        convert(prepared, strict=True)
    assert "would fit: a smaller bias" in str(caught.value)
    assert "ModuleNameQconfigSetter" not in str(caught.value)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_counts_with_its_sign(sign: int) -> None:
    """Sums are positive only; a bias below them makes them smaller, one above them larger."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(500, 1))
    nn.init.constant_(model[1].weight, 0.5)
    x = torch.rand(1, 500)
    x[0, 0] = 1.0
    nn.init.constant_(model[1].bias, sign * 20.0)
    integer = convert(calibrated(model, x, result="int16"))
    (linear,) = [node for node in integer.graph.nodes if "linear" in str(node.target)]
    weight, bias = (integer.get_buffer(str(node.target)).long() for node in linear.args[1:3])
    top = 32767 * int(weight.sum()) + int(bias)
    assert [entry.high for entry in overflowing(integer)] == ([top] if top > 2**31 - 1 else [])
    assert (top > 2**31 - 1) == (sign > 0)
