"""Every operator of every target refuses illegal formats: site, operator, combination and the nearest legal one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph.capture import trace
from qgraph.errors import QuantizationError
from qgraph.ir.copying import copy_graph
from qgraph.ir.node_info import info
from qgraph.ir.op import QuantRule
from qgraph.ir.op_table import OPS
from qgraph.numerics import parse_qtype
from qgraph.pipeline import CheckLevel, PassContext, Pipeline
from qgraph.quantization import ModuleNameQconfigSetter, QConfig, prepare
from qgraph.quantization.config.resolve import as_setters
from qgraph.quantization.prepare import PREPARE
from qgraph.targets import get_target
from qgraph.targets.find import BUILT_IN
from tests.lowering.indexing_cases import Case, module, of
from tests.lowering.test_operators import CASES as OPERATORS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

BEFORE = PREPARE.partition(",assign-dtypes")[0]
FORMATS = ("int4", "int8", "uint8", "int16")
WEIGHTS = ("int4", "int8", "int16")
ROOM = (3, 8, 8)
CASES = [
    *OPERATORS,
    Case("softmax whole", "softmax", of(lambda m, x: x.softmax(-1))),
    Case("exp", "exp", of(lambda m, x: x.exp())),
    Case("reciprocal", "reciprocal", of(lambda m, x: (x.abs() + 1).reciprocal())),
    Case("rsqrt", "rsqrt", of(lambda m, x: (x.abs() + 1).rsqrt())),
    Case("whole map", "adaptive_avg_pool2d", module(nn.AdaptiveAvgPool2d(1))),
    Case("whole row", "adaptive_avg_pool1d", module(nn.AdaptiveAvgPool1d(1)), (4, 9)),
    Case("pooled row", "avg_pool1d", module(nn.AvgPool1d(8)), (4, 8)),
    Case("pooled map", "avg_pool2d", module(nn.AvgPool2d(8)), ROOM),
    Case("doubled", "interpolate", of(lambda m, x: F.interpolate(x, scale_factor=2.0)), ROOM),
    Case("quotient", "div", of(lambda m, x: x / (x.abs() + 1))),
    Case("squared difference", "squared_difference", of(lambda m, x: (x - x.flip(1)) ** 2)),
]  # fmt: skip


@cache
def captured(name: str) -> fx.GraphModule:
    torch.manual_seed(0)
    case = next(case for case in CASES if case.name == name)
    return trace(case.build().eval(), torch.randn(2, *case.shape), verify=False)


def planned(ready: fx.GraphModule, target: str, setting: QConfig | None = None, site: str = "") -> fx.GraphModule:
    setters = as_setters(None if setting is None else ModuleNameQconfigSetter({site: setting}))
    ctx = PassContext(target=get_target(target), setters=setters)
    return Pipeline.parse("assign-dtypes").run(copy_graph(ready), ctx, checks=CheckLevel.NONE).gm


@cache
def sites(target: str) -> dict[str, tuple[fx.GraphModule, str]]:
    """A graph for every operator of the target that has a site of its own, and the site."""
    found: dict[str, tuple[fx.GraphModule, str]] = {}
    device = get_target(target)
    for case in CASES:
        if case.op in found or device.rule(case.op) is None or OPS.named(case.op).quant is not QuantRule.OWN:
            continue
        ctx = PassContext(target=device)
        ready = Pipeline.parse(BEFORE).run(copy_graph(captured(case.name)), ctx, checks=CheckLevel.NONE).gm
        for node in planned(ready, target).graph.nodes:
            if info(node).op.name == case.op and info(node).plan is not None:
                found[case.op] = ready, info(node).site
    return found


@pytest.mark.parametrize("target", BUILT_IN)
def test_every_operator_with_a_site_is_tried(target: str) -> None:
    own = {name for name in get_target(target).ops if OPS.named(name).quant is QuantRule.OWN}
    assert own - sites(target).keys() == {"quant_stub"} & own


@pytest.mark.parametrize("target", BUILT_IN)
def test_illegal_formats_are_refused(target: str) -> None:
    device = get_target(target)
    for op, (ready, site) in sites(target).items():
        plain = next(node for node in planned(ready, target).graph.nodes if info(node).site == site)
        weighted = info(plain).weight_plan is not None
        for result in FORMATS:
            for weight in WEIGHTS if weighted else WEIGHTS[1:2]:
                lines = device.ops[op].legal
                known = any(
                    parse_qtype(result) in line.results and (not weighted or parse_qtype(weight) in line.operands[-1])
                    for line in lines
                )
                if known:
                    continue
                setting = QConfig(output=parse_qtype(result), weight=parse_qtype(weight))
                with pytest.raises(QuantizationError) as caught:
                    planned(ready, target, setting, site)
                message = str(caught.value)
                asked = f"{weight} -> {result}" if weighted else f"-> {result}"
                nearest = (
                    f"nearest legal: {lines[0]}"
                    if len(lines) == 1 and not device.ops[op].same_scale
                    else "nearest legal: "
                )
                for word in (asked, f"is illegal for {op} on {target}", plain.name, "decided by: module name", nearest):
                    assert word in message, (op, message)


@pytest.mark.parametrize("target", BUILT_IN)
@pytest.mark.parametrize("given", FORMATS)
@pytest.mark.parametrize("where", ["everywhere", "input"])
def test_what_cannot_enter_a_device_is_refused(target: str, given: str, where: str) -> None:
    device, asked = get_target(target), parse_qtype(given)
    if any(asked in line.results for line in device.ops["quant_stub"].legal):
        return
    setting = QConfig(output=asked) if where == "everywhere" else QConfig(output=device.eight_bits, input=asked)
    with pytest.raises(QuantizationError) as caught:
        prepare(nn.Linear(4, 4).eval(), torch.randn(2, 4), ModuleNameQconfigSetter({"": setting}), target=target)
    op = "quant_stub" if where == "everywhere" else "linear"
    for word in (f"is illegal for {op} on {target}", given, "nearest legal: ", "node "):
        assert word in str(caught.value)
