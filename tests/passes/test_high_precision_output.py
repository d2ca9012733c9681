"""high-precision-output: which products keep their accumulator, and why others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph import DeQuantStub, QuantStub
from qgraph.capture import trace
from qgraph.errors import UserError
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import info
from qgraph.ir.op_table import QUANT_STUB
from qgraph.numerics import qint8, qint32
from qgraph.pipeline import CheckLevel, PassContext, Pipeline, PipelineResult
from qgraph.quantization import ModuleNameQconfigSetter, QConfig, calibrate, convert, get_qconfig, prepare
from qgraph.quantization.config.resolve import as_setters
from qgraph.simulator import Simulator
from qgraph.targets import LegalFormats, OpRule, Target, get_target
from tests.passes.models import check_values, printed
from tests.support.models import Forward, Residual, image
from tests.support.passes import assert_idempotent, refusal_with

BEFORE = "canonicalize,split-shared-modules,fuse-conv-bn-add-relu,decompose-composites,insert-quant-stubs,assign-dtypes"
PASSES = f"{BEFORE},high-precision-output"


def raised(model: nn.Module, example: object, setter: object = None, target: Target | None = None) -> PipelineResult:
    ctx = PassContext(target=target or get_target("bpu"), setters=as_setters(setter))
    return Pipeline.parse(PASSES).run(trace(model.eval(), example), ctx, checks=CheckLevel.CLAIMS)


def kept(gm: fx.GraphModule) -> list[str]:
    """Sites that keep their accumulator."""
    return [info(node).site for node in gm.graph.nodes if info(node).plan and info(node).plan.format == qint32]


def x() -> torch.Tensor:
    return torch.randn(2, 4)


def fc(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def test_golden(golden: Callable[[str], None]) -> None:
    result = raised(Residual(), image())
    golden(printed(result.gm) + "".join(f"note: {note}\n" for note in result.notes))


def test_the_last_product_only() -> None:
    result = raised(nn.Sequential(fc(), nn.ReLU(), fc()), x())
    assert kept(result.gm) == ["2"]
    assert not result.refusals
    assert "2 keeps its accumulator" in result.notes
    plan = next(info(node).plan for node in result.gm.graph.nodes if info(node).site == "2")
    assert plan.rule == "high-precision output"
    assert plan.observer == "none"
    assert plan.overrode == ("default_calibration_qconfig_setter: int8",), "what it replaced is kept"


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(4, 3, 3)), (2, 4, 9)),
        (nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU()), (2, 4, 6, 6)),
        (nn.Sequential(nn.Conv3d(2, 3, 2)), (2, 2, 4, 4, 4)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)), (2, 4, 5, 5)),
        (nn.Sequential(fc(), nn.ReLU()), (2, 4)),
        (Forward(lambda m, x: x @ x.transpose(1, 2)), (2, 3, 4)),
    ],
    ids=["conv1d", "conv_relu", "conv3d", "transposed", "linear_relu", "matmul"],
)
def test_every_kind_of_product(model: nn.Module, shape: tuple[int, ...]) -> None:
    example = torch.randn(shape)
    result = raised(model, example)
    assert len(kept(result.gm)) == 1
    check_values(model, result.gm, example)
    prepared = prepare(model.eval(), example)
    calibrate(prepared, [example], progress=False)
    integer = convert(prepared)
    with torch.no_grad():
        expected = prepared(example)
    assert (Simulator(integer)(example) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_output_is_finer_than_any_16_bits() -> None:
    """A hundred steps of the accumulator are one of the int8 site it replaced."""
    model, example = nn.Sequential(fc(64, 8)).eval(), torch.randn(4, 64)
    prepared = prepare(model, example)
    calibrate(prepared, [example], progress=False)
    result = convert(prepared)(example)
    assert len(result.unique()) == result.numel()


def test_each_of_several_outputs() -> None:
    model = Forward(lambda m, x: {"a": m.a(x), "b": [m.b(x.relu())]}, a=fc(), b=fc())
    assert sorted(kept(raised(model, x()).gm)) == ["a", "b"]


def test_before_an_island() -> None:
    model = Forward(lambda m, x: m.b(torch.cummax(m.a(x), -1).values), a=fc(), b=fc())
    assert kept(raised(model, x()).gm) == ["a", "b"]


def test_looks_through_what_moves_codes() -> None:
    """The operand's format is that of the site before the reshape."""
    model = Forward(lambda m, x: m.fc(x.sigmoid().reshape(-1, 8).flip(1)), fc=fc(8, 3))
    assert kept(raised(model, torch.randn(4, 4)).gm) == ["fc"]


def test_stubs_of_the_user() -> None:
    model = Forward(lambda m, x: m.dq(m.fc(m.q(x))).exp(), q=QuantStub(), dq=DeQuantStub(), fc=fc())
    assert kept(raised(model, x()).gm) == ["fc"]


# --- what is not raised --------------------------------------------------------------------------------------------


def line_of(result: PipelineResult, words: str, site: str) -> None:
    refusal = refusal_with(result, words)
    assert refusal.rule == "high-precision-output"
    assert refusal.site == site
    assert refusal.source is not None
    assert refusal.source.file.endswith("test_high_precision_output.py")
    assert kept(result.gm) == []


def test_other_users() -> None:
    """The other user needs codes at a scale."""
    model = Forward(lambda m, x: (lambda y: (y, y.sigmoid()))(m.fc(x)), fc=fc())
    line_of(raised(model, x()), "its result has other users", "fc")


def test_a_fixed_scale() -> None:
    model = Forward(lambda m, x: m.fc(x), fc=fc())
    setter = ModuleNameQconfigSetter({"fc": get_qconfig(fix_scale=0.5)})
    result = raised(model, x(), setter)
    line_of(result, "its scale is fixed", "fc")
    assert {info(node).plan.fixed_scale for node in result.gm.graph.nodes if info(node).site == "fc"} == {0.5}


def test_a_residual() -> None:
    model = Forward(lambda m, x: m.fc(x) + x, fc=fc())
    line_of(raised(model, x()), "a residual or relu6 is rounded", "fc")


def test_relu6() -> None:
    model = Forward(lambda m, x: F.relu6(m.fc(x)), fc=fc())
    line_of(raised(model, x()), "a residual or relu6 is rounded", "fc")


def test_a_target_without_accumulator() -> None:
    bpu = get_target("bpu")
    narrow = OpRule("tensor", (LegalFormats(((qint8,), (qint8,)), (qint8,)),))
    target = replace(bpu, name="narrow", ops={**bpu.ops, "linear": narrow})
    model = Forward(lambda m, x: m.fc(x), fc=fc())
    line_of(raised(model, x(), None, target), "narrow does not hand out its accumulator", "fc")


def test_an_operand_of_unknown_format() -> None:
    """As a pass of somebody else may leave it."""
    gm = Pipeline.parse(BEFORE).run(trace(Forward(lambda m, x: m.fc(x), fc=fc()).eval(), x())).gm
    stub = next(node for node in gm.graph.nodes if info(node).op is QUANT_STUB)
    Editor(gm, "test").annotate(stub, plan=None)
    line_of(Pipeline.parse("high-precision-output").run(gm), "the format of an operand is not known", "fc")


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(x).sigmoid(),
        lambda m, x: m.fc(x) + 1.0,
        lambda m, x: m.fc(x).reshape(-1),
        lambda m, x: torch.cat([m.fc(x), x]),
    ],
    ids=["sigmoid", "add", "reshape", "cat"],
)
def test_products_that_feed_no_stub(forward: Callable[..., torch.Tensor]) -> None:
    result = raised(Forward(forward, fc=fc()), x())
    assert kept(result.gm) == []
    rules = {refusal.rule for refusal in result.refusals}
    assert "high-precision-output" not in rules, "there is nothing to explain"


# --- numbers, order ------------------------------------------------------------------------------------------------


def test_exact_and_idempotent() -> None:
    model = Residual()
    before = Pipeline.parse(BEFORE).run(trace(model.eval(), image())).gm
    after = Pipeline.parse("high-precision-output").run(before, checks=CheckLevel.CLAIMS)
    assert not after.changed, "plans are records"
    assert torch.equal(after.gm(image(3) * 0 + 1), before(image(3) * 0 + 1))
    assert_idempotent(after.gm, "high-precision-output")
    again = Pipeline.parse("high-precision-output").run(after.gm)
    assert not again.notes
    assert printed(again.gm) == printed(after.gm)


def test_an_explicit_format_is_overridden_on_record() -> None:
    model = Forward(lambda m, x: m.fc(x), fc=fc())
    gm = raised(model, x(), (ModuleNameQconfigSetter({"fc": get_qconfig(out_dtype="int16")}), QConfig())).gm
    (plan,) = (info(node).plan for node in gm.graph.nodes if info(node).site == "fc")
    assert plan.overrode == ("qconfig: int8", "module name: int16")


def test_needs_dtypes() -> None:
    stubs = Pipeline.parse(BEFORE.removesuffix(",assign-dtypes")).run(trace(Residual().eval(), image())).gm
    with pytest.raises(UserError, match="high-precision-output needs 'dtypes' first"):
        Pipeline.parse("high-precision-output").run(stubs)
    with pytest.raises(UserError, match=r"established by assign-dtypes"):
        Pipeline.parse("high-precision-output,assign-dtypes").run(stubs)
    with pytest.raises(UserError, match="works on a fused graph, but gets a captured one"):
        Pipeline.parse("high-precision-output").run(trace(Residual().eval(), image()))
