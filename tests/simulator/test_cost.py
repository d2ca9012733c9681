"""Costs by hand: multiply-accumulates, bytes and cycles of single operators on `bpu`.

`bpu` does 1024 int8 products or 512 with one int16 operand per cycle, 128 (64) elements of other operators, and moves
16 bytes per cycle. Stored factors are a multiplier and a shift of 8 bytes each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from qgraph.ir.node_info import info
from qgraph.quantization import ModuleNameQconfigSetter, QConfig, calibrate, convert, get_qconfig, prepare
from qgraph.simulator import OpCost, Simulator
from qgraph.simulator.cost import macs_of, op_cost
from qgraph.targets import Memory, get_target
from tests.support.models import Forward, Residual, image


def integer_of(model: nn.Module, x: torch.Tensor, setter: Any = None) -> fx.GraphModule:
    prepared = prepare(model.eval(), x, setter)
    calibrate(prepared, [x], progress=False)
    return convert(prepared)


def costs(model: nn.Module, x: torch.Tensor, setter: Any = None) -> dict[str, OpCost]:
    run = Simulator(integer_of(model, x, setter)).run(x, record=True)
    return {op.site: op.cost for op in run.ops}


def conv(stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=stride, padding=1), nn.ReLU(), nn.Sigmoid())


def test_a_convolution_by_hand() -> None:
    cost = costs(conv(), torch.randn(2, 4, 6, 6))["0"]
    macs = 2 * 8 * 6 * 6 * 4 * 3 * 3
    moved = 2 * 4 * 36 + 2 * 8 * 36 + 8 * 4 * 9 + 8 * 4 + 8 * 8 + 8 * 8  # in, out, weight, bias, multiplier, shift
    assert (cost.unit, cost.macs, cost.bytes, cost.elements) == ("tensor", macs, moved, 2 * 8 * 36)
    assert cost.cycles == max(macs / 1024, moved / 16) == moved / 16
    assert cost.bound == "memory"


def test_a_large_convolution_is_bound_by_its_products() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Sigmoid())
    cost = costs(model, torch.randn(1, 64, 16, 16))["0"]
    assert cost.macs == 64 * 256 * 64 * 9
    assert cost.cycles == cost.macs / 1024
    assert cost.bound == "compute"


def test_int16_activations_halve_the_rate() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Sigmoid())
    cost = costs(model, torch.randn(1, 64, 16, 16), QConfig(output="int16"))["0"]
    assert cost.cycles == cost.macs / 512


def test_int16_weights_halve_the_rate() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Sigmoid())
    setter = ModuleNameQconfigSetter({"0": get_qconfig(weight_dtype="int16")})
    cost = costs(model, torch.randn(1, 64, 16, 16), setter)["0"]
    assert cost.cycles == cost.macs / 512


@pytest.mark.parametrize("name", ["onnxruntime", "x86", "litert"])
def test_integers_on_a_processor_take_the_rates_of_their_formats(name: str) -> None:
    x, target = torch.randn(1, 64, 16, 16), get_target(name)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Sigmoid(), nn.Tanhshrink())
    prepared = prepare(model.eval(), x, target=target)
    calibrate(prepared, [x], progress=False)
    by_site = {op.site: op.cost for op in Simulator(convert(prepared)).run(x, record=True).ops}
    rates, eight = target.units["cpu"], target.eight_bits
    products, table, island = by_site["0"], by_site["1"], by_site["2"]
    assert products.cycles == products.macs / rates[f"{eight}*int8"]
    assert table.cycles == max(table.elements / rates[str(eight)], table.bytes / target.bytes_per_cycle)
    assert island.cycles == max(island.elements / rates["float32"], island.bytes / target.bytes_per_cycle)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 9), 2 * 6 * 7 * 4 * 3),
        (nn.Conv2d(4, 8, 3, groups=2), (1, 4, 5, 5), 8 * 9 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), 4 * 9 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 3 * 8 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 9),
        (nn.Linear(5, 7), (3, 5), 3 * 7 * 5),
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 7 * 5),
    ],
    ids=["conv1d", "groups", "depthwise", "conv3d", "transposed", "transposed groups", "linear", "linear of three"],
)
def test_products_in_every_stage(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    x = torch.randn(shape)
    prepared = prepare(nn.Sequential(layer).eval(), x)
    calibrate(prepared, [x], progress=False)
    for gm in (prepared, convert(prepared)):
        (node,) = (node for node in gm.graph.nodes if info(node).site == "0")
        assert macs_of(node, gm) == macs


def test_a_matrix_product() -> None:
    cost = costs(Forward(lambda m, x: (x @ x.transpose(1, 2)).sigmoid()), torch.randn(2, 3, 4))["_generated_matmul_0"]
    assert cost.macs == 2 * 3 * 3 * 4


def test_elements_by_the_widest_operand() -> None:
    x = torch.randn(64, 1024)
    small, wide = (costs(nn.Sequential(nn.ReLU6()), x, QConfig(output=name))["0"] for name in ("int8", "int16"))
    assert (small.unit, small.macs, small.elements) == ("vector", 0, 65536)
    assert small.bytes == 2 * 65536 + 16
    assert small.cycles == small.bytes / 16
    assert wide.bytes == 4 * 65536 + 16
    target = replace(get_target("bpu"), memories={"ddr": Memory(1e9, 1e9)})
    for output, rate in (("int8", 128), ("int16", 64)):
        integer = integer_of(nn.Sequential(nn.ReLU6()), x, QConfig(output=output))
        node = next(node for node in integer.graph.nodes if info(node).site == "0")
        assert op_cost(node, integer, target).cycles == 65536 / rate
        assert op_cost(node, integer, target).bound == "compute"


def test_tables_and_movement_have_their_own_units() -> None:
    model = Forward(lambda m, x: x.sigmoid().reshape(x.shape[0], -1).flip(1) + 1.0)
    found = costs(model, torch.randn(2, 4, 5))
    units = {site: cost.unit for site, cost in found.items()}
    assert units["_generated_sigmoid_0"] == "table"
    assert units["_generated_flip_0"] == "move"
    assert units["_generated_add_0"] == "vector"
    assert found["_generated_sigmoid_0"].bytes == 40 + 40 + 256


def test_islands_run_on_the_cpu() -> None:
    model = Forward(lambda m, x: torch.cumprod(x.sigmoid(), 1).tanh())
    cost = costs(model, torch.randn(2, 8))["_generated_cumprod_0"]
    assert (cost.unit, cost.macs, cost.elements, cost.bytes) == ("cpu", 0, 16, 2 * 64)
    assert cost.cycles == max(16 / 4, 128 / 16)


def test_costs_are_those_of_the_example_whatever_runs() -> None:
    simulator = Simulator(integer_of(Residual(), image(2)))
    one, five = (simulator.run(image(batch), record=True) for batch in (1, 5))
    assert one.cycles == five.cycles == sum(op.cost.cycles for op in one.ops)
    assert [op.elements for op in five.ops] == [5 * op.elements for op in one.ops]
