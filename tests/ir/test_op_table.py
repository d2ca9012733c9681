"""The op table: every spelling finds its operator, and new operators are checked."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.decompose_composites import _RULES
from passes.decompose_layers import _RULES as _LAYER_RULES
from qgraph.errors import UserError
from qgraph.ir.op import Op, OpKind, OpTable, QuantRule, Spelling
from qgraph.ir.op_table import ADD, CONV2D, OPS, RELU, RESHAPE, SOFTMAX
from qgraph.lowering import LOWERINGS
from qgraph.targets import get_target


@pytest.mark.parametrize("function", [torch.add, operator.add, operator.iadd, torch.ops.aten.add.Tensor])
def test_functions(function: object) -> None:
    found = OPS.function(function)
    assert found is not None
    assert found[0] is ADD


def test_in_place_spellings_are_marked() -> None:
    assert OPS.method("add_")[2] is True
    assert OPS.method("add")[2] is False
    assert OPS.function(torch.relu_) == (RELU, Spelling(), True)


def test_only_exact_classes_match() -> None:
    class MyConv(nn.Conv2d):
        pass

    assert OPS.module(nn.Conv2d) is CONV2D
    assert OPS.module(MyConv) is None


def test_unhashable_and_unknown_targets_are_no_operators() -> None:
    class Unhashable:
        __hash__ = None

        def __call__(self) -> None: ...

    assert OPS.function(Unhashable()) is None
    assert OPS.function(torch.linalg.norm) is None
    assert OPS.method("no_such_method") is None


def test_names_are_found_with_close_matches() -> None:
    assert OPS.named("softmax") is SOFTMAX
    with pytest.raises(UserError, match="softmax"):
        OPS.named("softmx")


def make(name: str, **more: object) -> Op:
    return Op(
        name=name, kind=OpKind.TABLE, signature=inspect.signature(lambda input: None), operands=("input",), **more
    )


def test_names_and_spellings_are_taken_once() -> None:
    table = OpTable()
    table.define(make("one", target=torch.erf, methods={"erf": Spelling()}))
    with pytest.raises(UserError, match="'one' is defined"):
        table.define(make("one"))
    with pytest.raises(UserError, match="means 'one' already"):
        table.define(make("two", functions={torch.erf: Spelling()}))


def test_every_operator_names_parts_that_exist() -> None:
    for op in OPS:
        assert op.lowering is None or op.lowering in LOWERINGS, op
        assert op.decomposition is None or op.decomposition in {**_RULES, **_LAYER_RULES}, op
        assert (op.scalar_function is not None) == (op.lowering in ("table", "steps")), op
        assert set(op.operands) <= set(op.signature.parameters), op
        assert set(op.parameters) <= set(op.operands), op


def test_every_operator_with_a_lowering_is_on_the_default_target_and_back() -> None:
    """A lowering nobody can reach, or an operator the target promises and nobody lowers, is a mistake.

    The default target takes softmax apart; others run it as it is.
    """
    target = get_target("bpu")
    lowered = {op.name for op in OPS if op.lowering is not None}
    assert lowered - target.ops.keys() <= {"dequant_stub", "identity", "softmax"}
    assert target.ops.keys() - lowered <= {"item", "requantize"}


def test_operators_are_their_own_copies() -> None:
    import copy

    assert copy.deepcopy(RESHAPE) is RESHAPE


@pytest.mark.parametrize("op", [op for op in OPS if op.quant is QuantRule.SAME], ids=str)
def test_operators_that_keep_the_scale_have_a_first_operand(op: Op) -> None:
    assert op.operands


def test_spelled_functions_of_torch_are_what_they_seem() -> None:
    assert OPS.function(F.relu)[0] is RELU
    assert OPS.function(F.conv2d)[0] is CONV2D


def test_operands_are_parameters() -> None:
    wrong = Op("half", OpKind.TABLE, inspect.signature(lambda x: None), operands=("input",))
    with pytest.raises(UserError, match="'half' has no parameter 'input'"):
        OpTable().define(wrong)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lowering": "table"}, "quant says that it has no integer form"),
        ({"lowering": "table", "quant": QuantRule.OWN, "operands": ()}, "no operands"),
        ({"signature": len}, "signature"),
        ({"modules": [nn.Mish]}, "modules of the operator 'one' is a list"),
        ({"functions": (torch.sinc,)}, "functions of the operator 'one' is a tuple"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(fields: dict[str, Any], words: str) -> None:
    table, entry = OpTable(), make("one", target=torch.erf)
    with pytest.raises(UserError, match=words):
        table.define(dataclasses.replace(entry, **fields))
    table.define(entry)  # nothing of the refused one was kept
