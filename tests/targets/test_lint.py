"""The linter: built-in targets are clean, and every rule finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from passes.decompose_composites import _RULES
from qgraph.errors import TargetError
from qgraph.targets import Severity, get_target, lint_target, parse_target
from qgraph.targets.find import BUILT_IN
from qgraph.targets.lint import COMPOSITE_STEPS, LINT_RULES
from tests.targets.test_parse import SMALL

CLEAN = (
    SMALL.replace('names = ["add"]', 'names = ["add", "quant_stub"]')
    .replace('"int8|int16, int8 -> int8|int32", "float16, float16 -> float16"', '"int8, int8 -> int8|int32"')
    .replace("int16 = 1024\n", "")
)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_targets_are_clean(name: str) -> None:
    found = lint_target(get_target(name))
    islands = [finding for finding in found if "stays in float" in finding.what]
    if name == "bpu":
        assert islands == [], "the default target takes all composites apart"
    assert [finding for finding in found if finding not in islands] == []


def test_the_small_target_is_clean() -> None:
    assert lint_target(parse_target(CLEAN, origin="clean.toml")) == []


@pytest.mark.parametrize(
    ("old", "new", "severity", "words"),
    [
        ('"int8 -> int8"', '"int8 -> int8|int16"', "error", ["results in int16", "[activations]"]),
        ('"int8, int8 -> int8|int32"', '"int8, int16 -> int8"', "error", ["weights in int16", "[weights]"]),
        (
            '\nint8 = "symmetric"\n',
            '\nint8 = "symmetric"\nuint8 = "symmetric"\n',
            "error",
            ["uint8 cannot be symmetric"],
        ),
        ('int8 = "symmetric_narrow"', 'int8 = "affine"', "error", ["symmetric weights only"]),
        ('eight_bits = "int8"', 'eight_bits = "int4"', "error", ["eight_bits is int4"]),
        ('["add", "quant_stub"]', '["add"]', "error", ["nothing can enter the device"]),
        ('\nint8 = "symmetric"\n', '\nint8 = "symmetric"\nint16 = "symmetric"\n', "warning", ["results in int16"]),
        ('int8 = "full"', 'int8 = "full"\nint16 = 1024', "warning", ["no operator reads int16"]),
        ('"add", "quant_stub"', '"add", "quant_stub", "cast"', "warning", ["nothing takes cast to integers"]),
        ('"add", "quant_stub"', '"add", "quant_stub", "sigmoid"', "", []),
        ('int8 = "full"', "", "", []),
        ('legal = ["int8 -> int8"]', 'legal = ["int8 -> int8", "int8 -> int8"]', "warning", ["part of another one"]),
        ('"add", "quant_stub"', '"add", "quant_stub", "amax", "sub", "exp", "sum", "mul"', "warning", ["reciprocal"]),
        ('"int8*int8" = 64', '"int16*int8" = 64', "error", ["no rate for int8*int8", "[units.tensor]"]),
        ("[units.vector]", "[units.table]\nint8 = 1\n\n[units.vector]", "warning", ["no operator runs there"]),
        ("bytes = 1e6", "bytes = 1e12", "error", ["larger than ddr"]),
        ("bytes_per_cycle = 8", "bytes_per_cycle = 1", "error", ["slower than ddr"]),
        ('"add.sum" = "int32:wrap/float:half_even"', '"add.sum" = "int32:wrap/gemmlowp"', "error", ["single products"]),
        (
            'product = "int32:wrap/fixed_point:24:half_even"',
            'product = "int32:wrap/mlas_add"',
            "error",
            ["rescales none"],
        ),
        (
            '\nsum = "int32:wrap/fixed_point:24:half_even"',
            '\nsum = "int32:wrap/mlas_add"',
            "error",
            ["residual is true"],
        ),
        ('product = "int32', 'product = "int12', "error", ["has 15 bits, the accumulator 12"]),
    ],
)
def test_every_rule_finds_its_fault(old: str, new: str, severity: str, words: list[str]) -> None:
    assert old in CLEAN
    findings = lint_target(parse_target(CLEAN.replace(old, new, 1), origin="broken.toml"))
    assert (not findings) == (not severity), findings
    text = "\n".join(map(str, findings))
    assert text.startswith(severity)
    for word in words:
        assert word in text


def test_functions_without_tables_are_found() -> None:
    text = CLEAN.replace('"add", "quant_stub"', '"add", "quant_stub", "sigmoid"').replace('int8 = "full"', "")
    findings = lint_target(parse_target(text, origin="broken.toml"))
    assert [finding.severity for finding in findings] == [Severity.ERROR]
    assert "sigmoid reads int8" in findings[0].what


def test_files_that_cannot_be_understood_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(CLEAN.replace("[fusion]", "[fusoin]"), encoding="utf-8")
    (finding,) = lint_target(path)
    assert (finding.severity, finding.where) == (Severity.ERROR, str(path))
    assert "did you mean 'fusion'" in finding.fix
    (missing,) = lint_target(tmp_path / "none.toml")
    assert "cannot be read" in missing.what


@pytest.mark.parametrize("name", BUILT_IN)
def test_names_mean_what_they_mean_to_get_target(name: str) -> None:
    assert lint_target(name) == lint_target(get_target(name))


def test_paths_may_be_text(tmp_path: Path) -> None:
    path = tmp_path / "clean.toml"
    path.write_text(CLEAN, encoding="utf-8")
    assert lint_target(str(path)) == lint_target(path) == []


def test_neither_name_nor_path_nor_target() -> None:
    with pytest.raises(TargetError) as raised:
        lint_target("bpx")
    assert all(word in str(raised.value) for word in ("no target is named 'bpx'", "did you mean 'bpu'", ".toml"))
    with pytest.raises(TargetError, match="cannot be of type int"):
        lint_target(3)


def test_the_steps_of_composites_are_those_of_the_pass() -> None:
    for name, steps in COMPOSITE_STEPS.items():
        assert set(steps) == {op.name for op in _RULES[name].steps}


def test_every_rule_says_what_it_is_for_or_is_named_for_it() -> None:
    assert len({rule.__name__ for rule in LINT_RULES}) == len(LINT_RULES)


def test_a_step_that_nothing_asks_for_is_a_warning() -> None:
    text = CLEAN.replace("[arithmetic]", '[arithmetic]\n"add.sume" = "int32:wrap/float:floor"')
    (finding,) = lint_target(parse_target(text, origin="clean.toml"))
    assert finding.severity is Severity.WARNING
    assert "add.sume: qgraph has no step 'sume' (did you mean 'sum' or 'sample'?)" in str(finding)
