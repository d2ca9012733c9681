"""`base`: a target file that says only in what it differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgraph.errors import TargetError
from qgraph.numerics import qint8, qint32
from qgraph.targets import Target, get_target, lint_target, load_target, parse_target
from tests.targets.test_parse import SMALL

CHILD = """
name = "child"
base = "small.toml"

[arithmetic]
"add.sum" = "int32:wrap/float:half_up"
"linear.product" = "int32:wrap/float:floor"

[[ops]]
names = ["linear", "relu"]
unit = "wide"
legal = ["int8, int8 -> int8"]

[units.wide]
int8 = 32
"""


def child(folder: Path, old: str = "", new: str = "", base: str = SMALL) -> Target:
    assert old in CHILD
    (folder / "small.toml").write_text(base, encoding="utf-8")
    (folder / "child.toml").write_text(CHILD.replace(old, new, 1), encoding="utf-8")
    return load_target(folder / "child.toml")


def test_tables_are_merged_and_operators_replaced(tmp_path: Path) -> None:
    target, base = child(tmp_path), parse_target(SMALL, origin="small.toml")
    assert (target.name, target.description) == ("child", "for tests")
    assert str(target.step("sum", "add")) == "int32:wrap/float:half_up"
    assert str(target.step("product", "linear")) == "int32:wrap/float:floor"
    assert target.step("product") == base.step("product")
    assert target.units == {**base.units, "wide": {"int8": 32}}
    assert target.memories == base.memories
    linear, conv = target.rule("linear"), target.rule("conv2d")
    assert linear is not None
    assert conv == base.rule("conv2d")
    assert linear.unit == "wide"
    assert not linear.accepts([qint8, qint8], qint32)
    assert set(target.ops) == {"conv2d", "add", "linear", "relu"}


def test_a_base_may_have_a_base(tmp_path: Path) -> None:
    child(tmp_path)
    (tmp_path / "deeper").mkdir()
    file = tmp_path / "deeper" / "grandchild.toml"
    file.write_text('name = "grandchild"\nbase = "../child.toml"\n[fusion]\nresidual = false', encoding="utf-8")
    target = load_target(file)
    assert target.name == "grandchild"
    assert target.residual is False
    assert str(target.step("sum", "add")) == "int32:wrap/float:half_up"


def test_a_built_in_target_is_a_base() -> None:
    target = parse_target('name = "mine"\nbase = "bpu"\n[memory]\nclock_hz = 5e8', origin="text")
    assert target.clock_hz == 5e8
    assert target.ops == get_target("bpu").ops


@pytest.mark.parametrize(
    ("old", "new", "base", "words"),
    [
        ('base = "small.toml"', "base = 3", SMALL, ["base is 3", "child.toml"]),
        ('base = "small.toml"', 'base = "bup"', SMALL, ["no target is named 'bup'", "child.toml", "bpu"]),
        ('base = "small.toml"', 'base = "none.toml"', SMALL, ["none.toml cannot be read", "child.toml"]),
        ('name = "child"\n', "", SMALL, ["lacks 'name'", "child.toml"]),
        ('unit = "wide"', 'unit = "wied"', SMALL, ["'wied' is not described", "child.toml", "number 1"]),
        ("half_up", "half_down", SMALL, ["half_down", "child.toml"]),
        ("", "", SMALL.replace("bytes = 1e9", "bytes = 0"), ["bytes is 0", "small.toml"]),
        ("", "", SMALL.replace("[fusion]", "[fision]"), ["fision", "small.toml"]),
        ("", "", SMALL.replace("[fusion]", "[fusion"), ["not TOML", "small.toml"]),
    ],
)
def test_mistakes_are_reported_with_their_file(tmp_path: Path, old: str, new: str, base: str, words: list[str]) -> None:
    with pytest.raises(TargetError) as raised:
        child(tmp_path, old, new, base)
    message = str(raised.value)
    for word in words:
        assert word in message
    assert ("child.toml" in message) != ("small.toml" in words)


def test_circles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="its own base") as raised:
        child(tmp_path, base=SMALL.replace('name = "small"', 'name = "small"\nbase = "child.toml"'))
    assert "small.toml" in str(raised.value)
    assert "child.toml" in str(raised.value)


REMOVING = """
name = "less"
base = "bpu"
remove = ["int16", "tanh"]
"""


def test_operators_and_formats_of_the_base_can_be_removed() -> None:
    less, bpu = parse_target(REMOVING, origin="less.toml"), get_target("bpu")
    assert less.rule("tanh") is None
    assert set(less.activations) == {"int8"}
    assert {str(f) for rule in less.ops.values() for line in rule.legal for f in line.results} <= {"int8", "int32"}
    assert all("int16" not in name for rates in less.units.values() for name in rates)
    assert set(less.ops) < set(bpu.ops)
    assert lint_target(less) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"tanh"', '"tanhh"', "did you mean 'tanh'"),
        ('"int16", "tanh"', '"uint8"', "remove names 'uint8'"),
        ('["int16", "tanh"]', '"tanh"', "give a list"),
        ('base = "bpu"', "", "there is no base"),
    ],
)
def test_removing_what_is_not_there(old: str, new: str, words: str) -> None:
    with pytest.raises(TargetError) as raised:
        parse_target(REMOVING.replace(old, new), origin="less.toml")
    assert words in str(raised.value)


def test_a_step_of_a_removed_operator_goes_with_it(tmp_path: Path) -> None:
    assert "add.sum" in child(tmp_path).arithmetic
    (tmp_path / "least.toml").write_text('name = "least"\nbase = "small.toml"\nremove = ["add"]\n', encoding="utf-8")
    least = load_target(tmp_path / "least.toml")
    assert least.rule("add") is None
    assert "add.sum" not in least.arithmetic
