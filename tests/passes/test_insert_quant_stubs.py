"""insert-quant-stubs: borders between real numbers and codes, and the reason for every island."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph import DeQuantStub, QuantStub
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op_table import DEQUANT_STUB, QUANT_STUB
from qgraph.pipeline import PipelineResult
from tests.passes.models import before_and_after, check_all, check_values
from tests.support.models import Forward
from tests.support.passes import nodes_of, run_passes

STUBS = "canonicalize,fold-constants,fuse-conv-bn-add-relu,decompose-composites,insert-quant-stubs"


def x() -> torch.Tensor:
    return torch.randn(2, 4, 6, 6)


def placed(forward: Callable[..., object], **children: object) -> PipelineResult:
    return run_passes(Forward(forward, **children), x(), STUBS)


def sites(gm: fx.GraphModule, op: object) -> list[str]:
    return [info(node).site for node in nodes_of(gm, op)]


def island() -> nn.Module:
    def forward(m, x):
        y = torch.cummax(m.conv(x), dim=1).values  # no integer form
        return m.conv2(y) + m.offset

    conv, conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    return Forward(forward, conv=conv, conv2=conv2, offset=torch.randn(6, 6))


def test_golden(golden: Callable[[str], None]) -> None:
    golden(before_and_after(island(), x(), run_passes(island(), x(), STUBS)))


def test_exact_and_idempotent() -> None:
    model = island()
    result = run_passes(model, x(), STUBS)
    check_values(model, result.gm, x())
    again = run_passes(model, x(), f"{STUBS},insert-quant-stubs")
    assert len(again.gm.graph.nodes) == len(result.gm.graph.nodes)
    check_all(model, result, x(), "insert-quant-stubs")


def test_inputs_outputs_and_constants() -> None:
    gm = placed(lambda m, x: x + m.offset, offset=torch.randn(6, 6)).gm
    assert sites(gm, QUANT_STUB) == ["inputs_0.quant", "offset.quant"]
    assert sites(gm, DEQUANT_STUB) == ["_generated_add_0.dequant"]


def test_one_stub_per_value() -> None:
    gm = placed(lambda m, x: (x.relu(), x.sigmoid() * x, x)).gm
    assert len(nodes_of(gm, QUANT_STUB)) == 1, "three readers, one quantization"
    assert len(nodes_of(gm, DEQUANT_STUB)) == 2, "x itself is handed out as it came"


def test_several_outputs_of_one_value_share_a_stub() -> None:
    gm = placed(lambda m, x: (lambda y: {"a": y, "b": [y], "c": y.tanh()})(x.relu())).gm
    assert len(nodes_of(gm, DEQUANT_STUB)) == 2


def test_islands_have_reasons_with_their_lines() -> None:
    result = run_passes(island(), x(), STUBS)
    reasons = {info(node).site: info(node).float_reason for node in result.gm.graph.nodes if info(node).float_reason}
    assert list(reasons) == ["_generated_cummax_0"]
    assert reasons["_generated_cummax_0"] == "no integer form of torch.cummax is known"
    (note,) = [note for note in graph_info(result.gm).notes if note.startswith("float:")]
    assert "_generated_cummax_0" in note


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m, x: torch.cummax(x, -1).values, "cummax"),
        (lambda m, x: x.prod(1), "fits no accumulator"),
        (lambda m, x: x[x > 0].sum(), "shape of its result depends on the values"),
        (lambda m, x: torch.masked_select(x, x > 0).sum(), "shape of its result depends on the values"),
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], "indices"),
        (lambda m, x: x.mean(dim=0), "batch"),
        (lambda m, x: x.mean(1, dtype=torch.float64), "float64"),
    ],
    ids=["cummax", "prod", "mask as index", "masked_select", "indices", "batch mean", "dtype"],
)
def test_why_an_operator_stays_float(forward: Callable[..., object], words: str) -> None:
    gm = placed(forward).gm
    reasons = [info(node).float_reason or "" for node in gm.graph.nodes]
    assert any(words in reason for reason in reasons), reasons


def test_reading_a_shape_needs_no_stub() -> None:
    gm = placed(lambda m, x: x.relu().reshape(x.relu().shape[0], -1)).gm
    assert len(nodes_of(gm, DEQUANT_STUB)) == 1


def test_integer_inputs_stay_integers() -> None:
    model = Forward(lambda m, ids, x: m.table(ids) + x, table=nn.Embedding(10, 6))
    example = (torch.randint(0, 4, (2, 3)), torch.randn(2, 3, 6))
    gm = run_passes(model, example, STUBS).gm
    (stubbed, _) = (node.all_input_nodes[0] for node in nodes_of(gm, QUANT_STUB))
    assert info(stubbed).op.name != "input", "the embedding is a float island, its result is quantized"


# --- stubs of the user ---------------------------------------------------------------------------------------------


def test_stubs_of_the_user_are_borders() -> None:
    def forward(m, x):
        y = m.quant((x * 2).relu())
        y = m.conv(y)
        return (m.dequant(y) * 3).relu()

    model = Forward(forward, quant=QuantStub(), conv=nn.Conv2d(4, 4, 1), dequant=DeQuantStub())
    gm = run_passes(model, x(), STUBS).gm
    assert sites(gm, QUANT_STUB) == ["quant"], "nothing is quantized before the stub"
    assert sites(gm, DEQUANT_STUB) == ["dequant"], "nor after the other"
    reasons = [info(node).float_reason for node in gm.graph.nodes if info(node).float_reason]
    assert sum("before the model's own QuantStub" in reason for reason in reasons) == 2
    assert sum("after the model's own DeQuantStub" in reason for reason in reasons) == 2


def test_a_fixed_scale_of_the_user_is_kept() -> None:
    gm = placed(lambda m, x: m.quant(x).relu(), quant=QuantStub(scale=0.125)).gm
    (stub,) = nodes_of(gm, QUANT_STUB)
    assert gm.get_submodule(str(stub.target)).scale == 0.125


def test_one_of_two_inputs_has_a_stub() -> None:
    """The other input meets codes, so it gets one too: an operator never reads codes and reals."""
    model = Forward(lambda m, x, y: m.quant(x) + y, quant=QuantStub())
    gm = run_passes(model, (x(), x()), STUBS).gm
    assert sites(gm, QUANT_STUB) == ["quant", "inputs_1.quant"]


def test_stubs_of_torch_are_understood() -> None:
    """Models written for torch's own eager quantization carry its stubs."""
    from torch.ao.quantization import DeQuantStub as TorchDeQuantStub
    from torch.ao.quantization import QuantStub as TorchQuantStub

    model = Forward(lambda m, x: m.dq(m.q(x * 2).relu()), q=TorchQuantStub(), dq=TorchDeQuantStub())
    gm = run_passes(model, x(), STUBS).gm
    assert sites(gm, QUANT_STUB) == ["q"]
    assert sites(gm, DEQUANT_STUB) == ["dq"]
